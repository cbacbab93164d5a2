"""The training of a run: passes over the lanes until all steps are trained."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from tbptt_ckpt import OutOfMemory, Snapshots, Trainer, WindowResult, tbptt_windows
from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.ranks import is_first
from tbptt_ckpt.cli.task import Task
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.outcome import WorkDone
from tbptt_ckpt.engine import Reach
from tbptt_ckpt.engine.options import K2_TOLERANCE
from tbptt_ckpt.memory.resident import rss_bytes
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.peaks import fullest_window, metered
from tbptt_ckpt.profiling.rounding import rounding_error
from tbptt_ckpt.profiling.sweep import Progress, Watch
from tbptt_ckpt.schedule import Plan
from tbptt_ckpt.trainer import TensorBoard
from tbptt_ckpt.trainer.events import Notice
from tbptt_ckpt.updates.ranks import RankGroup

_IDENTITY = ("model", "hidden", "layers", "seed", "dtype")  # what the trainer cannot tell
_LOSS_MEMORY = 0.98  # of the running mean that is shown


@dataclass(slots=True)
class Scorecard:
    """What is noted of a run beside the trainer's own account; saved and resumed with it."""

    loss: float = math.nan  # running mean, in the unit of the task
    first_loss: float = math.nan
    last_loss: float = math.nan
    untrained: float = math.nan  # score before training
    seconds: float = 0.0  # spent training, in all processes
    peak_bytes: int = 0  # of the metered window; 0 before it has run
    metered: tuple[int, ...] = ()  # its index, start, new_start and stop
    weights_file: str = ""  # digest of a file of --save that this run has written
    ran_out: bool = False  # of memory, now and then, and trained on with less

    def on_notice(self, event: Notice) -> None:
        """Note that memory was missing."""
        self.ran_out |= event.kind == "out_of_memory"

    def ignore(self, *_: object, **__: object) -> None:
        """Take an event that is counted elsewhere."""

    on_window = on_update = resume_at = flush = close = ignore

    def score(self, untrained: float) -> None:
        """Note how well the model predicts before it is trained."""
        self.untrained = untrained

    def meter(self, window: WindowResult, peak_bytes: int) -> None:
        """Note the peak of the metered window."""
        self.peak_bytes = peak_bytes
        self.metered = (window.index, window.start, window.new_start, window.stop)

    def own(self, weights_file: str) -> None:
        """Note a file of weights that is this run's, and may be replaced by it."""
        self.weights_file = weights_file

    def add(self, loss: float | None, seconds: float) -> None:
        """Note the loss of one more window, if it had one, and the time up to its end."""
        self.seconds = seconds
        if loss is None:
            return
        if math.isnan(self.first_loss):
            self.first_loss = self.loss = loss
        self.last_loss, self.loss = loss, _LOSS_MEMORY * self.loss + (1 - _LOSS_MEMORY) * loss

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a snapshot."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in self.__slots__:  # there were others once
            setattr(self, name, state.get(name, getattr(self, name)))


class TrainingLoop:
    """Trains a task; one window of the first pass is metered."""

    def __init__(self, config: TrainingConfig, task: Task) -> None:
        self._config, self._task, work = config, task, task.workload
        self._work, self.scorecard = work, Scorecard()
        self._reach: Reach | None = None  # as this process has measured it
        self._last: tuple[Plan, int] | None = None  # the plan of a window, and how far back
        num_steps = min(len(work.source), config.max_steps)
        most = config.max_k2 if isinstance(config.k2, str) else config.k2
        self._metered = fullest_window(tbptt_windows(num_steps, config.k1, most))
        sinks = []
        if config.tensorboard is not None and is_first():
            sinks.append(TensorBoard(config.tensorboard))
        snapshots = None
        if config.snapshot_dir is not None:
            snapshots = Snapshots(
                directory=config.snapshot_dir,
                every_steps=config.snapshot_every,
                every_minutes=config.snapshot_minutes,
                keep=config.keep,
            )
        self._trainer = Trainer(
            work.engine(
                config.k1,
                config.k2,
                max_k2=config.max_k2,
                k2_tolerance=config.k2_tolerance or K2_TOLERANCE,
                overlap=config.overlap,
                truncation=config.truncation,
                strategy=config.strategy,
                memory_budget=config.budget,
                executor=config.stored(config.executor),
                compile=options.read_compile(config.compile),
                ranks="all" if dist.is_initialized() else None,
            ),
            work.source,
            init_state=work.init_state,
            epochs=None,
            max_steps=config.max_steps,
            snapshots=snapshots,
            # The copy it takes may be what the memory of the run is judged by.
            out_of_memory=OutOfMemory(protect_update=config.snapshot_dir is not None),
            events=[self.scorecard, *sinks],
            extra={"tally": self.scorecard},
            identity={name: getattr(config, name) for name in _IDENTITY},
        )

    @property
    def ranks(self) -> RankGroup | None:
        """Those that train together."""
        return self._trainer.tbptt.parts.updater.deliveries.ranks

    def resume(self) -> int | None:
        """The step of the newest valid snapshot, from which to go on; None where there is none."""
        if not self._trainer.resume(accept=self._config.accept):
            return None
        if not self.scorecard.peak_bytes:  # the metered window is still to come, whichever it is
            self._metered = max(self._metered, self._trainer.result().num_windows)
        return self._trainer.num_steps

    def run(self, watch: Watch) -> WorkDone:
        """Train for `max_steps` steps, telling `watch` after every window."""
        scorecard, began = self.scorecard, time.perf_counter() - self.scorecard.seconds
        windows, unit = self._trainer.windows(), self._task.unit
        while (window := self._next(windows)) is not None:
            loss = None if window.loss is None else float(window.loss) / self._task.unit_size
            scorecard.add(loss, time.perf_counter() - began)
            self._reach = window.reach or self._reach
            if window.plan is not None and window.num_new_steps == self._config.k1:
                self._last = window.plan, window.stop - window.start
            speed = self._trainer.num_steps / scorecard.seconds
            shown = figures(scorecard.loss, unit, speed, memory_in_use(self._work.device))
            watch(self.progress("training", shown))
        done = self._trainer.result()
        return WorkDone(
            num_windows=done.num_windows,
            num_steps=done.num_steps,
            num_passes=done.num_epochs + 1,  # the last counts, complete or not
            recomputed_steps_per_step=done.recomputed_steps / done.num_steps,
            mean_drift=done.mean_drift,
            reach=self._reach,
            first_loss=scorecard.first_loss,
            last_loss=scorecard.last_loss,
            seconds=scorecard.seconds,
            steps_per_second=done.num_steps / scorecard.seconds,
        )

    def gradient_error(self) -> float | None:
        """What rounded states change in the gradient of the last window, at today's weights.

        None where none are rounded, where windows reach back by what is measured or drawn, or
        this process ran none.
        """
        config = self._config
        if self._last is None or config.truncation != "fixed" or config.k2 == "auto":
            return None
        plan, k2 = self._last
        configuration = Configuration(
            strategy=config.strategy,
            k1=config.k1,
            k2=k2,
            overlap=config.overlap,
            executor=config.stored(config.executor),
        )
        return rounding_error(self._work, configuration, plan)

    def progress(self, stage: str, shown: str = "") -> Progress:
        """Where the run stands."""
        return Progress(stage, self._trainer.num_steps, self._config.max_steps, shown)

    def _next(self, windows: Iterator[WindowResult]) -> WindowResult | None:
        """The next window; it runs inside this call, under the meter if its turn has come."""
        if self._trainer.result().num_windows != self._metered:
            return next(windows, None)
        window, peak_bytes = metered(self._work, lambda: next(windows, None))
        if window is not None:
            self.scorecard.meter(window, peak_bytes)
        return window


def figures(loss: float, unit: str, steps_per_second: float, memory_bytes: int) -> str:
    """Loss, speed and memory so far, in words for people."""
    speed = f"{steps_per_second:,.0f} steps/s"
    return f"{loss:.3f} {unit}  {speed}  {format_bytes(memory_bytes)}"


def memory_in_use(device: torch.device) -> int:
    """Resident memory of the process, or what tensors take on an accelerator."""
    if device.type == "cpu":
        return rss_bytes().total
    return torch.accelerator.memory_allocated(device)
