"""What an accelerator's allocator took for a row; one that is made up stands in for it."""

from __future__ import annotations

import torch
from torch import nn

from tbptt_ckpt import profile_window
from tbptt_ckpt.memory import exhausted
from tbptt_ckpt.memory.meter import PeakMeter, peak_memory
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling import bench
from tbptt_ckpt.profiling.predicting import predicted
from tbptt_ckpt.profiling.table import table_of


class Caching:
    """Takes twice what is asked for, and keeps it until its cache is emptied."""

    def __init__(self, monkeypatch, kept):
        self.kept, observe = kept, PeakMeter._observe

        def observed(meter, *events):
            observe(meter, *events)
            self.kept = max(self.kept, 2 * meter.peak_bytes)
            meter.reserved_peak_bytes, meter.requested_peak_bytes = self.kept, meter.peak_bytes

        monkeypatch.setattr(PeakMeter, "_observe", observed)
        monkeypatch.setattr(exhausted, "empty_cache", self.empty)

    def empty(self):
        self.kept = 0


def test_a_row_says_what_it_reserved_and_nothing_of_what_else_ran(monkeypatch):
    Caching(monkeypatch, kept=1 << 30)

    def foretold(*given):
        with peak_memory():
            torch.zeros(1 << 20, dtype=torch.uint8)
        return predicted(*given)

    monkeypatch.setattr(bench, "predicted", foretold)
    inputs, targets = torch.randn(8, 4, 3), torch.randn(8, 4, 32)
    row = profile_window(
        nn.GRUCell(3, 32), nn.functional.mse_loss, inputs, targets, k1=8, k2=8, repeats=1
    )
    assert 0 < 2 * row.requested_peak_bytes <= row.reserved_peak_bytes < 1 << 20
    shown = table_of([row], "", {}, 200)
    assert "reserved" in shown
    assert format_bytes(row.reserved_peak_bytes) in shown
