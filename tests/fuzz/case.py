"""One case: what is asked of the package, what a plain loop needs, and its label."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss as the package is given it, and as sums that anybody can add up."""

    function: Callable[[Any, Any], Any]
    total: Callable[[Any, Any], Tensor]  # summed over all positions that count
    count: Callable[[Any, Any], float | Tensor]  # of these positions
    form: str = "mean"  # or "sum", or "pair" for (loss_sum, weight)
    window: Callable[[Any, Any], Tensor] | None = None  # of all loss steps, where no sums make it


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How a window runs whose gradient ends where a draw or a rule says."""

    first: int  # step that runs, unless new ones come before
    start: int  # step that the gradient reaches
    divisors: dict[int, float] = field(default_factory=dict)  # of the state's gradient, by step


def call_step(module: Any, x: Any, state: Any) -> tuple[Any, Any]:
    return module(x, state)


@dataclass(kw_only=True)
class Case:
    """A legal case must equal the plain loop; one with `refused` must end in an error by name."""

    make: Callable[[], Any]  # the module, afresh and always with the same weights
    loss: Loss
    inputs: Any
    targets: Any
    k1: int
    k2: int | str | None
    call: Callable[[Any, Any, Any], tuple[Any, Any]] = call_step  # the module over one step
    reference: Callable[[], Any] | None = None  # what the loop runs, where that is not `make`
    start: Callable[[], Any] = lambda: None  # the state at the first step
    time_dim: int = 0  # of inputs and targets
    is_segment: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    source: str = "tensors"
    data: Callable[[], Any] | None = None  # what is read, where not a `source` of these tensors
    weight: Tensor | None = None
    resets: Tensor | None = None  # bools [T] or [T, B]
    reach: Callable[[Any, tuple[int, int, int]], Reach] | None = None  # read from a result
    rounded: torch.dtype | None = None  # of the state that each step but the last starts from
    lr: float = 0.05
    has_optimizer: bool = True
    generators: Callable[[Any], list[Any]] = lambda module: []
    around: Callable[[Any], AbstractContextManager[Any]] = lambda module: nullcontext()
    refused: str = ""  # why; empty where the case is legal
    names: tuple[str, ...] = ()  # an error that names one of these has named the reason
    run: Callable[[], Any] | None = None  # instead of TBPTT over the source, for refusals
    kind: str = ""
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return int(self.inputs.shape[self.time_dim])

    @property
    def is_legal(self) -> bool:
        return not self.refused

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """Every window as (start, new_start, stop); as far as may be where `reach` says more."""
        new = 0
        while new < self.num_steps:
            stop = min(new + self.k1, self.num_steps)
            yield max(0, stop - self.k2) if isinstance(self.k2, int) else 0, new, stop
            new = stop

    def __str__(self) -> str:
        asked = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        shape = f"T={self.num_steps}, k1={self.k1}, k2={self.k2}, {self.source}, {asked}"
        return f"{self.kind} seed={self.seed} ({shape})"


class Dice(random.Random):
    """Random choices of one case; torch's generator is seeded with them."""

    def __init__(self, seed: int) -> None:
        super().__init__(f"fuzz {seed}")
        self.torch_seed = self.randrange(2**31)
        torch.manual_seed(self.torch_seed)

    def maybe(self, part: float) -> bool:
        return self.random() < part

    def window(self, *, most: int = 12) -> dict[str, int]:
        """Steps, k1 and k2, with k2 above, at and below k1 in equal parts."""
        steps, k1 = self.randint(3, most), self.randint(1, 5)
        k2 = self.choice((k1 + self.randint(1, 6), k1, max(1, k1 - self.randint(1, 3))))
        return {"steps": steps, "k1": k1, "k2": k2}

    def strategy(self) -> str:
        fixed = ("retain", "step", "sqrt", "uniform:2", "uniform:3", "uniform:5", "revolve:2")
        return "auto" if self.maybe(0.04) else self.choice(fixed)

    def options(self, **given: Any) -> dict[str, Any]:
        """Strategy, executor and so on; what is given stays."""
        drawn = {
            "strategy": self.strategy(),
            "executor": "checkpoint" if self.maybe(0.3) else "replay",
            "time_batching": self.choice((True, True, False, "auto")),
            "overlap": "stale" if self.maybe(0.3) else "refresh",
            "loss": "last" if self.maybe(0.15) else "new",
            "reduction": "sum" if self.maybe(0.25) else "mean",
        }
        if self.maybe(0.1):
            drawn["clip_grad_norm"] = 0.3
        return {**drawn, **given}
