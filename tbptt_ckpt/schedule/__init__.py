"""Schedules as data: windows, actions, nestings, plans, and what they cost; pure."""

from tbptt_ckpt.schedule.actions import Advance, Differentiate, Drop, Keep, Schedule
from tbptt_ckpt.schedule.costs import Costs, FixedBytes
from tbptt_ckpt.schedule.curves import Curve
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.roulette_price import RoulettePrice, fitted_roulette, roulette_price
from tbptt_ckpt.schedule.simulator import Simulation, simulate
from tbptt_ckpt.schedule.strategies import Retain, Revolve, Sqrt, Step, Uniform, parse_strategy
from tbptt_ckpt.schedule.truncation import Roulette, parse_truncation
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
    "Roulette",
    "RoulettePrice",
    "Schedule",
    "Simulation",
    "Sqrt",
    "Step",
    "Uniform",
    "Window",
    "fitted_roulette",
    "parse_strategy",
    "parse_truncation",
    "roulette_price",
    "simulate",
    "tbptt_windows",
]
