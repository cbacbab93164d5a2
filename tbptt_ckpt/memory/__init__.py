"""What memory is used, exactly: peaks over a region, bytes held by tensors, bytes still free."""

from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.meter import Lap, PeakMeter, can_measure, peak_memory
from tbptt_ckpt.memory.resident import RssBytes, RssSampler, rss_bytes
from tbptt_ckpt.memory.sizes import format_bytes, parse_bytes
from tbptt_ckpt.memory.storages import tensor_bytes

__all__ = [
    "Lap",
    "PeakMeter",
    "RssBytes",
    "RssSampler",
    "can_measure",
    "format_bytes",
    "free_memory",
    "parse_bytes",
    "peak_memory",
    "rss_bytes",
    "tensor_bytes",
]
