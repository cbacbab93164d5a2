"""Where steps come from: tensors, files, lanes, and anything with `read(start, stop)`."""

from tbptt_ckpt.data.arrays import ArraySequence, map_file
from tbptt_ckpt.data.batches import Batches
from tbptt_ckpt.data.burn_in import BurnIn
from tbptt_ckpt.data.lane_share import lane_range, own_lanes
from tbptt_ckpt.data.lanes import LaneSource
from tbptt_ckpt.data.source import Source
from tbptt_ckpt.data.tensors import TensorSequence

__all__ = [
    "ArraySequence",
    "Batches",
    "BurnIn",
    "LaneSource",
    "Source",
    "TensorSequence",
    "lane_range",
    "map_file",
    "own_lanes",
]
