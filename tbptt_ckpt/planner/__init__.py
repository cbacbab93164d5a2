"""From bytes to the fastest schedule that fits them; pure arithmetic."""

from tbptt_ckpt.planner.feasibility import Demand, largest_steps, smallest_budget
from tbptt_ckpt.planner.search import fastest_nestings

__all__ = ["Demand", "fastest_nestings", "largest_steps", "smallest_budget"]
