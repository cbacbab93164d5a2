"""Gradients: against the CPU in float64, in the precision of training, with random numbers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.accelerator.bench import Bench
from benchmarks.accelerator.check import Check, promised, skipped
from benchmarks.accelerator.modules import (
    Case,
    Stack,
    cases,
    chosen,
    distance,
    gradient_of,
    mse,
    plain_gradient,
)
from tbptt_ckpt import run_window, verify

STRATEGIES = ("retain", "uniform:7", "sqrt", "step", "revolve:4")
EXECUTORS = ("replay", "checkpoint")


def truth(bench: Bench) -> Iterator[Check]:
    """Every way of running a window gives the gradient of plain BPTT on the CPU, in float64."""
    steps = 20 if bench.is_quick else 50
    inputs, targets = bench.randn(2, steps, 3, 16, dtype=torch.float64)
    for case in cases(16):
        expected = plain_gradient(
            Case(case.name, case.module.double(), case.is_per_step), inputs.cpu(), targets.cpu()
        )
        module = copy.deepcopy(case.module).to(bench.device)
        errors = {}
        batching = (True, False) if case.is_per_step else ("auto",)
        for way in itertools.product(EXECUTORS, STRATEGIES, batching):
            executor, strategy, batched = way
            module.zero_grad(set_to_none=True)
            options = {"strategy": strategy, "executor": executor, "time_batching": batched}
            run_window(module, mse, inputs, targets, None, **options)
            errors[way] = distance(gradient_of(module), expected)
        worst = max(errors, key=errors.__getitem__)
        what, error = f"{case.name}, {len(errors)} ways", errors[worst]
        yield promised(error < 1e-10, what, worst=error, way=worst)


def precision(bench: Bench) -> Iterator[Check]:
    """In float32 as near to float64 as plain torch on the same device, with TF32 and without."""
    width, lanes, steps = (16, 2, 40) if bench.is_quick else (512, 32, 200)
    inputs, targets = bench.randn(2, steps, lanes, width)
    for case in chosen(width, "LSTMCell", "nn.LSTM"):
        exact = Case(case.name, copy.deepcopy(case.module).double(), case.is_per_step)
        expected = plain_gradient(exact, inputs.cpu().double(), targets.cpu().double())
        case.module.to(bench.device)
        for tf32 in (True, False) if bench.is_cuda else (False,):
            with torch.backends.cudnn.flags(allow_tf32=tf32):
                setting = f"TF32 {'on' if tf32 else 'off'}"
                yield from _single(case, expected, inputs, targets, setting)


def _single(
    case: Case, expected: dict[str, Tensor], inputs: Tensor, targets: Tensor, setting: str
) -> Iterator[Check]:
    plain = distance(plain_gradient(case, inputs, targets), expected)
    errors = {}
    for strategy in ("uniform:32", "sqrt", "uniform:7"):
        case.module.zero_grad(set_to_none=True)
        run_window(case.module, mse, inputs, targets, None, strategy=strategy)
        errors[strategy] = distance(gradient_of(case.module), expected)
    what = f"{case.name} in float32, {setting}"
    worst = max(errors.values())
    yield promised(worst <= 2 * plain + 1e-6, what, worst=worst, plain=plain)
    verdict = verify(case.module, mse, inputs, targets, None, strategy="uniform:7")
    figures = {"worst": verdict.max_relative_error, "tolerance": verdict.tolerance}
    yield promised(verdict.ok, f"verify of {what}", **figures)


def randomness(bench: Bench) -> Iterator[Check]:
    """Replays draw what the first run drew, on the device's own generator."""
    inputs, targets = bench.randn(2, 24, 3, 16, dtype=torch.float64)
    module = Stack(16, dropout=0.5).double().to(bench.device)
    found, ends = [], []
    for executor, strategy in itertools.product(EXECUTORS, ("retain", "uniform:7", "revolve:4")):
        torch.manual_seed(1)
        module.zero_grad(set_to_none=True)
        run_window(module, mse, inputs, targets, None, strategy=strategy, executor=executor)
        found.append(gradient_of(module))
        ends.append(torch.rand(4, device=bench.device).tolist())
    worst = max(distance(each, found[0]) for each in found)
    yield promised(worst < 1e-10, "dropout in a step: one gradient for all", worst=worst)
    yield promised(all(end == ends[0] for end in ends), "generators end alike")

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        return mse(nn.functional.dropout(outputs, 0.5), targets)

    try:
        run_window(module, noisy, inputs, targets, None, strategy="uniform:7")
        yield promised(False, "a loss that draws random numbers is refused")
    except ValueError as error:
        yield promised("random" in str(error), "a loss that draws random numbers is refused")


def autocast(bench: Bench) -> Iterator[Check]:
    """Under autocast as plain torch under autocast."""
    width, lanes, steps = (16, 2, 24) if bench.is_quick else (256, 16, 96)
    inputs, targets = bench.randn(2, steps, lanes, width)
    for case in chosen(width, "LSTMCell", "nn.LSTM"):
        case.module.to(bench.device)
        for dtype in (torch.bfloat16, torch.float16) if bench.is_accelerator else (torch.bfloat16,):
            what = f"{case.name} under autocast to {dtype}"
            try:
                with torch.autocast(bench.device.type, dtype=dtype):
                    expected = plain_gradient(case, inputs, targets)
            except RuntimeError as error:
                yield skipped(what, f"torch cannot: {str(error).splitlines()[0][:80]}")
                continue
            case.module.zero_grad(set_to_none=True)
            options = {"strategy": "uniform:16", "autocast_dtype": dtype}
            run_window(case.module, mse, inputs, targets, None, **options)
            error = distance(gradient_of(case.module), expected)
            yield promised(error < 0.03, what, error=error)
