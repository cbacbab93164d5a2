"""Runs the windows of a sequence: `TBPTT`, one window, evaluation, verification."""

from tbptt_ckpt.engine.evaluation import Evaluation, evaluate
from tbptt_ckpt.engine.initial_state import SharedState
from tbptt_ckpt.engine.reach import Border, Decay, Reach
from tbptt_ckpt.engine.reach_rule import ChosenK2
from tbptt_ckpt.engine.results import TrainResult, WindowFigures, WindowResult
from tbptt_ckpt.engine.single_window import run_window, unroll
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.engine.verification import Verification, verify
from tbptt_ckpt.updates.ranks import Ranks

__all__ = [
    "TBPTT",
    "Border",
    "ChosenK2",
    "Decay",
    "Evaluation",
    "Ranks",
    "Reach",
    "SharedState",
    "TrainResult",
    "Verification",
    "WindowFigures",
    "WindowResult",
    "evaluate",
    "run_window",
    "unroll",
    "verify",
]
