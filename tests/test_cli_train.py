"""`tbptt-ckpt train`: what it takes, what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import skip_unless_torch_runs_lstm
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence, tbptt_windows
from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.bytes.corpus import ByteLanes
from tbptt_ckpt.cli.bytes.models import build_model
from tbptt_ckpt.cli.bytes.score import bits_per_byte, byte_loss
from tbptt_ckpt.cli.progress import figures
from tbptt_ckpt.cli.train import command as train_command
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.job import run_training_job
from tbptt_ckpt.cli.train.outcome import Progress
from tbptt_ckpt.cli.train.window_memory import fullest_window
from tbptt_ckpt.errors import ArgumentError

FACTORIES = '''
import torch
from torch import nn


class Counter(nn.Module):
    """One step of a small recurrence, with a first state of its own."""

    def __init__(self, vocab_size, hidden, layers=1):
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocab_size, 8)
        self.cell = nn.GRUCell(8, hidden)
        self.readout = nn.Linear(hidden, vocab_size)

    def init_state(self, lanes):
        return torch.zeros(lanes, self.hidden)

    def forward(self, symbols, state):
        state = self.cell(self.embedding(symbols), state)
        return self.readout(state), state


class Segments(nn.Module):
    per_step = False

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 8)
        self.recurrent = nn.RNN(8, 8)
        self.readout = nn.Linear(8, 256)

    def forward(self, symbols, state):
        outputs, state = self.recurrent(self.embedding(symbols), state)
        return self.readout(outputs), state


def everything(**offered):
    assert sorted(offered) == ["hidden", "layers", "vocab_size"]
    return Counter(offered["vocab_size"], offered["hidden"])


def greedy(vocab_size, depth):
    return Counter(vocab_size, depth)


def broken():
    raise RuntimeError("no such\\nluck")


class Frozen(Segments):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class StateOnly(Segments):
    def forward(self, symbols, state):
        return super().forward(symbols, state)[1]


class Narrow(Segments):
    def forward(self, symbols, state):
        outputs, state = super().forward(symbols, state)
        return outputs[..., :7], state


class Crashing(Segments):
    def forward(self, symbols, state):
        raise KeyError("weights")


class Exploding(Segments):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, symbols, state):
        outputs, state = super().forward(symbols, state)
        return outputs * self.scale.square().exp(), state


class Uncopied(Segments):
    def __deepcopy__(self, memo):
        raise TypeError("one of a kind")


class Nested:
    factory = Segments


number = 3
text = dict
'''


@pytest.fixture
def text(tmp_path):
    """A file of 8,000 bytes that repeats a stretch of 40; pairs of bytes tell little about it."""
    stretch = np.random.default_rng(3).choice(np.frombuffer(b"abcd", np.uint8), 40)
    path = tmp_path / "text"
    path.write_bytes(stretch.tobytes() * 200)
    return path


@pytest.fixture
def small(text):
    """Options of a run that takes a moment."""
    return (
        f"train --data {text} --device cpu --hidden 8 --lanes 4 "
        "--k1 8 --k2 16 --strategy uniform:4 --max-steps 64"
    ).split()


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """The name of a module in the current directory, outside the package."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def outcome_of(capsys, arguments):
    """The JSON object that the command prints."""
    code = main([*arguments, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.count("\n") == 1
    return json.loads(printed.out)


def refusal_of(capsys, arguments):
    """The one line that the command prints when it refuses."""
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("tbptt-ckpt: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


class TestOptions:
    def test_without_options_the_defaults_are_used(self, monkeypatch, capsys):
        assert self.asked_for(monkeypatch, capsys, ["train"]) == TrainingConfig()

    def test_the_defaults_are_the_documented_job(self):
        config = TrainingConfig()
        assert (config.model, config.hidden, config.layers, config.lanes) == ("lstm", 192, 1, 32)
        assert (config.k1, config.k2, config.strategy) == (64, 128, "uniform:32")
        assert (config.overlap, config.executor, config.lr) == ("refresh", "replay", 4e-3)
        config.check()

    def test_every_option_arrives(self, monkeypatch, capsys):
        words = (
            "train --data d --model gru --hidden 2 --layers 3 --lanes 4 --k1 5 --k2 6 "
            "--strategy sqrt --overlap stale --executor checkpoint --lr 0.5 --max-steps 7 "
            "--seed 8 --device cpu --dtype float64 --save s --force"
        )
        assert self.asked_for(monkeypatch, capsys, words.split()) == TrainingConfig(
            data=Path("d"),
            model="gru",
            hidden=2,
            layers=3,
            lanes=4,
            k1=5,
            k2=6,
            strategy="sqrt",
            overlap="stale",
            executor="checkpoint",
            lr=0.5,
            max_steps=7,
            seed=8,
            device="cpu",
            dtype="float64",
            save=Path("s"),
            force=True,
        )

    def test_a_budget_asks_for_the_fastest_plan_within_it(self, monkeypatch, capsys):
        config = self.asked_for(monkeypatch, capsys, ["train", "--budget", "200MiB"])
        assert (config.strategy, config.memory_budget()) == ("optimal", "200MiB")
        words = ["train", "--budget", "0.5", "--strategy", "uniform:8"]
        config = self.asked_for(monkeypatch, capsys, words)
        assert (config.strategy, config.memory_budget()) == ("uniform:8", 0.5)

    def test_k2_none_reaches_back_to_the_start(self, monkeypatch, capsys):
        assert self.asked_for(monkeypatch, capsys, ["train", "--k2", "none"]).k2 is None

    def asked_for(self, monkeypatch, capsys, arguments):
        asked = []

        def record(config, watch):
            asked.append(config)
            raise ArgumentError("recorded")

        monkeypatch.setattr(train_command, "run_training_job", record)
        assert main(arguments) == 2
        capsys.readouterr()
        return asked[0]


class TestReport:
    def test_the_json_object_says_what_was_done(self, capsys, small, text):
        outcome = outcome_of(capsys, small)
        assert outcome["config"]["data"] == str(text)
        assert outcome["config"]["save"] is None
        assert outcome["device"] == "cpu"
        assert outcome["num_train_bytes"] == 7_600
        assert outcome["bits_per_byte"]["num_bytes"] == 396  # 399 // 4 steps of 4 lanes
        work = outcome["work"]
        assert (work["num_steps"], work["num_windows"], work["num_passes"]) == (64, 8, 1)
        # The first window advances 4 of 8 steps; the other seven run 12 + 16 for 8 new ones.
        assert work["recomputed_steps_per_step"] == pytest.approx((4 + 7 * 20) / 64)
        assert work["mean_drift"] > 0
        assert work["steps_per_second"] == pytest.approx(64 / work["seconds"])

    def test_memory_is_measured_and_retaining_takes_more(self, capsys, small):
        memory = outcome_of(capsys, [*small, "--k2", "64", "--max-steps", "128"])["memory"]
        assert memory["window_steps"] == 64
        assert memory["retained_is_measured"]
        assert 0 < memory["peak_bytes"] < memory["retained_peak_bytes"]
        assert 0 < memory["rss_before_bytes"] <= memory["rss_peak_bytes"]

    def test_retaining_as_strategy_takes_what_retaining_takes(self, small):
        # In a process of its own: the run's peak counts every live tensor of the process.
        command = [sys.executable, "-m", "tbptt_ckpt", *small, "--strategy", "retain", "--json"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        memory = json.loads(run.stdout)["memory"]
        assert memory["peak_bytes"] == pytest.approx(memory["retained_peak_bytes"], rel=0.02)

    @pytest.mark.parametrize("model", ["lstm", "lstmcell"])
    def test_extrapolated_peaks_are_near_measured_ones(self, capsys, small, monkeypatch, model):
        words = [*small, "--model", model, "--k1", "16", "--k2", "128", "--max-steps", "160"]
        measured = outcome_of(capsys, words)["memory"]
        monkeypatch.setattr("tbptt_ckpt.cli.train.window_memory._MOST_RETAINED_STEPS", 100)
        extrapolated = outcome_of(capsys, words)["memory"]
        assert measured["retained_is_measured"]
        assert not extrapolated["retained_is_measured"]
        assert extrapolated["retained_peak_bytes"] == pytest.approx(
            measured["retained_peak_bytes"], rel=0.05
        )

    def test_the_table_has_a_line_for_every_figure(self, capsys, small):
        assert main(small) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        for words in (
            "held-out bits per byte before",
            "held-out bits per byte after",
            "bigram table on the same 396 bytes",
            "windows",
            "time steps per lane",
            "recomputed steps per step",
            "peak tensor memory",
            "the same window of 16 steps retained",
            "resident memory",
        ):
            assert words in printed.out

    def test_the_bar_is_shown_on_a_terminal_and_leaves_stdout_alone(
        self, capsys, small, monkeypatch
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert json.loads(json.dumps(outcome_of(capsys, small)))["device"] == "cpu"

    def test_the_bar_shows_loss_speed_and_memory(self):
        progress = Progress("training", 5, 10, 1.25, 1234.5, 3 << 20)
        assert figures(progress) == "1.250 bits/byte  1,234 steps/s  3.0 MiB"
        assert figures(Progress("reading", 0, 10)) == ""

    def test_help_is_shown_without_a_command(self, capsys):
        assert main([]) == 0
        assert "train" in capsys.readouterr().out


class TestTraining:
    @pytest.mark.parametrize("model", ["lstm", "gru", "rnn", "lstmcell"])
    @pytest.mark.parametrize("layers", ["1", "2"])
    def test_every_built_in_model_learns(self, capsys, small, model, layers):
        words = [*small, "--model", model, "--layers", layers, "--lr", "0.02"]
        bits = outcome_of(capsys, words)["bits_per_byte"]
        assert bits["after"] < bits["before"] - 1

    @pytest.mark.parametrize(
        "words",
        [
            "--k2 none",
            "--k2 3",
            "--overlap stale",
            "--executor checkpoint",
            "--strategy revolve:3",
            "--strategy step",
            "--dtype float64",
            "--dtype bfloat16",
            "--dtype bfloat16 --model lstmcell",
            "--k1 100 --k2 100",
            "--budget 64MiB",
        ],
    )
    def test_every_way_to_train_learns(self, capsys, small, words):
        if words == "--dtype bfloat16":
            skip_unless_torch_runs_lstm(torch.bfloat16)
        outcome = outcome_of(capsys, [*small, *words.split()])
        assert outcome["bits_per_byte"]["after"] < outcome["bits_per_byte"]["before"]
        assert outcome["work"]["num_steps"] == 64
        assert math.isfinite(outcome["memory"]["retained_peak_bytes"])

    def test_strategies_change_memory_and_not_what_is_learned(self, capsys, small):
        words = [*small, "--model", "lstmcell", "--dtype", "float64"]
        bits = [
            outcome_of(capsys, [*words, "--strategy", strategy])["bits_per_byte"]["after"]
            for strategy in ("retain", "step", "uniform:5", "revolve:3")
        ]
        assert bits == pytest.approx([bits[0]] * 4, rel=1e-9)

    def test_a_trained_model_beats_the_bigram_table(self, capsys, text):
        bits = outcome_of(
            capsys,
            f"train --data {text} --device cpu --hidden 32 --lanes 4 --k1 16 --k2 32 "
            "--lr 0.01 --max-steps 3200".split(),
        )["bits_per_byte"]
        assert bits["after"] < 0.5 * bits["bigram"]
        assert bits["bigram"] < bits["before"]

    def test_steps_beyond_the_text_are_further_passes(self, capsys, small):
        # 7,600 bytes give 4 lanes of 1,899 steps.
        work = outcome_of(capsys, [*small, "--k1", "500", "--k2", "500", "--max-steps", "4000"])
        assert work["work"]["num_steps"] == 4_000
        assert work["work"]["num_passes"] == 3
        assert work["work"]["num_windows"] == 4 + 4 + 1

    def test_the_same_arguments_give_the_same_bytes(self, capsys, small, tmp_path):
        runs = []
        for name in ("first", "second"):
            path = tmp_path / name
            outcome = outcome_of(capsys, [*small, "--save", str(path)])
            runs.append((outcome["bits_per_byte"], path.read_bytes()))
        assert runs[0] == runs[1]
        assert outcome_of(capsys, [*small, "--seed", "1"])["bits_per_byte"] != runs[0][0]

    def test_lanes_feed_the_engine_as_the_same_tensors_do(self):
        data = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
        lanes = ByteLanes(data, 3)
        results = []
        for sequence in (lanes, TensorSequence(*lanes.read(0, len(lanes)))):
            torch.manual_seed(0)
            module = build_model("lstmcell", hidden=4, layers=1)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            tbptt = TBPTT(module, byte_loss, 8, 12, optimizer, strategy="uniform:5")
            losses = [w.loss.item() for w in tbptt.windows(sequence)]
            results.append((losses, *(p.tolist() for p in module.parameters())))
        assert results[0] == results[1]


class TestOwnModels:
    @pytest.mark.parametrize("factory", ["Counter", "Segments", "everything", "Nested.factory"])
    def test_a_factory_in_the_current_directory_is_found(self, capsys, small, factories, factory):
        outcome = outcome_of(capsys, [*small, "--model", f"{factories}:{factory}"])
        assert outcome["bits_per_byte"]["after"] < outcome["bits_per_byte"]["before"]

    def test_a_model_that_cannot_be_copied_is_trained_all_the_same(self, capsys, small, factories):
        words = [*small, "--model", f"{factories}:Uncopied"]
        assert outcome_of(capsys, words)["memory"]["retained_peak_bytes"] is None
        assert main(words) == 0
        assert "model cannot be copied" in capsys.readouterr().out

    def test_a_first_state_follows_the_weights(self, capsys, small, factories):
        words = [*small, "--model", f"{factories}:Counter", "--dtype", "float64"]
        assert outcome_of(capsys, words)["num_parameters"] > 0

    def test_an_installed_command_finds_it_too(self, small, factories, tmp_path):
        script = "import sys; sys.path.remove(''); from tbptt_ckpt.cli.app import main; "
        command = [sys.executable, "-c", script + "sys.exit(main())", *small, "--json"]
        run = subprocess.run(
            [*command, "--model", f"{factories}:Counter"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert json.loads(run.stdout)["work"]["num_windows"] == 8

    @pytest.mark.parametrize(
        ("factory", "expected"),
        [
            ("absent", "cannot be found: AttributeError"),
            ("greedy", "needs the argument 'depth'; offered are vocab_size, hidden, layers"),
            ("broken", "raised RuntimeError: no such luck"),
            ("number", "is int, not a factory to call"),
            ("text", "returned dict, not an nn.Module"),
            ("Frozen", "returned a module without trainable parameters"),
            ("StateOnly", "returned Tensor, not (logits, state)"),
            ("Narrow", "returned logits [2, 4, 7], not [2, 4, 256]"),
            ("Crashing", "raised KeyError: 'weights'"),
        ],
    )
    def test_a_factory_that_is_no_use_is_one_line(
        self, capsys, small, factories, factory, expected
    ):
        assert expected in refusal_of(capsys, [*small, "--model", f"{factories}:{factory}"])


class TestSaving:
    def test_saved_weights_load_into_the_same_model(self, capsys, small, tmp_path):
        path = tmp_path / "weights.pt"
        bits = outcome_of(capsys, [*small, "--save", str(path)])["bits_per_byte"]
        module = build_model("lstm", hidden=8, layers=1)
        module.load_state_dict(torch.load(path, weights_only=True))
        held_out = np.fromfile(tmp_path / "text", np.uint8)[7_600:]
        found = bits_per_byte(module, ByteLanes(held_out, 4), segment_steps=32)
        assert found == pytest.approx(bits["after"], rel=1e-6)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "weights.pt"]

    def test_a_file_is_replaced_only_by_force(self, capsys, small, tmp_path):
        path = tmp_path / "weights.pt"
        path.write_bytes(b"precious")
        message = refusal_of(capsys, [*small, "--save", str(path)])
        assert f"--save {path} exists; add --force" in message
        assert path.read_bytes() == b"precious"
        outcome_of(capsys, [*small, "--save", str(path), "--force"])
        assert torch.load(path, weights_only=True)

    def test_it_is_refused_before_training(self, small, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("tbptt_ckpt.cli.train.job._Job", None)  # calling it would raise
        (tmp_path / "there").touch()
        message = refusal_of(capsys, [*small, "--save", str(tmp_path / "there")])
        assert "there exists; add --force" in message

    def test_a_failed_write_leaves_the_old_file(self, small, tmp_path, monkeypatch, capsys):
        path = tmp_path / "weights.pt"
        path.write_bytes(b"precious")

        def fail(weights, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", fail)
        message = refusal_of(capsys, [*small, "--save", str(path), "--force"])
        assert "cannot be written: No space left on device" in message
        assert path.read_bytes() == b"precious"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "weights.pt"]


REFUSALS = [
    ("--lanes 0", "--lanes=0 must be an integer of at least 1"),
    ("--lanes 1000", "too short for --lanes 1000, which needs 20020"),
    ("--lanes two", "Invalid value for '--lanes'"),
    ("--hidden 0", "--hidden=0 must be an integer of at least 1"),
    ("--hidden 10000000", "out of memory; a smaller --hidden"),  # more than addresses reach
    ("--layers -1", "--layers=-1 must be an integer of at least 1"),
    ("--k1 0", "--k1=0 must be an integer of at least 1"),
    ("--k2 0", "--k2=0 must be an integer of at least 1, or none"),
    ("--k2 some", "--k2 some is neither a number of steps nor none"),
    ("--max-steps 0", "--max-steps=0 must be an integer of at least 1"),
    ("--lr 0", "--lr 0.0 must be above 0 and at most 1000.0"),
    ("--lr -1", "--lr -1.0 must be above 0 and at most 1000.0"),
    ("--lr nan", "--lr nan must be above 0 and at most 1000.0"),
    ("--lr inf", "--lr inf must be above 0 and at most 1000.0"),
    ("--lr 1e38", "--lr 1e+38 must be above 0 and at most 1000.0"),
    ("--seed -1", "--seed -1 must be in 0 to"),
    ("--budget much", "--budget much is neither a size such as 200MiB nor a fraction"),
    ("--budget 0", "--budget 0 is neither a size such as 200MiB nor a fraction"),
    ("--budget 1KiB", "memory_budget=1.0 KiB is below the"),
    ("--strategy best", "--strategy best is not one of auto, optimal, retain"),
    ("--strategy uniform", "--strategy uniform is not one of auto, optimal, retain"),
    ("--strategy revolve:0", "--strategy revolve:0 is not one of auto, optimal, retain"),
    ("--overlap twice", "--overlap twice is not one of refresh, stale"),
    ("--executor magic", "--executor magic is not one of replay, checkpoint"),
    ("--dtype float16", "--dtype float16 is not one of float32, float64, bfloat16"),
    ("--device tpu9", "--device tpu9 is no device"),
    ("--device meta", "--device meta is not on this machine"),
    ("--model transformer", "is neither lstm, gru, rnn or lstmcell, nor package.module:factory"),
    ("--model no_such_module:make", "cannot be found: ModuleNotFoundError"),
    ("--model torch.nn:Linear", "needs the argument 'in_features'"),
    ("--data nowhere", "--data nowhere does not exist"),
    ("--data .", "--data . is not a regular file"),
    ("--save nowhere/weights", "there is no directory nowhere"),
    ("--save .", "--save . is a directory"),
    ("--widht 3", "No such option: --widht"),
    ("--k1", "Option '--k1' requires an argument"),
    ("more", "unexpected extra argument"),
]


class TestRefusals:
    @pytest.mark.parametrize(("words", "expected"), REFUSALS)
    def test_bad_options_are_one_line(self, capsys, small, tmp_path, monkeypatch, words, expected):
        monkeypatch.chdir(tmp_path)
        assert expected in refusal_of(capsys, [*small, *words.split()])

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_cuda_without_cuda_is_one_line(self, capsys, small):
        message = refusal_of(capsys, [*small, "--device", "cuda"])
        assert "--device cuda is not on this machine, which has cpu" in message

    def test_weights_do_not_replace_the_text_they_are_learned_from(self, capsys, small, text):
        words = [*small, "--save", str(text), "--force"]
        assert "would replace the text of --data" in refusal_of(capsys, words)

    def test_short_and_empty_files_are_one_line(self, capsys, small, tmp_path):
        short = tmp_path / "short"
        short.write_bytes(b"x" * 99)
        message = refusal_of(capsys, [*small, "--data", str(short)])
        assert "has 99 bytes, too short for --lanes 4, which needs 100" in message
        short.write_bytes(b"")
        assert "is empty" in refusal_of(capsys, [*small, "--data", str(short)])

    def test_an_unknown_command_is_one_line(self, capsys):
        assert "No such command 'trian'" in refusal_of(capsys, ["trian"])

    def test_nothing_is_saved_of_a_run_that_diverged(self, capsys, small, factories, tmp_path):
        path = tmp_path / "weights"
        words = [*small, "--model", f"{factories}:Exploding", "--lr", "100"]
        message = refusal_of(capsys, [*words, "--save", str(path)])
        assert "window 1, steps 8 to 16: the loss is nan; nothing was updated" in message
        assert not path.exists()

    def test_an_interrupt_is_one_line_and_exit_code_130(self, small, factories, tmp_path):
        module = tmp_path / f"{factories}.py"
        module.write_text(
            FACTORIES + "\ndef begun():\n    open('begun', 'w').close()\n    return Segments()\n"
        )
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tbptt_ckpt", *small),
                *("--model", f"{factories}:begun", "--max-steps", "100000000"),
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Shells start what they put into the background deaf to it, tests included.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            while not (tmp_path / "begun").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            time.sleep(1.0)  # into the windows; earlier would do as well
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (130, "", "tbptt-ckpt: interrupted\n")


class TestEvaluation:
    class Remembering(nn.Module):
        """Dropout, a buffer that counts calls, and modes that differ."""

        per_step = True

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(256, 4)
            self.drop = nn.Dropout(0.5)
            self.frozen = nn.BatchNorm1d(4).eval()
            self.cell = nn.GRUCell(4, 6)
            self.readout = nn.Linear(6, 256)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, symbols, state):
            self.calls += 1
            noise = torch.rand(1)
            state = self.cell(self.drop(self.frozen(self.embedding(symbols))), state)
            return self.readout(state) + 0 * noise, state

    def test_it_leaves_everything_as_it_was(self):
        module = self.Remembering()
        source = ByteLanes(np.arange(50, dtype=np.uint8), 3)
        module.calls += 5
        before = {name: value.clone() for name, value in module.state_dict().items()}
        modes = [part.training for part in module.modules()]
        random = torch.get_rng_state()
        bits_per_byte(module, source, segment_steps=4)
        assert [part.training for part in module.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
        assert all(p.grad is None for p in module.parameters())

    @pytest.mark.parametrize("model", ["lstm", "lstmcell"])
    def test_it_equals_one_pass_whatever_the_segments(self, model):
        torch.manual_seed(0)
        module = build_model(model, hidden=6, layers=2).double()
        source = ByteLanes(np.random.default_rng(0).integers(0, 256, 90).astype(np.uint8), 3)
        inputs, targets = source.read(0, len(source))
        state, logits = None, []
        with torch.no_grad():
            for step in inputs:
                given = step if module.per_step else step[None]
                output, state = module(given, state)
                logits.append(output.reshape(3, 256))
        expected = float(byte_loss(torch.stack(logits), targets)) / math.log(2)
        for segment_steps in (1, 2, 7, 29, 100):
            found = bits_per_byte(module, source, segment_steps=segment_steps)
            assert found == pytest.approx(expected, rel=1e-12)

    def test_a_module_that_knows_nothing_needs_eight_bits(self):
        module = build_model("rnn", hidden=4, layers=1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        source = ByteLanes(np.arange(100, dtype=np.uint8), 3)
        assert bits_per_byte(module, source, segment_steps=8) == pytest.approx(8.0)


@pytest.mark.parametrize("k1", [1, 2, 3, 5])
@pytest.mark.parametrize("k2", [1, 2, 4, 9, None])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 30])
def test_the_metered_window_is_as_long_as_any(num_steps, k1, k2):
    windows = tbptt_windows(num_steps, k1, k2)
    longest = max(w.stop - w.first for w in windows)
    chosen = fullest_window(windows)
    assert windows[chosen].stop - windows[chosen].first == longest
    warm = [w.index for w in windows if w.stop - w.first == longest and w.index >= 2]
    assert not warm or chosen >= 2


def test_the_job_is_a_function_too(text):
    seen = []
    config = TrainingConfig(
        data=text, hidden=4, lanes=2, k1=8, k2=8, max_steps=24, device="cpu", strategy="retain"
    )
    outcome = run_training_job(config, seen.append)
    assert outcome.work.num_windows == 3
    assert [p.num_steps for p in seen if p.stage == "training"] == [8, 16, 24]
    assert all(p.memory_bytes > 0 for p in seen if p.stage == "training")
