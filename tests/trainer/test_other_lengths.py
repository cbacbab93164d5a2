"""A run that goes on to another `max_steps` is one that had it from the start, or says why not.

What a window starts from is kept when earlier windows pass it, and which windows there will be
depends on where the run ends.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from training_jobs import Stream

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence, Trainer

STEPS = 13
REACHES = [(3, 5), (3, 2), (2, 7), (3, None), (4, 6), (1, 3), (3, 3)]


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TensorSequence(*cases.random_data(STEPS)),
    "stream": lambda: Stream(STEPS),
    "list": lambda: list(zip(*cases.random_data(STEPS), strict=True)),
}


def build(source: str, overlap: str, reach: tuple[int, int | None], max_steps: int) -> Trainer:
    torch.manual_seed(5)
    module = cases.TanhCell().double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    engine = TBPTT(
        module, nn.functional.mse_loss, *reach, optimizer, overlap=overlap, strategy="retain"
    )
    return Trainer(engine, SOURCES[source](), epochs=None, max_steps=max_steps)


def run(trainer: Trainer) -> Iterator[tuple[Any, ...]]:
    for window in trainer.windows():
        weights = [p.detach().clone() for p in trainer.tbptt.parts.parameters]
        yield trainer.num_steps, window.start, window.stop, float(window.loss), weights


def is_same(some: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """To rounding: a state that is kept for another end cuts a sum of losses elsewhere."""
    weights = zip(some[-1], other[-1], strict=True)
    close = partial(torch.allclose, rtol=1e-10, atol=1e-12)
    return some[:3] == other[:3] and all(itertools.starmap(close, weights))


def lengths(last: int) -> list[tuple[int, int]]:
    return [pair for pair in itertools.product(range(1, last), repeat=2) if pair[0] != pair[1]]


def check(source: str, overlap: str, reach: tuple[int, int | None], pairs: Any) -> tuple[int, int]:
    """How often a run went on, and how often it was refused."""
    whole = {last: list(run(build(source, overlap, reach, last))) for last in {b for _, b in pairs}}
    went_on = refused = 0
    for first, last in pairs:
        trainer = build(source, overlap, reach, first)
        states = [copy.deepcopy(trainer.state_dict())]
        states += [copy.deepcopy(trainer.state_dict()) for _ in run(trainer)]
        done = list(run(build(source, overlap, reach, first)))
        list(run(trainer))
        for count, state in enumerate([*states, trainer.state_dict()]):
            resumed = build(source, overlap, reach, last)
            before = [p.detach().clone() for p in resumed.tbptt.parts.parameters]
            where = (source, overlap, reach, first, last, count)
            try:
                resumed.load_state_dict(state)
            except ArgumentError:
                refused += 1
                assert resumed.num_steps == 0
                after = resumed.tbptt.parts.parameters
                assert all(itertools.starmap(torch.equal, zip(before, after, strict=True))), where
                continue
            went_on += 1
            windows = [*done[:count], *run(resumed)]
            assert len(windows) == len(whole[last]), where
            assert all(itertools.starmap(is_same, zip(windows, whole[last], strict=True))), where
    return went_on, refused


@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("source", SOURCES)
def test_another_end_is_right_or_refused(source: str, overlap: str) -> None:
    for number, reach in enumerate(REACHES[:3]):
        went_on, refused = check(source, overlap, reach, lengths(12)[number::61])
        assert went_on
        assert refused


@pytest.mark.exhaustive
@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_other_end_is_right_or_refused(
    source: str, overlap: str, reach: tuple[int, int | None]
) -> None:
    went_on, refused = check(source, overlap, reach, lengths(12))
    assert went_on > 100
    assert refused > 100


@pytest.mark.parametrize("max_steps", [103, 110])
def test_the_error_says_where_to_go_on(max_steps: int) -> None:
    """Once a raw `KeyError: 93`, once a run that went on silently from a window cut short."""
    inputs, targets = cases.random_data(200)
    for first, saved_at in ((100, 100), (103, 103), (103, 100)):
        if first == max_steps:
            continue
        trainer = build_long(inputs, targets, first)
        for _ in trainer.windows():
            if trainer.num_steps == saved_at:
                state = copy.deepcopy(trainer.state_dict())
        with_more = build_long(inputs, targets, max_steps)
        if (first, max_steps) == (100, 110):
            with_more.load_state_dict(state)
            continue
        words = f"cannot go on from step {saved_at}: .*multiple of k1=5"
        with pytest.raises(ArgumentError, match=words):
            with_more.load_state_dict(state)


def build_long(inputs: Tensor, targets: Tensor, max_steps: int) -> Trainer:
    torch.manual_seed(5)
    module = cases.TanhCell().double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    engine = TBPTT(module, nn.functional.mse_loss, 5, 10, optimizer, strategy="retain")
    source = TensorSequence(inputs, targets)
    return Trainer(engine, source, epochs=None, max_steps=max_steps)
