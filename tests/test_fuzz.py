"""The fuzz itself is held to its word, and a part of its cases is run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz.case import Case
from fuzz.kinds_of_losses import KINDS as LOSS_KINDS
from fuzz.run import (
    EQUAL,
    KINDS,
    MISLABELLED,
    NAMED,
    REFUSED,
    UNNAMED,
    WRONG,
    case_of,
    main,
    run_case,
)
from fuzz.run import run_cases as run_all
from torch import nn


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


ROUND = len(KINDS)


@pytest.mark.times_the_module
@pytest.mark.parametrize("kind", KINDS)
def test_cases_of_each_kind_are_right(kind: str) -> None:
    place, is_brief = list(KINDS).index(kind), kind.startswith(("axes.", "hooks.", "replay."))
    account = run_all([place] if is_brief else [place, place + ROUND])
    assert not account.failures, "\n".join(account.lines())


@pytest.mark.exhaustive
@pytest.mark.times_the_module
@pytest.mark.parametrize("part", range(24))
def test_many_cases_are_right(part: int) -> None:
    account = run_all(range(part * 1000, (part + 1) * 1000))
    assert not account.failures, "\n".join(account.lines())


def test_labels_and_windows_are_as_many_of_each_sort_as_is_said() -> None:
    cases = [case_of(seed) for seed in range(4 * ROUND)]
    assert sum(case.is_legal for case in cases) > 0.6 * len(cases)
    assert set(Counter(case.kind for case in cases).values()) == {4}
    assert 24_000 // ROUND >= 300
    assert all(case.names or case.kind == "batch.written_row" for case in cases if case.refused)
    cases = [case for case in cases if isinstance(case.k2, int)]
    above = sum(case.k2 > case.k1 for case in cases)
    below = sum(case.k2 < case.k1 for case in cases)
    assert min(above, below, len(cases) - above - below) > 0.15 * len(cases)


def test_a_seed_is_the_case() -> None:
    seed = list(KINDS).index("replay.torch_random") + 3 * ROUND
    first, again = case_of(seed), case_of(seed)
    assert str(first) == str(again)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    for a, b in zip(first.make().parameters(), again.make().parameters(), strict=True):
        assert torch.equal(a, b)


def _plain() -> Case:
    return case_of(list(KINDS).index("loss.mean"))


def test_a_wrong_result_is_seen() -> None:
    case = _plain()
    assert run_case(case).outcome == EQUAL
    right = case.make

    def other() -> nn.Module:
        module = right()
        with torch.no_grad():
            next(module.parameters()).add_(1e-6)
        return module

    assert run_case(replace(case, make=other, reference=right)).outcome == WRONG


def test_a_legal_case_that_is_refused_is_seen() -> None:
    case = _plain()
    assert run_case(replace(case, options={**case.options, "reduction": "?"})).outcome == REFUSED


def test_a_refusal_must_name_what_it_refuses() -> None:
    case = replace(_plain(), refused="an own reduction", names=("reduction",))
    asked = {**case.options, "reduction": "?"}
    assert run_case(replace(case, options=asked)).outcome == NAMED
    assert run_case(replace(case, options=asked, names=("elsewhere",))).outcome == UNNAMED


def test_a_case_that_plain_torch_cannot_run_is_no_legal_one() -> None:
    def fails(module: Any, x: Any, state: Any) -> Any:
        raise RuntimeError("no")

    assert run_case(replace(_plain(), call=fails)).outcome == MISLABELLED


def test_the_command_prints_counts_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kind", "loss.pair", "--cases", "2"]) == 0
    printed = capsys.readouterr().out
    assert "loss.pair" in printed
    assert "2 cases, 2 legal" in printed


def test_every_room_of_kinds_is_run() -> None:
    assert set(LOSS_KINDS) <= set(KINDS)
    rooms = {kind.partition(".")[0] for kind in KINDS}
    older = {"loss", "replay", "hooks", "budget", "axes", "modules", "batch"}
    assert rooms == older | {"parts", "storage", "windows", "lanes"}
