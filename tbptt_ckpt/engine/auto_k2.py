"""`k2="auto"`: how far back each window of an engine reaches, and the audits that say so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.reach_rule import ReachRule, audited_steps, later_of_audit, reach_sizes
from tbptt_ckpt.engine.truncation import Truncation
from tbptt_ckpt.errors import ArgumentError, TbpttWarning, shown
from tbptt_ckpt.executor.gradient_sketch import BUCKETS, Row, Sketcher, asked, norm_of, signs_for
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.executor.window_pass import Executor
from tbptt_ckpt.module.host import Number, Numbers
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.schedule.actions import Action
from tbptt_ckpt.schedule.truncation import Draw
from tbptt_ckpt.schedule.windows import Window, next_point
from tbptt_ckpt.updates.step_units import step_units
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
    wrappers, ranks = updater.deliveries.wrappers, updater.deliveries.ranks
    if ranks is None and (wrappers.is_any or wrappers.is_sharded):
        raise ArgumentError(
            "k2='auto' does not go with a module that several processes train: each would choose "
            "by its own gradients; give ranks='all', by which they choose together, or a fixed k2"
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
        self._ranks = updater.deliveries.ranks
        sizes = reach_sizes(options.k1, self._most)
        self._rule = ReachRule(sizes, options.k2_tolerance, options.k2_window_tolerance)
        self.observer = self._auditor = _Auditor(self._audit_of)
        self._places: tuple[Tensor, list[Tensor]] | None = None

    def of(self, window: Window) -> Draw:
        """As far back as the rule says, or all the way for an audit."""
        start = max(window.start, next_point(window.stop - self._rule.k2, self._k1))
        reached = replace(window, start=start)
        if self._is_audit(window.index):
            quiet = reached if self._ranks is None else window  # other ranks may have a loss
            cuts = self._cuts(window)
            later = () if self._restarts else later_of_audit(cuts, window.start, self._k1)
            return Draw(window, window, quiet=quiet, audited=cuts, later=later)
        later = () if self._restarts else (start + self._k1,)
        return Draw(window, reached, quiet=reached, later=later)

    def has_run(
        self, drawn: Draw, norms: Mapping[int, Number], *, has_loss: bool, factor: float | None
    ) -> dict[str, Any]:
        """A window is done: learn from it, and say how far it reached."""
        audit, index = self._auditor.take(), drawn.whole.index
        if not has_loss:
            return {}
        is_audit = self._is_audit(index)
        k2 = self._most if is_audit else self._rule.k2
        self._learn(index, None if audit is None else audit.found(), factor)
        return {"chosen_k2": self._rule.chosen(k2, is_audit=is_audit)}

    def has_passed(self, index: int, *, has_loss: bool) -> None:
        """Other ranks have run a window: learn what they do."""
        if has_loss:
            self._learn(index, None, None)

    def _learn(self, index: int, own: _Found | None, factor: float | None) -> None:
        """From a window with a loss, of which this rank has found its `own` lanes' part."""
        if not self._is_audit(index):
            self._rule.ran()
            return
        if (ranks := self._ranks) is not None:
            share = (factor or 0.0) / ranks.count
            own = _joined(ranks.exchange(None if own is None else own.times(share)))
        if own is None or not np.isfinite(own.sums).all():
            self._rule.ran()
            return
        self._rule.audited(*own.sums)
        self._look_at_audit(index, own)

    def held(self) -> tuple[Tensor, list[Tensor]] | None:
        """What audits need on an accelerator; nothing where weights are on the CPU."""
        if self._places is None and (signs := signs_for(self.weights())):
            shape = 2 * len(self._rule.sizes) + 2, BUCKETS
            rows = torch.empty(shape, dtype=signs[0].dtype, device=signs[0].device)
            self._places = rows, signs
        return self._places

    def _is_audit(self, index: int) -> bool:
        """One that is due and has the steps before it, wherever the sequence of a rank ends."""
        return self._rule.is_due and (index + 1) * self._k1 >= self._most

    def _cuts(self, window: Window) -> tuple[int, ...]:
        return audited_steps((window.index + 1) * self._k1, self._rule.sizes)

    def _audit_of(self, window: Window) -> _Audit | None:
        if not self._is_audit(window.index):
            return None
        rows = None if (held := self.held()) is None else held[0]
        return _Audit(window.start, self._cuts(window), self.weights(), self._updater, rows)

    def weights(self) -> list[Tensor]:
        """Whose gradients are looked at."""
        weights = (*self._parameters, *self._updater.optimized())
        found = self._updater.deliveries.wholes(weights)
        return [w for w in dict.fromkeys(found) if w.requires_grad and w.numel()]

    def _look_at_audit(self, index: int, found: _Found) -> None:
        is_known = np.isfinite(found.norms).all()
        near, far = (found.norms[0], found.norms[-1]) if is_known else (0.0, 0.0)
        grows = far > _TIMES * near > 0
        self._growing = self._growing + 1 if grows else 0
        if self._growing == _GROWING and not self._has_warned:
            self._has_warned = True
            nearest, farthest = self._rule.sizes[0], self._rule.sizes[-2]
            warnings.warn(
                f"k2='auto': the gradient of the state grows with distance, {far / near:.3g} times "
                f"over {farthest - nearest} steps in window {index} and in {_GROWING} "
                "audits in a row: it explodes, and a longer k2 makes it worse. What helps is "
                "clip_grad_norm, smaller or orthogonal recurrent weights, a smaller forget bias, "
                "or a short k2, knowingly",
                TbpttWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the rule stands."""
        return {**super().state_dict(), "audits": self._rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        if (audits := state.get("audits")) is not None:
            self._rule.load_state_dict(audits)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What an audit finds.

    Attributes:
        sums: Of the gradient of each size, as it is and in units of steps, [2, sizes, BUCKETS].
        norms: Of the state's gradient at each border, the nearest first, [sizes - 1].
    """

    sums: Any
    norms: Any

    def times(self, share: float) -> _Found:
        """The same of a loss that counts as much."""
        return _Found(share * self.sums, share * self.norms)


def _joined(parts: Iterable[_Found | None]) -> _Found | None:
    """Of all lanes: the weights' gradient is the sum of those of ranks, the state's holds theirs.

    Ranks get the same bits, since all add up in the same order.
    """
    if not (found := [part for part in parts if part is not None]):
        return None
    squares = sum(part.norms**2 for part in found)
    return _Found(sum(part.sums for part in found), np.sqrt(squares))


class _Audit:
    """One window whose gradient is looked at where each size begins."""

    def __init__(
        self,
        start: int,
        cuts: Sequence[int],
        weights: Sequence[Tensor],
        updater: Updater,
        places: Tensor | None,
    ) -> None:
        self._start, self._weights, self._updater = start, weights, updater
        self._cuts, self._places = cuts, places
        self._sketcher = Sketcher(weights, step_units(updater.optimizer, weights))
        # What earlier windows left in `.grad`, then the smallest size, each in all units there are.
        self._rows: list[Row] = []
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
        if step in self._cuts or step == self._start:
            self._read()

    def ask(self, numbers: Numbers) -> None:
        """Ask for all of it, once."""
        rows = np.stack(self._rows) if self._places is None else torch.stack(self._rows)
        rows = rows.reshape(len(self._cuts) + 2, -1, BUCKETS)
        sums = rows[1:] - rows[:1]
        scale = self._updater.grad_scale(self._weights[0].device)
        self._asked = [asked(value, numbers) for value in (sums, scale, *self._norms)]
        self._rows, self._norms = [], []

    def _read(self) -> None:
        for row in self._sketcher.rows():
            if self._places is not None:
                row = self._places[len(self._rows)].copy_(row)
            self._rows.append(row)

    def found(self) -> _Found | None:
        """Nothing where there was no gradient."""
        if not self._asked:
            return None
        sums, scale, *norms = (np.asarray(number.value) for number in self._asked)
        in_units = np.stack([sums[:, 0], sums[:, -1]])
        return _Found(in_units / scale, np.array(norms) / scale)


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
