"""The peak of one window, and of each of its actions."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.memory.exhausted import older_garbage_kept
from tbptt_ckpt.memory.meter import Lap, peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.schedule.actions import Action, Schedule
from tbptt_ckpt.schedule.plan import Plan

# A call of a cell makes some 130 events of up to 0.9 KiB, those of its backward included.
_CALLS_PER_FLUSH = 64
_CALLS_PER_HOOK = 256


class Pilot(Protocol):
    """Follows a window action by action and may change what comes next."""

    def attach(self, bound_calls: Callable[[int], None]) -> None:
        """The window begins; `bound_calls` sets the most steps of one call in an advance."""
        ...

    def after(
        self, action: Action, begun: Lap, ended: Lap, pending: Iterator[Action]
    ) -> Iterator[Action]:
        """An action is done; returns the actions to go on with."""
        ...

    def executed_plan(self, plan: Plan) -> Plan:
        """The plan as it was followed."""
        ...


class UnmeteredWindow:
    """Measures nothing."""

    peak_bytes: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do."""

    def runner(self, runner: Runner) -> Runner:
        """The same runner."""
        return runner

    def schedule(self, schedule: Schedule, pilot: Pilot) -> Schedule:
        """The same schedule."""
        return schedule

    def lap(self) -> Lap | None:
        """Nothing is known."""
        return None


class WindowMeter:
    """Measures one window, from after its gradients are cleared to after its update.

    The meter's records are read every few calls of the module, so that they stay below a few
    MiB however long the window.

    Args:
        device: What is measured.
        held: Trees of what is live at the start and belongs to the run.
        input_bytes: Inputs and targets of the window.

    Attributes:
        base_bytes: Live bytes at the start, gradients and inputs included.
    """

    def __init__(self, device: torch.device, held: Sequence[object], input_bytes: int) -> None:
        self._device, self._held, self._input_bytes = device, held, input_bytes
        self.base_bytes = 0
        self._exits = ExitStack()

    @property
    def peak_bytes(self) -> int | None:
        """Peak of device memory, everything that belongs to the run included."""
        return self.base_bytes + self._meter.peak_bytes

    def __enter__(self) -> Self:
        self._exits.enter_context(older_garbage_kept())
        self.base_bytes = tensor_bytes(*self._held, grads=True) + self._input_bytes
        self._meter = peak_memory(self._device, held=self._held, rss=False)
        self._exits.enter_context(self._meter)
        self._held = ()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exits.__exit__(kind, error, trace)

    def runner(self, runner: Runner) -> Runner:
        """The same runner, reading the meter's records as it goes."""
        metered = copy.copy(runner)
        metered.recurrence = replace(runner.recurrence, call=self._flushing(runner.recurrence.call))
        return metered

    def schedule(self, schedule: Schedule, pilot: Pilot) -> Schedule:
        """The same schedule, with a pilot who is told what each action took."""

        def actions() -> Iterator[Action]:
            pending, begun = iter(schedule), self.lap()
            while (action := next(pending, None)) is not None:
                yield action
                ended = self.lap()
                pending = pilot.after(action, begun, ended, pending)
                begun = ended

        return Schedule(actions)

    def lap(self) -> Lap:
        """What the last stretch took; bytes count from nothing."""
        lap = self._meter.lap()
        return Lap(self.base_bytes + lap.peak_bytes, self.base_bytes + lap.now_bytes)

    def _flushing(self, call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        calls = itertools.count(1)

        def flushing(inputs: Any, state: Any) -> Any:
            number = next(calls)
            if number % _CALLS_PER_FLUSH == 0:
                self._meter.flush()
            if number % _CALLS_PER_HOOK == 0 and torch.is_grad_enabled():
                self._meter.flush_on_gradient(*tensors_of(state))
            return call(inputs, state)

        return flushing


class Bystander:
    """A pilot who lets everything go on."""

    def attach(self, bound_calls: Callable[[int], None]) -> None:
        """Nothing will change."""

    def after(
        self, action: Action, begun: Lap, ended: Lap, pending: Iterator[Action]
    ) -> Iterator[Action]:
        """Go on."""
        return pending

    def executed_plan(self, plan: Plan) -> Plan:
        """The plan."""
        return plan
