"""Where steps come from: tensors, files, lanes, and anything with `read(start, stop)`."""

from tbptt_ckpt.data.arrays import ArraySequence, map_file
from tbptt_ckpt.data.burn_in import BurnIn
from tbptt_ckpt.data.lanes import LaneSource
from tbptt_ckpt.data.source import (
    Source,
    as_tensors,
    check_range,
    check_same_source,
    check_time_dim,
    check_time_exists,
    checked_resets,
    checked_weight,
    rows_of,
)
from tbptt_ckpt.data.tensors import TensorSequence

__all__ = [
    "ArraySequence",
    "BurnIn",
    "LaneSource",
    "Source",
    "TensorSequence",
    "as_tensors",
    "check_range",
    "check_same_source",
    "check_time_dim",
    "check_time_exists",
    "checked_resets",
    "checked_weight",
    "map_file",
    "rows_of",
]
