"""How far windows reach by lot or by audits, first states that learn, steps without a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tbptt_ckpt.schedule import Roulette

from .carriers import LANES, carried
from .case import Case, Dice, Reach
from .oracle import mapped


def by_lot(dice: Dice) -> Case:
    """Truncation by lot: the length is the result's, which must follow from its survival."""
    k1 = dice.randint(1, 4)
    k2 = dice.choice((k1, None, *(k1 + dice.randint(1, 9) for _ in range(4))))
    survival = dice.choice((1.0, 0.5, 0.8, [0.9, 0.4], [0.3, 0.6, 0.9]))
    window = {"steps": dice.randint(4, 14), "k1": k1, "k2": k2}
    case = carried(dice, window=window)
    is_stale = case.options["overlap"] == "stale"
    every = dice.choice((None, None, k1, 2 * k1, 1 if not is_stale else k1))
    case.options["truncation"] = Roulette(survival, every=every, seed=dice.randrange(99))
    if k2 is not None and k2 <= k1:
        case.refused, case.names = "new steps are always reached", ("truncation",)
    given = survival if isinstance(survival, list) else [survival]

    def reach(result: Any, window: tuple[int, int, int]) -> Reach:
        start, new, _ = window
        borders = list(range(new, start, -(every or k1)))
        reached = [b for b in borders if b > result.start]
        crossed = dict(zip(reached, [*given, *given[-1:] * len(reached)], strict=False))
        expected = torch.tensor(list(crossed.values())).prod()
        assert result.start in (start, *borders)
        assert abs(result.survival - expected) < 1e-12
        first = result.start if is_stale else start
        return Reach(first=first, start=result.start, divisors=crossed)

    case.reach = reach
    return case


def by_audits(dice: Dice) -> Case:
    """`k2="auto"`: with the k2 that each result says, windows begin at an update point."""
    k1, units = dice.randint(1, 4), dice.randint(2, 5)
    steps = k1 * dice.randint(6, 24) + dice.randrange(k1)
    options: dict[str, Any] = {"executor": "replay", "max_k2": k1 * units, "loss": "new"}
    case = carried(dice, window={"steps": steps, "k1": k1, "k2": "auto"}, options=options)
    if dice.maybe(0.15):
        case.refused, case.names = "a window could not begin at an update point", ("max_k2",)
        case.options["max_k2"] = dice.choice((k1, k1 * units * 2 + 1)) if k1 > 1 else 1
    elif dice.maybe(0.1):
        case.refused, case.names = "one graph has no borders to audit", ("k2", "executor")
        case.options["executor"] = "checkpoint"

    def reach(result: Any, window: tuple[int, int, int]) -> Reach:
        chosen, (_, _, stop) = result.chosen_k2, window
        assert k1 <= chosen.k2 <= k1 * units
        start = max(0, -(-(stop - chosen.k2) // k1) * k1)
        return Reach(first=start, start=start)

    case.reach = reach
    return case


def learned_start(dice: Dice) -> Case:
    """A first state that learns, through step 0 and through lanes that begin anew."""
    case = carried(dice, options={"overlap": dice.choice(("refresh", "refresh", "stale"))})
    zeros, seed = case.start, dice.torch_seed

    def start() -> Any:
        drawn = torch.Generator().manual_seed(seed)
        return mapped(lambda s: nn.Parameter(torch.randn(s.shape, generator=drawn)), zeros())

    case.start = start
    if dice.maybe(0.4):
        case.source = "tensors"
        case.resets = torch.rand(case.num_steps, LANES) < 0.1
    return case


def resets(dice: Dice) -> Case:
    """Lanes, or all of them, begin anew in the middle."""
    case = carried(dice, source="tensors")
    steps = case.num_steps
    case.resets = torch.rand(steps, LANES) < dice.choice((0.05, 0.2))
    if dice.maybe(0.3):
        case.resets = torch.rand(steps) < 0.2
    if dice.maybe(0.3):
        case.weight = (torch.rand(steps) < 0.7).double()
    return case


def without_targets(dice: Dice) -> Case:
    """A stream some of whose steps have None as their target, whole windows too."""
    case = carried(dice, source="stream", options={"overlap": "refresh"})
    case.weight = (torch.rand(case.num_steps) > dice.choice((0.2, 0.6, 0.9))).double()
    return case


def from_the_start(dice: Dice) -> Case:
    """`k2=None`: every window differentiates all that was."""
    window = {"steps": dice.randint(3, 12), "k1": dice.randint(1, 5), "k2": None}
    return carried(dice, window=window)


KINDS = {
    "windows.by_lot": by_lot,
    "windows.by_audits": by_audits,
    "windows.learned_start": learned_start,
    "windows.resets": resets,
    "windows.without_targets": without_targets,
    "windows.from_the_start": from_the_start,
}
