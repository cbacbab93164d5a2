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
    map_tensors,
    replace_tensors,
    tensors_of,
)

_NUM_STEPS = 3
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest element
_OF_HALF = 2e-2


def hold_against(parts: StepParts, module: nn.Module, inputs: Tree, state: Tree) -> None:
    """Raise `NoPartsError` unless parts and module agree over a few steps from an example.

    Outputs, states, and the gradients of weights, inputs and incoming state under one random
    cotangent are compared: in float64 where module and parts can be copied, otherwise in their
    own dtype and with its rounding. Everything is left as it was.
    """
    attributes = Attributes(module)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            untouched(module, tensors=tensors_of((inputs, state))),
            OutputsNeeded(True),
        ):
            mine, copied, cast = _in_double(parts, module, inputs, state)
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


def _in_double(
    parts: StepParts, module: nn.Module, inputs: Tree, state: Tree
) -> tuple[StepParts, nn.Module, tuple[Tree, Tree]]:
    """Copies of everything in float64; what was given where that cannot be."""
    encode, run, readout = parts.encode, parts.transition, parts.readout
    is_traced = isinstance(encode, Encode) and isinstance(run, Transition)
    if not (is_traced and isinstance(readout, Readout)):
        return parts, module, (inputs, state)
    try:
        copied = copy.deepcopy(module).double()
        given = map_tensors(_doubled, (inputs, state))
        copied(*map_tensors(Tensor.clone, given))
    except Exception:  # of a module of the user's
        return parts, module, (inputs, state)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in copied.parameters():
            if weight.is_floating_point() and not weight.any():  # hides what is before it
                weight.add_(_random(weight, source), alpha=0.1)
    step: Any = SimpleNamespace(step=copied)
    found: Any = (encode, run, readout)
    of_copy: Any = [replace(each, step=step) for each in found]
    return StepParts(*of_copy), copied, given


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
    results, precision = [], _Precision()
    for run in (_run_plain, _run_folded):
        leaves = map_tensors(_as_leaf, (steps, state))
        with precision:
            outputs, last = run(module if run is _run_plain else parts, *leaves)
        results.append(_with_gradients(outputs, last, leaves, module))
    (plain, names), (folded, _) = results
    floating = [t for t in plain if t is not None and is_differentiable(t)]
    largest = max((_size(t) for t in floating), default=0.0)
    for expected, got, name in zip(plain, folded, names, strict=True):
        if (expected is None) != (got is None):
            raise NoPartsError(f"its parts do not give the same {name}: one of the two has none")
        if expected is None or got is None:
            continue
        if not math.isfinite(_size(expected)):
            raise NoPartsError(f"its {name} are not finite on the example")
        if not _is_near(expected, got, largest, precision.lowest):
            raise NoPartsError(f"its parts do not give the same {name} as the module itself")


class _Precision(TorchFunctionMode):
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
    count, flat = len(steps), [tensors_of(each) for each in steps]
    folded = [torch.cat(each) for each in zip(*flat, strict=True)]
    encoded = parts.encode(replace_tensors(steps[0], folded))
    kept = []
    for step in range(count):
        one = map_tensors(functools.partial(_one_of, index=step, count=count), encoded)
        features, state = parts.transition(one, state)
        kept.append(tensors_of(features))
    together = [torch.cat(each) for each in zip(*kept, strict=True)]
    outputs = parts.readout(replace_tensors(features, together), encoded)
    return [each.reshape(count, -1, *each.shape[1:]) for each in tensors_of(outputs)], state


def _one_of(folded: Tensor, index: int, count: int) -> Tensor:
    return folded.reshape(count, -1, *folded.shape[1:])[index]


def _with_gradients(
    outputs: list[Tensor], state: Tree, leaves: Tree, module: nn.Module
) -> tuple[list[Tensor | None], list[str]]:
    """Results, and the gradients of all that has some, with their names."""
    results = [*outputs, *tensors_of(state)]
    source = torch.Generator().manual_seed(2)
    loss: Any = 0.0
    for each in results:
        cotangent = _random(each, source) if is_differentiable(each) else each
        if each.requires_grad:
            loss = loss + (each * cotangent).sum()
    names = [*["outputs"] * len(outputs), *["states"] * len(tensors_of(state))]
    wanted: dict[int, tuple[Tensor, str]] = {
        id(p): (p, f"gradient of {n}") for n, p in module.named_parameters()
    }
    wanted |= {id(t): (t, "gradients of inputs and state") for t in tensors_of(leaves)}
    asked = [(t, name) for t, name in wanted.values() if t.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(asked)
    if isinstance(loss, Tensor) and asked:
        gradients = torch.autograd.grad(loss, [t for t, _ in asked], allow_unused=True)
    return [*results, *gradients], [*names, *(name for _, name in asked)]


def _is_near(expected: Tensor, got: Tensor, largest: float, lowest: torch.dtype) -> bool:
    """Whether rounding explains a difference: that of a tensor's own sums, and of what cancels."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    if not is_differentiable(expected):
        return torch.equal(expected, got)
    relative = _TOLERANCES.get(lowest, _OF_HALF)
    cancelled = 100 * torch.finfo(lowest).eps * largest
    difference = float((expected - got).detach().abs().max()) if got.numel() else 0.0
    return difference <= max(relative * _size(expected), cancelled)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
