"""Measures one warm window of a configuration: its memory, its time, its way through time."""

from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.failure import ProfileError
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.profiling.profile import profile_strategies, profile_window
from tbptt_ckpt.profiling.progress import Progress, Watch, unwatched
from tbptt_ckpt.profiling.sweep import sweep, with_baselines
from tbptt_ckpt.profiling.work import Work, Workload

__all__ = [
    "Configuration",
    "ProcessBench",
    "ProfileError",
    "Progress",
    "Watch",
    "Work",
    "Workload",
    "profile_strategies",
    "profile_window",
    "sweep",
    "unwatched",
    "with_baselines",
]
