"""What every executor shares: the work of one window, its advances and its result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tbptt_ckpt.errors import StaleWeightsError, TbpttError
from tbptt_ckpt.executor.losses import LossSum
from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.executor.sinks import LossSink, WindowLoss
from tbptt_ckpt.executor.task import Boundary, WindowTask
from tbptt_ckpt.module.hooks import silent_hooks
from tbptt_ckpt.module.trees import copy_containers, detach_state
from tbptt_ckpt.schedule.actions import Action, Schedule


class Observer(Protocol):
    """Told what a window is doing as it does it; it must change nothing."""

    def begins(self, action: Action) -> None:
        """An action is about to be run; the one before it is done."""

    def differentiates(self) -> None:
        """A leaf has been run with its graph; its gradient comes next."""

    def ends(self) -> None:
        """All actions are done."""


class _Unobserved:
    """Watches nothing."""

    def begins(self, action: Action) -> None:
        """Nothing to do."""

    def differentiates(self) -> None:
        """Nothing to do."""

    def ends(self) -> None:
        """Nothing to do."""


UNOBSERVED: Observer = _Unobserved()


# A segment module's advance may span a long stretch; it is cut into calls of at most this
# many steps (or of the longest leaf), so that its outputs stay small.
_ADVANCE_STEPS = 64

StateGrads = list[Tensor | None]  # one per tensor of a state
Root = tuple[Tensor, Tensor | None]  # to differentiate, with its gradient; None stands for one


class WeightGuard:
    """Notices weights that change between a window's advance and its replay.

    Attributes:
        expected: The fingerprint of the weights with which the window runs.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.expected = self.fingerprint()

    def fingerprint(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever a weight is written to or replaced."""
        return tuple([(p._version, p.data_ptr()) for p in self._parameters])

    def check(self, window_stop: int) -> None:
        """Raise `StaleWeightsError` if a weight changed."""
        if self.fingerprint() != self.expected:
            raise StaleWeightsError(
                f"weights changed while the window up to step {window_stop} was being "
                "differentiated, between its advance and its replay; call optimizer.step() only "
                "between windows"
            )


@dataclass(slots=True)
class WindowRun:
    """One window being run.

    Attributes:
        task: What to run.
        runner: Runs it.
        loss: Its loss.
        guard: Watches the weights.
        grad_scale: Factor on the gradients, of a `GradScaler`.
        longest_advance: Most steps of one call of a segment module in an advance.
        record: Actions are appended here as they are run.
        observer: Told of actions as they are run.
    """

    task: WindowTask
    runner: Runner
    loss: WindowLoss
    guard: WeightGuard
    grad_scale: float = 1.0
    longest_advance: int = _ADVANCE_STEPS
    record: list[Action] | None = None
    observer: Observer = UNOBSERVED

    def note(self, action: Action) -> None:
        """Record an action that is about to be run."""
        self.observer.begins(action)
        if self.record is not None:
            self.record.append(action)

    def advance(self, boundary: Boundary, stop: int) -> Boundary:
        """Run from a boundary to `stop` without a graph."""
        boundary.check_untouched()
        task = self.task
        task.ambient.restore(boundary.ambient)
        sink, longest = LossSink(task, self.loss, graph=False), self.longest_advance
        with torch.no_grad(), silent_hooks():
            state = self.runner.run(
                task, boundary.step, stop, copy_containers(boundary.state), sink, longest
            )
        boundary.check_untouched()
        return self.boundary(stop, state)

    def differentiating(self) -> _Differentiating:
        """While entered, a graph is recorded, weights are watched, and torch's errors explained."""
        return _Differentiating(self.guard, self.task.stop)

    def boundary(self, step: int, state: object) -> Boundary:
        """The state at `step`: the recorded one at a joint, otherwise the one just reached."""
        joint = self.task.joints.get(step)
        if joint is not None:
            return joint
        return Boundary(step, detach_state(state), self.task.ambient.capture())

    def roots(self, parts: Iterable[LossSum]) -> list[Root]:
        """What to differentiate: parts of the window's loss."""
        return [
            (losses.total, self._gradient_of(losses.total, losses.factor))
            for losses in parts
            if losses.total is not None and losses.total.requires_grad
        ]

    def _gradient_of(self, total: Tensor, factor: float) -> Tensor | None:
        """The gradient of the window's loss with respect to `total`, a part's sum over `factor`."""
        divisor, scale = self.loss.divisor, self.grad_scale * factor
        if not isinstance(divisor, float):
            return torch.full_like(total, scale) / divisor
        # torch makes the gradient one by itself, faster than it checks one that is given.
        return None if scale == divisor else torch.full_like(total, scale / divisor)


class _Differentiating:
    """See `WindowRun.differentiating`."""

    __slots__ = ("_guard", "_stop", "_was_recording")

    def __init__(self, guard: WeightGuard, stop: int) -> None:
        self._guard, self._stop = guard, stop

    def __enter__(self) -> None:
        self._guard.check(self._stop)
        self._was_recording = torch.is_grad_enabled()
        if not self._was_recording:
            torch.set_grad_enabled(True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._was_recording:
            torch.set_grad_enabled(False)
        if error is None:
            self._guard.check(self._stop)
        elif isinstance(error, RuntimeError):
            self._explain(error)

    def _explain(self, error: RuntimeError) -> None:
        """Raise what a user can act on, where torch's error has a known cause."""
        if "backward through the graph a second time" in str(error):
            raise TbpttError(
                "a tensor with the graph of an earlier run was used: whatever the module "
                "carries from step to step with its gradient belongs in the state it returns"
            ) from error
        if "in-place operation" not in str(error) and "inplace operation" not in str(error):
            return
        self._guard.check(self._stop)
        raise TbpttError(
            "a tensor that the gradient needs was modified in place; the module must return a "
            f"new state, or clone it before writing into it ({str(error).splitlines()[0]})"
        ) from error


def differentiate(roots: Sequence[Root]) -> None:
    """Add the gradients of roots that are differentiated together."""
    if roots:
        tensors, grads = zip(*roots, strict=True)
        torch.autograd.backward(tensors, grads)


class Executor(Protocol):
    """Runs schedules."""

    def run(self, work: WindowRun, schedule: Schedule, first: Boundary) -> StateGrads | None:
        """Differentiate a window.

        Gradients accumulate in `.grad`.

        Args:
            work: The window.
            schedule: How.
            first: Its first state.

        Returns:
            The gradients of the state at the window's `start`, one per tensor; None if the
            window turned out to have no loss, in which case nothing was differentiated.
        """
        ...
