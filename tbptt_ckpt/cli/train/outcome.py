"""What a training run found; field for field what `--json` prints."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt_ckpt.cli.train.config import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Bits per byte on the same held-out bytes."""

    before: float  # training
    after: float
    bigram: float  # a table of byte pairs, fitted on the training bytes
    num_bytes: int  # predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDone:
    """What training did."""

    num_windows: int  # each with one update
    num_steps: int  # per lane
    num_passes: int  # over the training bytes, the last perhaps not complete
    recomputed_steps_per_step: float
    mean_drift: float  # relative, of a recomputed state against the recorded one
    training_bits: float  # per byte, running mean at the end
    seconds: float  # spent training, one metered window included, evaluation excluded
    steps_per_second: float  # per lane


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What the run took: tensor memory in all, and resident memory of the process."""

    window_steps: int  # of the metered window, the longest kind there was
    peak_bytes: int  # weights, gradients, optimizer state and window
    retained_peak_bytes: int | None  # with everything kept; None: the model cannot be copied
    retained_is_measured: bool  # or else extrapolated, where running that was not safe
    rss_before_bytes: int  # anything was trained
    rss_peak_bytes: int  # until training was over


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """What a run found."""

    config: TrainingConfig
    corpus: str
    num_train_bytes: int
    device: str
    num_parameters: int
    bits_per_byte: Scores
    work: WorkDone
    memory: MemoryUse
