"""Segment modules whose random numbers depend on where their calls are cut.

Two draws in one call, such as those of an `nn.LSTM` of three layers with dropout, take turns once a
call: cut in two, each step gets other numbers. Then no replay is the run that it repeats, unless
every call that has a step is cut alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, pairwise

from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.fingerprint import step_difference
from tbptt_ckpt.executor.guard import advancing
from tbptt_ckpt.executor.observer import UNOBSERVED
from tbptt_ckpt.executor.sinks import Sink
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.hooks import silent_hooks
from tbptt_ckpt.module.inside import name_of
from tbptt_ckpt.module.trees import Tree, copy_containers, tensors_of

_PAIRS = 8  # of steps that are run in one call and in two

Call = tuple[int, int]  # the steps [start, stop)


class CallCuts:
    """Looks at how the calls of a segment module were cut, where it draws random numbers."""

    def __init__(self) -> None:
        self._matter: bool | None = None  # None until calls were cut differently

    def check(
        self, window: WindowPass, first: Boundary, before: AmbientState, after: AmbientState
    ) -> None:
        """Look at the calls of a window that has run from `first`.

        `before` and `after` are what the first run of its new steps found and left.

        Raises:
            ReplayMismatchError: A step was in calls that were cut differently, and the module
                draws other numbers then.
        """
        crossing = next(_crossing(window.calls), None)
        if crossing is None or self._matter is False or before.digest() == after.digest():
            return
        difference = _largest_difference(window, first)
        self._matter = self._matter or difference > 0.0
        if self._matter:
            one, other = crossing
            raise ReplayMismatchError(
                f"module={name_of(window.runner.recurrence.module)} draws random numbers that "
                "depend on where its calls are cut, as nn.LSTM(num_layers=3, dropout=0.5) does, "
                f"and steps [{one[0]}, {one[1]}) and [{other[0]}, {other[1]}) were each run in "
                "one call; cut all calls alike with a k2 that is a multiple of k1 and "
                "strategy='retain', or 'uniform:L' for an L that divides k1, or draw step by "
                "step: a module of one step, such as nn.LSTMCell with nn.Dropout in between",
                start=other[0],
                stop=min(one[1], other[1]),
                difference=difference,
            )


def _crossing(calls: Iterable[Call]) -> Iterator[tuple[Call, Call]]:
    """Calls that share steps and are not the same."""
    return ((one, other) for one, other in pairwise(sorted(calls)) if other[0] < one[1])


def _largest_difference(window: WindowPass, first: Boundary) -> float:
    """How much steps differ when they run in one call and in two, from the same state; 0 if not."""
    window = replace(
        window,
        observer=UNOBSERVED,
        note=UNOBSERVED.arrives,
        calls=set(),
        stops_at=(),
        joints={},
        ambients={},
    )
    in_half, largest = window.runner.is_in_half(first.state), 0.0
    for step in range(first.step, min(window.stop - 1, first.step + 2 * _PAIRS), 2):
        whole, parts = (
            _run(window, first, step, step + 2),
            _run(window, first, step, step + 1, step + 2),
        )
        difference, is_rounding = step_difference(whole, parts, in_half=in_half)
        largest = largest if is_rounding else max(largest, difference)
        first = window.advance(first, step + 2, 2, _Steps())
    return largest


def _run(window: WindowPass, boundary: Boundary, *cuts: int) -> Tree:
    """Outputs and state of steps that run in calls cut there."""
    sink = _Steps()
    window.ambient.restore(boundary.ambient)
    with advancing(), silent_hooks():
        state = copy_containers(boundary.state)
        for begin, end in pairwise(cuts):
            state = window.run(begin, end, state, sink)
    return sink.outputs, state


class _Steps(Sink):
    """Keeps the outputs of each step."""

    def take_segment(self, outputs: Tree, targets: Tree, block: StepBlock, time_dim: int) -> None:
        steps: list[tuple[Tensor, ...]] = [t.unbind(time_dim) for t in tensors_of(outputs)]
        self.outputs += chain.from_iterable(zip(*steps, strict=True))
