"""Trains within a budget while another tool counts the tensor allocator's own calls.

    python metered_from_outside.py FOLDER copies|lanes

Prints, as JSON lines, for each strategy and module: the budget, the highest total of live tensor
bytes in each window, and the largest single allocation. The package's own meter has
no part in the count: memray writes down every call of `posix_memalign`, which is how torch's
allocator for the CPU takes memory (oneDNN, which takes some for itself, is told by its frames),
and nothing is collected by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import memray
import torch
from memray import AllocatorType
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, LaneSource, TensorSequence

STEPS, LANES, WIDTH_IN, WIDTH, K1, K2 = 448, 8, 32, 64, 32, 200
MARK_BYTES = 12_345_664  # an allocation of this size, freed at once, marks a window's end


class Copies:
    """A source as any loader is: every read is new memory."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self._inputs, self._targets = inputs, targets

    def __len__(self) -> int:
        return len(self._inputs)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._inputs[start:stop].clone(), self._targets[start:stop].clone()


def make_source(kind: str) -> Any:
    inputs, targets = torch.randn(STEPS, LANES, WIDTH_IN), torch.randn(STEPS, LANES, WIDTH)
    if kind == "copies":
        return Copies(inputs, targets)
    lanes = [TensorSequence(x, y) for x, y in zip(inputs.unbind(1), targets.unbind(1), strict=True)]
    return LaneSource(lanes + lanes[:5], lanes=LANES)


def make_module(kind: str) -> nn.Module:
    return nn.LSTMCell(WIDTH_IN, WIDTH) if kind == "cell" else nn.LSTM(WIDTH_IN, WIDTH)


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def train(source: Any, module: nn.Module, strategy: str, budget: int) -> None:
    optimizer = torch.optim.Adam(module.parameters())
    tbptt = TBPTT(
        module,
        nn.functional.mse_loss,
        K1,
        K2,
        optimizer,
        strategy=strategy,
        memory_budget=budget,
    )
    for _ in tbptt.windows(source):
        torch.empty(MARK_BYTES, dtype=torch.uint8)


def peaks(trace: Path) -> tuple[list[int], int]:
    """The highest live bytes of each window above those at the start, and the largest block."""
    live, peak, largest, found = 0, 0, 0, []
    sizes: dict[int, int] = {}
    for record in memray.FileReader(trace).get_allocation_records():
        if record.allocator == AllocatorType.POSIX_MEMALIGN and _is_a_tensors(record):
            if record.size == MARK_BYTES:
                found.append(peak)
                peak = live
                continue
            sizes[record.address] = record.size
            live += record.size
            peak, largest = max(peak, live), max(largest, record.size)
        elif record.allocator == AllocatorType.FREE:
            live -= sizes.pop(record.address, 0)
    return found, largest


def _is_a_tensors(record: memray.AllocationRecord) -> bool:
    """Whether torch's allocator asked for it, rather than oneDNN for itself."""
    return any("alloc_cpu" in function for function, *_ in record.native_stack_trace(4))


def measured(kind: str, module_kind: str, strategy: str, budget: int, trace: Path) -> Any:
    """One training: its budget, the peak of each window, and the largest block."""
    torch.manual_seed(0)
    source, module = make_source(kind), make_module(module_kind)
    before = bytes_of(*module.parameters())
    with memray.Tracker(trace, native_traces=True):
        train(source, module, strategy, budget)
    found, largest = peaks(trace)
    trace.unlink()
    row = {"source": kind, "module": module_kind, "strategy": strategy, "budget": budget}
    return row | {"peaks": [before + peak for peak in found], "largest": largest}


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    for module_kind, budget in (("cell", 1_700_000), ("layer", 2_600_000)):
        for strategy in ("optimal", "uniform:20"):
            row = measured(kind, module_kind, strategy, budget, folder / "trace.bin")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
