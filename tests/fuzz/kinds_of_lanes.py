"""Sequences of many lengths side by side, some lanes drawn anew, first steps without loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt import LaneSource, TensorSequence
from tbptt_ckpt.data import BurnIn

from .carriers import LANES, WIDTH, carried
from .case import Case, Dice

Sequence = tuple[Tensor, Tensor]


def _sequences(dice: Dice, shortest: int) -> list[Sequence]:
    lengths = [dice.randint(shortest, 9) for _ in range(dice.randint(LANES, 7))]
    return [(torch.randn(n, WIDTH), torch.randn(n, WIDTH)) for n in lengths]


def _held(read: Sequence, sequences: list[Sequence], lane: int) -> tuple[Tensor, Tensor, list[int]]:
    """A lane's weights and resets, and which sequences it holds, by comparing what was read."""
    x, y = read[0][:, lane], read[1][:, lane]
    weight, resets, numbers, at = torch.zeros(len(x)), torch.zeros(len(x)).bool(), [], 0
    while at < len(x) and bool(x[at].any()):
        number = next(i for i, (inputs, _) in enumerate(sequences) if torch.equal(inputs[0], x[at]))
        inputs, targets = sequences[number]
        stop = at + len(inputs)
        assert torch.equal(x[at:stop], inputs)
        assert torch.equal(y[at:stop], targets)
        weight[at:stop], resets[at] = 1.0, True
        numbers.append(number)
        at = stop
    return weight, resets, numbers


def _drawn(
    read: Sequence, sequences: list[Sequence], lane: int, steps: int
) -> tuple[Tensor, Tensor]:
    """The same of a lane of stretches, each of which must lie in a sequence."""
    x, resets = read[0][:, lane], torch.zeros(len(read[0])).bool()
    for at in range(0, len(x), steps):
        cut, resets[at] = x[at : at + steps], True
        places = ((s, i) for s, _ in sequences for i in range(len(s) - steps + 1))
        assert any(torch.equal(s[i : i + len(cut)], cut) for s, i in places)
    return torch.ones(len(x)), resets


def _laid_out(case: Case, sequences: list[Sequence], fresh: int, steps: int) -> None:
    """Give the case what the source reads, and weights and resets that are not asked of it."""
    source = case.data()
    read = source.read(0, len(source))
    case.inputs, case.targets = read
    lanes = [_held(read, sequences, lane) for lane in range(LANES - fresh)]
    assert sorted(n for _, _, held in lanes for n in held) == list(range(len(sequences)))
    further = [_drawn(read, sequences, lane, steps) for lane in range(LANES - fresh, LANES)]
    pairs = [(weight, resets) for weight, resets, _ in lanes] + further
    case.weight, case.resets = (torch.stack(each, 1) for each in zip(*pairs, strict=True))


def _lanes(dice: Dice, **given: Any) -> Case:
    steps = given.get("fresh_steps", 1)
    case = carried(dice)
    sequences = _sequences(dice, steps)
    seed = dice.choice((None, dice.randrange(99))) if not given else dice.randrange(99)

    def data() -> Any:
        made = [TensorSequence(x.clone(), y.clone()) for x, y in sequences]
        return LaneSource(made, LANES, seed=seed, **given)

    case.data = data
    _laid_out(case, sequences, given.get("fresh_lanes", 0), steps)
    return case


def side_by_side(dice: Dice) -> Case:
    """Every sequence once, in order or shuffled; a lane that ends takes the next."""
    return _lanes(dice)


def fresh(dice: Dice) -> Case:
    """Lanes that begin a stretch drawn anew every so many steps, beside others."""
    return _lanes(dice, fresh_lanes=dice.randint(1, 2), fresh_steps=dice.randint(1, 5))


def burn_in(dice: Dice) -> Case:
    """The first steps of each sequence without loss, over lanes or over tensors with resets."""
    number, plain = dice.randint(1, 4), dice.maybe(0.5)
    case = carried(dice, source="tensors") if plain else _lanes(dice)
    if plain:
        case.resets = torch.rand(case.num_steps, LANES) < 0.15
        case.weight = torch.ones(case.num_steps, LANES)
        x, y, given = case.inputs.clone(), case.targets.clone(), case.resets.clone()
        case.data = lambda: TensorSequence(x, y, resets=given)
    inner = case.data
    case.data = lambda: BurnIn(inner(), number)
    begins = case.resets.clone()
    begins[0] = True
    for step, lane in begins.nonzero().tolist():
        case.weight[step : step + number, lane] = 0.0
    return case


KINDS = {"lanes.side_by_side": side_by_side, "lanes.fresh": fresh, "lanes.burn_in": burn_in}
