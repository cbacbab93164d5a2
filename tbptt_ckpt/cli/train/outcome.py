"""What a training run found; field for field what `--json` prints."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt_ckpt.cli.train.config import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Bits per byte on the same held-out bytes.

    Attributes:
        before: The model before training.
        after: The model after training.
        bigram: A table of byte pairs, fitted on the training bytes.
        num_bytes: Bytes predicted.
    """

    before: float
    after: float
    bigram: float
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDone:
    """What training did.

    Attributes:
        num_windows: Windows, each with one update.
        num_steps: Time steps per lane.
        num_passes: Passes over the training bytes, the last perhaps not complete.
        recomputed_steps_per_step: Steps run again for every new one.
        mean_drift: Mean relative change of a recomputed state against the recorded one.
        training_bits: Running mean of the training loss at the end, bits per byte.
        seconds: Time spent training, one metered window included, evaluation excluded.
        steps_per_second: Time steps per lane and second.
    """

    num_windows: int
    num_steps: int
    num_passes: int
    recomputed_steps_per_step: float
    mean_drift: float
    training_bits: float
    seconds: float
    steps_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What the run took.

    Attributes:
        window_steps: Steps of the metered window, the longest kind there was.
        peak_bytes: Peak of tensor memory: weights, gradients, optimizer state, window.
        retained_peak_bytes: The same for that window with everything retained; None where
            the model cannot be copied to find out.
        retained_is_measured: False where running that was not safe, and the figure is
            extrapolated from shorter windows.
        rss_before_bytes: Resident memory of the process before anything was trained.
        rss_peak_bytes: Most resident memory of the process until training was over.
    """

    window_steps: int
    peak_bytes: int
    retained_peak_bytes: int | None
    retained_is_measured: bool
    rss_before_bytes: int
    rss_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """What a run found.

    Attributes:
        config: What was asked.
        corpus: Name of the text.
        num_train_bytes: Bytes there were to train on.
        device: Where it ran.
        num_parameters: Trained numbers of the model.
        bits_per_byte: How well it predicts.
        work: What training did.
        memory: What it took.
    """

    config: TrainingConfig
    corpus: str
    num_train_bytes: int
    device: str
    num_parameters: int
    bits_per_byte: Scores
    work: WorkDone
    memory: MemoryUse
