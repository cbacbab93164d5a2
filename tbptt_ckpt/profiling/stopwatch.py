"""Watches the actions of one window: when each began and ended, and what it held in memory."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.memory.meter import PeakMeter
from tbptt_ckpt.profiling.report import ActionSpan
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep


class ActionWatch(Observer):
    """An observer that measures every action of a window, while it is told to.

    Its `clock` stands still while the meter is read; `held_states` were kept at once at most.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._meter: PeakMeter | None = None

    @contextmanager
    def watching(self, meter: PeakMeter, before_bytes: int) -> Iterator[None]:
        """Watch while the context is open.

        `before_bytes` of tensors were live when the meter began.
        """
        self.clock = PausedClock()
        self._action: Action | None = None
        self._before_bytes = self._live_bytes = before_bytes
        self._began_seconds = 0.0
        self._gradient_seconds: float | None = None
        self._held = self.held_states = 0
        self.spans: list[ActionSpan] = []
        self._meter = meter
        try:
            yield
        finally:
            self._meter = None

    def begins(self, action: Action) -> None:
        """Close the action before and open this one."""
        if self._meter is None:
            return
        self.ends()
        if isinstance(action, Keep | Drop):
            self._held += 1 if isinstance(action, Keep) else -1
            self.held_states = max(self.held_states, self._held)
        self._action, self._gradient_seconds = action, None
        self._began_seconds = self._now()

    def differentiates(self) -> None:
        """Note when a leaf's gradient begins."""
        if self._meter is not None:
            self._gradient_seconds = self._now()

    def ends(self) -> None:
        """Close the last action."""
        if self._meter is None:
            return
        ended = self._now()
        with self.clock.paused():
            lap = self._meter.lap()
        if (action := self._action) is not None:
            if isinstance(action, Advance | Differentiate):
                start, stop = action.start, action.stop
            else:
                start = stop = action.step
            self.spans.append(
                ActionSpan(
                    kind=type(action).__name__.lower(),
                    start=start,
                    stop=stop,
                    began_seconds=self._began_seconds,
                    ended_seconds=ended,
                    gradient_seconds=self._gradient_seconds,
                    live_bytes=self._live_bytes,
                    peak_bytes=self._before_bytes + lap.peak_bytes,
                )
            )
        self._action, self._live_bytes = None, self._before_bytes + lap.now_bytes

    def read(self) -> None:
        """Take in what the meter recorded, off the clock."""
        if self._meter is not None:
            with self.clock.paused():
                self._meter.flush()

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self.clock.now()


class PausedClock:
    """Seconds since it was made, pauses left out."""

    def __init__(self) -> None:
        self._begun = time.time()  # the clock of the meter's events
        self._starts: list[float] = []
        self._totals: list[float] = [0.0]

    def now(self) -> float:
        """Seconds of work so far."""
        return time.time() - self._begun - self._totals[-1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still while the context is open."""
        start = time.time()
        try:
            yield
        finally:
            self._starts.append(start - self._begun)
            self._totals.append(self._totals[-1] + time.time() - start)

    def without_pauses(self, seconds: float) -> float:
        """Seconds since the clock was made as seconds of work."""
        before = bisect_right(self._starts, seconds)
        if before == 0:
            return seconds
        pause = self._totals[before] - self._totals[before - 1]
        inside = min(pause, seconds - self._starts[before - 1])
        return seconds - self._totals[before - 1] - inside
