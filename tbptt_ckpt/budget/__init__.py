"""Keeps a run within its bytes: measures what windows take, plans them, and corrects."""

from tbptt_ckpt.budget.measure import measure_costs

__all__ = [
    "measure_costs",
]
