"""Memory: predicted against what the allocator says, budgets, and how far a gradient reaches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.accelerator.bench import MIB, Bench, Sizes, mib
from benchmarks.accelerator.check import Check, info, promised, skipped
from benchmarks.accelerator.modules import Case, chosen, mse
from benchmarks.paired import timed
from benchmarks.recomputation import ByteLSTM, byte_loss
from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence, profile_window
from tbptt_ckpt.memory.exhausted import is_out_of_memory

STRATEGIES = ("retain", "uniform:32", "sqrt", "revolve:12")
SLACK = MIB  # an allocator may round a tensor up by as much


def peaks(bench: Bench) -> Iterator[Check]:
    """A warm window's peak by the allocator, by our meter, and as a profile predicts it."""
    (sizes,) = bench.sizes(Sizes(512, 32, 512))
    for case in chosen(sizes.width, "LSTMCell", "nn.LSTM, 2 layers"):
        for strategy in STRATEGIES:
            yield from _row(bench, case, sizes, strategy)


def _row(bench: Bench, case: Case, sizes: Sizes, strategy: str) -> Iterator[Check]:
    k1, k2, what = sizes.num_steps // 4, sizes.num_steps, f"{case.name}, {strategy}"
    empty = bench.fresh()
    windows, data = _warm(bench, case, sizes, strategy, measure_memory=True)
    bench.fresh()
    measured = next(windows).peak_bytes
    figures: dict[str, Any] = {"measured_mib": mib(measured)}
    if bench.is_accelerator:
        beside = empty + data.nbytes - 2 * k2 * data[0].nbytes  # a window counts its own data
        seen = bench.peaks()
        own = seen.allocated - beside
        figures |= {"allocated_mib": mib(own), "requested_mib": mib(seen.requested - beside)}
        figures["reserved_mib"] = mib(seen.reserved - beside)
        is_right = abs(measured - own) <= 0.03 * own + SLACK
        yield promised(is_right, f"{what}: the meter's peak is the allocator's", **figures)
    del windows
    bench.fresh()
    module = copy.deepcopy(case.module).to(bench.device)
    report = profile_window(
        module,
        mse,
        data[: k2 + k1],
        data[1 : k2 + k1 + 1],
        k1=k1,
        k2=k2,
        strategy=strategy,
        time_batching=False,
        optimizer=torch.optim.Adam(module.parameters()),
        repeats=1,
    )
    if not report.is_ok:
        yield promised(False, f"{what}: a profile", status=report.status, why=report.message)
        return
    figures |= {
        "profile_mib": mib(report.peak_bytes),
        "predicted_mib": mib(report.predicted_peak_bytes),
        "profile_reserved_mib": mib(report.reserved_peak_bytes),
    }
    near = is_near(report.predicted_peak_bytes, report.peak_bytes)
    yield promised(near, f"{what}: predicted", error=report.prediction_error, **figures)
    if report.reserved_peak_bytes is None:
        yield skipped(f"{what}: requested and reserved bytes", "a CPU has no such allocator")
        return
    is_own = report.reserved_peak_bytes <= 1.3 * (seen.reserved - empty) + 64 * MIB
    yield promised(is_own, f"{what}: a profile's reserved bytes are the window's", **figures)


def is_near(predicted: int, measured: int) -> bool:
    """Whether a peak was predicted."""
    return abs(predicted - measured) <= max(0.05 * measured, MIB / 16)


def _warm(
    bench: Bench, case: Case, sizes: Sizes, strategy: str, **options: Any
) -> tuple[Any, Tensor]:
    """Windows of which the next is warm and reaches back as far as any, and their data."""
    k1, k2 = sizes.num_steps // 4, sizes.num_steps
    module = copy.deepcopy(case.module).to(bench.device)
    data = bench.randn(k2 + 4 * k1 + 1, sizes.num_lanes, sizes.width)
    optimizer = torch.optim.Adam(module.parameters())
    options = {"strategy": strategy, "time_batching": False, **options}
    tbptt = TBPTT(module, mse, k1, k2, optimizer, **options)
    windows = iter(tbptt.windows(TensorSequence(data[:-1], data[1:])))
    for _ in range(k2 // k1 + 2):
        next(windows)
    return windows, data


def budgets(bench: Bench) -> Iterator[Check]:
    """No window is above its budget, by the meter and by the allocator."""
    (sizes,) = bench.sizes(Sizes(512, 32, 512))
    for case in chosen(sizes.width, "LSTMCell", "nn.LSTM", "stack of cells"):
        smallest = _smallest(bench, case, sizes)
        for factor in (1.0, 1.3, 3.0):
            budget, empty = int(factor * smallest), bench.fresh()
            highest, reserved, errors = 0, 0, []
            tbptt, data = _budgeted(bench, case, sizes, budget)
            beside = empty + data.nbytes - 2 * sizes.num_steps * data[0].nbytes
            for window in tbptt.windows(TensorSequence(data[:-1], data[1:])):
                highest = max(highest, window.peak_bytes)
                errors.append(window.plan.predicted_peak_bytes / window.peak_bytes - 1)
                if bench.is_accelerator:
                    highest = max(highest, bench.peaks().allocated - beside)
                    reserved = max(reserved, bench.peaks().reserved - beside)
                bench.fresh()
            yield promised(
                highest <= budget,
                f"{case.name} within {factor:.1f} of the least",
                budget_mib=mib(budget),
                highest_mib=mib(highest),
                reserved_mib=mib(reserved) if bench.is_accelerator else "none on a CPU",
                worst_prediction=max(errors, key=abs),
                leaf=window.plan.longest_leaf,
            )
            del tbptt, data


def _budgeted(bench: Bench, case: Case, sizes: Sizes, budget: int) -> tuple[TBPTT, Tensor]:
    module = copy.deepcopy(case.module).to(bench.device)
    data = bench.randn(3 * sizes.num_steps + 1, sizes.num_lanes, sizes.width)
    optimizer = torch.optim.Adam(module.parameters())
    reach = sizes.num_steps
    options = {"memory_budget": budget, "measure_memory": True}
    return TBPTT(module, mse, reach, reach, optimizer, **options), data


def _smallest(bench: Bench, case: Case, sizes: Sizes) -> int:
    """The least that works, as the error of a hopeless budget says."""
    tbptt, data = _budgeted(bench, case, sizes, 1)
    try:
        tbptt.train(TensorSequence(data[:-1], data[1:]))
    except InfeasibleBudgetError as error:
        return error.smallest_budget_bytes
    raise AssertionError("one byte is enough for nothing")


def longest(bench: Bench) -> Iterator[Check]:
    """The longest full BPTT in a given memory: plain, and ours."""
    if not bench.can_be_limited:
        yield skipped("longest full BPTT in a given memory", "this device's cannot be limited")
        return
    width, lanes, limit = (64, 8, 64 * MIB) if bench.is_quick else (512, 32, 2048 * MIB)
    ways = {
        "plain BPTT": {"strategy": "retain"},
        "sqrt": {"strategy": "sqrt"},
        "budget of 85 %": {"memory_budget": int(0.85 * limit)},
    }
    reached = {}
    with bench.limited_to(limit):
        for way, options in ways.items():
            steps, seconds = 64 if bench.is_quick else 256, 0.0
            while bench.seconds_left > 60 and seconds < 15:
                seconds = _seconds_of(bench, width, lanes, steps, options)
                if seconds == float("inf"):
                    break
                reached[way], steps = steps, 2 * steps
            per_step = 1e6 * seconds / steps if seconds < float("inf") else None
            what = f"{way} in {limit // MIB} MiB, {lanes} x {width}"
            yield info(what, steps=reached.get(way, 0), last_us_per_step=per_step)
    ours = max(reached.get("sqrt", 0), reached.get("budget of 85 %", 0))
    plain = reached.get("plain BPTT", 0)
    factor = ours / max(plain, 1)
    yield promised(plain > 0 and factor >= 8, "ours reaches further than plain BPTT", factor=factor)


def _seconds_of(bench: Bench, width: int, lanes: int, steps: int, options: dict[str, Any]) -> float:
    """Time of a window of so many steps; infinite where it does not fit."""
    bench.fresh()
    try:
        return _window_seconds(bench, width, lanes, steps, options)
    except (RuntimeError, MemoryError, InfeasibleBudgetError) as error:
        if not isinstance(error, InfeasibleBudgetError) and not is_out_of_memory(error):
            raise
        return float("inf")


def _window_seconds(
    bench: Bench, width: int, lanes: int, steps: int, options: dict[str, Any]
) -> float:
    torch.manual_seed(0)
    module = ByteLSTM(width).to(bench.device)
    optimizer = torch.optim.Adam(module.parameters())
    inputs = bench.randn(steps, lanes, width)
    targets = torch.zeros(steps, lanes, dtype=torch.int64, device=bench.device)
    tbptt = TBPTT(module, byte_loss, steps, steps, optimizer, per_step=False, **options)
    return timed_wait(bench, lambda: tbptt.train(TensorSequence(inputs, targets)))


def timed_wait(bench: Bench, work: Any) -> float:
    """Seconds until the device has done it."""
    bench.wait()

    def done() -> None:
        work()
        bench.wait()

    return timed(done)
