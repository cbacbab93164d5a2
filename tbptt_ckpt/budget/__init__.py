"""What a module costs, measured on a few short segments of the user's own data."""

from tbptt_ckpt.budget.calibrate import Limits, calibrate
from tbptt_ckpt.budget.costed_plans import CostedPlans
from tbptt_ckpt.budget.fixed_plans import FixedPlans
from tbptt_ckpt.budget.planned_window import (
    PlannedWindow,
    Request,
    Shape,
    WindowPlans,
    fullest_shape,
)
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.update_bytes import UpdateBytes, update_bytes

__all__ = [
    "CostedPlans",
    "FixedPlans",
    "Limits",
    "PlannedWindow",
    "Request",
    "SegmentProbe",
    "Shape",
    "UpdateBytes",
    "WindowPlans",
    "calibrate",
    "fullest_shape",
    "update_bytes",
]
