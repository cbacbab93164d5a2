"""Measures how far back windows' gradients reach, in as many of them as cost next to nothing.

NOTE [What it costs]
At a border the weights' gradients are read once, 0.4 to 6 % of what a leaf takes. So a window is
measured, and the next ones are not until they have taken `_SHARE` times what that took; and of
its borders `_MOST_BORDERS` at most. A device is not waited for: see `module.host`.

NOTE [A gradient that vanishes]
The error of a window whose losses are near zero, relative to its own gradient, is noise that has
no end. It is taken relative to the mean norm of such gradients where that is larger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.engine.reach import Border, Decay
from tbptt_ckpt.executor.gradient_sketch import (
    BUCKETS,
    Row,
    asked,
    can_sketch,
    norm_of,
    signs_for,
    sketch,
    tail_norms,
)
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.updates.updater import Updater

_SHARE = 100.0  # windows' time over that of what is measured
_MOST_BORDERS = 64  # of a window
_MEMORY = 0.9  # of the running norm


class ReachGauge(Observer):
    """Told of an engine's windows, one after the other.

    Args:
        parameters: The weights of module and loss.
        updater: Knows others, and the factor on gradients.
        works: Whether gradients are whole here, and come leaf by leaf.
    """

    def __init__(
        self, parameters: Sequence[Tensor], updater: Updater, *, works: bool = True
    ) -> None:
        self._parameters, self._updater = parameters, updater
        self._due = -math.inf if works else math.inf  # when a window is measured next
        self._window: _Measured | None = None
        self._mean_norm = 0.0
        self._places: tuple[Tensor, list[Tensor]] | None = None

    def held(self) -> tuple[Tensor, list[Tensor]] | None:
        """Tensors that are live whenever it measures; none where weights are on the CPU."""
        if self._places is None and self._due < math.inf:
            weights = self._weights()
            if signs := signs_for(weights):
                shape = _MOST_BORDERS + 2, BUCKETS
                rows = torch.empty(shape, dtype=signs[0].dtype, device=signs[0].device)
                self._places = rows, signs
        return self._places

    def _rest(self, seconds: float) -> None:
        """So much time was spent: windows that are not measured come next."""
        self._due = time.perf_counter() + _SHARE * seconds

    def _weights(self) -> list[Tensor]:
        found = (*self._parameters, *self._updater.optimized())
        return [w for w in dict.fromkeys(found) if w.requires_grad and w.numel()]

    def planned(self, window: Window) -> None:
        """Measure this window, or not."""
        self._window = None
        if time.perf_counter() >= self._due:
            weights = self._weights()
            if can_sketch(weights):
                self._window = _Measured(window, weights, self.held())

    def begins(self, action: Action) -> None:
        """Look at what gradients there are before the first action."""
        if self._window is not None:
            self._window.begin()

    def reaches(self, step: int, state_grads: Sequence[Tensor | None]) -> None:
        """Look at the gradients at a border."""
        if self._window is not None:
            self._window.add(step, state_grads)

    def asks(self, numbers: Numbers, loss: Tensor | None, states: list[Tree]) -> None:
        """Ask for the norms."""
        measured = self._window
        if measured is None or (
            loss is not None and measured.ask(numbers, self._updater.grad_scale)
        ):
            return
        self._rest(measured.seconds)  # gradients that stay were looked at all the same
        self._window = None

    def take_figures(self) -> dict[str, Any]:
        """`decay` and `reach` of the window that was told of last; nothing if unmeasured."""
        measured, self._window = self._window, None
        if measured is None:
            return {}
        begun = time.perf_counter()
        found = measured.decay(self._mean_norm)
        self._rest(measured.seconds + time.perf_counter() - begun)
        if found is None:
            return {}
        decay, norm = found
        self._mean_norm += (norm - self._mean_norm) * (1 - _MEMORY if self._mean_norm else 1.0)
        return {"decay": decay, "reach": decay.reach()}

    def state_dict(self) -> dict[str, float]:
        """What errors to come are relative to; the clock says in which windows they are."""
        return {"mean_norm": self._mean_norm}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there."""
        self._mean_norm = state["mean_norm"]


class _Measured:
    """One window that is measured.

    Attributes:
        seconds: What that took.
    """

    def __init__(
        self,
        window: Window,
        weights: Sequence[Tensor],
        places: tuple[Tensor, list[Tensor]] | None,
    ) -> None:
        self._window, self._weights = window, weights
        self._places = None if places is None else places[0]
        self._gap = -(-(window.stop - window.start) // _MOST_BORDERS)
        self._steps: list[int] = []
        self._rows: list[Row] = []  # the first of them before the window
        self._norms: list[Any] = []
        self._asked: list[Number] = []
        self.seconds = 0.0

    def begin(self) -> None:
        """The gradients of earlier windows are there, if they stay."""
        if not self._rows:
            self._read()

    def add(self, step: int, state_grads: Sequence[Tensor | None]) -> None:
        """The gradient has come to `step`."""
        last = self._steps[-1] if self._steps else self._window.stop
        if step == self._window.start:
            if not self._steps:  # of one leaf there is nothing to say
                return
        elif last - step < self._gap:
            return
        self._steps.append(step)
        known = [grad for grad in state_grads if grad is not None]
        self._norms.append(norm_of(known) if known else None)
        self._read()

    def ask(self, numbers: Numbers, scale: Callable[[torch.device], float | Tensor]) -> bool:
        """Ask for all norms, if the window was measured up to its start."""
        if not self._steps or self._steps[-1] != self._window.start:
            return False
        begun = time.perf_counter()
        factor = scale(self._weights[0].device)
        wanted = (tail_norms(self._rows), factor, *self._norms)
        self._asked = [asked(value, numbers) for value in wanted]
        self._rows, self._norms = [], []
        self.seconds += time.perf_counter() - begun
        return True

    def decay(self, mean_norm: float) -> tuple[Decay, float] | None:
        """What was found, and the norm of the gradient; None where that is zero or not finite."""
        (total, *tails), scale, *norms = (number.value for number in self._asked)
        if not (total and math.isfinite(total) and all(map(math.isfinite, tails))):
            return None
        norm, stop = total / scale, self._window.stop
        errors = [tail / scale / max(norm, mean_norm) for tail in tails]
        borders = (
            Border(stop - step, None if found is None else found / scale, error)
            for step, found, error in zip(self._steps, norms, errors, strict=True)
        )
        return Decay(tuple(borders), self._window.num_new_steps), norm

    def _read(self) -> None:
        begun = time.perf_counter()
        row = sketch(self._weights)
        if self._places is not None:
            row = self._places[len(self._rows)].copy_(row)
        self._rows.append(row)
        self.seconds += time.perf_counter() - begun
