"""A compiled block of steps, held against the steps themselves before any gradient is its."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tbptt_ckpt.devices import device_of
from tbptt_ckpt.memory.meter import can_measure, peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.trees import (
    Tree,
    is_differentiable,
    map_tensors,
    structure,
    tensors_of,
)

# Outputs, with time first, and the state at the end of consecutive steps.
Block = Callable[[Tree, Tree], tuple[Tree, Tree]]

_ROUNDINGS = 100  # of one cut against the other, or of the dtype, by which a form may differ
_LARGEST = 1_000  # times the dtype's rounding that a difference between cuts may explain


class BlockDiffersError(Exception):
    """A compiled block is not what it was compiled from; the message says in what."""


class NotFiniteError(Exception):
    """Nothing can be held against numbers that are not finite."""


def hold_block(
    plain: Block, compiled: Block, inputs: Tree, state: Tree, weights: Sequence[Tensor]
) -> None:
    """Compare outputs, states and, where gradients are recorded, those of a random cotangent.

    Both run from identical states. What may differ is what differs between two uncompiled cuts:
    all steps in one graph, and the same in two graphs, from a state and inputs that are rounded
    otherwise.

    Raises:
        BlockDiffersError: Something else differs.
        NotFiniteError: The steps themselves give NaN or infinite numbers.
    """
    num_steps = tensors_of(inputs)[0].shape[0]
    names, whole = _results([(plain, inputs)], state, weights)
    if not all(t is None or bool(torch.isfinite(t).all()) for t in whole):
        raise NotFiniteError
    source = torch.Generator().manual_seed(1)
    rounded = map_tensors(lambda t: _rounded(t, source), (inputs, state))
    half = max(1, num_steps // 2)
    pieces = [_part(rounded[0], *bounds) for bounds in ((0, half), (half, num_steps))]
    _, cut = _results([(plain, each) for each in pieces if _length(each)], rounded[1], weights)
    _, made = _results([(compiled, inputs)], state, weights)
    if structure(made) != structure(whole):
        raise BlockDiffersError("it does not give the same tensors, or gradients")
    largest = 0.0
    for name, *three in zip(names, whole, cut, made, strict=True):
        expected, other, got = three
        if expected is not None and other is not None and got is not None:
            largest = max(largest, _size(expected) if is_differentiable(expected) else 0.0)
            _compare(name, expected, other, got, largest)


def bytes_to_hold(one_step: Callable[[], object], num_steps: int, weights: Sequence[Tensor]) -> int:
    """What comparing a block of so many steps may take, from a step with its graph.

    0 where memory cannot be measured.
    """
    device = device_of(weights)
    if not can_measure(device):
        return 0
    with peak_memory(device, held=(), rss=False) as meter:
        graph = one_step()
    del graph
    # A graph, and what others have left: outputs, and gradients of weights and their sums.
    return num_steps * meter.peak_bytes * 5 // 4 + 4 * tensor_bytes(list(weights))


def _part(tree: Tree, begin: int, end: int) -> Tree:
    return map_tensors(lambda t: t[begin:end], tree)


def _length(tree: Tree) -> int:
    return int(tensors_of(tree)[0].shape[0])


def _rounded(tensor: Tensor, source: torch.Generator) -> Tensor:
    """The same, each element one rounding up or down."""
    if not is_differentiable(tensor):
        return tensor
    signs = torch.randint(2, tensor.shape, generator=source, device="cpu").mul_(2).sub_(1)
    factor = 1 + torch.finfo(tensor.dtype).eps * signs.to(tensor.device, tensor.dtype)
    return (tensor.detach() * factor).requires_grad_(tensor.requires_grad)


def _results(
    pieces: Sequence[tuple[Block, Tree]], state: Tree, weights: Sequence[Tensor]
) -> tuple[list[str], list[Tensor | None]]:
    """Outputs, states and gradients of steps that are run in pieces, each a graph of its own."""
    graphs: list[tuple[list[Tensor], list[Tensor]]] = []
    outputs: list[list[Tensor]] = []
    for run, inputs in pieces:
        state = map_tensors(_as_leaf, state)
        starts = tensors_of(state)
        given, state = run(inputs, state)
        outputs.append(tensors_of(given))
        graphs.append((starts, tensors_of(state)))
    ends = graphs[-1][1]
    joined = [torch.cat(each) for each in zip(*outputs, strict=True)]
    results: list[Tensor | None] = [each.detach() for each in (*joined, *ends)]
    names = ["outputs"] * len(joined) + ["states"] * len(ends)
    if not torch.is_grad_enabled():
        return names, results
    grads = _cotangents(ends)
    totals: list[Tensor | None] = [None] * len(weights)
    for (starts, stops), given in zip(reversed(graphs), reversed(outputs), strict=True):
        # Of the outputs too: those of equal steps are alike, however the steps are cut.
        roots = [*zip(given, _cotangents(given), strict=True), *zip(stops, grads, strict=True)]
        known = [(t, g) for t, g in roots if g is not None and t.requires_grad]
        asked = [t for t in (*weights, *starts) if t.requires_grad]
        found = iter(_gradients(known, asked))
        new = [next(found) if t.requires_grad else None for t in (*weights, *starts)]
        totals = [_plus(a, b) for a, b in zip(totals, new, strict=False)]
        grads = new[len(weights) :]
    names += ["gradients of weights"] * len(weights) + ["gradients of the state"] * len(grads)
    return names, [*results, *totals, *grads]


def _gradients(
    roots: Sequence[tuple[Tensor, Tensor]], asked: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if not roots or not asked:
        return [None] * len(asked)
    tensors, grads = zip(*roots, strict=True)
    return torch.autograd.grad(tensors, asked, grads, allow_unused=True)


def _plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _as_leaf(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    return made.requires_grad_(torch.is_grad_enabled() and is_differentiable(made))


def _cotangents(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [_cotangent(each) if is_differentiable(each) else None for each in tensors]


def _cotangent(like: Tensor) -> Tensor:
    """Random numbers that follow from the shape of one step, and so not from how steps are cut."""
    source = torch.Generator().manual_seed(like.dim())
    drawn = torch.randn(like.shape[1:], generator=source, dtype=torch.float64, device="cpu")
    return drawn.to(like.device, like.dtype).expand(like.shape)


def _compare(name: str, expected: Tensor, other: Tensor, got: Tensor, largest: float) -> None:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        raise BlockDiffersError(f"its {name} are of another shape or dtype")
    if not is_differentiable(expected):
        if not torch.equal(expected, got):
            raise BlockDiffersError(f"its {name} differ")
        return
    rounding = torch.finfo(expected.dtype).eps
    between_cuts = min(_distance(expected, other), _LARGEST * rounding * _size(expected))
    allowed = _ROUNDINGS * (between_cuts + rounding * largest)
    difference = _distance(expected, got)
    if not difference <= allowed:
        raise BlockDiffersError(
            f"its {name} differ by {difference:.2g}, two uncompiled cuts by {between_cuts:.2g}"
        )


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max()) if one.numel() else 0.0


def _size(tensor: Tensor) -> float:
    size = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    return size if math.isfinite(size) else 0.0
