"""Measures one warm window of a configuration: its memory, its time, its way through time."""

from tbptt_ckpt.profiling.configuration import Configuration, ProfileError
from tbptt_ckpt.profiling.front import pareto_front
from tbptt_ckpt.profiling.measured_reach import MeasuredReach, measure_reach
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.profile import profile_strategies, profile_window
from tbptt_ckpt.profiling.report import MemoryReport
from tbptt_ckpt.profiling.strategy_report import StrategyReport
from tbptt_ckpt.profiling.sweep import Progress, sweep, with_baselines
from tbptt_ckpt.profiling.workload import Workload

__all__ = [
    "Configuration",
    "MeasuredReach",
    "MemoryReport",
    "ProcessBench",
    "ProfileError",
    "Progress",
    "StrategyReport",
    "Workload",
    "measure_reach",
    "pareto_front",
    "profile_strategies",
    "profile_window",
    "sweep",
    "with_baselines",
]
