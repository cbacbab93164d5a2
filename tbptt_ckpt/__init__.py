"""Truncated backpropagation through time with overlapping windows and bounded memory.

Here is what most programs use. A name is made when it is first asked for, so that importing the
package imports neither torch nor any room.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbptt_ckpt.budget import measure_costs
    from tbptt_ckpt.data import ArraySequence, Batches, BurnIn, LaneSource, TensorSequence
    from tbptt_ckpt.engine import (
        TBPTT,
        SharedState,
        TrainResult,
        WindowResult,
        evaluate,
        run_window,
        unroll,
        verify,
    )
    from tbptt_ckpt.errors import (
        ArgumentError,
        InfeasibleBudgetError,
        NonFiniteError,
        OutOfMemoryError,
        ScheduleError,
        SnapshotError,
        StaleWeightsError,
        TbpttError,
        TbpttWarning,
    )
    from tbptt_ckpt.memory import peak_memory
    from tbptt_ckpt.module import Recurrent
    from tbptt_ckpt.planner import plan
    from tbptt_ckpt.profiling import Workload, profile_strategies, profile_window
    from tbptt_ckpt.schedule import Costs, Plan, Revolve, Uniform, simulate, tbptt_windows
    from tbptt_ckpt.trainer import NonFinite, OutOfMemory, Snapshots, Trainer, Validation

__all__ = [
    "TBPTT",
    "ArgumentError",
    "ArraySequence",
    "Batches",
    "BurnIn",
    "Costs",
    "InfeasibleBudgetError",
    "LaneSource",
    "NonFinite",
    "NonFiniteError",
    "OutOfMemory",
    "OutOfMemoryError",
    "Plan",
    "Recurrent",
    "Revolve",
    "ScheduleError",
    "SharedState",
    "SnapshotError",
    "Snapshots",
    "StaleWeightsError",
    "TbpttError",
    "TbpttWarning",
    "TensorSequence",
    "TrainResult",
    "Trainer",
    "Uniform",
    "Validation",
    "WindowResult",
    "Workload",
    "evaluate",
    "measure_costs",
    "peak_memory",
    "plan",
    "profile_strategies",
    "profile_window",
    "run_window",
    "simulate",
    "tbptt_windows",
    "unroll",
    "verify",
]

# From the ground up: a name whose room knows no torch is made without it.
_ROOMS = (
    *("errors", "schedule", "planner", "memory", "module"),
    *("data", "budget", "engine", "profiling", "trainer"),
)


if not TYPE_CHECKING:  # a checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """Make a public name when it is first asked for, by the room where it is public."""
        if name in __all__:
            for room in _ROOMS:
                module = import_module(f"{__name__}.{room}")
                if name in module.__all__:
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, made or not."""
    return sorted({*globals(), *__all__})
