"""What the user asked for, checked and never changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tbptt_ckpt.arguments import AboveZero, Dimension, PositiveInt, check_fields
from tbptt_ckpt.budget.amount import Amount, MemoryBudget, parse_budget
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.executor import compiled_steps
from tbptt_ckpt.executor.window_pass import Executor
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.strategies import (
    AnyStrategy,
    Auto,
    Retain,
    Strategy,
    Uniform,
    UserSchedule,
    parse_strategy,
)
from tbptt_ckpt.schedule.truncation import AnyTruncation, Roulette, parse_truncation
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.time_batching.compiler import CompileChoice
from tbptt_ckpt.time_batching.policy import TimeBatchingChoice
from tbptt_ckpt.updates.ranks import Ranks

LossSteps = Literal["new", "last"]
Reduction = Literal["mean", "sum"]
Overlap = Literal["refresh", "stale"]
AnyK2 = PositiveInt | Literal["auto"] | None
ExecutorName = Literal["replay", "checkpoint"]
DeliverName = Literal["auto", "once"]
AnyRanks = Literal["all"] | Ranks | None

K2_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `TBPTT` but module, loss and optimizer; see there for their meaning.

    Raises:
        ArgumentError: One that cannot work.
    """

    k1: PositiveInt
    k2: AnyK2
    max_k2: PositiveInt | None = None
    k2_tolerance: AboveZero = K2_TOLERANCE
    k2_window_tolerance: AboveZero | None = None
    loss: LossSteps = "new"
    reduction: Reduction = "mean"
    overlap: Overlap = "refresh"
    truncation: AnyTruncation = "fixed"
    strategy: AnyStrategy = "auto"
    memory_budget: MemoryBudget = None
    executor: ExecutorName | Executor = "replay"
    time_batching: TimeBatchingChoice = "auto"
    compile: CompileChoice = False
    per_step: bool | None = None
    time_dim: Dimension | None = None
    clip_grad_norm: AboveZero | None = None
    autocast_dtype: torch.dtype | None = None
    scaler: Any = None
    scheduler: Any = None
    lane_dim: Dimension | None = None
    accumulate: PositiveInt = 1
    deliver: DeliverName = "auto"
    ranks: AnyRanks = None
    costs: Costs | None = None
    measure_memory: bool = False
    check_replays: bool = True
    check_finite: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.strategy, Plan) and self.strategy.form == "compiled":
            _check_compiled(self)
        _check_auto_k2(self)
        if (roulette := self.parsed_truncation()) is not None:
            self._check_borders(roulette)

    def _check_borders(self, roulette: Roulette) -> None:
        """Raise unless a gradient can be stopped on its way, and where the overlap lets it."""
        k1, every = self.k1, roulette.every
        given = f"truncation={roulette}"
        if isinstance(self.k2, int) and self.k2 <= k1:
            raise ArgumentError(
                f"{given} with k2={self.k2} and k1={k1} has nothing to stop: new steps are always "
                "reached; give a k2 above k1, or truncation='fixed'"
            )
        if self.is_stale and every is not None and every % k1:
            raise ArgumentError(
                f"{given} with overlap='stale' must have every a multiple of k1={k1}, such as "
                f"every={max(1, every // k1) * k1}: states are recorded at update points"
            )

    @property
    def is_auto(self) -> bool:
        """Whether windows reach as far back as audits say."""
        return self.k2 == "auto"

    @property
    def most_k2(self) -> int | None:
        """Steps that any window reaches back; None for back to the start."""
        return self.max_k2 if isinstance(self.k2, str) else self.k2

    @property
    def is_stale(self) -> bool:
        """Whether blocks restart from recorded states."""
        return self.overlap == "stale"

    def begins_at_records(self, *, has_length: bool) -> bool:
        """Whether a short last window begins at a recorded state: at an update point."""
        return self.is_auto or (self.is_stale and not has_length)

    def loss_start(self, window: Window) -> int:
        """First step of a window whose loss counts."""
        return window.new_start if self.loss == "new" else window.stop - 1

    @property
    def is_compiled(self) -> bool:
        """Whether steps are compiled whatever the run."""
        return self.parsed_compile() not in (False, "auto")

    def parsed_compile(self) -> CompileChoice:
        """How steps are compiled; a plan that is followed decides where that is left open."""
        if self.compile == "auto" and isinstance(self.strategy, Plan):
            return self.strategy.form == "compiled"
        return self.compile

    def parsed_costs(self) -> Costs | None:
        """Given costs: of steps in blocks, where these are to be compiled."""
        if self.costs is None or not self.is_compiled:
            return self.costs
        return replace(self.costs, block_steps=compiled_steps.BLOCK_STEPS)

    def parsed_strategy(self) -> Strategy:
        """The strategy as an object."""
        strategy = parse_strategy(self.strategy)
        if self.is_auto and isinstance(strategy, Retain):  # an audit ends leaves on its way
            return Uniform(self.max_k2 or self.k1)
        is_auto = self.is_compiled and isinstance(strategy, Auto)
        return Auto(compiled_steps.BLOCK_STEPS) if is_auto else strategy

    def parsed_truncation(self) -> Roulette | None:
        """How a gradient is stopped by lot; None where it is not."""
        return parse_truncation(self.truncation)

    def parsed_ranks(self) -> Ranks | None:
        """How ranks train together; None where this process trains alone."""
        return Ranks() if self.ranks == "all" else self.ranks

    def parsed_budget(self) -> Amount | None:
        """The memory budget; None where none was asked for."""
        return parse_budget(self.memory_budget)


def _check_compiled(options: Options) -> None:
    """Raise `ArgumentError` for a plan of compiled steps that are not to be compiled."""
    if options.compile is False:
        raise ArgumentError(
            f"strategy={options.strategy} is a plan of compiled steps, and compile=False; give "
            "compile=True, or the backend that the plan was made with"
        )


def _check_auto_k2(options: Options) -> None:
    """Raise `ArgumentError` for what is of `k2="auto"` alone, or does not go with it."""
    k1, max_k2 = options.k1, options.max_k2
    if not options.is_auto:
        default = {"k2_tolerance": K2_TOLERANCE, "max_k2": None, "k2_window_tolerance": None}
        for name, value in default.items():
            if (given := getattr(options, name)) != value:
                raise ArgumentError(
                    f"{name}={shown(given)} is for k2='auto', and k2={options.k2} is fixed; leave "
                    "it out, or give k2='auto'"
                )
        return
    if max_k2 is None:
        raise ArgumentError(
            f"k2='auto' needs max_k2, the furthest that a window may reach back, such as "
            f"max_k2={16 * k1}: audits do, and what they find says how far others reach"
        )
    if max_k2 % k1 or max_k2 < 2 * k1:
        raise ArgumentError(
            f"max_k2={max_k2} must be a multiple of k1={k1}, and twice as much at least, such as "
            f"max_k2={max(2, -(-max_k2 // k1)) * k1}: windows begin at update points"
        )
    if options.parsed_truncation() is not None:
        raise ArgumentError(
            f"truncation={shown(options.truncation)} does not go with k2='auto': audits need the "
            "whole gradient; give a fixed k2, or leave truncation out"
        )
    if isinstance(options.parsed_strategy(), Plan | UserSchedule):
        raise ArgumentError(
            "strategy given as actions, or as a plan, is of one length, and windows of k2='auto' "
            "have several; give a name such as 'uniform:32', or a function"
        )
