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
from tbptt_ckpt.schedule.forms import Form
from tbptt_ckpt.time_batching.candidates import Tally
from tbptt_ckpt.time_batching.interception import opened
from tbptt_ckpt.time_batching.region import Region

TimeBatchingChoice = bool | Literal["auto", "fused", "mixed"]

SLOWER = "plans without time batching are faster by measurement"
# Elements of a weight from which on "auto" batches its products on the CPU: what is saved is
# a pass over the weight's gradient in every step.
_LARGE = 250_000
_FORMS: dict[object, Form] = {
    **{False: "plain", True: "batched"},
    **{"auto": "auto", "fused": "fused", "mixed": "mixed"},
}
_UNBATCHED: tuple[Form, ...] = ("plain", "compiled")


@dataclass(frozen=True, slots=True)
class BatchedOperation:
    """An operation of the module's step.

    Attributes:
        operation: Such as "linear", "LSTMCell", or "linear of inputs" for one that was made
            for all steps at once; "compiled block" of steps.
        shape: Of its weight; empty for blocks, and where it was left to the plain operation.
        reason: Why it was left; empty where it was batched.
        count: Segments in which it was batched, or calls that were left.
    """

    operation: str
    shape: tuple[int, ...]
    reason: str
    count: int


def _pays(elements: int) -> bool:
    """Whether batching gains time for products with a weight of so many elements.

    A rule and no measurement, so that equal runs have equal bits; see `docs/time_batching.md`.
    A planner may find that all of a run is better left plain; its snapshots say so.
    """
    return elements >= _LARGE


class TimeBatching:
    """Opens a region around each run of steps of a module, or does not.

    Attributes:
        choice: True batches all that can be, "fused" too, with torch's kernels, "mixed" with these
            in advances alone, False nothing, "auto" what is large enough to gain by it.
        form: How steps run now: as chosen, as `decide` says, or as a plan that is followed.
    """

    @checked
    def __init__(self, choice: TimeBatchingChoice = False, module: object = None) -> None:
        self.choice, self.form = choice, _FORMS[choice]
        self._decided: Form | None = None
        sizes = [parameter.numel() for parameter in parameters_of(module)]
        matrices = [p.numel() for p in parameters_of(module) if p.dim() > 1]
        # Where no weight is large a region would cost time and gain none. Of a function the
        # weights may be unknown.
        self._may_pay = not sizes or _pays(max(sizes))
        # Where all of them are large together it may gain, which only measuring tells.
        self._may_gain = self._may_pay or _pays(sum(matrices))
        self._is_mixed = self._may_pay and not all(map(_pays, matrices))
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
        if is_open and self._is_slower:
            self._tally["step", (), SLOWER] += 1
        elif chosen and torch._C._len_torch_dispatch_stack():
            self._tally["step", (), "a mode that sees each operation"] += 1
        return nullcontext() if not chosen or watched else self._opened(num_steps)

    @contextmanager
    def _opened(self, num_steps: int) -> Iterator[None]:
        before = self._region
        self._region = Region(num_steps, self._tally, _LARGE if self.form == "auto" else 0)
        try:
            with opened(self._region):
                yield
        finally:
            self._region = before

    @contextmanager
    def as_form(self, form: Form) -> Iterator[None]:
        """While entered, steps run in that form."""
        before, self.form = self.form, form
        try:
            yield
        finally:
            self.form = before

    def took(self, name: str, weight: Tensor) -> None:
        """Take note of what was made for all steps at once."""
        self._tally[name, tuple(weight.shape), ""] += 1

    def made(self, name: str) -> None:
        """Take note of a run of steps that is made in another form, whatever its weights."""
        self._tally[name, (), ""] += 1

    def leave(self, name: str, reason: str) -> None:
        """Take note of what is run as it is."""
        self._tally[name, (), reason] += 1

    def leave_slower(self, name: str) -> None:
        """Take note of what "auto" left, as it was measured, if it was."""
        if self._is_slower:
            self.leave(name, SLOWER)

    @property
    def _is_slower(self) -> bool:
        return self._decided == "plain"

    def decide(self, form: Form) -> None:
        """Let "auto" run in that form: who measured them, or has a plan, knows better.

        Compiled steps are no matter of the choice.
        """
        if self.choice == "auto":
            self.form = self._decided = form
        elif form == "compiled" or self.is_compiled:
            self.form = form if form == "compiled" else _FORMS[self.choice]

    def do_not_compile(self) -> None:
        """Steps cannot run by compiled blocks, or not any more: run as was chosen."""
        if self.is_compiled:
            self.form, self._decided = _FORMS[self.choice], None

    @property
    def is_compiled(self) -> bool:
        """Whether steps run by compiled blocks, as far as there are such."""
        return self.form == "compiled"

    def forms(self, per_step: bool, *, has_parts: bool, of_kernel: Tensor | None) -> list[Form]:
        """The forms that "auto" may weigh, that of its rule first; one where nothing is open.

        `has_parts` if steps may run by their parts, `of_kernel` the recurrent weight of one of
        these that has a kernel.
        """
        if self.choice != "auto" or not (has_parts or self.is_open(per_step)):
            return [_FORMS[self.choice]]
        if of_kernel is not None:
            if _pays(of_kernel.numel()):
                return ["mixed", "fused", "batched", "plain"]
            return ["fused", "mixed", "batched", "plain"]
        if not (has_parts or self._may_pay):
            return ["plain", "batched"]
        return ["auto", "batched", "plain"] if self._is_mixed else ["auto", "plain"]

    def is_chosen(self, per_step: bool) -> bool:
        """Whether runs are batched."""
        if self.form == "auto":
            return per_step and self._may_pay
        return self.form not in _UNBATCHED

    def takes_parts(self) -> bool:
        """Whether what is not sequential in a step may be run for all steps of a run at once."""
        return self.form not in _UNBATCHED

    def takes_kernel(self, weight: Tensor, *, in_leaves: bool) -> bool:
        """Whether torch's kernel runs a cell with that recurrent weight, in advances or leaves.

        In leaves it does by the rule where the cell is so small that what torch does beside the
        products takes longer than they do.
        """
        if self.form == "auto":
            return not (in_leaves and _pays(weight.numel()))
        return self.form == "fused" or (self.form == "mixed" and not in_leaves)

    def is_open(self, per_step: bool) -> bool:
        """Whether "auto" may find something to batch, so that forms are to be weighed."""
        return self.choice == "auto" and per_step and self._may_gain

    def takes(self, weight: Tensor) -> bool:
        """Whether the gradient of a weight of that size is made once for all steps of a run."""
        is_taken = self.form not in _UNBATCHED and (self.form != "auto" or _pays(weight.numel()))
        return is_taken and self.has_batched

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
