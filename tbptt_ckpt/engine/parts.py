"""What runs: made once from what the user asked for, and not replaced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.budget.fitting import FittingPlans
from tbptt_ckpt.budget.growing import GrowingBudget
from tbptt_ckpt.budget.measured_budget import MeasuredBudget
from tbptt_ckpt.budget.window_budget import PlannedWindow, WindowBudget
from tbptt_ckpt.devices import check_on_one, device_of
from tbptt_ckpt.engine.auto_k2 import make_truncation
from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.ranks import make_ranks
from tbptt_ckpt.engine.reach_gauge import ReachGauge
from tbptt_ckpt.engine.shared_costs import SharedCosts
from tbptt_ckpt.engine.truncation import Truncation
from tbptt_ckpt.errors import ArgumentError, TbpttWarning, shown
from tbptt_ckpt.executor.checkpoint import CheckpointExecutor
from tbptt_ckpt.executor.cuts import CallCuts
from tbptt_ckpt.executor.guard import WeightGuard
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.observer import UNOBSERVED, Observer
from tbptt_ckpt.executor.replay import ReplayExecutor, storage_of
from tbptt_ckpt.executor.runner import Runner, make_runner
from tbptt_ckpt.executor.window_pass import Executor
from tbptt_ckpt.module.inside import is_compiled, modules_in, owner_of
from tbptt_ckpt.module.recurrence import (
    Recurrence,
    check_differentiable,
    check_initialised,
    parameters_of,
    renormalised_in,
)
from tbptt_ckpt.schedule.plan import Plan
from tbptt_ckpt.schedule.strategies import Auto, Optimal
from tbptt_ckpt.updates.accumulation import Accumulation
from tbptt_ckpt.updates.delivery import Deliveries
from tbptt_ckpt.updates.updater import Updater

_EXECUTORS: dict[str, Callable[[], Executor]] = {
    "replay": ReplayExecutor,
    "checkpoint": CheckpointExecutor,
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs the windows of an engine."""

    runner: Runner
    loss_function: LossFunction
    updater: Updater
    executor: Executor
    budget: WindowBudget  # plans windows, and keeps them within bytes
    shared_costs: SharedCosts  # of the slowest of ranks
    truncation: Truncation  # how far back each of them goes
    parameters: list[nn.Parameter]  # the weights of module and loss
    observer: Observer  # told of all that is done
    cuts: CallCuts  # whether it matters where calls are cut
    renormalised: frozenset[int]  # weights that a forward writes to, by their identity
    checks_replays: bool
    reach: ReachGauge  # how far back gradients reach, in some of the windows

    @property
    def recurrence(self) -> Recurrence:
        """The module, and how it is called."""
        return self.runner.recurrence

    def weights(self) -> list[Tensor]:
        """All that an update changes: a function's weights are known to the optimizer only."""
        found = {id(p): p for p in (*self.parameters, *self.updater.optimized())}
        return list(found.values())

    def guard(self, weights: Sequence[Tensor]) -> WeightGuard:
        """Watches those that only an update writes to, from now on."""
        return WeightGuard(weights, self.renormalised)

    def held(self) -> tuple[object, ...]:
        """Trees of tensors that are live between windows."""
        owners = (self.recurrence.module, self.loss_function.loss_fn, self.updater.optimizer)
        return (self.parameters, *owners, self.reach.held(), self.truncation.held())

    @property
    def gauges(self) -> tuple[Observer, ...]:
        """What looks at gradients on their way."""
        return self.reach, self.truncation.observer

    def absent_gradient_bytes(self) -> int:
        """Of weights that learn and have no gradient now."""
        weights = self.updater.deliveries.wholes(self.parameters)
        return sum(w.nbytes for w in weights if w.requires_grad and w.grad is None)

    def library_bytes(self) -> int:
        """What libraries keep where the weights are; on an accelerator buckets are among it."""
        buckets = self.updater.deliveries.wrappers.bucket_bytes
        return max(buckets, self.budget.library_bytes(self.device))

    def plan_of(self, planned: PlannedWindow) -> Plan:
        """The plan of a window as it was followed, with the form of its steps."""
        forms = tuple(self.budget.forms.items())
        return replace(planned.executed_plan(), form=self.runner.time_batching.form, forms=forms)

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU where none are known."""
        return device_of(self.parameters or self.updater.optimized())


def make_parts(
    recurrence: Recurrence,
    loss_fn: Callable[[Any, Any], Any],
    optimizer: Any,
    options: Options,
    *,
    observer: Observer = UNOBSERVED,
    measured: bool = True,
) -> Parts:
    """Check every argument and build what runs.

    `measured` says whether costs may be measured, which a single window is not worth.

    Raises:
        ArgumentError: An argument that cannot work.
    """
    module = recurrence.module
    runner = make_runner(
        recurrence,
        options.autocast_dtype,
        options.time_batching,
        traces=True,
        has_room=options.memory_budget is None,
        compile=options.parsed_compile(),
    )
    if isinstance(options.strategy, Plan):
        runner.time_batching.decide(options.strategy.form)
    check_differentiable(module)
    check_initialised("loss_fn", loss_fn)
    parameters = parameters_of(module, loss_fn)
    ranks = make_ranks(options, module, loss_fn, optimizer)
    deliveries = Deliveries(module, loss_fn, once=options.deliver == "once", ranks=ranks)
    updater = _make_updater(optimizer, parameters, options, deliveries)
    _check_optimized(updater, module, loss_fn)
    if options.measure_memory:
        check_on_one("measure_memory=True", (*parameters, *updater.optimized()))
    given = options.executor
    executor: Executor = _EXECUTORS[given]() if isinstance(given, str) else given
    wrappers = deliveries.wrappers
    is_drawn = options.parsed_truncation() is not None  # what gradients are is divided
    is_sharded = wrappers.is_sharded or wrappers.shards.is_any
    budget = _make_budget(options, executor, updater, parameters, runner, measured=measured)
    works = measured and not (executor.one_graph or is_sharded or is_drawn)
    return Parts(
        runner=runner,
        loss_function=LossFunction(loss_fn),
        updater=updater,
        executor=executor,
        budget=budget,
        shared_costs=SharedCosts(ranks, budget, options, parameters),
        truncation=make_truncation(options, executor, parameters, updater),
        parameters=parameters,
        observer=observer,
        cuts=CallCuts(),
        renormalised=renormalised_in(module, loss_fn),
        # Where a check fails, processes would run different steps while weights are gathered.
        checks_replays=options.check_replays and not wrappers.is_sharded,
        reach=ReachGauge(parameters, updater, works=works),
    )


def _make_updater(
    optimizer: Any, parameters: list[nn.Parameter], options: Options, deliveries: Deliveries
) -> Updater:
    group = Accumulation(options.accumulate, averages=options.reduction == "mean")
    if optimizer is None and options.accumulate != 1:
        raise ArgumentError(
            f"accumulate={options.accumulate} needs an optimizer; with optimizer=None the "
            "gradients of all windows accumulate in .grad"
        )
    return Updater(
        optimizer,
        parameters,
        options.clip_grad_norm,
        options.scaler,
        options.scheduler,
        group,
        deliveries,
    )


def _check_optimized(updater: Updater, module: object, loss_fn: object) -> None:
    """Compare what an optimizer holds with what learns; of functions that is not known.

    Raises:
        ArgumentError: It holds none of it.
    """
    owners = (("module", owner_of(module)), ("loss_fn", owner_of(loss_fn)))
    learning = {
        id(parameter): f"{owner}.{name}"
        for owner, tree in owners
        if isinstance(tree, nn.Module)
        for name, parameter in tree.named_parameters()
        if parameter.requires_grad
    }
    optimized = {id(parameter) for parameter in updater.optimized()}
    missed = [name for key, name in learning.items() if key not in optimized]
    if updater.optimizer is None or not missed:
        return
    kind, some = type(updater.optimizer).__name__, ", ".join(missed[:3])
    if len(missed) == len(learning):
        raise ArgumentError(
            f"optimizer={kind} holds none of the parameters that learn, such as {some}; make it "
            "of module.parameters(), or freeze the module with requires_grad_(False)"
        )
    more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
    warnings.warn(
        f"optimizer={kind} misses parameters that get gradients, and never updates them: "
        f"{some}{more}; add them, or freeze them with requires_grad_(False)",
        TbpttWarning,
        stacklevel=5,
    )


def _make_budget(
    options: Options,
    executor: Executor,
    updater: Updater,
    parameters: list[nn.Parameter],
    runner: Runner,
    *,
    measured: bool,
) -> WindowBudget:
    """Who plans the windows.

    Raises:
        ArgumentError: A budget, or the best plan within one, for nested checkpoints: they record
            the graph of a whole window, which no schedule bounds.
    """
    strategy, amount = options.parsed_strategy(), options.parsed_budget()
    if amount is not None:
        amount.check_device(device_of(parameters or updater.optimized()))
    finds_fastest = measured and isinstance(strategy, Auto | Optimal)
    if (finds_fastest or amount is not None) and _is_compiled_by_length(runner.recurrence):
        if amount is None and isinstance(strategy, Auto):
            return WindowBudget(strategy)  # one length, and what is left of a window
        runner.call_in_blocks()  # of two lengths, whatever leaves have
    if executor.one_graph:
        if amount is not None or isinstance(strategy, Optimal):
            raise ArgumentError(
                "executor='checkpoint' holds the graph of a whole window, which no memory_budget "
                "and no strategy='optimal' bounds; use executor='replay'"
            )
    elif finds_fastest or amount is not None:
        given = f"strategy={shown(options.strategy)}, memory_budget={shown(options.memory_budget)}"
        check_on_one(given, (*parameters, *updater.optimized()))
        if updater.deliveries.wrappers.is_sharded:
            raise ArgumentError(
                f"{given}: every run of a step of module gathers weights from all processes "
                "(fully_shard), and plans that each of them measures may differ; use a fixed "
                "strategy, such as 'sqrt', without a budget"
            )
        costs, batching = options.parsed_costs(), runner.time_batching
        return GrowingBudget(
            lambda: MeasuredBudget(
                FittingPlans(strategy, amount, parted=options.is_auto),
                costs,
                updater,
                parameters,
                batching,
                storage_of(executor),
            ),
            batching,
        )
    return WindowBudget(strategy)


def _is_compiled_by_length(recurrence: Recurrence) -> bool:
    """Whether a module of segments is compiled by who gave it, anew for each length of a call."""
    module = recurrence.module
    inside = any("_orig_mod" in inner._modules for _, inner in modules_in(module))
    return not recurrence.per_step and (inside or is_compiled(module))
