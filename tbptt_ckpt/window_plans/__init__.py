"""Who plans the windows of a run: a fixed strategy, or costs that are measured and corrected."""

from tbptt_ckpt.window_plans.costed import CostedPlans
from tbptt_ckpt.window_plans.fixed import FixedPlans
from tbptt_ckpt.window_plans.requests import (
    PlannedWindow,
    Request,
    Shape,
    WindowPlans,
    fullest_shape,
)

__all__ = [
    "CostedPlans",
    "FixedPlans",
    "PlannedWindow",
    "Request",
    "Shape",
    "WindowPlans",
    "fullest_shape",
]
