"""Products over all steps of a segment instead of one per step, for modules that take steps."""

from tbptt_ckpt.time_batching.policy import BatchedOperation, TimeBatching

__all__ = ["BatchedOperation", "TimeBatching"]
