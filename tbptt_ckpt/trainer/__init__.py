"""A trainer for runs that must survive whatever happens to their process."""

from tbptt_ckpt.trainer.events import EventSink, Notice, UpdateEvent, WindowEvent
from tbptt_ckpt.trainer.json_lines import JsonLines
from tbptt_ckpt.trainer.options import NonFinite, OutOfMemory, Snapshots
from tbptt_ckpt.trainer.progress import TrainerResult
from tbptt_ckpt.trainer.progress_bar import ProgressBar
from tbptt_ckpt.trainer.signals import TrainingStopped
from tbptt_ckpt.trainer.tensorboard import TensorBoard
from tbptt_ckpt.trainer.trainer import Trainer
from tbptt_ckpt.trainer.validation import Validation

__all__ = [
    "EventSink",
    "JsonLines",
    "NonFinite",
    "Notice",
    "OutOfMemory",
    "ProgressBar",
    "Snapshots",
    "TensorBoard",
    "Trainer",
    "TrainerResult",
    "TrainingStopped",
    "UpdateEvent",
    "Validation",
    "WindowEvent",
]
