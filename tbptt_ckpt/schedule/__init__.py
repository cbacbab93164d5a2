"""Schedules as data: windows, actions, nestings, plans, and what they cost; pure."""

from tbptt_ckpt.schedule.actions import Advance, Differentiate, Drop, Keep, Schedule
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.schedule.curves import Curve
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.simulator import Simulation, simulate
from tbptt_ckpt.schedule.strategies import Retain, Revolve, Sqrt, Step, Uniform, parse_strategy
from tbptt_ckpt.schedule.windows import Window, tbptt_windows

__all__ = [
    "Advance",
    "Costs",
    "Curve",
    "Differentiate",
    "Drop",
    "FixedBytes",
    "Keep",
    "Plan",
    "Retain",
    "Revolve",
    "Schedule",
    "Simulation",
    "Sqrt",
    "Step",
    "Uniform",
    "Window",
    "parse_strategy",
    "simulate",
    "tbptt_windows",
]
