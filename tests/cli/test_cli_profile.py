"""`tbptt-ckpt profile`: what it measures, prints, draws and writes, and how it refuses."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import devices
import pytest
import torch
from grids import later

from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.profiling import MemoryReport, StrategyReport
from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import BenchError, Configuration
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.profile import DEFAULT_STRATEGIES
from tbptt_ckpt.profiling.sweep import sweep
from tbptt_ckpt.schedule.plan import plan_window
from tbptt_ckpt.schedule.strategies import parse_strategy

SMALL = ["--hidden", "8", "--lanes", "2", "--k1", "4", "--k2", "12", "--repeats", "1"]
PLAIN = ["--strategy", "retain", "--time-batching", "false"]  # one row: plain BPTT
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One run of the command with everything it writes."""

    device: torch.device
    folder: Path
    printed: dict


STRATEGIES = ("revolve:3",)  # each row is a process that imports torch


@pytest.fixture(scope="module", params=devices.found(), ids=str)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    options = ["--strategy", ",".join(STRATEGIES), "--device", str(request.param)]
    options += ["--csv", str(folder / "rows.csv"), "--trace", str(folder / "trace.json")]
    if importlib.util.find_spec("matplotlib"):
        options += ["--plot", str(folder / "picture.png")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["profile", *SMALL, *options, "--json"]) == 0
    return Run(request.param, folder, json.loads(printed.getvalue()))


def test_rows_with_plain_bptt_first(run):
    rows = run.printed["rows"]
    assert [row["strategy"] for row in rows] == ["retain", *STRATEGIES]
    assert all(row["status"] == "ok" and row["device"] == str(run.device) for row in rows)
    assert rows[0]["ratio"] == 1.0
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)
    assert all(row["fixed_bytes"] < row["peak_bytes"] < row["rss_peak_bytes"] for row in rows)
    assert rows[0]["executed_steps_per_step"] == 1.0
    assert all(row["predicted_peak_bytes"] > row["fixed_bytes"] for row in rows)
    assert run.printed["environment"]["torch"] == torch.__version__
    assert run.printed["schema"] == 2
    assert run.printed["command"].startswith("tbptt-ckpt profile --")
    assert run.printed["what"] == "lstm, 2 lanes"
    for row in rows:
        assert row["seconds_range"][0] <= row["seconds"] <= row["seconds_range"][1]


def test_rows_in_json_are_a_report(run):
    report = StrategyReport.from_dict(run.printed)
    assert report.to_dict(traces=False) == run.printed


def test_rows_in_csv_are_those_in_json(run):
    with (run.folder / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for written, printed in zip(rows, run.printed["rows"], strict=True):
        assert written == {k: "" if v is None else str(v) for k, v in printed.items()}


NUMBER = (int, float)
FIELDS = {
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
    "X": {"name": str, "cat": str, "ts": NUMBER, "dur": NUMBER, "pid": int, "tid": int},
    "C": {"name": str, "ts": NUMBER, "pid": int, "args": dict},
}


def test_the_trace_is_in_the_trace_event_format(run):
    """The JSON object form: an array of events, each with its phase's fields, spans that nest."""
    trace = json.loads((run.folder / "trace.json").read_text())
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        fields = FIELDS[event["ph"]]
        assert all(isinstance(event[name], kind) for name, kind in fields.items()), event
        assert event.keys() <= {*fields, "ph", "args", "tid"}
        assert event.get("ts", 0) >= 0 <= event.get("dur", 0)
        if event["ph"] == "C":
            assert all(isinstance(value, NUMBER) for value in event["args"].values())
        if event["ph"] == "M":
            assert isinstance(event["args"]["name"], str)
    tracks = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert tracks <= named
    for track in tracks:
        spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
        check_nesting([e for e in spans if (e["pid"], e["tid"]) == track])


def check_nesting(spans):
    """Spans of a track lie beside or inside each other, to the nanosecond."""
    open_until = []
    for span in sorted(spans, key=lambda s: (s["ts"], -s["dur"])):
        begin, end = span["ts"], span["ts"] + span["dur"]
        while open_until and open_until[-1] <= begin + 1e-3:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 1e-3, span
        open_until.append(end)


def test_the_trace_has_one_span_for_every_action_of_the_schedule(run):
    events = json.loads((run.folder / "trace.json").read_text())["traceEvents"]
    for pid, strategy in enumerate(("retain", *STRATEGIES), 1):
        spans = [e for e in events if e["pid"] == pid and e.get("cat") == "action"]
        offset = min(e["args"]["start"] for e in spans)
        schedule = plan_window(parse_strategy(strategy), offset, offset, offset + 12).schedule
        expected = [
            (type(a).__name__.lower(), getattr(a, "start", None) or a.step) for a in schedule
        ]
        assert [(e["name"].split()[0], e["args"]["start"]) for e in spans] == expected
        passes = [e["name"] for e in events if e["pid"] == pid and e.get("cat") == "pass"]
        kinds = [kind for kind, _ in expected]
        assert passes.count("advance") == kinds.count("advance")
        assert passes.count("differentiate") == kinds.count("differentiate")
        assert passes.count("replay") + passes.count("first run") == kinds.count("differentiate")
        counters = [e for e in events if e["pid"] == pid and e["name"] == "tensor memory"]
        peak = run.printed["rows"][pid - 1]["peak_bytes"]
        assert max(e["args"]["bytes"] for e in counters) == peak


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_both_pictures_are_drawn(run):
    for name in ("picture.png", "picture-windows.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_overwritten_without_force(run, monkeypatch, capsys):
    monkeypatch.chdir(run.folder)
    before = (run.folder / "trace.json").read_bytes()
    assert main(["profile", *SMALL, "--trace", "trace.json"]) == 2
    assert "--trace trace.json exists; add --force to replace it" in capsys.readouterr().err
    assert (run.folder / "trace.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k1", "0"], "--k1=0 must be an integer of at least 1"),
        (["--k2", "8,none"], "--k2 8,none is no list of whole numbers"),
        (["--k1", ""], "--k1 names nothing"),
        (["--strategy", "retain,quick"], "--strategy quick is not one of"),
        (["--budget", "64MiB,lots"], "--budget='lots' is not a size"),
        (["--overlap", "fresh"], "'fresh' is not one of"),
        (["--executor", "quick"], "'quick' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--repeats", "0"], "--repeats=0 must be"),
        (["--plot", "picture.jpg"], "--plot picture.jpg must end in .png or .svg"),
        (["--csv", "nowhere/rows.csv"], "there is no directory nowhere"),
        (["--memory-history", "h.pickle"], "needs --device cuda"),
    ],
)
def test_options_that_cannot_work_are_one_line(options, message, capsys):
    assert main(["profile", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_without_cuda_is_one_line(capsys):
    assert main(["profile", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "tbptt-ckpt: --device cuda is not on this machine, which has cpu\n"
    )


MODELS = """
import torch
from torch import nn


class Counter(nn.Module):
    def __init__(self, vocab_size, hidden):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.cell = nn.GRUCell(8, hidden)
        self.readout = nn.Linear(hidden, vocab_size)

    def forward(self, symbols, state):
        print("this must not end up in the report")
        state = self.cell(self.embedding(symbols), state)
        return self.readout(state), state


class Signature(Counter):
    def forward(self, symbols):
        return super().forward(symbols, None)


class NoState(Counter):
    def forward(self, symbols, state):
        return super().forward(symbols, state)[0]


class Raising(Counter):
    def forward(self, symbols, state):
        if torch.is_grad_enabled():
            raise KeyError("a weight")
        return super().forward(symbols, state)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    file = tmp_path_factory.mktemp("models") / "my_models.py"
    file.write_text(MODELS)
    return file


def test_a_model_from_a_file_of_ones_own(models, capfd):
    assert main(["profile", *SMALL, "--model", f"{models}:Counter", *PLAIN, "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["rows"]  # nothing else was printed there
    assert row["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "message", "where"),
    [
        later("Signature", "it takes (symbols): too many", "_check_takes_state"),
        ("Raising", "raised KeyError: 'a weight'", 'raise KeyError("a weight")'),
        later("NoState", "returned a Tensor; it must return (output, state)", "split_result"),
        later("Missing", "cannot be found: AttributeError", "has no attribute 'Missing'"),
    ],
)
def test_mistakes_of_a_model_are_one_line_and_a_traceback_on_request(
    models, name, message, where, monkeypatch, capfd
):
    monkeypatch.chdir(models.parent)  # the way of package.module:factory
    options = [*SMALL, "--model", f"my_models:{name}", *PLAIN, "--traceback"]
    assert main(["profile", *options]) == 2
    printed = capfd.readouterr()
    assert not printed.out
    *traceback, line = printed.err.strip().splitlines()
    assert line.startswith("tbptt-ckpt: ")
    assert message in line
    assert "Traceback (most recent call last):" in traceback
    assert any(where in each for each in traceback)


def test_without_asking_there_is_no_traceback(models, capfd):
    assert main(["profile", *SMALL, "--model", f"{models}:NoState", *PLAIN]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if not line.startswith("this must not")]) == 1


class Killed:
    """Work whose making is the death of the process, as it is when memory runs out."""

    def __call__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Quitting:
    def __call__(self):
        os._exit(3)


@pytest.mark.parametrize(
    ("workload", "status", "message"),
    [
        (Killed(), "out of memory", "the system killed the process"),
        (Quitting(), "failed", "ended by itself with exit code 3"),
    ],
)
def test_a_process_that_dies_is_a_row_that_says_so(workload, status, message):
    configuration = Configuration(strategy="sqrt", k1=4, k2=8)
    with ProcessBench(workload, configuration) as bench, pytest.raises(BenchError) as caught:
        bench.ask(WindowBench.warm_up)
    assert caught.value.status == status
    assert message in caught.value.message


def test_a_table_names_what_is_measured_and_what_did_not_fit(capsys):
    rows = (
        MemoryReport(strategy="retain", k1=4, k2=8, status="out of memory", message="no room"),
        MemoryReport(
            strategy="sqrt",
            k1=4,
            k2=8,
            peak_bytes=5 * MIB,
            fixed_bytes=MIB,
            predicted_peak_bytes=6 * MIB,
            rss_peak_bytes=300 * MIB,
            seconds=0.5,
            window_steps=8,
            executed_steps=12,
            held_states=3,
        ),
    )
    printed = str(StrategyReport(rows))
    for text in ("tensor", "RSS", "out of memory", "5.0 MiB", "+20.0%", "1.50"):
        assert text in printed
    assert "retain, k1=4, k2=8: no room" in printed
    on_gpu = tuple(
        MemoryReport(
            strategy=row.strategy, k1=4, k2=8, device="cuda:0", peak_bytes=MIB,
            reserved_peak_bytes=2 * MIB, allocation_retries=1,
        )
        for row in rows
    )  # fmt: skip
    printed = StrategyReport(on_gpu).table()
    for text in ("allocated", "reserved", "retries"):
        assert text in printed
    assert "tensor" not in printed


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_table_fits_its_width_and_keeps_what_matters_most(width):
    row = MemoryReport(
        strategy="uniform:1024", k1=64, k2=512, budget_bytes=5 * MIB, peak_bytes=5 * MIB,
        fixed_bytes=MIB, predicted_peak_bytes=6 * MIB, rss_peak_bytes=300 * MIB, seconds=0.5,
        seconds_range=(0.4, 0.6), ratio=1.25, ratio_range=(1.2, 1.3), window_steps=8,
        executed_steps=12, held_states=3,
    )  # fmt: skip
    other = MemoryReport(strategy="auto", k1=64, k2=256, status="failed", message="no " * 60)
    lines = StrategyReport((row, other), {}, "mine.py:make").table(width).splitlines()
    assert max(map(len, lines[1:])) <= max(width, 52)
    text = "\n".join(lines)
    assert all(word in text for word in ("uniform:1024", "5.0 MiB", "0.500", "1.25", "failed"))
    assert ("1.20-1.30" in text) == (width >= 80)
    assert ("300.0 MiB" in text) == (width >= 200)


def test_what_the_command_measures_by_default_is_what_code_does():
    assert ProfileConfig().strategy == DEFAULT_STRATEGIES
    assert "auto" in DEFAULT_STRATEGIES


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_pictures_of_a_report_leave_the_backend_alone_and_name_every_mark():
    script = """
    import matplotlib
    matplotlib.use("svg")
    import sys
    from tbptt_ckpt.profiling import StrategyReport
    report = StrategyReport.from_json(sys.stdin.read())
    axes = report.plot()
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.get_backend() == "svg"
    import matplotlib.pyplot as plt
    _, mine = plt.subplots()
    assert report.plot(ax=mine) is mine
    print(axes.get_title(loc="left"))
    print(*axes.get_legend_handles_labels()[1], sep=";")
    """
    rows = [
        MemoryReport(
            strategy=s, k1=4, k2=8, peak_bytes=p * MIB, seconds=t, seconds_range=(t / 2, 2 * t),
            predicted_peak_bytes=p * MIB, ratio=t, ratio_range=(t / 2, 2 * t),
        )
        for s, p, t in (("retain", 9, 1.0), ("sqrt", 3, 1.5), ("step", 4, 2.0))
    ]  # fmt: skip
    versions = {"torch": "2.0", "tbptt_ckpt": "0.1", "threads": 2, "processor": "a chip"}
    report = StrategyReport(tuple(rows), versions, "lstm, 32 lanes")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=report.to_json(), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *title, marks = done.stdout.splitlines()
    assert title == [
        "lstm, 32 lanes, k1=4, k2=8, cpu",
        "torch 2.0, tbptt_ckpt 0.1, 2 threads, a chip",
    ]
    assert set(marks.split(";")) == {
        *("nothing is faster and smaller", "measured", "something is faster and smaller"),
        *("fastest to slowest repeat", "predicted peak"),
    }


REGION = """
    import json, sys, torch
    from torch import nn
    from tbptt_ckpt import TensorSequence
    from tbptt_ckpt.profiling.bench import WindowBench
    from tbptt_ckpt.profiling.configuration import Configuration
    from tbptt_ckpt.profiling.workload import Workload

    torch.manual_seed(0)
    data = TensorSequence(torch.randn(16, 192, 64), torch.randn(16, 192, 128))

    def bench(strategy):
        module = nn.LSTMCell(64, 128)
        work = Workload(
            module=module,
            loss_fn=nn.functional.mse_loss,
            source=data,
            optimizer=torch.optim.Adam(module.parameters()),
        )
        return WindowBench(work, Configuration(strategy=strategy, k1=16, k2=64))

    strategy = sys.argv[1]
    bench(strategy).time_window()  # what libraries take once is no matter here
"""
OURS = """
    report = bench(strategy).measure()
    print(json.dumps([report.peak_bytes, report.fixed_bytes]))
"""
MEMRAYS = """
    import memray
    with memray.Tracker(sys.argv[2]):
        measured = bench(strategy)
        measured.time_window()
    records = memray.FileReader(sys.argv[2]).get_high_watermark_allocation_records()
    print(json.dumps(sum(record.size for record in records)))
"""


@pytest.mark.exhaustive  # tests/memory/test_peak_elsewhere.py has one by default
@pytest.mark.skipif(not importlib.util.find_spec("memray"), reason="needs memray")
def test_peaks_agree_with_memray_within_five_percent(tmp_path):
    """memray counts every malloc from the making of the model on, autograd's nodes included."""
    peak, fixed = figures_of(REGION + OURS, "step")
    theirs = figures_of(REGION + MEMRAYS, "step", str(tmp_path / "records"))
    assert peak > 20 * MIB > fixed
    assert theirs == pytest.approx(peak, rel=0.05)


def figures_of(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ANSWERS = {
    WindowBench.warm_up: (1, 2),
    WindowBench.time_window: 0.5,
    WindowBench.measure: MemoryReport(strategy="?", k1=1, k2=1, peak_bytes=1),
}


class FakeBench:
    """Answers without measuring, or fails as it is told to."""

    def __init__(self, failure):
        self.failure = failure

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, request):
        if self.failure:
            raise BenchError(*self.failure)
        return ANSWERS[getattr(request, "func", request)]


def test_failing_rows_do_not_stop_a_sweep():
    failures = {
        "step": ("failed", "why"),
        "sqrt": ("over budget", "too much"),
        "retain": ("out of memory", "no room"),
    }
    rows = sweep(
        [Configuration(strategy=s, k1=1, k2=1) for s in ("step", "sqrt", "uniform:2")],
        lambda configuration: FakeBench(failures.get(configuration.strategy)),
        repeats=2,
    ).rows
    assert [(row.status, row.message) for row in rows] == [
        ("out of memory", "no room"),
        ("failed", "why"),
        ("over budget", "too much"),
        ("ok", None),
    ]
    assert rows[-1].ratio is None  # plain BPTT did not run
