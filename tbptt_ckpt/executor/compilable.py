"""Whether a module's steps may be compiled: what one of them does besides returning its results."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tbptt_ckpt.executor.held_blocks import bytes_to_hold
from tbptt_ckpt.executor.step_blocks import block_function, run_block
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.attributes import Attributes
from tbptt_ckpt.module.recurrence import Recurrence, split_result
from tbptt_ckpt.module.step_parts import has_hooks
from tbptt_ckpt.module.trees import (
    Tree,
    copy_containers,
    iterate_leaves,
    map_tensors,
    structure,
    tensors_of,
)

_PARALLEL = ("torch.nn.parallel", "torch.distributed")
_EXACT = (torch.float32, torch.float64)  # dtypes whose rounding tells right from wrong


class LeftError(Exception):
    """Steps are not to be compiled; the message says why."""


def check_module(module: object) -> nn.Module:
    """A module whose steps may be looked at."""
    if not isinstance(module, nn.Module):
        raise LeftError("its weights are not known: it is a function")
    if any(map(has_hooks, module.modules())):
        raise LeftError("it has hooks, which want to see every step")
    for part in module.modules():
        if type(part).__module__.startswith(_PARALLEL):
            raise LeftError(f"it is a {type(part).__name__}, which wants each of its calls")
    return module


def check_step(
    recurrence: Recurrence, inputs: Tree, state: Tree, ambient: Ambient, attributes: Attributes
) -> Tree:
    """Run the first of some steps; the state it began with, or that which it made of none.

    Whoever calls puts attributes, generators and buffers back.

    Raises:
        LeftError: It does something that a compiled step would not, or not at each call.
    """
    one = map_tensors(lambda t: t[0].detach().clone(), inputs)
    mine = copy_containers(map_tensors(lambda t: t.detach().clone(), state))
    given = tensors_of((one, mine))
    versions = [each._version for each in given]
    found = ambient.capture()
    ambient.about_to_run()
    outputs, reached = split_result(recurrence.call(one, mine), recurrence)
    if ambient.capture() is not found:
        raise LeftError("a step draws random numbers or changes buffers")
    if (name := attributes.changed()) is not None:
        raise LeftError(f"a step changes {name}")
    if [each._version for each in given] != versions:
        raise LeftError("a step writes into its input or state")
    _check_tensors(recurrence, one, outputs, reached)
    state = state if tensors_of(state) else reached
    if structure(state) != structure(reached):
        raise LeftError("its state is nested otherwise from step to step")
    return map_tensors(lambda t: t.detach().clone(), state)


def check_room(
    recurrence: Recurrence, inputs: Tree, state: Tree, num_steps: int, room_bytes: float
) -> None:
    """Raise `LeftError` where so many steps and their block, with gradients, do not fit."""
    if room_bytes == float("inf"):
        return
    block = block_function(recurrence.call, wants=True)
    one = partial(run_block, block, map_tensors(lambda t: t[:1], inputs), state, graph=True)
    needed = bytes_to_hold(one, num_steps, recurrence.parameters)
    if needed > room_bytes:
        raise LeftError(
            f"holding a block against its steps may take {format_bytes(needed)}, of which the "
            f"memory budget leaves {format_bytes(max(0, int(room_bytes)))}"
        )


def _check_tensors(recurrence: Recurrence, one: Tree, outputs: Tree, reached: Tree) -> None:
    strange = [leaf for leaf in iterate_leaves((one, outputs, reached)) if leaf is not None]
    if others := [type(leaf).__name__ for leaf in strange if not isinstance(leaf, Tensor)]:
        raise LeftError(f"its inputs, outputs or states hold a {others[0]} beside tensors")
    for each in (*tensors_of(reached), *recurrence.parameters):
        if each.is_complex() or (each.is_floating_point() and each.dtype not in _EXACT):
            raise LeftError(f"it computes in {str(each.dtype).removeprefix('torch.')}")
