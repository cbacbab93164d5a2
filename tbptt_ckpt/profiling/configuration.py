"""What a measured window is asked to do, and what becomes of one that cannot be run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch

from tbptt_ckpt.arguments import PositiveInt, check_fields
from tbptt_ckpt.budget.amount import budget_bytes
from tbptt_ckpt.errors import ArgumentError, InfeasibleBudgetError, TbpttError
from tbptt_ckpt.memory.exhausted import is_out_of_memory
from tbptt_ckpt.profiling.report import FAILED, OUT_OF_MEMORY, OVER_BUDGET, MemoryReport
from tbptt_ckpt.schedule.strategies import parse_strategy

BASELINE = "retain"


class BenchError(Exception):
    """Why a configuration did not run: status, a line, and where, as Python prints it."""

    def __init__(self, status: str, message: str, traceback: str = "") -> None:
        super().__init__(status, message, traceback)  # so that it can be pickled
        self.status, self.message, self.traceback = status, message, traceback


class ProfileError(ArgumentError):
    """A profile that cannot be made; raised for what goes wrong in plain BPTT already.

    Attributes:
        remote_traceback: Where it was raised, in whatever process, as Python prints it.
    """

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback


def bench_error(error: BaseException, traceback: str) -> BenchError:
    """What an error means for its row."""
    status, line = FAILED, " ".join(str(error).split())
    if is_out_of_memory(error):
        status, line = OUT_OF_MEMORY, line or "out of memory"
    elif isinstance(error, InfeasibleBudgetError):
        status = OVER_BUDGET
    elif not isinstance(error, TbpttError):
        line = f"the module or its loss raised {type(error).__name__}: {line}"
    return BenchError(status, line, traceback)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One row of a profile.

    Attributes not named here are those of `TBPTT`.

    Attributes:
        budget_bytes: A memory budget; None gives none.
    """

    strategy: Any
    k1: PositiveInt
    k2: PositiveInt
    overlap: Any = "refresh"
    executor: Any = "replay"
    time_batching: bool | str = "auto"
    budget_bytes: PositiveInt | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strategy, Sequence) and not isinstance(self.strategy, str):
            object.__setattr__(self, "strategy", tuple(self.strategy))  # so that it has a hash
        if self.k2 is None:
            raise ArgumentError("k2=None has no end; a profile measures one window: give a number")
        check_fields(self)
        parse_strategy(self.strategy)

    @property
    def strategy_name(self) -> str:
        """The strategy in words."""
        given = self.strategy
        return given if isinstance(given, str) else str(parse_strategy(given))

    @property
    def is_baseline(self) -> bool:
        """Whether this is plain BPTT: one leaf, no budget, step by step."""
        return replace(self, strategy=self.strategy_name) == self.baseline()

    def baseline(self) -> Configuration:
        """Plain BPTT of the same windows."""
        return replace(self, strategy=BASELINE, budget_bytes=None, time_batching=False)

    def report(self, **figures: Any) -> MemoryReport:
        """A report about this configuration with those figures."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        words = {
            "strategy": self.strategy_name,
            "executor": str(self.executor),
            "time_batching": str(self.time_batching).lower(),
        }
        return MemoryReport(**{**given, **words, **figures})


def combinations(
    k1: Sequence[int],
    k2: Sequence[int],
    strategies: Sequence[object],
    budgets: Sequence[object],
    device: torch.device | str = "cpu",
    **shared: Any,
) -> list[Configuration]:
    """Every combination of what may be several, with what is shared.

    Budgets that are a part of the free memory are that part of what the device has free now.
    """
    sizes = [budget_bytes(budget, "memory_budget", device) for budget in budgets]
    configurations = [
        Configuration(strategy=strategy, k1=k1, k2=k2, budget_bytes=size, **shared)
        for k1, k2, strategy, size in product(k1, k2, strategies, sizes)
    ]
    if not configurations:
        raise ArgumentError("strategies, k1, k2 and memory_budgets must each name at least one")
    return configurations
