"""The user's module: how it is called, its state, and what a step reads and changes besides."""

from tbptt_ckpt.module.outputs import outputs_needed

__all__ = ["outputs_needed"]
