"""How far back the gradient of some windows reaches: exactly, and finer where it matters.

A window is differentiated once for its gradient, and again to see at the beginning of each leaf
what is still missing of it. Where a tolerance lies between two of these, leaves become shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.arguments import AboveZero, Dimension, PositiveInt, checked
from tbptt_ckpt.engine.reach import TOLERANCE, Border, Decay, Reach
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.profiling.profile import make_work
from tbptt_ckpt.profiling.sweep import Progress, Watch, unwatched
from tbptt_ckpt.profiling.workload import EndlessSource, Workload
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep

_FIRST_LEAVES = 32  # of a window that is looked at for the first time
_PARTS, _LOOKS = 8, 4  # of what a tolerance lies in, and how often that is cut
_CLOSE = 0.02  # relative distance of two borders between which nothing is looked for

TOLERANCES = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredReach:
    """How far back the gradient of several windows reaches.

    Attributes:
        k1: Steps at each window's end that have a loss.
        k2: Steps of each window.
        decays: One for each window. Errors are exact, and relative to the norm of the window's own
            gradient or to the mean of all windows', whichever is larger.
    """

    k1: int
    k2: int
    decays: tuple[Decay, ...]

    @checked
    def reach(self, tolerance: AboveZero = TOLERANCE) -> Reach:
        """That of the window that reaches farthest.

        Args:
            tolerance: As for `Decay.reach`.

        Raises:
            ArgumentError: A tolerance that is no positive number.
        """
        found = [decay.reach(tolerance) for decay in self.decays]
        return max(found, key=lambda reach: (reach.within is None, reach.steps, reach.above))

    @checked
    def errors(self, every: PositiveInt | None = None) -> list[float]:
        """The largest at each border where a gradient may be stopped by lot: see `Decay.errors`.

        Args:
            every: As there.

        Raises:
            ArgumentError: No positive number.
        """
        return [max(each) for each in zip(*(d.errors(every) for d in self.decays), strict=True)]

    @property
    def growth(self) -> float | None:
        """The largest `Decay.growth`; above 1 a gradient grows with distance."""
        return max((d.growth for d in self.decays if d.growth is not None), default=None)


@checked
def measure_reach(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    init_state: Any = None,
    *,
    k1: PositiveInt,
    k2: PositiveInt,
    tolerances: Sequence[AboveZero] = TOLERANCES,
    windows: PositiveInt = 1,
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    **options: Any,
) -> MeasuredReach:
    """Measure how far back the gradient of windows of `k2` steps reaches, at today's weights.

    Exact where `WindowResult.reach` is a sketch, and takes each window two to five times, with 32
    states and a copy of the gradient. Nothing is learned: windows run on a copy of the module. It
    is said of these weights and data only: what training makes of them, windows show.

    Args:
        module: As for `TBPTT`.
        loss_fn: As for `TBPTT`.
        inputs: Nested tensors with time on `time_dim`, such as [T, B, F]; those that are too few
            are read over and over.
        targets: The same, such as [T, B].
        init_state: The state at the first step; the windows begin `k2` steps later, and more.
        k1: Steps between updates: those of a window that have a loss.
        k2: Steps to look back at most.
        tolerances: Relative errors around which is looked more closely.
        windows: How many, one after the other.
        per_step: As for `TBPTT`.
        time_dim: As for `run_window`.
        **options: `loss`, `reduction`, `clip_grad_norm` and `autocast_dtype`, as for `TBPTT`.

    Raises:
        ArgumentError: An argument that cannot work, or windows without a gradient.

    References:
        Aicher, Foti & Fox (2019), doi:10.48550/arXiv.1905.07473, who choose a truncation by how the
        norm of the gradient decays.
    """
    work = make_work(
        module, loss_fn, inputs, targets, init_state, None, per_step, time_dim, options
    )
    return reach_of(work, k1, k2, tolerances, windows)


def reach_of(
    work: Workload,
    k1: int,
    k2: int,
    tolerances: Sequence[float] = TOLERANCES,
    windows: int = 1,
    watch: Watch = unwatched,
    executor: Any = "replay",
) -> MeasuredReach:
    """The same of a workload, whose windows an executor of exact states runs."""
    if k2 < k1:
        raise ArgumentError(f"k2={k2} is below k1={k1}: every step of a window has a loss")
    mine = replace(work.copied(), optimizer=None, clip_grad_norm=None)
    found = []
    for number in range(1, windows + 1):
        watch(Progress("measuring gradients", number - 1, windows))
        stop = -(-k2 // k1) * k1 * (number + 1)
        with untouched(mine.module, mine.loss_fn) as start_over:
            looked_at = _Window(mine, k1, k2, stop, start_over, executor)
            if looked_at.norm:
                found.append((looked_at.norm, looked_at.decay(tolerances)))
    if not found:
        raise ArgumentError(
            f"windows={windows}: none of them has a finite gradient that is not zero; take data in "
            f"which the last {k1} steps of a window have a target"
        )
    mean = fmean(norm for norm, _ in found)
    decays = (_relative_to(max(norm, mean) / norm, decay) for norm, decay in found)
    return MeasuredReach(k1=k1, k2=k2, decays=tuple(decays))


class _Window:
    """The window that ends at `stop`; those before it run forward only.

    Attributes:
        norm: Of its gradient; 0.0 where it has none that is finite.
    """

    def __init__(
        self,
        work: Workload,
        k1: int,
        k2: int,
        stop: int,
        start_over: Callable[[], None],
        executor: Any,
    ) -> None:
        self._work, self._k1, self._k2, self._stop = work, k1, k2, stop
        self._start_over, self._executor = start_over, executor
        weights = self._run("sqrt", _Borders())
        self._whole = [w.grad.clone() if w.grad is not None else None for w in weights]
        norm = _norm_of(self._whole)
        self.norm = norm if math.isfinite(norm) else 0.0

    def decay(self, tolerances: Sequence[float]) -> Decay:
        """Look at it, more closely where tolerances lie."""
        step = -(-self._k2 // _FIRST_LEAVES)
        cuts = set(range(step, self._k2, step))
        for _ in range(_LOOKS):
            borders = _Borders(self._whole)
            self._run(partial(_leaves, frozenset(cuts)), borders)
            decay = self._decay_of(borders)
            more = {cut for each in tolerances for cut in _between(decay.reach(each))} - cuts
            if not more:
                break
            cuts |= more
        return decay

    def _decay_of(self, borders: _Borders) -> Decay:
        start = self._stop - self._k2
        found = [
            Border(self._stop - step, norm, missing / self.norm if step > start else 0.0)
            for step, (norm, missing) in borders.found.items()
        ]
        return Decay(tuple(found), self._k1)

    def _run(self, strategy: Any, borders: _Borders) -> list[Tensor]:
        self._start_over()
        how = {"strategy": strategy, "executor": self._executor, "observer": borders}
        tbptt = self._work.engine(self._k1, self._k2, **how)
        weights = borders.watch(tbptt)
        source = EndlessSource(self._work.source, self._stop - self._k1)
        for window in tbptt.windows(source, self._work.init_state):
            if window.stop >= self._stop:
                break
        return weights


class _Borders(Observer):
    """What is missing of a gradient at the borders of one window, and the state's own there.

    Attributes:
        found: By step, both norms; the first is None where the state's is not asked for.
    """

    def __init__(self, whole: Sequence[Tensor | None] = ()) -> None:
        self._whole, self._weights = whole, list[Tensor]()
        self.found: dict[int, tuple[float | None, float]] = {}

    def watch(self, tbptt: TBPTT) -> list[Tensor]:
        """Look at what this engine differentiates, and at the weights that are returned."""
        self._weights = tbptt.parts.weights()
        return self._weights

    def reaches(self, step: int, state_grads: Sequence[Tensor | None]) -> None:
        """Note both norms."""
        if not self._whole:
            return
        pairs = zip(self._whole, self._weights, strict=True)
        missing = [w if p.grad is None else w - p.grad for w, p in pairs if w is not None]
        is_known = any(grad is not None for grad in state_grads)
        self.found[step] = (_norm_of(state_grads) if is_known else None, _norm_of(missing))


def _leaves(cuts: Collection[int], start: int, stop: int) -> list[Action]:
    """The actions of leaves that begin so many steps before the window's end."""
    edges = [start, *sorted(stop - cut for cut in cuts if cut < stop - start), stop]
    actions = list[Action]()
    for before, after in pairwise(edges[:-1]):
        actions += [Advance(before, after), Keep(after)]
    for before, after in list(pairwise(edges))[::-1]:
        actions.append(Differentiate(before, after))
        if before != start:
            actions.append(Drop(before))
    return actions


def _between(reach: Reach) -> Iterator[int]:
    """Places to look at between two borders, unless they are close."""
    distance = reach.steps - reach.above
    if distance > max(1, _CLOSE * reach.steps):
        step = -(-distance // _PARTS)
        yield from range(reach.above + step, reach.steps, step)


def _norm_of(tensors: Sequence[Tensor | None]) -> float:
    """The norm of all together, those that are None aside."""
    dense = (tensor.to_dense() for tensor in tensors if tensor is not None)
    exact = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in dense)
    return math.hypot(*(float(torch.linalg.vector_norm(t)) for t in exact))


def _relative_to(factor: float, decay: Decay) -> Decay:
    borders = (replace(border, error=border.error / factor) for border in decay.borders)
    return replace(decay, borders=tuple(borders))
