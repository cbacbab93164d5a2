"""Runs the steps of a segment by their parts: all at once, but for the transition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.data.blocks import steps_of
from tbptt_ckpt.memory.reading import Told
from tbptt_ckpt.module.step_parts import StepParts, bare_cell
from tbptt_ckpt.module.trees import Tree, join_trees, map_tensors, tensors_of
from tbptt_ckpt.time_batching.interception import suspended
from tbptt_ckpt.time_batching.over_time import has_kernel, run_cell
from tbptt_ckpt.time_batching.policy import TimeBatching


class SegmentParts:
    """A step's parts, over a segment whose time is the first dimension.

    Attributes:
        is_one_call: Whether a transition ran all steps at once, so that no step has a graph.
    """

    def __init__(self, parts: StepParts, batching: TimeBatching) -> None:
        self._parts, self._batching, self.is_one_call = parts, batching, False

    @property
    def of_kernel(self) -> Tensor | None:
        """The recurrent weight of a cell that has a kernel; None where the transition is none."""
        bare = self._parts.cell
        return bare.cell.weight_hh if bare is not None and has_kernel(bare.cell) else None

    @property
    def has_cell(self) -> bool:
        """Whether its transition is one of torch's cells, which may run all steps at once."""
        return self._parts.cell is not None

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
            found = self._of_cell(encoded, state)
        if found is None:
            features, state = self._loop(encoded, state, first_wanted, rows, told)
        else:
            self.is_one_call = True
            cell, features, state = found
            self._batching.took(f"{type(cell).__name__} of all steps", cell.weight_hh)
            features = _from(first_wanted, features)
        if first_wanted == num_steps:
            return None, state
        with suspended():
            wanted = _from(first_wanted, encoded)
            outputs = self._parts.readout(folded(features), folded(wanted))
        return _unfolded(outputs, num_steps - first_wanted), state

    def _of_cell(self, encoded: Tree, state: Tree) -> tuple[nn.RNNCellBase, Tree, Tree] | None:
        """A cell, and its features and state of all steps; None if it is called step by step.

        It takes what is encoded, or the first of several tensors, and gives features alike.
        """
        bare = self._parts.cell
        if bare is None or bare_cell(bare.cell) is None:  # hooks may be new
            return None
        x = encoded[0] if isinstance(encoded, tuple) and encoded else encoded
        states = None if state is None else bare.split(state)
        found = run_cell(bare.cell, x, states, takes_kernel=self._batching.takes_kernel)
        if found is None:
            return None
        outputs, last = found
        features = (outputs,) if isinstance(encoded, tuple) else outputs
        return bare.cell, features, bare.join(*last)

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
        return join_trees(torch.stack, kept) if kept else None, state


def rows_of(batching: TimeBatching, whole: Tree) -> Iterator[Any]:
    """The entries of consecutive steps, known as such in the region that is entered."""
    rows = batching.step_inputs(whole, 0)
    return steps_of(whole, 0, tensors_of(whole)[0].shape[0]) if rows is None else rows


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
