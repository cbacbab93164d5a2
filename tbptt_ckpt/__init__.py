"""Truncated backpropagation through time with overlapping windows and bounded memory."""

from tbptt_ckpt.costs import Costs, Curve, FixedBytes
from tbptt_ckpt.engine import TBPTT
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
from tbptt_ckpt.evaluation import Evaluation, evaluate
from tbptt_ckpt.events import EventSink, JsonLines, Notice, TensorBoard, UpdateEvent, WindowEvent
from tbptt_ckpt.initial_state import SharedState
from tbptt_ckpt.measured_costs import measure_costs
from tbptt_ckpt.outputs import outputs_needed
from tbptt_ckpt.planning import plan
from tbptt_ckpt.plans import Plan
from tbptt_ckpt.profiling import profile_strategies, profile_window
from tbptt_ckpt.report import MemoryReport, StrategyReport
from tbptt_ckpt.results import TrainResult, WindowResult
from tbptt_ckpt.schedule import Advance, Differentiate, Drop, Keep, Schedule
from tbptt_ckpt.simulator import Simulation, simulate
from tbptt_ckpt.single_window import WindowGradient, run_window, unroll
from tbptt_ckpt.sources import (
    ArraySequence,
    BurnIn,
    LaneSource,
    Source,
    TensorSequence,
    map_file,
)
from tbptt_ckpt.strategies import Retain, Revolve, Sqrt, Step, Uniform
from tbptt_ckpt.trainer import (
    NonFinite,
    OutOfMemory,
    Snapshots,
    Trainer,
    TrainerResult,
    TrainingStopped,
)
from tbptt_ckpt.verification import Verification, verify
from tbptt_ckpt.windows import Window, tbptt_windows

__all__ = [
    "TBPTT",
    "Advance",
    "ArgumentError",
    "ArraySequence",
    "BurnIn",
    "Costs",
    "Curve",
    "Differentiate",
    "Drop",
    "Evaluation",
    "EventSink",
    "FixedBytes",
    "InfeasibleBudgetError",
    "JsonLines",
    "Keep",
    "LaneSource",
    "MemoryReport",
    "NonFinite",
    "NonFiniteError",
    "Notice",
    "OutOfMemory",
    "OutOfMemoryError",
    "Plan",
    "Retain",
    "Revolve",
    "Schedule",
    "ScheduleError",
    "SharedState",
    "Simulation",
    "SnapshotError",
    "Snapshots",
    "Source",
    "Sqrt",
    "StaleWeightsError",
    "Step",
    "StrategyReport",
    "TbpttError",
    "TbpttWarning",
    "TensorBoard",
    "TensorSequence",
    "TrainResult",
    "Trainer",
    "TrainerResult",
    "TrainingStopped",
    "Uniform",
    "UpdateEvent",
    "Verification",
    "Window",
    "WindowEvent",
    "WindowGradient",
    "WindowResult",
    "evaluate",
    "map_file",
    "measure_costs",
    "outputs_needed",
    "plan",
    "profile_strategies",
    "profile_window",
    "run_window",
    "simulate",
    "tbptt_windows",
    "unroll",
    "verify",
]
