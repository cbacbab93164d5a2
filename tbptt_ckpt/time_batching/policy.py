"""Whether and where the steps of a window are batched over time, and what of them was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.module.recurrence import parameters_of
from tbptt_ckpt.module.trees import Tree
from tbptt_ckpt.time_batching.candidates import Tally
from tbptt_ckpt.time_batching.interception import opened
from tbptt_ckpt.time_batching.region import Region

TimeBatchingChoice = bool | Literal["auto"]

SLOWER = "plans without time batching are faster by measurement"
# Elements of a weight from which on "auto" batches its products on the CPU: what is saved is
# a pass over the weight's gradient in every step.
_LARGE = 250_000


@dataclass(frozen=True, slots=True)
class BatchedOperation:
    """An operation of the module's step.

    Attributes:
        operation: Such as "linear", "LSTMCell", or "linear of inputs" for one that was made
            for all steps at once.
        shape: Of its weight; empty where it was left to the plain operation.
        reason: Why it was left; empty where it was batched.
        count: Segments in which it was batched, or calls that were left.
    """

    operation: str
    shape: tuple[int, ...]
    reason: str
    count: int


def pays(elements: int) -> bool:
    """Whether batching gains time for products with a weight of so many elements.

    A rule and no measurement, so that equal runs have equal bits; see `docs/time_batching.md`.
    A planner may find that all of a run is better left plain; its snapshots say so.
    """
    return elements >= _LARGE


class TimeBatching:
    """Opens a region around each run of steps of a module, or does not.

    Attributes:
        choice: True batches all that can be, False nothing, "auto" what is large enough to gain by
            it. False within `plain`.
        pays_off: Whether "auto" batches anything; see `decide`.
    """

    @checked
    def __init__(self, choice: TimeBatchingChoice = False, module: object = None) -> None:
        self.choice, self.pays_off = choice, True
        sizes = [parameter.numel() for parameter in parameters_of(module)]
        # Where no weight is large a region would cost time and gain none. Of a function the
        # weights may be unknown.
        self._may_pay = not sizes or pays(max(sizes))
        self._tally: Tally = Counter()
        self._region: Region | None = None

    def region(self, num_steps: int, per_step: bool) -> AbstractContextManager[None]:
        """While entered, one run of steps is batched.

        A module that takes segments is batched by its own make, and loops over cells only if the
        choice says so.
        """
        is_open, chosen = self.is_open(per_step), self.is_chosen(per_step)
        # Modes want to see, or decide about, each operation of the user's module.
        # Inference mode has no versions to look at.
        watched = torch._C._len_torch_dispatch_stack() or torch.is_inference_mode_enabled()
        if is_open and not self.pays_off:
            self._tally["step", (), SLOWER] += 1
        elif chosen and torch._C._len_torch_dispatch_stack():
            self._tally["step", (), "a mode that sees each operation"] += 1
        return nullcontext() if not chosen or watched else self._opened(num_steps)

    @contextmanager
    def _opened(self, num_steps: int) -> Iterator[None]:
        before = self._region
        self._region = Region(num_steps, self._tally, _LARGE if self.choice == "auto" else 0)
        try:
            with opened(self._region):
                yield
        finally:
            self._region = before

    @contextmanager
    def plain(self) -> Iterator[None]:
        """While entered, nothing is batched."""
        before, self.choice = self.choice, False
        try:
            yield
        finally:
            self.choice = before

    def took(self, name: str, weight: Tensor) -> None:
        """Take note of what was made for all steps at once."""
        self._tally[name, tuple(weight.shape), ""] += 1

    def leave(self, name: str, reason: str) -> None:
        """Take note of what is run as it is."""
        self._tally[name, (), reason] += 1

    def leave_slower(self, name: str) -> None:
        """Take note of what "auto" left, as it was measured, if it was."""
        if self.choice and not self.pays_off:
            self.leave(name, SLOWER)

    def decide(self, pays_off: bool) -> None:
        """Let "auto" follow its rule, or leave all plain: who measured both forms knows better."""
        self.pays_off = pays_off

    def is_chosen(self, per_step: bool) -> bool:
        """Whether runs are batched."""
        return self.choice is True or (self.is_open(per_step) and self.pays_off)

    def takes_parts(self) -> bool:
        """Whether what is not sequential in a step may be run for all steps of a run at once."""
        return bool(self.choice) and self.pays_off

    def is_open(self, per_step: bool) -> bool:
        """Whether "auto" may find something to batch, so that both forms are to be weighed."""
        return self.choice == "auto" and per_step and self._may_pay

    def takes(self, weight: Tensor) -> bool:
        """Whether the gradient of a weight of that size is made once for all steps of a run."""
        is_large = self.choice is True or (self.choice == "auto" and pays(weight.numel()))
        return is_large and self.pays_off and self.has_batched

    @property
    def has_batched(self) -> bool:
        """Whether anything was batched so far."""
        return any(not reason for _, _, reason in self._tally)

    def step_inputs(self, inputs: Tree, time_dim: int) -> Iterator[Any] | None:
        """The input of each step, in the region that is entered; None where there is none."""
        return None if self._region is None else self._region.rows.of_steps(inputs, time_dim)

    def report(self) -> list[BatchedOperation]:
        """What was batched so far, and after that what was left to the plain operation."""
        seen = [BatchedOperation(*key, count) for key, count in self._tally.items()]
        return sorted(seen, key=lambda operation: bool(operation.reason))
