"""`torchrun ... -m tbptt_ckpt train`: processes that share lanes, and say things once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tbptt_ckpt.cli.app import main

TEXT = b"it is what it is, and it was what it was. " * 200
MODEL = '''
import os, signal
from torch import nn


class Killed(nn.Module):
    """Killed on the second rank, in the first attempt, at its 30th call."""

    per_step = False

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.recurrent = nn.GRU(8, 8)
        self.readout = nn.Linear(8, vocab_size)
        self.calls = [0]

    def forward(self, symbols, state):
        self.calls[0] += self.training
        place = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
        if self.calls[0] == 30 and place == ("1", "0") and "KILLS" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        outputs, state = self.recurrent(self.embedding(symbols), state)
        return self.readout(outputs), state


def make(vocab_size):
    return Killed(vocab_size)
'''


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "mine.py").write_text(MODEL)
    return (
        f"train --data {tmp_path / 'text'} --device cpu --lanes 3 --k1 8 --k2 16 --max-steps 128 "
        f"--strategy uniform:4 --model {tmp_path / 'mine.py'}:make --json"
    ).split()


def on_ranks(words: list[str], *launch: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", *launch)
    return subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "tbptt_ckpt", *words],
        env=os.environ | env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def told(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command has said on the standard error, without what torchrun says."""
    return [line for line in result.stderr.splitlines() if line.startswith("tbptt-ckpt")]


def check_alike(path: Path, other: Path) -> None:
    found, expected = (torch.load(each) for each in (path, other))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.exhaustive
def test_two_ranks_print_once_and_end_with_the_weights_of_one_process(
    words: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert main([*words, "--save", str(tmp_path / "alone")]) == 0
    expected = json.loads(capsys.readouterr().out)
    saves = ["--snapshot-dir", str(tmp_path / "s"), "--snapshot-every", "24", "--resume"]
    first = on_ranks([*words, *saves, "--save", str(tmp_path / "two"), "--max-steps", "64"])
    assert (first.returncode, told(first)) == (0, []), first.stderr
    # One process takes it up, and others from there.
    assert main([*words, *saves, "--max-steps", "96"]) == 0
    capsys.readouterr()
    again = on_ranks([*words, *saves, "--save", str(tmp_path / "two"), "--force"])
    assert (again.returncode, told(again)) == (0, []), again.stderr
    for result in (first, again):
        (line,) = result.stdout.splitlines()
        outcome = json.loads(line)
        peaks = outcome["memory"]["peak_bytes_of_ranks"]
        assert (len(peaks), peaks[0]) == (2, outcome["memory"]["peak_bytes"])
        assert min(peaks) > 50_000  # weights, gradients and Adam's two, of 4,784 numbers
    check_alike(tmp_path / "two", tmp_path / "alone")
    for name in ("before", "after", "baseline"):
        assert outcome["scores"][name] == pytest.approx(expected["scores"][name], rel=1e-5)
    assert outcome["work"]["last_loss"] == pytest.approx(expected["work"]["last_loss"], rel=1e-5)
    lines = map(json.loads, (tmp_path / "s" / "events.jsonl").read_text().splitlines())
    steps = [line["steps"] for line in lines if line["event"] == "window"]
    assert steps == list(range(8, 129, 8))


@pytest.mark.exhaustive
def test_two_ranks_choose_the_reach_that_one_process_chooses(
    words: list[str], tmp_path: Path, capsys: Any
) -> None:
    words += ["--k2", "auto", "--max-k2", "32", "--max-steps", "256"]
    assert main([*words, "--save", str(tmp_path / "alone")]) == 0
    capsys.readouterr()
    result = on_ranks([*words, "--save", str(tmp_path / "two")])
    assert (result.returncode, told(result)) == (0, []), result.stderr
    check_alike(tmp_path / "two", tmp_path / "alone")


@pytest.mark.exhaustive
def test_a_killed_rank_is_started_again_and_goes_on(words: list[str], tmp_path: Path) -> None:
    results = []
    for name, env in (("whole", {}), ("killed", {"KILLS": "1"})):
        saves = ["--snapshot-dir", str(tmp_path / name), "--snapshot-every", "24", "--resume"]
        save = ["--save", str(tmp_path / f"{name}.pt")]
        results.append(on_ranks([*words, *saves, *save], "--max-restarts", "1", **env))
        assert results[-1].returncode == 0, results[-1].stderr[-3000:]
    assert "exitcode: -9) local_rank: 1" in results[1].stderr
    assert len(results[1].stdout.splitlines()) == 1
    found, expected = (torch.load(tmp_path / f"{name}.pt") for name in ("killed", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.exhaustive
def test_a_profile_says_what_the_others_held(words: list[str]) -> None:
    kept = [*words[1:7], *words[-3:]]  # data, device, lanes, model, json
    command = ["profile", "--k1", "8", "--k2", "16", "--strategy", "uniform:4", "--repeats", "1"]
    result = on_ranks([*command, *kept])
    assert (result.returncode, told(result)) == (0, []), result.stderr
    (line,) = result.stdout.splitlines()
    plain, cut = json.loads(line)["rows"]
    for row in (plain, cut):
        first, second = row["peak_bytes_of_ranks"]
        assert row["peak_bytes"] == first > second > 50_000  # of 2 lanes and of 1
    assert cut["peak_bytes"] < plain["peak_bytes"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--k2 auto --max-k2 4", "max_k2=4"),
        ("--lanes 1", "lanes=1 are too few for 2 ranks"),
        ("--lr 5000", "--lr 5000.0 must be above 0"),
        ("--k1 none", "--k1"),
    ],
)
def test_an_error_is_told_once(words: list[str], options: str, message: str) -> None:
    result = on_ranks([*words, *options.split()])
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = told(result)
    assert message in line
