"""The peak of one window, and of each of its actions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

import torch

from tbptt_ckpt.budget.window_budget import PlannedWindow
from tbptt_ckpt.executor.window_pass import Route
from tbptt_ckpt.memory.exhausted import older_garbage_kept
from tbptt_ckpt.memory.meter import Lap, peak_memory
from tbptt_ckpt.memory.reading import reading
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.schedule.actions import Action


class UnmeteredWindow(ExitStack):
    """Measures nothing."""

    peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None

    def route(self, planned: PlannedWindow) -> Route:
        """The plan as it is."""
        return Route(planned.plan.schedule, planned.plan.advance_steps)

    def lap(self) -> Lap | None:
        """Nothing is known."""
        return None


class WindowMeter(ExitStack):
    """Measures one window, from after its gradients are cleared to after its update.

    The meter's records are read every few calls of the module, so that they stay below a few
    MiB however long the window.

    Args:
        device: What is measured.
        held: Trees of what is live at the start and belongs to the run.
        beside_bytes: Inputs and targets of the window, and what libraries keep.

    Attributes:
        base_bytes: Live bytes at the start, gradients, inputs and libraries included.
    """

    def __init__(self, device: torch.device, held: Sequence[object], beside_bytes: int) -> None:
        super().__init__()
        self._device, self._held, self._beside_bytes = device, held, beside_bytes
        self.base_bytes = 0

    @property
    def peak_bytes(self) -> int | None:
        """Peak of device memory, everything that belongs to the run included."""
        return self.base_bytes + self._meter.peak_bytes

    @property
    def reserved_peak_bytes(self) -> int | None:
        """Most that an accelerator's allocator had reserved."""
        return self._meter.reserved_peak_bytes

    def __enter__(self) -> Self:
        self.enter_context(older_garbage_kept())
        self.base_bytes = tensor_bytes(*self._held, grads=True, device=self._device)
        self.base_bytes += self._beside_bytes
        self._meter = peak_memory(self._device, held=self._held, rss=False)
        self.enter_context(self._meter)
        self.enter_context(reading(self._meter.flush))
        self._held = ()
        return self

    def route(self, planned: PlannedWindow) -> Route:
        """The plan, held against what each action takes, and left where it must be."""
        return _MeteredRoute(planned, self)

    def lap(self) -> Lap:
        """What the last stretch took; bytes count from nothing."""
        lap = self._meter.lap()
        return Lap(self.base_bytes + lap.peak_bytes, self.base_bytes + lap.now_bytes)


class _MeteredRoute(Route):
    """Follows a plan while its window lets it, and what the window says from there on."""

    def __init__(self, planned: PlannedWindow, meter: WindowMeter) -> None:
        super().__init__(planned.plan.schedule, planned.plan.advance_steps)
        self._planned, self._meter = planned, meter
        self._action: Action | None = None
        self._begun = meter.lap()

    def next_action(self) -> Action | None:
        """As planned, or as the window says now that it knows what the last one took."""
        ended = self._meter.lap()  # what ran before the first, such as a look at parts, is none
        if self._action is not None and self._planned.take(self._action, self._begun, ended):
            self._actions = iter(())
        self._begun = ended
        self._action = super().next_action()
        while self._action is None and (stretch := self._planned.next_stretch()) is not None:
            self._actions, self.advance_steps = stretch._actions, stretch.advance_steps
            self._action = super().next_action()
        return self._action
