"""The loop over windows: passes over the lanes until all steps are trained, and what it counts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tbptt_ckpt import OutOfMemory, Snapshots, Trainer, WindowResult, tbptt_windows
from tbptt_ckpt.cli.bytes.contract import initial_state
from tbptt_ckpt.cli.bytes.corpus import ByteArray, ByteLanes
from tbptt_ckpt.cli.bytes.score import NATS_PER_BIT
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.engine import build_engine
from tbptt_ckpt.cli.train.outcome import Progress, Watch, Work
from tbptt_ckpt.cli.train.window_memory import fullest_window, live_bytes, metered
from tbptt_ckpt.memory.resident import rss_bytes
from tbptt_ckpt.schedule import Window

_LOSS_MEMORY = 0.98  # of the running mean that is shown


@dataclass(slots=True)
class Tally:
    """What a loop has counted so far.

    Attributes:
        num_windows: Windows run.
        num_steps: New time steps per lane.
        num_passes: Passes begun.
        recomputed_steps: Steps run again.
        drift: Sum of the windows' drifts.
        bits: Running mean of the loss, bits per byte.
        peak_bytes: Peak tensor memory of the metered window; 0 before it has run.
        metered: Index, start, new_start and stop of that window.
        seconds: Time spent training, in all processes.
        untrained_bits: How well the model predicted before it was trained, bits per byte.
    """

    num_windows: int = 0
    num_steps: int = 0
    num_passes: int = 0
    recomputed_steps: int = 0
    drift: float = 0.0
    bits: float = math.nan
    peak_bytes: int = 0
    metered: tuple[int, ...] = ()
    seconds: float = 0.0
    untrained_bits: float = math.nan

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a snapshot."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        for name, value in state.items():
            setattr(self, name, value)

    def add(self, window: WindowResult) -> None:
        """Count one more window."""
        assert window.loss is not None, "every byte has a next byte"
        bits = float(window.loss) / NATS_PER_BIT
        self.num_windows += 1
        self.num_passes += window.index == 0
        self.num_steps += window.stop - window.new_start
        self.recomputed_steps += window.recomputed_steps
        self.drift += window.drift
        first = math.isnan(self.bits)
        self.bits = bits if first else _LOSS_MEMORY * self.bits + (1 - _LOSS_MEMORY) * bits

    def work(self) -> Work:
        """The same as ratios and means."""
        return Work(
            num_windows=self.num_windows,
            num_steps=self.num_steps,
            num_passes=self.num_passes,
            recomputed_steps_per_step=self.recomputed_steps / self.num_steps,
            mean_drift=self.drift / self.num_windows,
            training_bits=self.bits,
            seconds=self.seconds,
            steps_per_second=self.num_steps / self.seconds,
        )


class TrainingLoop:
    """Trains a model on lanes of bytes; one window of the first pass is metered.

    Args:
        config: The options.
        module: The model, on its device.
        optimizer: Of its parameters.
        train: The bytes.
        device: Where the model is.
    """

    def __init__(
        self,
        config: TrainingConfig,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: ByteArray,
        device: torch.device,
    ) -> None:
        self.config, self.module, self.tally = config, module, Tally()
        self._device = device
        self.first_pass = ByteLanes(train, config.lanes, device=device, max_steps=config.max_steps)
        windows = tbptt_windows(len(self.first_pass), config.k1, config.k2)
        self._metered = fullest_window(windows)
        self.trainer = Trainer(
            build_engine(config, module, optimizer),
            ByteLanes(train, config.lanes, device=device),
            init_state=lambda: initial_state(module, config.lanes),
            epochs=None,
            max_steps=config.max_steps,
            snapshots=snapshots_of(config),
            # The copy it takes may be what the memory of the run is judged by.
            out_of_memory=OutOfMemory(protect_update=config.snapshot_dir is not None),
            extra={"tally": self.tally},
            identity=config.identity(),
        )

    @property
    def metered_window(self) -> Window:
        """The window whose memory was measured."""
        return Window(*self.tally.metered)

    def resume(self) -> bool:
        """Go on from the newest valid snapshot; False where there is none."""
        if not self.trainer.resume():
            return False
        if not self.tally.peak_bytes:  # the metered window is still to come, whichever it is
            self._metered = max(self._metered, self.tally.num_windows)
        return True

    def run(self, watch: Watch) -> Tally:
        """Train for `max_steps` steps, telling `watch` after every window."""
        began = time.perf_counter() - self.tally.seconds
        windows = self.trainer.windows()
        while (window := self._next(windows)) is not None:
            self.tally.add(window)
            self.tally.seconds = time.perf_counter() - began
            watch(self._progress())
        return self.tally

    def _next(self, windows: Iterator[WindowResult]) -> WindowResult | None:
        """The next window; it runs inside this call, under the meter if its turn has come."""
        if self.tally.num_windows != self._metered:
            return next(windows, None)
        live = live_bytes(self._device)
        with metered(self._device, self.module) as meter:
            window = next(windows, None)
        if window is not None:
            self.tally.peak_bytes = live + meter.peak_bytes
            self.tally.metered = (window.index, window.start, window.new_start, window.stop)
        return window

    def _progress(self) -> Progress:
        tally = self.tally
        return Progress(
            "training",
            tally.num_steps,
            self.config.max_steps,
            tally.bits,
            tally.num_steps / tally.seconds,
            memory_in_use(self._device),
        )


def snapshots_of(config: TrainingConfig) -> Snapshots | None:
    """When and where the options ask for snapshots."""
    if config.snapshot_dir is None:
        return None
    return Snapshots(
        directory=config.snapshot_dir,
        every_steps=config.snapshot_every,
        every_minutes=config.snapshot_minutes,
        keep=config.keep,
    )


def memory_in_use(device: torch.device) -> int:
    """Resident memory of the process, or what tensors take on an accelerator."""
    if device.type == "cpu":
        return rss_bytes().total
    return torch.accelerator.memory_allocated(device)
