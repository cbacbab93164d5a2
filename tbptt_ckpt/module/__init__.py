"""The user's module: how it is called, its state, and what a step reads and changes besides."""

from tbptt_ckpt.module.lifting import Lifted, lifted
from tbptt_ckpt.module.outputs import outputs_needed
from tbptt_ckpt.module.recurrent import Recurrent
from tbptt_ckpt.module.recurrent_parts import RecurrentParts, recurrent_parts

__all__ = [
    "Lifted",
    "Recurrent",
    "RecurrentParts",
    "lifted",
    "outputs_needed",
    "recurrent_parts",
]
