"""Run a schedule: explicit replay of one leaf at a time, or nested checkpoints."""

from tbptt_ckpt.executor.checkpoint import CheckpointExecutor
from tbptt_ckpt.executor.observer import ActionTrace, Observer
from tbptt_ckpt.executor.replay import ReplayExecutor
from tbptt_ckpt.executor.window_pass import Executor

__all__ = ["ActionTrace", "CheckpointExecutor", "Executor", "Observer", "ReplayExecutor"]
