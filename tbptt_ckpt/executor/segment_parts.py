"""Runs the steps of a segment by their parts: all at once, but for the transition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.memory.reading import Told
from tbptt_ckpt.module.step_parts import BareCell, StepParts, bare_cell
from tbptt_ckpt.module.trees import Tree, map_tensors, replace_tensors, tensors_of
from tbptt_ckpt.time_batching.candidates import autocast_dtype, is_plain, is_stable
from tbptt_ckpt.time_batching.interception import suspended
from tbptt_ckpt.time_batching.policy import TimeBatching

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class SegmentParts:
    """A step's parts, over a segment whose time is the first dimension.

    Attributes:
        has_fused: Whether a transition ran as a kernel, so that nothing is left step by step.
    """

    def __init__(self, parts: StepParts, batching: TimeBatching) -> None:
        self._parts, self._batching, self.has_fused = parts, batching, False

    def run(
        self,
        inputs: Tree,
        state: Tree,
        first_wanted: int,
        rows: Callable[[Tree], Iterable[Any]],
        told: Told | None,
    ) -> tuple[Tree, Tree]:
        """Outputs of the steps from `first_wanted` on, None for none, and the state at the end.

        `rows` gives the entries of something for all steps one by one; `told` is told of calls.
        """
        num_steps = tensors_of(inputs)[0].shape[0]
        with suspended():
            encoded = _unfolded(self._parts.encode(folded(inputs)), num_steps)
            found = _fused(self._parts.cell, encoded, state)
        if found is None:
            features, state = self._loop(encoded, state, first_wanted, rows, told)
        else:
            self.has_fused = True
            self._batching.took("LSTMCell of all steps", found[2])
            features, state = _from(first_wanted, found[0]), found[1]
        if first_wanted == num_steps:
            return None, state
        with suspended():
            wanted = _from(first_wanted, encoded)
            outputs = self._parts.readout(folded(features), folded(wanted))
        return _unfolded(outputs, num_steps - first_wanted), state

    def _loop(
        self,
        encoded: Tree,
        state: Tree,
        first_wanted: int,
        rows: Callable[[Tree], Iterable[Any]],
        told: Told | None,
    ) -> tuple[Tree, Tree]:
        transition, kept = self._parts.transition, []
        for step, row in enumerate(rows(encoded)):
            if told is not None:
                told(partial(tensors_of, state))
            features, state = transition(row, state)
            if step >= first_wanted:
                kept.append(features)
        return _stacked(kept), state


def folded(tree: Tree) -> Tree:
    """Time and lanes, the first two dimensions, as one."""
    return map_tensors(lambda t: t.flatten(0, 1), tree)


def have_lanes(inputs: Tree, state: Tree) -> bool:
    """Whether inputs, with time first, and a state, if there is one, have the same lanes."""
    found = tensors_of(inputs)
    if not found or found[0].dim() < 2:
        return False
    lanes = found[0].shape[1:2]
    alike = all(t.dim() > 1 and t.shape[1:2] == lanes for t in found)
    return lanes[0] > 0 and alike and all(t.shape[:1] == lanes for t in tensors_of(state))


def _from(first: int, tree: Tree) -> Tree:
    return map_tensors(lambda t: t[first:], tree) if first else tree


def _unfolded(tree: Tree, num_steps: int) -> Tree:
    return map_tensors(lambda t: t.unflatten(0, (num_steps, t.shape[0] // num_steps)), tree)


def _stacked(trees: Sequence[Tree]) -> Tree:
    if not trees:
        return None
    if isinstance(trees[0], Tensor):
        return torch.stack(list(trees))
    columns = zip(*map(tensors_of, trees), strict=True)
    return replace_tensors(trees[0], [torch.stack(column) for column in columns])


def _begun(x: Tensor, shapes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What a cell begins with by itself."""
    return x.new_zeros(shapes), x.new_zeros(shapes)


def _fused(bare: BareCell | None, encoded: Tree, state: Tree) -> tuple[Tree, Tree, Tensor] | None:
    """Features and state of all steps by torch's kernel, and the cell's recurrent weight.

    None where the cell is to make them. It takes what is encoded, or the first of several
    tensors, and gives features alike. On an accelerator the kernel wants its weights in one
    piece, which a cell's are not.
    """
    x = encoded[0] if isinstance(encoded, tuple) and encoded else encoded
    if bare is None or bare_cell(bare.cell) is None or not is_plain(x):  # hooks may be new
        return None
    weights = [bare.cell._parameters.get(name) for name in _WEIGHTS]
    has_bias = weights[2] is not None
    alike = (weights[3] is not None) == has_bias and all(map(is_stable, weights))
    if not alike or weights[0] is None or weights[1] is None:
        return None
    shapes = (*x.shape[1:2], weights[1].shape[1])
    h, c = _begun(x, shapes) if state is None else bare.split(state)
    fits = x.dim() == 3 and x.is_cpu and autocast_dtype(weights[0]) is None
    if not fits or x.shape[2] != weights[0].shape[1] or not len(x):
        return None
    for each in (x, h, c, weights[1]):
        if not is_plain(each) or each.dtype != weights[0].dtype or not each.is_floating_point():
            return None
    if h.shape != shapes or c.shape != shapes:
        return None
    given: list[Tensor] = [weight for weight in weights if weight is not None]
    outputs, last_h, last_c = torch._VF.lstm(
        x, (h[None], c[None]), given, has_bias, 1, 0.0, bare.cell.training, False, False
    )
    features = (outputs,) if isinstance(encoded, tuple) else outputs
    return features, bare.join(last_h[0], last_c[0]), weights[1]
