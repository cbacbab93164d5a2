"""Runs warm windows of one configuration: plain ones to time, and one under the meter."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from tbptt_ckpt.devices import check_on_one
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.memory.exhausted import release_memory
from tbptt_ckpt.memory.meter import PeakMeter, peak_memory
from tbptt_ckpt.memory.reading import reading
from tbptt_ckpt.memory.resident import RssSampler, rss_bytes
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.recurrence import parameters_of
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.profiling.configuration import Configuration, bench_error
from tbptt_ckpt.profiling.predicting import predicted, with_predictions
from tbptt_ckpt.profiling.report import MemoryReport, WindowTrace
from tbptt_ckpt.profiling.rounding import rounding_error
from tbptt_ckpt.profiling.stopwatch import ActionWatch
from tbptt_ckpt.profiling.workload import EndlessSource, Workload
from tbptt_ckpt.schedule.simulator import Simulation

# The first update makes the optimizer's state and the second finds it warm.
_WARM_UPDATES = 2
_MOST_WARM_UPDATES = 16

T = TypeVar("T")


class WindowBench:
    """Runs warm windows of one configuration, one at a time.

    Windows without targets lead up to the first one that reaches back all of `k2` steps and
    does not touch the start of the sequence, so that it is like those in the middle of a run.
    Weights and optimizer of the work change as in training.
    """

    def __init__(self, work: Workload, configuration: Configuration) -> None:
        self._work, self._configuration = work, configuration
        check_on_one("a profile", parameters_of(work.module))
        self._device = work.device
        k1, k2 = configuration.k1, configuration.k2
        self._silent_windows = max(0, k2 // k1)
        self._source = EndlessSource(work.source, self._silent_windows * k1)
        self._watch = ActionWatch(work.device)
        self._engine = work.engine(
            k1,
            k2,
            strategy=configuration.strategy,
            memory_budget=configuration.budget_bytes,
            overlap=configuration.overlap,
            executor=configuration.executor,
            time_batching=configuration.time_batching,
            observer=self._watch,
        )
        self._running: Iterator[WindowResult] | None = None

    def warm_up(self) -> tuple[int, int]:
        """Run the first windows; resident bytes of the process before, and at their peak."""
        before = rss_bytes().total
        with RssSampler() as sampler:
            self.time_window()
        return before, sampler.peak_bytes

    def time_window(self) -> float:
        """Seconds of one more window and its update; warm ones run first if none has."""
        if self._running is None:
            self._running = self._warm_windows()
        gc.collect()
        gc.disable()
        try:
            self._synchronize()
            begun = time.perf_counter()
            next(self._running)
            self._synchronize()
            return time.perf_counter() - begun
        finally:
            gc.enable()

    def measure(self, *, trace: bool = False) -> MemoryReport:
        """One warm window under the meter, and then what short segments predict for it."""
        self._running = None
        release_memory()  # what allocators keep of other windows is none of this one's
        window, meter, before_bytes = self._metered_window()
        peak_bytes = before_bytes + meter.peak_bytes
        costs, found = predicted(
            self._work, self._engine.parts, window, self._configuration, peak_bytes
        ) or (None, None)
        data = self._source.read(window.first, window.stop)  # read when the window begins
        return self._configuration.report(
            device=str(self._device),
            peak_bytes=peak_bytes,
            fixed_bytes=before_bytes + tensor_bytes(data),
            library_bytes=self._library_bytes(),
            predicted_peak_bytes=found and found.peak_bytes,
            reserved_peak_bytes=meter.reserved_peak_bytes,
            requested_peak_bytes=meter.requested_peak_bytes,
            allocation_retries=meter.allocation_retries,
            window_steps=window.stop - window.first,
            executed_steps=window.executed_steps,
            held_states=self._watch.held_states,
            kept_state_bytes=costs and costs.kept_state_bytes,
            store_seconds=costs and costs.store_seconds,
            gradient_error=window.plan
            and rounding_error(self._work, self._configuration, window.plan),
            longest_leaf=window.plan.longest_leaf if window.plan else None,
            form=window.plan.form if window.plan else None,
            forms=dict(window.plan.forms) if window.plan else {},
            trace=self._trace(meter, before_bytes, found) if trace else None,
        )

    def write_history(self, path: Path) -> None:
        """Run one warm window on CUDA and write PyTorch's memory history of it."""
        windows = self._warm_windows()
        # The viewer groups by Python's frames; C++ ones take long to find names for.
        torch.cuda.memory._record_memory_history(stacks="python")
        try:
            next(windows)
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _metered_window(self) -> tuple[WindowResult, PeakMeter, int]:
        """A warm window, its meter, and the tensor bytes that were live before it."""
        held, device = self._held(), self._device
        base = tensor_bytes(*held, grads=True, device=device) + self._library_bytes()
        with peak_memory(device, held=held, rss=False) as outer:
            with reading(outer.flush):
                windows = self._warm_windows()
            outer.flush()
            before = base + outer.net_bytes
            with (
                peak_memory(device, held=(), rss=False) as meter,
                self._watch.watching(meter, before),
                reading(self._watch.read),
            ):
                return next(windows), meter, before

    def _warm_windows(self) -> Iterator[WindowResult]:
        """An iterator over windows whose next one is warm."""
        windows = iter(self._engine.windows(self._source, self._work.init_state))
        for _ in range(self._silent_windows):
            next(windows)
        for number in range(1, _MOST_WARM_UPDATES):
            is_metered = next(windows).peak_bytes is not None  # to correct its plan
            if number >= _WARM_UPDATES and not is_metered:
                break
        return windows

    def _library_bytes(self) -> int:
        return self._engine.parts.budget.library_bytes(self._device)

    def _held(self) -> tuple[object, ...]:
        """The trees of tensors that are there before a sequence begins."""
        return (*self._work.held(), self._engine.parts.updater.grad_norm)

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _trace(self, meter: PeakMeter, before_bytes: int, found: Simulation | None) -> WindowTrace:
        """The metered window in time."""
        clock, spans = self._watch.clock, self._watch.spans
        points = [
            (clock.without_pauses(seconds), before_bytes + live) for seconds, live in meter.timeline
        ]
        for span in spans:  # the meter thins old points most
            points.append((span.began_seconds, span.live_bytes))
            points.append((span.gradient_seconds or span.ended_seconds, span.peak_bytes))
        points.sort()
        return WindowTrace(points[-1][0], tuple(points), with_predictions(spans, found))


class BenchHere:
    """A `WindowBench` in this process, on copies; what is copied stays as it is."""

    def __init__(self, work: Workload, configuration: Configuration) -> None:
        self._work, self._configuration = work, configuration
        self._bench: WindowBench | None = None

    def ask(self, request: Callable[[WindowBench], T]) -> T:
        """What a request returns; the `WindowBench` is made for the first one."""
        try:
            with untouched(self._work.module, tensors=tensors_of(self._work.init_state)):
                if self._bench is None:
                    self._bench = WindowBench(self._work.copied(), self._configuration)
                return request(self._bench)
        except Exception as error:
            raise bench_error(error, traceback.format_exc()) from error
