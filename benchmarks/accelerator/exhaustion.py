"""Memory that does not suffice: a window runs again under a smaller plan, and nothing is left."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accelerator.bench import MIB, Bench, Sizes, mib
from benchmarks.accelerator.check import Check, promised, skipped
from benchmarks.accelerator.modules import mse
from tbptt_ckpt import TBPTT, OutOfMemory, TensorSequence, Trainer, profile_window


class Notices:
    """The kinds of what a trainer gave notice of."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def on_window(self, event: object) -> None:
        """Not of interest."""

    on_update = on_window

    def on_notice(self, event: Any) -> None:
        self.kinds.append(event.kind)

    def resume_at(self, steps: int) -> None:
        """Nothing resumes."""

    def flush(self) -> None:
        """Nothing is held back."""

    close = flush


def out_of_memory(bench: Bench) -> Iterator[Check]:
    """A device that is too small for the first plan ends with the weights of one that is not."""
    if not bench.can_be_limited:
        yield skipped("too little memory for the first plan", "this device's cannot be limited")
        return
    (sizes,) = bench.sizes(Sizes(512, 32, 512))
    need = _peak(bench, sizes)
    expected, _, _ = _train(bench, sizes)
    kept = bench.fresh()
    with bench.limited_to(kept + int(0.6 * need)):
        found, kinds, left = _train(bench, sizes)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    replays = kinds.count("out_of_memory")
    what = "too little memory for the first plan: run again under a smaller one"
    yield promised(replays > 0 and worst < 1e-3, what, replays=replays, weights_differ=worst)
    yield promised(left < 80 * MIB, "nothing is left of the tries", left_mib=mib(left))


def _peak(bench: Bench, sizes: Sizes) -> int:
    """What the undisturbed run takes at most above what was there."""
    before = bench.fresh()
    _train(bench, sizes)
    return bench.peaks().allocated - before


def _train(bench: Bench, sizes: Sizes) -> tuple[list[Tensor], list[str], int]:
    """Weights afterwards, notices, and bytes that are still there."""
    before = bench.fresh()
    torch.manual_seed(0)
    module, notices = nn.LSTM(sizes.width, sizes.width).to(bench.device), Notices()
    data = bench.randn(3 * sizes.num_steps + 1, sizes.num_lanes, sizes.width)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    reach = sizes.num_steps
    tbptt = TBPTT(module, mse, reach, reach, optimizer, strategy="retain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sequence = TensorSequence(data[:-1], data[1:])
        Trainer(tbptt, sequence, events=[notices], out_of_memory=OutOfMemory()).train()
    weights = [p.detach().double().cpu() for p in module.parameters()]
    del tbptt, optimizer, sequence, data, module
    gc.collect()
    left = torch.accelerator.memory_allocated(bench.device) - before
    return weights, notices.kinds, left


def small_device(bench: Bench) -> Iterator[Check]:
    """A profile of a strategy that fits where plain BPTT does not."""
    if not bench.can_be_limited:
        yield skipped("a profile where plain BPTT does not fit", "this device's cannot be limited")
        return
    width, lanes, steps = (64, 8, 1024) if bench.is_quick else (1024, 64, 4096)
    limit = (12 if bench.is_quick else 3072) * MIB
    module = nn.LSTM(width, width).to(bench.device)
    data = bench.randn(513, lanes, width)
    with bench.limited_to(limit + bench.fresh()):
        for options in ({"strategy": "uniform:32"}, {"memory_budget": int(0.8 * limit)}):
            report = profile_window(
                module, mse, data[:-1], data[1:], k1=steps, k2=steps, repeats=1, **options
            )
            what = f"a profile in {limit // MIB} MiB, {options}"
            figures = {"status": report.status, "peak_mib": mib(report.peak_bytes)}
            yield promised(report.is_ok, what, **figures, why=report.message)
