"""From bytes to the fastest schedule that fits them; pure arithmetic."""

from tbptt_ckpt.planner.bounds import SecondsBound
from tbptt_ckpt.planner.feasibility import Demand, certain_budget, largest_steps, smallest_budget
from tbptt_ckpt.planner.search import fastest_nestings, is_exact

__all__ = [
    "Demand",
    "SecondsBound",
    "certain_budget",
    "fastest_nestings",
    "is_exact",
    "largest_steps",
    "smallest_budget",
]
