"""Truncated backpropagation through time with overlapping windows and bounded memory."""

from tbptt_ckpt.budget.measure import measure_costs
from tbptt_ckpt.data.arrays import ArraySequence, map_file
from tbptt_ckpt.data.burn_in import BurnIn
from tbptt_ckpt.data.lanes import LaneSource
from tbptt_ckpt.data.source import Source
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.engine.evaluation import Evaluation, evaluate
from tbptt_ckpt.engine.initial_state import SharedState
from tbptt_ckpt.engine.results import TrainResult, WindowResult
from tbptt_ckpt.engine.single_window import WindowGradient, run_window, unroll
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.engine.verification import Verification, verify
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
from tbptt_ckpt.module.outputs import outputs_needed
from tbptt_ckpt.planner.fastest import plan
from tbptt_ckpt.profiling.profile import profile_strategies, profile_window
from tbptt_ckpt.profiling.report import MemoryReport, StrategyReport
from tbptt_ckpt.schedule.actions import Advance, Differentiate, Drop, Keep, Schedule
from tbptt_ckpt.schedule.costs import Costs, Curve, FixedBytes
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.simulator import Simulation, simulate
from tbptt_ckpt.schedule.strategies import Retain, Revolve, Sqrt, Step, Uniform
from tbptt_ckpt.schedule.windows import Window, tbptt_windows
from tbptt_ckpt.trainer.events import EventSink, Notice, UpdateEvent, WindowEvent
from tbptt_ckpt.trainer.json_lines import JsonLines
from tbptt_ckpt.trainer.options import NonFinite, OutOfMemory, Snapshots
from tbptt_ckpt.trainer.progress import TrainerResult
from tbptt_ckpt.trainer.signals import TrainingStopped
from tbptt_ckpt.trainer.tensorboard import TensorBoard
from tbptt_ckpt.trainer.trainer import Trainer

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
