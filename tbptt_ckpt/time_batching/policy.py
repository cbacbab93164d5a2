"""Whether and where the steps of a window are batched over time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tbptt_ckpt.blocks import StepBlock
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.time_batching.interception import opened
from tbptt_ckpt.time_batching.region import Region
from tbptt_ckpt.time_batching.report import BatchedOperation, Tally

# Multiply-adds of one call from which on "auto" batches it, on the CPU in float32.
_SMALLEST_WORK = 500_000


class TimeBatching:
    """Opens a region around each run of steps, or does not.

    Args:
        choice: True batches all that can be, False nothing, "auto" what is large enough to
            gain by it.

    Attributes:
        choice: The same; may be set between windows.
    """

    def __init__(self, choice: object = False) -> None:
        if choice is not True and choice is not False and choice != "auto":
            raise ArgumentError(f"time_batching={choice!r} must be 'auto', True or False")
        self.choice = choice
        self._tally = Tally()
        self._region: Region | None = None

    @contextmanager
    def region(self, num_steps: int, per_step: bool) -> Iterator[None]:
        """While entered, one run of steps is batched.

        Args:
            num_steps: How many.
            per_step: Whether the module takes one step at a time. One that takes segments is
                batched by its own make, and loops over cells only if it says so.
        """
        chosen = self.choice is True or (self.choice == "auto" and per_step)
        # Modes want to see, or decide about, each operation of the user's module.
        if not chosen or torch._C._len_torch_dispatch_stack():
            yield
            return
        before = self._region
        self._region = Region(
            num_steps, self._tally, _SMALLEST_WORK if self.choice == "auto" else 0
        )
        try:
            with opened(self._region):
                yield
        finally:
            self._region = before

    def step_inputs(self, block: StepBlock) -> Iterator[Any]:
        """The input of each step of a block, in the region that is entered."""
        return block.step_inputs() if self._region is None else self._region.step_inputs(block)

    def report(self) -> list[BatchedOperation]:
        """What was batched so far, and what was left to the plain operation."""
        return self._tally.operations()
