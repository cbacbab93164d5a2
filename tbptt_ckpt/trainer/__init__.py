"""A trainer for runs that must survive whatever happens to their process."""

from tbptt_ckpt.trainer.options import NonFinite, OutOfMemory, Snapshots
from tbptt_ckpt.trainer.progress import TrainerResult
from tbptt_ckpt.trainer.signals import TrainingStopped
from tbptt_ckpt.trainer.trainer import Trainer

__all__ = [
    "NonFinite",
    "OutOfMemory",
    "Snapshots",
    "Trainer",
    "TrainerResult",
    "TrainingStopped",
]
