"""What reading a window takes beside its steps is little, or counted: a budget holds then too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, BurnIn, InfeasibleBudgetError, LaneSource, TensorSequence
from tbptt_ckpt.data.blocks import StepBlock, true_rows
from tbptt_ckpt.data.source import checked_weight
from tbptt_ckpt.data.window_reader import WindowReader
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.memory import peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.recurrence import recognise

STEPS, LANES, K1, K2 = 140, 128, 20, 60  # many lanes of few features: weights are most of a step
CALLS = 5
INPUTS, TARGETS = torch.randn(STEPS, LANES, 2), torch.randn(STEPS, LANES, 2)


class Weighted:
    """Every read is new memory, with weights and resets of lanes."""

    dtype = torch.float64

    def __len__(self) -> int:
        return STEPS

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return INPUTS[start:stop].clone(), TARGETS[start:stop].clone()

    def weights(self, start: int, stop: int) -> Tensor:
        weights = torch.ones(stop - start, LANES, dtype=self.dtype)
        weights[::3, 1:5] = 0
        return weights

    def resets(self, start: int, stop: int) -> Tensor:
        resets = torch.zeros(stop - start, LANES, dtype=torch.bool)
        resets[(-start) % 7 :: 7, 3] = True
        return resets


class InHalf(Weighted):
    """The same with weights that have to be converted."""

    dtype = torch.float16


class Normalised(Weighted):
    """The same where what is read is computed, by a user who counts no bytes."""

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().read(start, stop)
        return ((inputs.double() - 1) / 2).sub(0.5).float(), targets


class Stream:
    """The same without a length."""

    def __init__(self, source: Weighted) -> None:
        self._source = source

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._source.read(start, stop)

    def weights(self, start: int, stop: int) -> Tensor:
        return self._source.weights(start, min(stop, STEPS))


def lanes(weight: Tensor | None = None) -> LaneSource:
    cut = [STEPS - lane // 2 for lane in range(LANES)]
    pairs = [(INPUTS[:n, lane], TARGETS[:n, lane], n) for lane, n in enumerate(cut)]
    found = [
        TensorSequence(x, y, weight=None if weight is None else torch.ones(n)) for x, y, n in pairs
    ]
    return LaneSource(found + found[: LANES // 2], lanes=LANES)


def steps() -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in zip(INPUTS, TARGETS, strict=True):
        yield x.double().sub(1).float(), y.clone()


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TensorSequence(
        INPUTS, TARGETS, weight=torch.ones(STEPS, LANES), resets=torch.rand(STEPS, LANES) < 0.001
    ),
    "weighted": Weighted,
    "in half": InHalf,
    "normalised": Normalised,
    "lanes": lanes,
    "weighted lanes": lambda: lanes(torch.ones(1)),
    "burn in": lambda: BurnIn(Weighted(), 3),
    "burn in of lanes": lambda: BurnIn(lanes(), 3),
    "stream": lambda: Stream(Normalised()),
    "generator": steps,
}
# Others are of the same kind.
NEXT_TO = ("in half", "normalised", "lanes", "burn in", "burn in of lanes", "stream")
MODULES: dict[str, Callable[[], nn.Module]] = {
    "cell": lambda: nn.LSTMCell(2, 2),
    "layer": lambda: nn.GRU(2, 2),
}


def run(module_name: str, source: Any, budget: int) -> list[int]:
    """The most that was live from each window's end to the next one's, reading included."""
    torch.manual_seed(0)
    module = MODULES[module_name]()
    optimizer = torch.optim.Adam(module.parameters())
    tbptt = TBPTT(module, nn.functional.mse_loss, K1, K2, optimizer, memory_budget=budget)
    base, found = tensor_bytes(module), []
    with peak_memory(held=module, rss=False) as around:
        for _ in islice(tbptt.windows(source), CALLS):
            found.append(base + around.lap().peak_bytes)
    return found


@pytest.mark.parametrize(
    ("source", "module"),
    [
        *((source, "cell") for source in SOURCES if source not in NEXT_TO),
        *(pytest.param(source, "cell", marks=pytest.mark.exhaustive) for source in NEXT_TO),
        ("lanes", "layer"),
    ],
)
def test_no_read_exceeds_the_smallest_budget(source: str, module: str) -> None:
    with pytest.raises(InfeasibleBudgetError) as refused:
        run(module, SOURCES[source](), 1)
    budget = refused.value.smallest_budget_bytes or 0
    found = run(module, SOURCES[source](), budget)
    assert max(found[1:]) <= budget, found  # one step is measured in any case
    if source != "tensors":  # which are the user's
        assert max(found[2:]) >= 0.85 * budget, "nothing is counted that nothing takes"


class Growing(Weighted):
    """One whose later reads take more."""

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        torch.zeros(1 + start * LANES * 100)
        return super().read(start, stop)


def test_later_reads_that_take_more_exceed_a_budget() -> None:
    found = run("cell", Growing(), 1_000_000)
    assert max(found[:3]) <= 1_000_000 < found[3]


def looked_at(source: Any) -> tuple[int, int, int]:
    """Bytes of a window's steps; taken beside them while they are read; and afterwards."""
    reader = WindowReader(source, K1, STEPS, recognise(nn.LSTMCell(2, 2), None))
    with peak_memory(held=(), rss=False) as memory:
        (block,) = reader.window(0, STEPS)
        read = memory.lap()
        resets = Resets([block])
        assert block.has_loss()
        block.weighs()
        assert resets.steps == [step for step in block.reset_steps() if step]
        look = memory.lap()
    return block.num_bytes(), read.peak_bytes - read.now_bytes, look.peak_bytes - read.now_bytes


@pytest.mark.parametrize("source", ["tensors", "lanes", "weighted lanes"])
def test_own_sources_take_next_to_nothing_beside_what_they_read(source: str) -> None:
    steps, beside, looking = looked_at(SOURCES[source]())
    assert max(beside, looking) < 0.02 * steps


def test_burn_in_takes_no_more_than_its_weights() -> None:
    _, beside, looking = looked_at(BurnIn(lanes(), 5))
    assert beside <= 1.2 * STEPS * LANES * 8
    assert looking < 0.02 * STEPS * LANES * 8


@pytest.mark.parametrize("shape", [(3000,), (3000, 7), (5, 3000)])
def test_what_is_looked_at_in_pieces_is_what_is_there(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, ones = torch.zeros(shape[0], 1), torch.ones(shape, dtype=torch.float64)
    flags = torch.rand(shape) < 0.01
    rows = flags.reshape(shape[0], -1).any(1).nonzero().flatten().tolist()
    assert true_rows(flags) == rows
    assert StepBlock(4, 4 + shape[0], x, x, None, 0, flags).reset_steps() == [4 + r for r in rows]
    assert not StepBlock(0, shape[0], x, x, ones, 0).weighs()
    assert not StepBlock(0, shape[0], x, x, 0 * ones, 0).has_loss()
    few = max(1, 1024 // ones[0].numel())
    for row in (
        row for row in {1, few - 1, few, few + 1, 2 * few, shape[0] - 1} if 0 < row < shape[0]
    ):
        later = ones.clone()
        later[row:] = 2.0  # at the seams of pieces too
        assert StepBlock(0, shape[0], x, x, later, 0).weighs()
    ones[-1:] = 0
    assert StepBlock(0, shape[0], x, x, ones, 0).has_loss()


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), -float("inf")])
def test_a_wrong_weight_is_found_in_any_piece(wrong: float) -> None:
    for row in (0, 1500, 2999):
        weight = torch.ones(3000, 3)
        assert checked_weight(weight, 3000) is not None
        weight[row, 1] = wrong
        with pytest.raises(ValueError, match="finite and not negative"):
            checked_weight(weight, 3000)
