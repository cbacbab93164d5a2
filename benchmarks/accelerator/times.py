"""Times: against plain torch, its checkpoints, compiled segments and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accelerator.bench import Bench, Sizes, mib
from benchmarks.accelerator.check import Check, info, promised, skipped
from benchmarks.accelerator.modules import distance, gradient_of, mse
from benchmarks.paired import PairedTimes, time_pairs
from benchmarks.peers.entries import ENTRIES, Entry
from benchmarks.peers.work import Size, Work, make_work, relative_error
from tbptt_ckpt import run_window

CELLS = ("ckpt-cell", "ours-cell-retain", "ours-cell-32", "ours-cell-32-ckpt")
FUSED = ("ckpt-lstm", "ours-lstm-retain", "ours-lstm-16")
BASELINES = {"plain-cell": CELLS, "plain-lstm": FUSED}
LEAF = 32


def times(bench: Bench) -> Iterator[Check]:
    """Against an LSTMCell loop and `nn.LSTM` (cuDNN's), in turns; the same gradient first."""
    known = {entry.key: entry for entry in ENTRIES}
    for sizes in bench.sizes(Sizes(256, 32, 512), Sizes(1024, 64, 512)):
        work = make_work(Size(sizes.width, sizes.num_lanes, sizes.num_steps))
        for baseline, others in BASELINES.items():
            for key in others:
                if bench.seconds_left < 60:
                    yield skipped(f"{key}, {sizes}", "no time left")
                    continue
                yield _against(bench, known[baseline], known[key], work)


def _against(bench: Bench, baseline: Entry, entry: Entry, work: Work) -> Check:
    plain, other = (each.make(work, device=bench.device) for each in (baseline, entry))
    for peer in (plain, other):
        peer.warm_up()
        peer.run()
    error = relative_error(other.gradients(), plain.gradients())
    measured = time_pairs(plain.run, other.run, num_pairs=3 if bench.is_quick else 7, num_warmups=1)
    memory = {"peak_mib": mib(other.peak_bytes()), "plain_peak_mib": mib(plain.peak_bytes())}
    what = f"{entry.label} over {baseline.label}, {work.size}"
    return promised(error < 1e-3, what, **_figures(measured), **memory, gradient_error=error)


def _figures(measured: PairedTimes) -> dict[str, Any]:
    low, high = measured.interval
    seconds = {f"{name[:-2]}_ms": 1e3 * value for name, value in measured.seconds().items()}
    return {"ratio": measured.ratio, "interval": (round(low, 3), round(high, 3)), **seconds}


class CellSegment(nn.Module):
    """A segment of an LSTM written as a loop, which can be compiled and captured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        (h, c), outputs = state, []
        for step in x.unbind(0):
            h, c = self.cell(step, (h, c))
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def compiled(bench: Bench) -> Iterator[Check]:
    """A user's compiled segment under our strategies: the same gradient, and its time."""
    if not bench.is_accelerator:
        yield skipped("compiled segments", "compiling one takes a minute on a CPU")
        return
    for sizes in bench.sizes(Sizes(256, 32, 512)):
        segment, inputs = _segment(bench, sizes)
        eager = _ours(segment, inputs)
        try:
            fast = _ours(torch.compile(segment, dynamic=False), inputs)
            fast()
        except Exception as error:  # whatever a compiler raises
            yield skipped("compiled segments", f"{type(error).__name__}: {str(error)[:120]}")
            return
        found = gradient_of(segment)
        eager()
        error = distance(found, gradient_of(segment))
        measured = _in_turns(bench, eager, fast)
        what = f"compiled segments of {LEAF} over eager, {sizes}"
        yield promised(error < 1e-3, what, gradient_error=error, **measured)


def graphs(bench: Bench) -> Iterator[Check]:
    """A leaf as CUDA graphs: what there is to gain."""
    if not bench.is_cuda:
        yield skipped("a leaf as CUDA graphs", "needs CUDA")
        return
    for sizes in bench.sizes(Sizes(256, 32, 512), Sizes(1024, 64, 512)):
        segment, inputs = _segment(bench, sizes)
        states = [torch.zeros_like(inputs[0]).requires_grad_() for _ in range(2)]
        leaf = _Flat(segment)
        graphed = torch.cuda.make_graphed_callables(_Flat(segment), (inputs[:LEAF], *states))
        ways = (_leaf(leaf, segment, inputs, states), _leaf(graphed, segment, inputs, states))
        what = f"a leaf of {LEAF} as CUDA graphs over eager, {sizes}"
        yield info(what, **_in_turns(bench, *ways))


class _Flat(nn.Module):
    """Tensors in, tensors out, as a capture wants it."""

    def __init__(self, segment: CellSegment) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs, (h, c) = self.segment(x, (h, c))
        return outputs, h, c


def _leaf(
    call: Any, segment: nn.Module, inputs: Tensor, states: list[Tensor]
) -> Callable[[], None]:
    def go() -> None:
        segment.zero_grad(set_to_none=False)
        outputs, h, c = call(inputs[:LEAF], *states)
        (outputs.square().mean() + h.sum() + c.sum()).backward()

    return go


def _segment(bench: Bench, sizes: Sizes) -> tuple[CellSegment, Tensor]:
    torch.manual_seed(0)
    segment = CellSegment(sizes.width).to(bench.device)
    return segment, bench.randn(sizes.num_steps, sizes.num_lanes, sizes.width)


def _ours(module: Any, inputs: Tensor) -> Callable[[], None]:
    """A window in leaves of one length."""
    first = (torch.zeros_like(inputs[0]), torch.zeros_like(inputs[0]))

    def go() -> None:
        module.zero_grad(set_to_none=True)
        options = {"strategy": f"uniform:{LEAF}", "per_step": False}
        run_window(module, mse, inputs, inputs, first, **options)

    return go


def _in_turns(
    bench: Bench, baseline: Callable[[], None], other: Callable[[], None]
) -> dict[str, Any]:
    def until_done(work: Callable[[], None]) -> Callable[[], None]:
        def go() -> None:
            work()
            bench.wait()

        return go

    num_pairs = 3 if bench.is_quick else 7
    ways = (until_done(baseline), until_done(other))
    return _figures(time_pairs(*ways, num_pairs, between=bench.wait))
