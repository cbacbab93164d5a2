"""Parts of a step, held against the module itself."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.attributes import Attributes
from tbptt_ckpt.module.outputs import OutputsNeeded
from tbptt_ckpt.module.part_functions import Encode, Readout, Transition
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.step_parts import StepParts
from tbptt_ckpt.module.trees import (
    Tree,
    is_differentiable,
    join_trees,
    map_tensors,
    tensors_of,
)

_NUM_STEPS = 3
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest element
_OF_HALF = 2e-2


def hold_against(
    parts: StepParts,
    module: nn.Module,
    inputs: Tree,
    state: Tree,
    *,
    on_copy: bool = False,
    grads: bool = True,
) -> None:
    """Raise `NoPartsError` unless parts and module agree over a few steps from an example.

    Outputs, states, and the gradients of weights, inputs and incoming state under one random
    cotangent are compared, one after the other, in their own dtype and with its rounding; with
    `on_copy` in float64 where module and parts can be copied, in the memory of a copy. Without
    `grads` only outputs and states are. Everything is left as it was.
    """
    attributes = Attributes(module)
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grads),
            untouched(module, tensors=tensors_of((inputs, state))),
            OutputsNeeded(True),
        ):
            given = parts, module, (inputs, state)
            mine, copied, cast = _in_double(*given) if on_copy else given
            device = next((t.device.type for t in tensors_of((inputs, state))), "cpu")
            is_copy = copied is not module
            with torch.autocast(device, enabled=False) if is_copy else nullcontext():
                _compare(mine, copied, *cast)
    except NoPartsError:
        raise
    except Exception as error:  # of a module of the user's
        raise NoPartsError(f"it fails as it is compared with its parts: {error}") from error
    finally:
        attributes.put_back()


def hold_step(plain: tuple[Tree, Tree], parts: tuple[Tree, Tree], precision: Precision) -> bool:
    """Whether outputs and state of one step agree, or are not finite, which others look at."""
    if not all(bool(torch.isfinite(each).all()) for each in tensors_of(plain)):
        return True
    comparison = _Comparison(precision.lowest)
    try:
        for name, mine, its in zip(("outputs", "states"), plain, parts, strict=True):
            comparison.hold(name, tensors_of(mine), tensors_of(its))
    except (NoPartsError, ValueError):
        return False
    return True


def _in_double(
    parts: StepParts, module: nn.Module, example: tuple[Tree, Tree]
) -> tuple[StepParts, nn.Module, tuple[Tree, Tree]]:
    """Copies of everything in float64; what was given where that cannot be."""
    encode, run, readout = parts.encode, parts.transition, parts.readout
    is_traced = isinstance(encode, Encode) and isinstance(run, Transition)
    if not (is_traced and isinstance(readout, Readout)):
        return parts, module, example
    try:
        copied = copy.deepcopy(module)
        if _pieces_of(copied) & _pieces_of(module):  # what copies itself is not the copy's alone
            return parts, module, example
        copied = copied.double()
        given = map_tensors(_doubled, example)
        copied(*map_tensors(Tensor.clone, given))
    except Exception:  # of a module of the user's
        return parts, module, example
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.is_floating_point() and not weight.any():  # hides what is before it
                weight.add_(_random(weight, source), alpha=0.1)
    step: Any = SimpleNamespace(step=copied)
    found: Any = (encode, run, readout)
    of_copy: Any = [replace(each, step=step) for each in found]
    return StepParts(*of_copy), copied, given


def _pieces_of(module: nn.Module) -> set[int]:
    pieces = (*module.modules(), *module.parameters(), *module.buffers())
    return set(map(id, pieces))


def _doubled(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    return made.double() if made.is_floating_point() else made


def _random(like: Tensor, source: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=source, dtype=torch.float64, device="cpu")
    return drawn.to(like.device, like.dtype)


def _compare(parts: StepParts, module: nn.Module, inputs: Tree, state: Tree) -> None:
    source = torch.Generator().manual_seed(0)
    steps = [
        map_tensors(functools.partial(_varied, step=k, source=source), inputs)
        for k in range(_NUM_STEPS)
    ]
    runs, precision = [], Precision()
    for run in (_run_plain, _run_folded):
        leaves = map_tensors(_as_leaf, (steps, state))
        with precision:
            outputs, last = run(module if run is _run_plain else parts, *leaves)
        runs.append((outputs, tensors_of(last), tensors_of(leaves)))
    (outputs, states, leaves), (its_outputs, its_states, its_leaves) = runs
    comparison = _Comparison(precision.lowest)
    comparison.hold("outputs", outputs, its_outputs)
    comparison.hold("states", states, its_states)
    losses = _scalar([*outputs, *states]), _scalar([*its_outputs, *its_states])
    if losses[0] is None or losses[1] is None:
        return
    for name, weight in module.named_parameters():
        comparison.hold_gradients(f"gradient of {name}", losses, (weight, weight))
    for pair in zip(leaves, its_leaves, strict=True):
        comparison.hold_gradients("gradients of inputs and state", losses, pair)


class _Comparison:
    """Holds tensors of the parts against those of the module, whose largest gives the rounding."""

    def __init__(self, lowest: torch.dtype) -> None:
        self._lowest, self._largest = lowest, 0.0

    def hold(
        self, name: str, plain: Sequence[Tensor | None], folded: Sequence[Tensor | None]
    ) -> None:
        for expected, got in zip(plain, folded, strict=True):
            if (expected is None) != (got is None):
                raise NoPartsError(f"its parts do not give the same {name}: one of them has none")
            if expected is None or got is None:
                continue
            size = _size(expected)
            if not math.isfinite(size):
                raise NoPartsError(f"its {name} are not finite on the example")
            self._largest = max(self._largest, size if is_differentiable(expected) else 0.0)
            if not _is_near(expected, got, self._largest, self._lowest):
                raise NoPartsError(f"its parts do not give the same {name} as the module itself")

    def hold_gradients(
        self, name: str, losses: tuple[Any, Any], leaves: tuple[Tensor, Tensor]
    ) -> None:
        """Compare one gradient and let it go: those of all weights take as much as these."""
        if leaves[0].requires_grad:
            plain, folded = (
                torch.autograd.grad(loss, [leaf], retain_graph=True, allow_unused=True)
                for loss, leaf in zip(losses, leaves, strict=True)
            )
            self.hold(name, plain, folded)


class Precision(TorchFunctionMode):
    """Notes the floating dtype of least precision that a step computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in (result, *args):
            if isinstance(each, Tensor) and each.is_floating_point():
                self.lowest = max(self.lowest, each.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return result


def _varied(tensor: Tensor, step: int, source: torch.Generator) -> Tensor:
    """Other values for a later step, of lanes that changed places, within the range there is."""
    moved = tensor.detach().roll(step, 0)
    if step and moved.is_floating_point():
        size = torch.rand(moved.shape, generator=source, dtype=torch.float64, device="cpu")
        return moved * (1 - size / 2).to(moved.device, moved.dtype)
    is_index = moved.dtype in (torch.int32, torch.int64) and moved.numel() and moved.min() >= 0
    return (moved + step) % (moved.max() + 1) if step and is_index else moved.clone()


def _as_leaf(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    return made.requires_grad_() if is_differentiable(made) else made


def _run_plain(module: Any, steps: Sequence[Tree], state: Tree) -> tuple[list[Tensor], Tree]:
    outputs = []
    for each in steps:
        result = module(each, state)
        if isinstance(module, nn.RNNCellBase):
            result = (result if isinstance(result, Tensor) else result[0], result)
        output, state = result
        outputs.append(tensors_of(output))
    return [torch.stack(each) for each in zip(*outputs, strict=True)], state


def _run_folded(parts: Any, steps: Sequence[Tree], state: Tree) -> tuple[list[Tensor], Tree]:
    encoded = parts.encode(join_trees(torch.cat, steps))
    kept = []
    for step in range(len(steps)):
        one = map_tensors(functools.partial(_one_of, step=step, count=len(steps)), encoded)
        features, state = parts.transition(one, state)
        kept.append(features)
    outputs = parts.readout(join_trees(torch.cat, kept), encoded)
    flat = tensors_of(outputs)
    return [each.reshape(len(steps), -1, *each.shape[1:]) for each in flat], state


def _one_of(folded: Tensor, step: int, count: int) -> Tensor:
    return folded.reshape(count, -1, *folded.shape[1:])[step]


def _scalar(results: Sequence[Tensor]) -> Tensor | None:
    """The sum of all results with random factors, of those that have a graph."""
    source, total = torch.Generator().manual_seed(2), None
    for each in results:
        cotangent = _random(each, source) if is_differentiable(each) else each
        if each.requires_grad:
            part = (each * cotangent).sum()
            total = part if total is None else total + part
    return total


def _is_near(expected: Tensor, got: Tensor, largest: float, lowest: torch.dtype) -> bool:
    """Whether rounding explains a difference: that of a tensor's own sums, and of what cancels."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    if not is_differentiable(expected):
        return torch.equal(expected, got)
    relative = _TOLERANCES.get(lowest, _OF_HALF)
    cancelled = 100 * torch.finfo(lowest).eps * largest
    apart = expected.detach() - got.detach()
    difference = float(apart.abs_().max()) if got.numel() else 0.0
    return difference <= max(relative * _size(expected), cancelled)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
