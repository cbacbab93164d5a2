"""Consecutive steps as one function, as a compiler is given them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.data.blocks import steps_of
from tbptt_ckpt.module.trees import (
    Tree,
    is_differentiable,
    join_trees,
    map_tensors,
    tensors_of,
)
from tbptt_ckpt.time_batching.interception import has_function_mode

Block = Callable[[list[Tree], Tree], tuple[list[Tree], Tree]]


def block_function(call: Callable[[Any, Any], Any], *, wants: bool) -> Block:
    """Steps one after the other, from the input of each to the output of each, if one `wants` it.

    Inputs and outputs of steps are tensors of their own: parts of one would lie at another offset
    each, and have machine code of its own.
    """

    def block(inputs: list[Tree], state: Tree) -> tuple[list[Tree], Tree]:
        outputs: list[Tree] = []
        for one in inputs:
            output, state = call(one, state)
            if wants:
                outputs.append(output)
        return outputs, state

    return block


def run_block(block: Block, inputs: Tree, state: Tree, *, graph: bool) -> tuple[Tree, Tree]:
    """Outputs, with time first as inputs have it, or None, and the state after.

    What a block is given is alike each time, since it is compiled for it: strides, whether
    gradients are recorded, and no tensor twice.
    """
    seen = set[int]()

    def of_state(tensor: Tensor) -> Tensor:
        tensor = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))
        if not graph:
            return tensor.detach().contiguous()
        if tensor.requires_grad or not is_differentiable(tensor):
            return tensor.contiguous()
        return tensor.detach().contiguous().requires_grad_()

    inputs = map_tensors(Tensor.contiguous, inputs)
    steps = list(steps_of(inputs, 0, tensors_of(inputs)[0].shape[0]))
    outputs, state = block(steps, map_tensors(of_state, state))
    return (join_trees(torch.stack, outputs) if outputs else None), state


def is_watched() -> bool:
    """Whether somebody wants to see each operation, or no graph is to be made of any."""
    modes = torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled()
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    hooks = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return bool(modes or transforms or hooks or has_function_mode())


def key_of(inputs: Tree, state: Tree) -> object:
    """What a block is compiled for."""
    given, held = (
        tuple((t.shape[first:], t.dtype, t.device) for t in tensors_of(tree))
        for tree, first in ((inputs, 1), (state, 0))
    )
    asks = tuple(t.requires_grad for t in tensors_of(inputs))
    return given, held, asks


def first_line(error: BaseException) -> str:
    """What went wrong in the first place, in one line."""
    while (cause := error.__cause__ or getattr(error, "inner_exception", None)) is not None:
        error = cause  # torch's own names the backend alone
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
