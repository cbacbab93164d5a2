"""Lanes that begin a new sequence inside a window, and the state they begin it from."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.host import sent
from tbptt_ckpt.module.trees import Tree, map_tensors, replace_tensors, structure, tensors_of


class Resets:
    """The steps of a window at which lanes begin a new sequence.

    A lane that resets at step t runs step t from the initial state; the state kept at t, if
    one is, is that before the reset. Step 0 needs no reset.

    Args:
        blocks: The window's steps.
        initial: The state that lanes begin from, with its graph; None stands for zeros.
        lane_dim: Where lanes are in the tensors of a state.
    """

    def __init__(
        self, blocks: Sequence[StepBlock] = (), initial: Tree = None, lane_dim: int = 0
    ) -> None:
        self._initial, self._lane_dim = initial, lane_dim
        self._blocks = [block for block in blocks if block.resets is not None]
        found = [step for block in self._blocks for step in block.reset_steps()]
        self.steps = [step for step in found if step > 0]  # the first has nothing to reset
        self._sent: dict[torch.device, Tensor] = {}  # a row for each, where states are

    def of(self, blocks: Sequence[StepBlock]) -> Resets:
        """Those of other blocks, to the same state."""
        return Resets(blocks, self._initial, self._lane_dim)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut `[start, stop)` before each step at which a lane resets."""
        position = bisect_right(self.steps, start)
        while start < stop:
            end = min(stop, self.steps[position]) if position < len(self.steps) else stop
            yield start, end
            start, position = end, position + 1

    def apply(self, step: int, state: Tree) -> Tree:
        """The state from which `step` runs: lanes that reset there get the initial state.

        No gradient reaches the old state of a lane that resets.

        Raises:
            ArgumentError: A state whose lanes cannot be told apart, or an initial state that
                is not nested like it.
        """
        position = bisect_left(self.steps, step)
        if position == len(self.steps) or self.steps[position] != step:
            return state
        tensors = tensors_of(state)
        pairs = zip(tensors, self._initial_for(state), strict=True)
        return replace_tensors(
            state,
            [torch.where(self._mask(position, old), new.to(old.dtype), old) for old, new in pairs],
        )

    def _initial_for(self, state: Tree) -> list[Tensor]:
        if self._initial is None:
            return tensors_of(map_tensors(torch.zeros_like, state))
        if structure(self._initial) != structure(state):
            raise ArgumentError(
                f"init_state is {structure(self._initial)}, the module's state is "
                f"{structure(state)}; lanes can only be reset to a state nested like it"
            )
        return tensors_of(self._initial)

    def _mask(self, position: int, tensor: Tensor) -> Tensor:
        """The lanes that reset, in a shape that spreads over a state's tensor."""
        mask = self._lanes(position, tensor.device)
        if mask.dim() == 0:
            return mask
        dim, num_lanes = self._lane_dim, mask.shape[0]
        if tensor.dim() <= dim or tensor.shape[dim] != num_lanes:
            raise ArgumentError(
                f"resets are for {num_lanes} lanes, but the state has a tensor of shape "
                f"{tuple(tensor.shape)} without that many on lane_dim={dim}; pass lane_dim to say "
                "where lanes are in the state"
            )
        return mask.view([num_lanes if d == dim else 1 for d in range(tensor.dim())])

    def _lanes(self, position: int, device: torch.device) -> Tensor:
        """Which lanes reset at a step of `steps`; on another device those of all, sent at once."""
        if device.type == "cpu":
            return self._row(self.steps[position]).clone()  # a graph takes no inference tensor
        if device not in self._sent:
            self._sent[device] = sent(torch.stack([*map(self._row, self.steps)]), device)
        return self._sent[device][position]

    def _row(self, step: int) -> Tensor:
        block = self._blocks[bisect_right(self._blocks, step, key=lambda each: each.start) - 1]
        assert block.resets is not None, "others are left out"
        return block.resets[step - block.start]
