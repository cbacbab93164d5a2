"""Wrappers of modules that several processes train, which see one pass for each window.

NOTE [Several processes]
`DistributedDataParallel` hangs on the nodes that accumulate gradients, where no tensor shows it.
Leaves run within its `no_sync`; then a forward of it that hands tickets of the weights through, and
their backward, are the one pass that it sees. Processes need not have the same plans. Buffers are
sent before a window, by a forward without a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.inside import is_a, modules_in
from tbptt_ckpt.updates.hooks import HooksOff
from tbptt_ckpt.updates.shards import Shards

# Modules that keep gradients in a backward of their own, and where they come from.
_REFUSED = {"FullyShardedDataParallel": "torch", "DeepSpeedEngine": "deepspeed"}


class Wrappers:
    """Those of a run's modules, found once.

    Args:
        *owners: Modules, and functions that name some.
        gathers: Whether sharded weights are gathered for a window, and reduced at its update.

    Attributes:
        is_sharded: Whether weights are gathered from all processes in every run of a step.
        shards: What is gathered for a window instead.
        weights: Those whose gradients are reduced over processes, by their identity.
        bucket_bytes: What reducers gather gradients in, which nobody else can reach.

    Raises:
        ArgumentError: One that cannot be given a window's gradient at once.
    """

    def __init__(self, *owners: object, gathers: bool = False) -> None:
        found = {id(module): module for owner in owners for _, module in modules_in(owner)}
        for module in found.values():
            _check(module)
        shards = Shards(found.values())
        self.is_sharded = shards.is_any and not gathers
        self.shards = shards if gathers else Shards(())
        self._reducers = [m for m in found.values() if isinstance(m, DistributedDataParallel)]
        self.weights = {id(p): p for m in self._reducers for p in m.parameters() if p.requires_grad}
        self.bucket_bytes = sum(weight.nbytes for weight in self.weights.values())

    @property
    def is_any(self) -> bool:
        """Whether one reduces gradients."""
        return bool(self._reducers)

    def begin(self) -> None:
        """A window begins: processes agree on buffers, as in a forward."""
        for reducer in self._reducers:
            if reducer._join_config.enable:
                raise ArgumentError(
                    "module is run within its join(), which counts forwards, and windows of "
                    "different processes may have different ones; give all processes as many steps"
                )
            with torch.no_grad():
                _handed_through(reducer, [torch.zeros((), device="cpu")])

    def no_sync(self) -> ExitStack:
        """While entered, no gradient is reduced."""
        stack = ExitStack()
        for reducer in self._reducers:
            stack.enter_context(reducer.no_sync())
        return stack

    def hand_through(self, tickets: Mapping[int, Tensor | None]) -> list[Tensor]:
        """What to differentiate so that each sees it; None stands for a weight without gradient.

        Raises:
            ArgumentError: One would wait for gradients that do not come.
        """
        found = [ticket for ticket in tickets.values() if ticket is not None]
        for reducer in self._reducers:
            _check_complete(reducer, tickets)
            found = _handed_through(reducer, found)
        return found

    def reduce(self) -> None:
        """Each sees one pass, without a gradient of its own: it reduces what has accumulated."""
        self.shards.reduce()
        for reducer in self._reducers:
            weights = [weight for weight in reducer.parameters() if weight.requires_grad]
            hooks = [HooksOff(weight) for weight in weights]
            try:
                with torch.enable_grad():
                    zeros = [_Zeros.apply(weight) for weight in weights]  # type: ignore[no-untyped-call]
                    roots = _handed_through(reducer, zeros)
                torch.autograd.backward(roots)
            finally:
                for each in hooks:
                    each.put_back()
            # Once, and all ranks together: otherwise a forward does it, and not all run one.
            reducer.reducer._rebuild_buckets()


class _Zeros(torch.autograd.Function):
    """Stands for a weight, and adds nothing to its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return torch.zeros((), device=weight.device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        weight = ctx.weight
        return torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)


class _HandsThrough(nn.Module):
    """Stands in a wrapper for the module whose steps have run already."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._buffers.update(dict(module.named_buffers()))

    def forward(self, *tickets: Tensor) -> tuple[Tensor, ...]:
        return tickets


def _handed_through(reducer: DistributedDataParallel, tickets: list[Tensor]) -> list[Tensor]:
    """A forward of the reducer with the tickets as inputs and outputs."""
    module = reducer.module
    reducer._modules["module"] = _HandsThrough(module)
    try:
        # That of the class: packages put one of their own in place, with autocast around it.
        return list(DistributedDataParallel.forward(reducer, *tickets))  # type: ignore[no-untyped-call]
    finally:
        reducer._modules["module"] = module


def _check_complete(reducer: DistributedDataParallel, tickets: Mapping[int, Tensor | None]) -> None:
    """Raise where a reducer would wait for gradients that do not come."""
    missed = [
        name
        for name, weight in reducer.module.named_parameters()
        if weight.requires_grad and tickets.get(id(weight)) is None
    ]
    missed = [name for name in missed if name not in reducer.parameters_to_ignore]
    if missed and not reducer.find_unused_parameters:
        raise ArgumentError(
            f"module.{missed[0]} got no gradient in a window, and DistributedDataParallel waits "
            f"for those of all weights ({len(missed)} have none); make it with "
            "find_unused_parameters=True, or freeze what does not learn beforehand"
        )


def _check(module: nn.Module) -> None:
    for package in ("lightning", "lightning_fabric"):
        precision = getattr(getattr(module, "_strategy", None), "precision", None)
        if is_a(module, package, "_FabricModule") and is_a(precision, package, "MixedPrecision"):
            raise ArgumentError(
                "module was set up by Fabric with mixed precision, which has every backward go "
                "through fabric.backward; in one process give its .module, with autocast_dtype="
                f"{getattr(precision, '_desired_input_dtype', torch.bfloat16)}"
            )
    for name, package in _REFUSED.items():
        if is_a(module, package, name):
            raise ArgumentError(
                f"module contains a {name}, which takes gradients out of every backward, so that "
                "a window's cannot be handed over at once; use DistributedDataParallel, or "
                "torch.distributed.fsdp.fully_shard"
            )
    if isinstance(module, DistributedDataParallel):
        for option in ("static_graph", "mixed_precision"):
            if getattr(module, option, None):
                raise ArgumentError(
                    f"module contains a DistributedDataParallel({option}=...), which counts the "
                    "backwards of a run, and a window's are its schedule's; leave "
                    f"{option} out (TBPTT has autocast_dtype)"
                )
