"""`k2="auto"`: how far back each window of an engine reaches, and the audits that say so."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.reach_rule import ReachRule, audited_steps, reach_sizes
from tbptt_ckpt.engine.truncation import Truncation
from tbptt_ckpt.errors import ArgumentError, TbpttWarning, shown
from tbptt_ckpt.executor.gradient_sketch import BUCKETS, Row, asked, norm_of, signs_for, sketch
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.window_pass import Executor
from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.schedule.truncation import Draw
from tbptt_ckpt.schedule.windows import Window, next_point
from tbptt_ckpt.updates.updater import Updater

_GROWING, _TIMES = 3, 10.0  # audits in a row whose gradient grows by so much are told of


def make_truncation(
    options: Options, executor: Executor, parameters: Sequence[Tensor], updater: Updater
) -> Truncation:
    """Who says how far back windows go.

    Raises:
        ArgumentError: Audits cannot see the gradient as it grows.
    """
    if not options.is_auto:
        return Truncation(options)
    if executor.one_graph:
        raise ArgumentError(
            f"executor={shown(options.executor)} does not go with k2='auto': it differentiates a "
            "window as one graph, and an audit looks at the gradient on its way; use "
            "executor='replay'"
        )
    wrappers = updater.deliveries.wrappers
    if wrappers.is_any or wrappers.is_sharded:
        raise ArgumentError(
            "k2='auto' does not go with a module that several processes train: each would choose "
            "by its own gradients; give a fixed k2"
        )
    auto = AutoK2(options, parameters, updater)
    if len(places := {str(weight.device) for weight in auto.weights()}) > 1:
        raise ArgumentError(
            f"k2='auto' does not go with weights on {' and '.join(sorted(places))}: an audit adds "
            "their gradients up in one place; move them to one device, or give a fixed k2"
        )
    return auto


class AutoK2(Truncation):
    """Chooses for the windows of all runs of an engine, from what audits of them find.

    Args:
        options: With `max_k2`, `k2_tolerance` and `k2_window_tolerance`.
        parameters: The weights of module and loss.
        updater: Knows others, and the factor on gradients.
    """

    def __init__(self, options: Options, parameters: Sequence[Tensor], updater: Updater) -> None:
        super().__init__(options)
        assert options.max_k2 is not None, "options have been checked"
        self._most, self._parameters, self._updater = options.max_k2, parameters, updater
        sizes = reach_sizes(options.k1, self._most)
        self._rule = ReachRule(sizes, options.k2_tolerance, options.k2_window_tolerance)
        self.observer = self._auditor = _Auditor(self._audit_of)
        self._places: tuple[Tensor, list[Tensor]] | None = None

    def of(self, window: Window) -> Draw:
        """As far back as the rule says, or all the way for an audit."""
        start = max(window.start, next_point(window.stop - self._rule.k2, self._k1))
        reached = replace(window, start=start)
        if self._is_audit(window):
            return Draw(
                window, window, quiet=reached, audited=audited_steps(window, self._rule.sizes)
            )
        return Draw(window, reached, quiet=reached)

    def has_run(
        self, drawn: Draw, norms: Mapping[int, Number], *, has_loss: bool
    ) -> dict[str, Any]:
        """A window is done: learn from it, and say how far it reached."""
        audit, rule = self._auditor.take(), self._rule
        if not has_loss:
            return {}
        is_audit = bool(drawn.audited)
        sums = None if audit is None or not is_audit else audit.sums()
        k2 = self._most if is_audit else rule.k2
        if audit is not None and sums is not None:
            rule.audited(sums)
            self._look_at_audit(drawn.whole, audit.norms())
        else:
            rule.ran()
        return {"chosen_k2": rule.chosen(k2, is_audit=is_audit)}

    def held(self) -> tuple[Tensor, list[Tensor]] | None:
        """What audits need on an accelerator; nothing where weights are on the CPU."""
        if self._places is None and (signs := signs_for(self.weights())):
            shape = len(self._rule.sizes) + 1, BUCKETS
            rows = torch.empty(shape, dtype=signs[0].dtype, device=signs[0].device)
            self._places = rows, signs
        return self._places

    def _is_audit(self, window: Window) -> bool:
        """One that is due, and has all the steps that it wants."""
        return self._rule.is_due and window.stop - window.start == self._most

    def _audit_of(self, window: Window) -> _Audit | None:
        if not self._is_audit(window):
            return None
        rows = None if (held := self.held()) is None else held[0]
        return _Audit(window, self._rule.sizes, self.weights(), self._updater, rows)

    def weights(self) -> list[Tensor]:
        """Whose gradients are looked at."""
        found = (*self._parameters, *self._updater.optimized())
        return [w for w in dict.fromkeys(found) if w.requires_grad and w.numel()]

    def _look_at_audit(self, window: Window, norms: Sequence[float]) -> None:
        near, far = (norms[-1], norms[0]) if norms else (0.0, 0.0)
        grows = far > _TIMES * near > 0
        self._growing = self._growing + 1 if grows else 0
        if self._growing == _GROWING and not self._has_warned:
            self._has_warned = True
            nearest, farthest = self._rule.sizes[0], self._rule.sizes[-2]
            warnings.warn(
                f"k2='auto': the gradient of the state grows with distance, {far / near:.3g} times "
                f"over {farthest - nearest} steps in window {window.index} and in {_GROWING} "
                "audits in a row: it explodes, and a longer k2 makes it worse. What helps is "
                "clip_grad_norm, smaller or orthogonal recurrent weights, a smaller forget bias, "
                "or a short k2, knowingly",
                TbpttWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the rule stands."""
        told = {"growing": self._growing, "has_warned": self._has_warned}
        return {**super().state_dict(), "audits": {**self._rule.state_dict(), **told}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        if (audits := state.get("audits")) is not None:
            self._rule.load_state_dict(audits)
            self._growing, self._has_warned = audits["growing"], audits["has_warned"]


class _Audit:
    """One window whose gradient is looked at where each size begins."""

    def __init__(
        self,
        window: Window,
        sizes: Sequence[int],
        weights: Sequence[Tensor],
        updater: Updater,
        places: Tensor | None,
    ) -> None:
        self._window, self._weights, self._updater = window, weights, updater
        self._cuts, self._places = audited_steps(window, sizes), places
        self._rows: list[Row] = []  # what earlier windows left in `.grad`, then the smallest size
        self._norms: list[Any] = []
        self._asked: list[Number] = []

    def begin(self) -> None:
        """Nothing has been differentiated yet."""
        if not self._rows:
            self._read()

    def add(self, step: int, state_grads: Sequence[Tensor | None]) -> None:
        """The gradient has come to `step`."""
        if step in self._cuts:
            known = [grad for grad in state_grads if grad is not None]
            self._norms.append(norm_of(known) if known else 0.0)
        if step in self._cuts or step == self._window.start:
            self._read()

    def ask(self, numbers: Numbers) -> None:
        """Ask for all of it, once."""
        before, *rows = self._rows
        sums = (np.stack(rows) if self._places is None else torch.stack(rows)) - before
        scale = self._updater.grad_scale(self._weights[0].device)
        self._asked = [asked(value, numbers) for value in (sums, scale, *self._norms)]
        self._rows, self._norms = [], []

    def _read(self) -> None:
        row = sketch(self._weights)
        if self._places is not None:
            row = self._places[len(self._rows)].copy_(row)
        self._rows.append(row)

    def sums(self) -> Any:
        """The sums of each size, [sizes, BUCKETS]; None where one is not finite."""
        if not self._asked:
            return None
        sums = np.asarray(self._asked[0].value) / self._asked[1].value
        return sums if np.isfinite(sums).all() else None

    def norms(self) -> list[float]:
        """Of the state's gradient at each border, the earliest first."""
        norms = [number.value / self._asked[1].value for number in reversed(self._asked[2:])]
        return norms if all(map(math.isfinite, norms)) else []


class _Auditor(Observer):
    """Looks at the windows that are audited."""

    def __init__(self, audit_of: Callable[[Window], _Audit | None]) -> None:
        self._audit_of = audit_of
        self._audit: _Audit | None = None

    def planned(self, window: Window) -> None:
        """Look at this window, or not."""
        self._audit = self._audit_of(window)

    def begins(self, action: Action) -> None:
        """Look at what gradients there are before the first action."""
        if self._audit is not None:
            self._audit.begin()

    def reaches(self, step: int, state_grads: Sequence[Tensor | None]) -> None:
        """Look at the gradients at a border."""
        if self._audit is not None:
            self._audit.add(step, state_grads)

    def asks(self, numbers: Numbers, loss: Tensor | None, states: list[Tree]) -> None:
        """Ask for the sums."""
        if self._audit is not None and loss is not None:
            self._audit.ask(numbers)

    def take(self) -> _Audit | None:
        """What was looked at of the last window."""
        audit, self._audit = self._audit, None
        return audit
