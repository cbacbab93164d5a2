"""A loader of batches of whole sequences, each of which is run from its first state to its end."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, TypeVar

import numpy as np
import torch

from tbptt_ckpt.arguments import Dimension, checked, checked_where_used
from tbptt_ckpt.data.source import Steps
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.available import Device
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.trees import map_tensors

R = TypeVar("R")


class Batches:
    """A loader of batches of whole sequences; iterating gives a `TensorSequence` for each batch.

    Given to a `Trainer`, every batch is a sequence of its own: it begins with the first state, its
    last window may be short, and no gradient crosses to the next one. Batches may differ in
    length, and in lanes where `init_state` is None. For sequences of different lengths side by
    side see `LaneSource`.

    What the loader draws, its order included, is a function of `(seed, epoch)`, and draws by
    others are none of its: so a pass is gone through again up to where a resumed run goes on. Only
    workers that persist draw on from pass to pass; what they draw is not repeated.

    Args:
        loader: A `DataLoader`, or what else can be iterated anew for each pass, of pairs
            `(inputs, targets)`.
        time_dim: Where time is in inputs and targets; 1 for [B, T, F].
        seed: Of what is drawn.
        device: Where batches are moved to; by default they stay where they are.

    Raises:
        ArgumentError: A loader that can be read once only, or is none.
    """

    @checked
    def __init__(
        self,
        loader: Annotated[Iterable[tuple[Any, Any]], checked_where_used],
        *,
        time_dim: Dimension,
        seed: int = 0,
        device: Device | None = None,
    ) -> None:
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator | str):
            raise ArgumentError(
                f"loader={shown(loader)} must give its batches anew for each pass: pass the "
                "DataLoader itself, or a list of pairs (inputs, targets)"
            )
        self._loader, self._time_dim, self._seed = loader, time_dim, seed
        self._device = None if device is None else torch.device(device)
        self._generators = Ambient([], [])
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The pass that is iterated next."""
        self.epoch = epoch
        owners: list[Any] = [self._loader, getattr(self._loader, "sampler", None)]
        for owner in owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)

    def __repr__(self) -> str:
        return f"Batches({type(self._loader).__name__}, time_dim={self._time_dim})"

    def __iter__(self) -> Iterator[TensorSequence]:
        digest = hashlib.sha256(f"{self._seed} {self.epoch}".encode()).digest()
        seed = int.from_bytes(digest[:4])
        stands = None  # where the generators are for the loader

        def aside(call: Callable[[], R]) -> R:
            """The call's result; its draws are the loader's, and of no others."""
            nonlocal stands
            outside = self._generators.found()
            try:
                if stands is None:
                    self._begin(seed)
                else:
                    self._generators.restore(stands)
                result = call()
                stands = self._generators.found()
                return result
            finally:
                self._generators.restore(outside)

        batches = aside(lambda: iter(self._loader))
        number = 0
        while (batch := aside(lambda: next(batches, None))) is not None:
            yield self._sequence(batch, number)
            number += 1

    def _begin(self, seed: int) -> None:
        for generator in (torch, random, np.random, getattr(self._loader, "generator", None)):
            begin = getattr(generator, "manual_seed", None) or getattr(generator, "seed", None)
            if begin is not None:
                begin(seed)

    def _sequence(self, batch: Any, number: int) -> TensorSequence:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentError(
                f"batch {number} of {self!r} is a {type(batch).__name__}, not a pair (inputs, "
                "targets); have collate_fn of the DataLoader make one"
            )
        if self._device is not None:
            batch = map_tensors(lambda t: t.to(self._device, non_blocking=True), tuple(batch))
        return TensorSequence(*batch, time_dim=self._time_dim)


# What is run one after the other, or alone.
Sequences = Annotated[Steps | Batches, checked_where_used]


def sequences_of(steps: Any) -> Iterable[Any]:
    """The sequences of what is run one after the other: the batches, or the one that is given."""
    return steps if isinstance(steps, Batches) else (steps,)
