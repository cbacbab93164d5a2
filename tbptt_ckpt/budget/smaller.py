"""The next smaller strategy, where memory was missing."""

from __future__ import annotations

import math

from tbptt_ckpt.schedule.plan import plan_window
from tbptt_ckpt.schedule.strategies import Revolve, Strategy, Uniform
from tbptt_ckpt.schedule.windows import Window

# Below a quarter of the square root of the window, uniform leaves need more for their first
# states than they save; several levels of few states take over.
_FEW_STATES = (16, 4, 1)


def smaller_strategy(strategy: Strategy, window: Window) -> Strategy | None:
    """The next strategy to try, or None where `strategy` takes the least there is.

    Leaves are halved, then states are kept at several levels; the gradient stays the same.
    """
    if isinstance(strategy, Revolve):
        fewer = [count for count in _FEW_STATES if count < strategy.num_states]
        return Revolve(fewer[0]) if fewer else None
    first, start, stop = window.first, window.start, window.stop
    leaf_steps = plan_window(strategy, first, start, stop).longest_leaf // 2
    if leaf_steps >= max(1, math.isqrt(stop - start) // 4):
        return Uniform(leaf_steps)
    return Revolve(_FEW_STATES[0])
