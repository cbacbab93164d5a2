"""The benchmark of peers: they do the same work, and its verdicts follow from the figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from grids import later
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY))  # last: the installed package comes first

from benchmarks.peers import campaign  # noqa: E402
from benchmarks.peers.__main__ import main  # noqa: E402
from benchmarks.peers.campaign import Job, Records, rounds  # noqa: E402
from benchmarks.peers.entries import BASELINE, ENTRIES, OURS, Entry  # noqa: E402
from benchmarks.peers.forum import RewiredBPTT  # noqa: E402
from benchmarks.peers.summary import Row, over, verdicts  # noqa: E402
from benchmarks.peers.work import Size, make_work, relative_error  # noqa: E402

SIZE = Size(width=8, num_lanes=3, num_steps=150)
TORCH = [entry for entry in ENTRIES if not entry.needs]
MIB = 2**20


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    peer = BASELINE.make(make_work(SIZE))
    peer.run()
    return peer.gradients()


@pytest.mark.parametrize(
    "entry",
    [*TORCH[::4], *(later(entry) for entry in TORCH if entry not in TORCH[::4])],
    ids=lambda entry: entry.key,
)
@pytest.mark.filterwarnings("ignore")  # what torch says of itself as it traces
def test_peers_of_torch_give_the_gradient_of_plain_bptt(entry: Entry, expected) -> None:
    peer = entry.make(make_work(SIZE))
    peer.warm_up()
    assert peer.run() == pytest.approx(np.log(256), rel=0.2)
    assert relative_error(peer.gradients(), expected) < 1e-5
    assert peer.peak_bytes() > 0


def test_the_error_sees_a_wrong_gradient(expected) -> None:
    wrong = {**expected, "bias": expected["bias"] * 1.01}
    assert relative_error(wrong, expected) > 1e-4
    assert relative_error(expected, expected) == 0.0


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (1, 4), (2, 3), (3, 6), (6, 6)])
def test_the_forums_algorithm_repaired_gives_the_gradients_of_its_windows(k1: int, k2: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 5, dtype=torch.float64)
    inputs = torch.randn(6, 2, 2, dtype=torch.float64)
    targets = torch.randn(6, 2, 3, dtype=torch.float64)
    first = torch.zeros(2, 2, dtype=torch.float64)

    def step(x, state):
        both = linear(torch.cat([x, *state], 1))
        return both[:, :3], (both[:, 3:].tanh(),)

    RewiredBPTT(step, nn.functional.mse_loss, k1, k2).train(inputs, targets, (first,))
    found = linear.weight.grad.clone()

    linear.weight.grad = None
    for stop in range(k1, 7, k1):
        state, losses = (first,), []
        for t in range(stop):
            if t == max(0, stop - k2):
                state = tuple(part.detach() for part in state)
            output, state = step(inputs[t], state)
            losses.append(nn.functional.mse_loss(output, targets[t]))
        (torch.stack(losses[-k1:]).mean()).backward()
    torch.testing.assert_close(found, linear.weight.grad, rtol=1e-12, atol=0)


def test_rounds_begin_with_the_baseline_and_turn_round() -> None:
    entries = [ENTRIES[1], BASELINE, ENTRIES[2]]
    order = [(job.entry, job.number) for job in rounds(entries, [SIZE], 2)]
    there = [BASELINE.key, ENTRIES[1].key, ENTRIES[2].key]
    assert order == [(key, 0) for key in there] + [(key, 1) for key in reversed(there)]


def test_records_are_read_again(tmp_path: Path) -> None:
    job = Job(BASELINE.key, SIZE, "time", 1)
    Records(tmp_path).add(job, {"seconds": [1.5]})
    assert Records(tmp_path).results == {job: {"seconds": [1.5]}}


def test_who_takes_too_long_is_stopped_and_not_run_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(campaign, "_command", lambda *_: slow)
    records, later_size = Records(tmp_path), Size(8, 3, 151)
    jobs = [Job("scan", size, "time", k) for size in (SIZE, later_size) for k in range(2)]
    options = {"num_runs": 1, "threads": 1, "clock": campaign.Clock(None), "most_seconds": 0.05}
    assert campaign.run(jobs, records, **options)
    assert records.results == {job: {"error": "stopped after 0.05 s"} for job in jobs[::2]}


def _row(family: str, peak_bytes: int, seconds: float) -> Row:
    entry = Entry(f"{family}-{peak_bytes}", family, family, "")
    return Row(entry, SIZE, np.array([seconds, seconds]), peak_bytes, 0.0, 0.0)


def test_a_verdict_takes_our_fastest_within_the_peers_memory() -> None:
    ours = [_row(OURS, 5 * MIB, 2.0), _row(OURS, 10 * MIB, 1.0), _row(OURS, 11 * MIB, 0.1)]
    peers = [_row("a", 4 * MIB, 9.0), _row("b", 10 * MIB, 1.0), _row("c", 10 * MIB, 0.9)]
    found = verdicts([*ours, *peers])
    assert [verdict.ours for verdict in found] == [None, ours[1], ours[1]]
    assert [verdict.kept for verdict in found] == [False, True, False]
    assert over(peers[2], ours[0]).ratio == pytest.approx(2.0 / 0.9)


@pytest.mark.exhaustive
def test_one_command_measures_publishes_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, result = tmp_path / "records", tmp_path / "result.json"
    command = ["peers", "--quick", "--parts", "peaks", "times", "--only", "ours-cell-retain"]
    command += ["--threads", "1", "--records", str(records)]
    monkeypatch.chdir(REPOSITORY)  # measured processes find the benchmarks there
    monkeypatch.setattr(sys, "argv", command)
    main()
    written = (records / "records.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(result)])
    main()
    assert "ours, LSTMCell, retain" in capsys.readouterr().out
    assert (records / "records.jsonl").read_text() == written
    measured = json.loads(result.read_text())["measured"]
    assert {line["job"]["entry"] for line in measured} == {BASELINE.key, "ours-cell-retain"}
    assert "LSTMCell loop, plain BPTT" in result.with_suffix(".md").read_text()
