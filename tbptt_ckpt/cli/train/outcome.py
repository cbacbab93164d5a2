"""What a training run found, field for field what `--json` prints, and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from tbptt_ckpt.cli.terminal import figure_table
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.engine import Reach
from tbptt_ckpt.memory.sizes import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Losses on the same held-out data; NaN where there is none."""

    unit: str
    before: float  # training
    after: float
    baseline: float | None  # what a trained model should beat
    baseline_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkDone:
    """What training did."""

    num_windows: int  # each with one update
    num_steps: int  # per lane
    num_passes: int  # over the training data, the last perhaps not complete
    recomputed_steps_per_step: float
    mean_drift: float  # relative, of a recomputed state against the recorded one
    reach: Reach | None  # of the gradient of the last window in which it was measured
    first_loss: float  # of a window, in the unit of the scores
    last_loss: float
    seconds: float  # spent training, one metered window included, evaluation excluded
    steps_per_second: float  # per lane


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What the run took: tensor memory in all, and resident memory of the process."""

    window_steps: int  # of the metered window, the longest kind there was
    peak_bytes: int  # weights, gradients, optimizer state and window
    peak_bytes_of_ranks: tuple[int | None, ...] | None  # the same of each; None: one process
    retained_peak_bytes: int | None  # with everything kept; None: not measured
    retained_is_measured: bool  # or else extrapolated, where running that was not safe
    rss_before_bytes: int  # anything was trained
    rss_peak_bytes: int  # until training was over


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """What a run found."""

    config: TrainingConfig
    data: str
    num_train_steps: int  # per lane
    device: str
    num_parameters: int
    scores: Scores
    resumed_step: int | None  # where this process took the run up
    work: WorkDone
    gradient_error: float | None  # relative, by states in fewer bits; None: not measured
    memory: MemoryUse


def print_outcome(outcome: TrainingOutcome) -> None:
    """Print the outcome as a table on the standard output."""
    config = outcome.config
    reach = "the start" if config.k2 is None else f"{config.max_k2 or config.k2:,}"
    if config.k2 == "auto":
        reach = f"auto up to {reach}"
    if config.truncation != "fixed":
        reach += f" by {config.truncation}"
    caption = (
        f"k1={config.k1:,}, k2={reach}, {config.strategy}, {config.overlap} overlap, "
        f"{outcome.num_parameters:,} parameters"
    )
    title = f"{config.model} on {outcome.data}, {outcome.device}"
    Console().print(figure_table(title, outcome_rows(outcome), caption))


def outcome_rows(outcome: TrainingOutcome) -> list[tuple[str, str]]:
    """What the table says, line by line."""
    work, memory = outcome.work, outcome.memory
    retained = f"the same window of {memory.window_steps:,} steps retained"
    if memory.retained_peak_bytes is None:
        how, peak = "", "not measured: memory is missing, or the model cannot be copied"
    else:
        how = "" if memory.retained_is_measured else ", extrapolated"
        peak = format_bytes(memory.retained_peak_bytes)
    return [
        *_resumed_rows(outcome),
        *_score_rows(outcome),
        ("windows (one update each)", f"{work.num_windows:,}"),
        ("time steps per lane", f"{work.num_steps:,}"),
        ("passes over the training data", f"{work.num_passes:,}"),
        ("recomputed steps per step", f"{work.recomputed_steps_per_step:.3f}"),
        ("mean drift of recomputed states", f"{work.mean_drift:.2e}"),
        *([] if work.reach is None else [("gradient reaches back, at last", str(work.reach))]),
        *_rounding_rows(outcome),
        ("time training", f"{work.seconds:.1f} s"),
        ("time steps per second", f"{work.steps_per_second:,.0f}"),
        ("peak tensor memory", format_bytes(memory.peak_bytes)),
        *_rank_rows(memory.peak_bytes_of_ranks or ()),
        (retained + how, peak),
        ("resident memory before training", format_bytes(memory.rss_before_bytes)),
        ("resident memory at its peak", format_bytes(memory.rss_peak_bytes)),
    ]


def _resumed_rows(outcome: TrainingOutcome) -> list[tuple[str, str]]:
    step, last = outcome.resumed_step, outcome.work.num_steps
    if step is None:
        return []
    if step == last:
        return [("resumed", f"at step {step:,}, finished before")]
    return [("resumed", f"at step {step:,} of {last:,}")]


def _rounding_rows(outcome: TrainingOutcome) -> list[tuple[str, str]]:
    error, dtype = outcome.gradient_error, outcome.config.state_dtype
    return [] if error is None else [(f"gradient off by states in {dtype}", f"{error:.1e}")]


def _rank_rows(peaks: Sequence[int | None]) -> list[tuple[str, str]]:
    return [
        (f"the same of rank {rank}", format_bytes(peak))
        for rank, peak in enumerate(peaks)
        if rank and peak is not None
    ]


def _score_rows(outcome: TrainingOutcome) -> list[tuple[str, str]]:
    scores, work = outcome.scores, outcome.work
    if math.isnan(scores.after):
        losses = [("first window", work.first_loss), ("last window", work.last_loss)]
        return [(f"training {scores.unit}, {when}", f"{loss:.4g}") for when, loss in losses]
    rows = [
        (f"held-out {scores.unit} before training", f"{scores.before:.3f}"),
        (f"held-out {scores.unit} after training", f"{scores.after:.3f}"),
    ]
    if scores.baseline is not None:
        rows.append((scores.baseline_name, f"{scores.baseline:.3f}"))
    return rows


def outcome_json(outcome: TrainingOutcome) -> str:
    """The outcome as one JSON object on one line; keys as in `TrainingOutcome`."""
    return json.dumps(_finite(asdict(outcome)), allow_nan=False, default=str)  # paths


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
