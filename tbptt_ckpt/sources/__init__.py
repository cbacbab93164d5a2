"""Where steps come from: tensors, files, lanes, and anything with `read(start, stop)`."""

from tbptt_ckpt.sources.protocol import (
    Source,
    as_tensors,
    check_time_dim,
    check_time_exists,
    checked_resets,
    checked_weight,
)
from tbptt_ckpt.sources.tensors import TensorSequence

__all__ = [
    "Source",
    "TensorSequence",
    "as_tensors",
    "check_time_dim",
    "check_time_exists",
    "checked_resets",
    "checked_weight",
]
