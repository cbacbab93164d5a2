"""From bytes to the fastest schedule that fits them; pure arithmetic."""

from tbptt_ckpt.planner.fastest import plan

__all__ = [
    "plan",
]
