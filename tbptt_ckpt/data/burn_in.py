"""Sequences whose first steps warm the state up and have no loss."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.arguments import PositiveInt, checked
from tbptt_ckpt.data.blocks import true_rows
from tbptt_ckpt.data.source import Source, check_range, check_same_source, for_module, rows_of
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.recurrence import Recurrence
from tbptt_ckpt.module.trees import Tree


class BurnIn:
    """A source whose sequences run their first steps without loss.

    Those steps have weight zero: after step 0 in all lanes, after a reset in the lanes that
    reset. They are left out of every divisor. Gradients flow back through them as far as `k2`
    reaches. Steps count in sequence time, so a sequence that is not longer has no loss at all.

    Args:
        source: A source with a length.
        num_steps: Steps without loss at the beginning of each sequence.

    Raises:
        ArgumentError: A source without a length, whose earlier resets could not be asked for.
    """

    @checked
    def __init__(self, source: Any, num_steps: PositiveInt) -> None:
        if not isinstance(source, Source) or not isinstance(source, Sized):
            raise ArgumentError(
                f"source={shown(source)} must be a source with a length; in a stream, give "
                "the first targets as None or weight zero"
            )
        self.source, self.num_burn_in_steps = source, num_steps
        self.time_dim: int = getattr(source, "time_dim", 0)

    def for_module(self, recurrence: Recurrence) -> BurnIn:
        """The same for a module, with time where its layer has it unless the source says it."""
        source = for_module(self.source, recurrence)
        return self if source is self.source else BurnIn(source, self.num_burn_in_steps)

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"BurnIn({self.source!r}, {self.num_burn_in_steps:,} steps without loss)"

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """What the source reads."""
        return self.source.read(start, stop)

    def resets(self, start: int, stop: int) -> Tensor | None:
        """The source's resets."""
        return rows_of(self.source, "resets", start, stop)

    def weights(self, start: int, stop: int) -> Tensor:
        """[n] or [n, B]: the source's weights, zero while a sequence burns in."""
        check_range(start, stop, len(self))
        weights = rows_of(self.source, "weights", start, stop)
        kept = self._burnt_in(start, stop)
        if weights is None:
            return kept.to(torch.float64)
        if weights.dim() != kept.dim():  # one of them has lanes
            weights, kept = (rows.reshape(stop - start, -1) for rows in (weights, kept))
        return torch.where(kept, weights, 0)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on, where the source has an order."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The source's state, and the number of steps without loss."""
        state: dict[str, Any] = getattr(self.source, "state_dict", dict)()
        return {"num_burn_in_steps": self.num_burn_in_steps, "source": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the source.

        Raises:
            ArgumentError: The source is not the same, or burnt in otherwise.
        """
        numbers = state["num_burn_in_steps"], self.num_burn_in_steps
        check_same_source(*(f"one of {number} burn-in steps" for number in numbers))
        if hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state["source"])

    def _burnt_in(self, start: int, stop: int) -> Tensor:
        """[n] or [n, B]: whether the sequence began `num_burn_in_steps` ago or before."""
        num_steps = self.num_burn_in_steps
        first = max(0, start - num_steps + 1)  # one that began before has burnt in
        resets = self.resets(first, stop)
        shape = [stop - first] if resets is None else resets.shape
        kept = torch.ones(shape, dtype=torch.bool, device="cpu")
        if first == 0:
            kept[:num_steps] = False
        if resets is not None:
            for row in true_rows(resets):
                kept[row : row + num_steps] &= ~resets[row]
        return kept[start - first :]
