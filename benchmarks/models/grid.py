"""Every way of running a window, and whether its gradients are those of the plain loop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.models.model import Model
from benchmarks.models.plain import Gradients, plain_gradients
from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.module import Lifted

STEP_SIZE = 0.05
STRATEGIES = ("retain", "uniform:5", "revolve:3", "sqrt", "auto", "64MiB")
QUICK = ("uniform:5", "auto")


@dataclass(frozen=True)
class Verdict:
    """What came of a model.

    Attributes:
        exact: Runs whose every window has the gradients of the plain loop.
        runs: How many there were.
        worst: The largest relative error of a gradient; nan where none was compared.
        refused: The package's own errors, and how many runs ended with each.
        faults: What must not be: wrong gradients, and errors of others.
        plain_error: Why the plain loop does not run either.
        lines: What a user writes around the model.
    """

    exact: int
    runs: int
    worst: float
    refused: Counter[str]
    faults: Counter[str]
    plain_error: str
    lines: str

    @property
    def text(self) -> str:
        """In the words of the table."""
        if self.faults:
            return "WRONG: " + "; ".join(f"{n} x {what}" for what, n in self.faults.items())
        why = "; ".join(f"{n} x {what}" for what, n in self.refused.items())
        if self.exact:
            return f"exact; refused: {why}" if why else "exact"
        said = f"refused: {next(iter(self.refused))}" if len(self.refused) == 1 else why
        return f"{said}; the plain loop fails: {self.plain_error}" if self.plain_error else said


def judged(model: Model, strategies: tuple[str, ...] = STRATEGIES) -> Verdict:
    """Train the model in every way.

    Raises:
        ImportError: Its library is not installed.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        return _judged(model, strategies)
    finally:
        torch.set_default_dtype(before)


def _judged(model: Model, strategies: tuple[str, ...]) -> Verdict:
    refused, faults, errors = Counter[str](), Counter[str](), [math.nan]
    module = _made(model.make)
    lines = "1 (`lifted`)" if isinstance(module, Lifted) else model.written_lines(module)
    try:
        expected = [_expected(model, model.plain or model.make)]
        if model.plain_steps is not None:
            expected.append(_expected(replace(model, per_step=True), model.plain_steps))
        plain_error = ""
    except Exception as error:  # then no run may end without one
        expected, plain_error = [], _line(error)
    exact = runs = 0
    for options in ways(strategies):
        runs += 1
        try:
            errors.append(min(errors_of(model, expected, options), default=math.nan))
        except TbpttError as error:
            refused[_line(error)] += 1
        except Exception as error:
            (refused if _line(error) == plain_error else faults)[_line(error)] += 1
        else:
            exact += errors[-1] <= model.tolerance
            if not errors[-1] <= model.tolerance:
                faults[f"a gradient {errors[-1]:.1e} off"] += 1
    worst = max(errors[1:], default=math.nan)
    return Verdict(exact, runs, worst, refused, faults, plain_error, str(lines))


def _expected(model: Model, make: Callable[[], Any]) -> list[Gradients]:
    reference = _made(make)
    torch.manual_seed(3)
    return plain_gradients(model, reference, STEP_SIZE)


def ways(strategies: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Options of `TBPTT`: strategies, executors, and products over time."""
    for strategy in strategies:
        budgeted = strategy.endswith("B")
        planned = {"memory_budget": strategy} if budgeted else {"strategy": strategy}
        for executor in ("replay",) if budgeted else ("replay", "checkpoint"):
            for batching in ("auto", True, False):
                yield {**planned, "executor": executor, "time_batching": batching}


def errors_of(
    model: Model, expected: list[list[Gradients]], options: dict[str, Any]
) -> list[float]:
    """The largest error of a window's gradients, relative to their norm, by what is expected."""
    module = _made(model.make)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=STEP_SIZE)
    tbptt = TBPTT(
        module,
        model.loss_fn,
        model.k1,
        model.k2,
        optimizer,
        per_step=model.per_step,
        time_dim=model.time_dim,
        **options,
    )
    data = TensorSequence(*model.data(), time_dim=model.time_dim)
    torch.manual_seed(3)
    errors = [
        [_difference([weight.grad for weight in weights], each) for each in gradients]
        for _, *gradients in zip(tbptt.windows(data, model.state()), *expected, strict=True)
    ]
    return [max(each) for each in zip(*errors, strict=True)]


def _made(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


def _difference(found: Gradients, expected: Gradients) -> float:
    pairs = [
        (torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b)
        for a, b in zip(found, expected, strict=True)
        if a is not None or b is not None
    ]
    off = sum(float((a.to_dense() - b.to_dense()).abs().square().sum()) for a, b in pairs)
    size = sum(float(b.to_dense().abs().square().sum()) for _, b in pairs)
    return math.sqrt(off / size) if size else (math.inf if off else 0.0)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"
