"""Run a schedule: explicit replay of one leaf at a time, or nested checkpoints."""

from tbptt_ckpt.executor.checkpoint import CheckpointedSpans, CheckpointExecutor
from tbptt_ckpt.executor.replay import ReplayExecutor
from tbptt_ckpt.executor.spans import parse_spans
from tbptt_ckpt.executor.window_run import (
    UNOBSERVED,
    Executor,
    Observer,
    StateGrads,
    WeightGuard,
    WindowRun,
)

__all__ = [
    "UNOBSERVED",
    "CheckpointExecutor",
    "CheckpointedSpans",
    "Executor",
    "Observer",
    "ReplayExecutor",
    "StateGrads",
    "WeightGuard",
    "WindowRun",
    "parse_spans",
]
