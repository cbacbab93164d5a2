"""`python -m benchmarks.models`: what is right, wrong, refused or broken is told apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks are no part of the package

from benchmarks.models.__main__ import main
from benchmarks.models.grid import Verdict, judged, ways
from benchmarks.models.model import Model, Wrapped
from benchmarks.models.of_torch import MODELS, Tied, zeros

ONE = ("uniform:5",)
NAMED = {model.name: model for model in MODELS}


def verdict(make: Any, plain: Any = None, **options: Any) -> Verdict:
    return judged(Model(name="", make=make, plain=plain, state=zeros, **options), ONE)


class Doubled(Wrapped):
    def forward(self, x: Tensor, h: Tensor) -> Any:
        y, h = self.inner(x, h)
        return 2 * y, h


class Broken(nn.Module):
    """Runs in the plain loop, and where each step has its graph (`executor="checkpoint"`)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied()

    def forward(self, x: Tensor, h: Tensor) -> Any:
        if not torch.is_grad_enabled():
            raise ZeroDivisionError("of the module's own")
        return self.inner(x, h)


@pytest.mark.parametrize("name", ["nn.LSTM, batch_first", "LSTM with layer norms and dropout"])
def test_gradients_of_the_plain_loop_are_exact(name: str) -> None:
    found = judged(NAMED[name], ONE)
    assert (found.text, found.lines, found.exact, found.runs) == ("exact", "0", 6, 6)
    assert found.worst < 1e-13


def test_a_wrapper_is_counted_and_another_gradient_is_wrong() -> None:
    found = verdict(lambda: Doubled(Tied()), Tied)
    assert found.text.startswith("WRONG: 6 x a gradient ")
    assert (found.lines, found.exact) == ("3", 0)


def test_errors_of_others_are_faults_and_those_of_the_package_are_refusals() -> None:
    assert verdict(Broken).text == "WRONG: 3 x ZeroDivisionError: of the module's own"
    assert verdict(lambda: nn.LSTM(4, 5, bidirectional=True), Tied).text.startswith(
        "refused: ArgumentError: module=nn.LSTM(bidirectional=True) reads the future"
    )


def test_what_the_plain_loop_does_not_run_either_is_no_fault() -> None:
    found = verdict(lambda: Doubled(nn.Linear(1, 1)))
    assert "the plain loop fails: TypeError" in found.text
    assert not found.faults


def test_a_run_without_an_error_where_the_plain_loop_has_one_is_wrong() -> None:
    assert verdict(Tied, lambda: Doubled(nn.Linear(1, 1))).text == "WRONG: 6 x a gradient nan off"


def test_numbers_that_follow_cuts_are_those_of_a_loop_with_such_cuts() -> None:
    found = judged(NAMED["nn.LSTM, 3 layers, dropout"], ("revolve:3",))
    assert (found.exact, found.runs, sum(found.refused.values())) == (3, 6, 3)


def test_every_way_is_one_row_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(ways(("retain", "64MiB")))) == 6 + 3
    assert main(["--only", "bidirectional, in a module", "--quick"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()[:3]
    assert header == "| model | library | lines written | result | exact runs | largest error |"
    assert row.startswith(
        f"| nn.LSTM, bidirectional, in a module | torch {torch.__version__} | 0 | refused: Argument"
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMED)
def test_no_model_of_torch_is_silently_wrong(name: str) -> None:
    assert not judged(NAMED[name]).faults
