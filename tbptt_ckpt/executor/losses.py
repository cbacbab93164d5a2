"""What a loss function returns, and how step weights enter: as sums and their weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepWeight
from tbptt_ckpt.devices import torch_generators
from tbptt_ckpt.errors import ArgumentError, TbpttError, TbpttWarning, shown
from tbptt_ckpt.executor.additivity import MeanCheck
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.loss_values import as_mean, check_scalar, checked_pair
from tbptt_ckpt.executor.torch_losses import Counting, LossCalls, TorchCall, counting_of
from tbptt_ckpt.executor.weighted_steps import (
    check_lanes,
    equal_runs,
    lane_groups,
    narrow,
    select,
)
from tbptt_ckpt.module.trees import Tree, tensors_of


class LossFunction:
    """The user's `loss_fn`, evaluated on one step or on the steps of a segment.

    A pair `(loss_sum, weight)` is taken as it is, and the result of one call of a loss of
    torch's as what that is (see `torch_losses`). Any other scalar is taken as the mean over the
    steps it was given. Which of them it is shows at the first call and must not change.

    Attributes:
        counting: How a recognised loss of torch's counts.
        folds: Whether it may be called on many steps at once as if they were lanes; None until
            a window has shown it, in which a step may run again as it ran before.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any]) -> None:
        self.loss_fn = loss_fn
        self.counting: Counting | None = None
        self.folds: bool | None = None
        self._shown_folds: bool | None = None
        self._returns_pairs: bool | None = None  # unknown before the first call
        self._in_segments = False
        self._mean_check = MeanCheck(loss_fn)

    @property
    def weighs_itself(self) -> bool:
        """Whether a step's weight shows only when its loss is evaluated."""
        return bool(self._returns_pairs) or not (self.counting is None or self.counting.foretold)

    @property
    def may_weigh_itself(self) -> bool:
        """The same, as far as it is known: not before the first call."""
        return self._returns_pairs is None or self.weighs_itself

    def divisor(self, weight: float | Tensor, num_steps: float, reduction: str) -> float | Tensor:
        """What summed losses of summed weight are divided by, in a window of so many steps."""
        if self.counting is not None and self.counting.reduction == "sum":
            summed = num_steps if reduction == "mean" else 1.0
            return summed / num_steps if self._in_segments else summed
        if reduction == "mean":
            return weight
        return 1.0 if self.counting is None else weight / num_steps

    def state_dict(self) -> dict[str, Any]:
        """What is known of it, in plain data."""
        counting = None if self.counting is None else asdict(self.counting)
        known = {"pairs": self._returns_pairs, "counting": counting, "folds": self._shown_folds}
        return known | {"segments": self._in_segments}

    def load_state_dict(self, state: dict[str, Any] | bool | None) -> None:
        """Go on with what `state_dict` gave; older ones only know whether there are pairs."""
        if isinstance(state, dict):
            self._returns_pairs, self._in_segments = state["pairs"], state["segments"]
            self.counting = None if state["counting"] is None else Counting(**state["counting"])
            self._shown_folds = state.get("folds")  # older ones do not say
        else:
            self._returns_pairs = state or None

    def begin(self, targets: Iterable[Tree], num_steps: int) -> None:
        """A window begins, with the targets of so many steps."""
        self.go_on_as_shown()
        if self.counting is None and not self._returns_pairs:
            self._mean_check.begin(targets, num_steps)

    def go_on_as_shown(self) -> bool:
        """Call it on many steps at once, if two showed that it may be; whether that is new."""
        before, self.folds = self.folds, self._shown_folds
        return bool(self.folds) and not before

    def add_step(self, losses: LossSum, output: Tree, target: Tree, weight: StepWeight) -> None:
        """Add the loss of one step; `output` and `target` have no time dimension."""
        if weight == 1.0:
            losses.add(*self._evaluate(losses, output, target, 1, 1.0))
            return
        check_lanes((output, target), weight, 0)
        for value, lanes in lane_groups(weight):
            part = (output, target) if lanes is None else select((output, target), lanes, 0)
            share = 1.0 if isinstance(weight, float) else float(len(weight))
            self.add_part(losses, part, 1 if lanes is None else len(lanes), share, value)

    def add_segment(
        self,
        losses: LossSum,
        outputs: Tree,
        targets: Tree,
        weights: Sequence[StepWeight] | None,
        num_steps: int,
        time_dim: int,
    ) -> None:
        """Add the losses of consecutive steps, in as few calls as their weights allow."""
        self._in_segments = True
        for begin, end, weight in equal_runs(weights, num_steps):
            part = narrow((outputs, targets), begin, end, num_steps, time_dim)
            check_lanes(part, weight, 1 - min(time_dim, 1))
            for value, lanes in lane_groups(weight):
                chosen = part if lanes is None else select(part, lanes, 1 - min(time_dim, 1))
                count = (end - begin) * (1 if lanes is None else len(lanes))
                self.add_part(losses, chosen, count, 1.0, value)
                if self._returns_pairs is False and self.counting is None:
                    self._mean_check.check(chosen, end - begin, time_dim)

    def add_part(
        self, losses: LossSum, part: tuple[Tree, Tree], count: int, share: float, value: float
    ) -> None:
        """Add the loss of outputs and targets, of so many steps or steps of lanes of a weight."""
        total, weight, factor = self._evaluate(losses, *part, count, share)
        losses.add(total, weight if value == 1.0 else weight * value, factor * value)

    @property
    def asks_folding(self) -> bool:
        """Whether it is not known if it folds."""
        return self._shown_folds is None

    def learn_folding(self, folds: bool | None) -> None:
        """Note what two steps have shown, for when a window begins."""
        self._shown_folds = folds

    def learn_no_more(self) -> None:
        """Call it step by step for good, if nothing has shown yet that it may be called otherwise.

        What steps take is known of the calls that were measured.
        """
        self._shown_folds = bool(self._shown_folds)

    def _evaluate(
        self, losses: LossSum, outputs: Tree, targets: Tree, count: int, share: float
    ) -> tuple[Tensor | None, float | Tensor, float]:
        """A loss, the weight of all its steps, and the factor that makes it their sum.

        The loss is None if none of its positions counts. `share` is the factor of a sum.
        """
        if outputs is None:
            raise ArgumentError(
                "module returned None as the output of a step whose loss counts; it may leave "
                "outputs out only where outputs_needed() is False"
            )
        if not losses.looks() and self._is_usual(targets, count):
            return self._unwatched(outputs, targets, count, share)
        value, call = self._call(outputs, targets, count)
        if not isinstance(value, Tensor):
            return *checked_pair(value), 1.0
        check_scalar(value, "a loss")
        if self.counting is not None and call is None:
            return self._guarded(value, self.counting)
        if self.counting is None or call is None:
            total, steps, factor = as_mean(value, float(count))
            return total, steps if self._returns_pairs is False else 0.0, factor
        hits = float(call.counted.numel()) if losses.all_count else call.hits()
        weight = self.counting.steps_of(hits, count)
        if call.reduction == "sum":
            return value, weight, share
        if isinstance(weight, Tensor):
            return call.total, weight, 1.0 / self.counting.unit
        return as_mean(value, weight) if hits else (None, 0.0, 1.0)

    def _is_usual(self, targets: Tree, count: int) -> bool:
        """Whether there are as many positions per step as in the first call."""
        counting = self.counting
        if counting is None or counting.leaf is None:
            return False
        found = targets if isinstance(targets, Tensor) else tensors_of(targets)[counting.leaf]
        return found.numel() == counting.unit * count

    def _unwatched(
        self, outputs: Tree, targets: Tree, count: int, share: float
    ) -> tuple[Tensor, float, float]:
        """`_evaluate` for a call of torch's loss that counts as the one that was looked at."""
        value = self._checked_kind(self.loss_fn(outputs, targets))
        check_scalar(value, "a loss")
        assert self.counting is not None, "a call was looked at"
        if self.counting.reduction == "sum":
            return value, float(count), share
        return as_mean(value, float(count))

    def _call(self, outputs: Tree, targets: Tree, count: int) -> tuple[Any, TorchCall | None]:
        """What the loss returns, and the call of torch's that made it."""
        if self._returns_pairs is None:
            value, call = self._first_call(outputs, targets)
            self._learn(value, call, count)
        elif self.counting is not None:
            with LossCalls(outputs, targets) as calls:
                value = self.loss_fn(outputs, targets)
            call = calls.made(value)
            if call is not None:
                _check_same(self.counting, counting_of(call, count))
        else:
            value, call = self.loss_fn(outputs, targets), None
        return self._checked_kind(value), call

    def _checked_kind(self, value: Any) -> Any:
        if self._returns_pairs is not None and isinstance(value, Tensor) is self._returns_pairs:
            raise ArgumentError(
                "loss_fn returned a scalar once and a pair (loss_sum, weight) another time; "
                "it must always return the same"
            )
        return value

    def _first_call(self, outputs: Tree, targets: Tree) -> tuple[Any, TorchCall | None]:
        generators = torch_generators(tensors_of((outputs, targets)))
        before = [each.get_state() for each in generators]
        try:
            with LossCalls(outputs, targets) as calls:
                value = self.loss_fn(outputs, targets)
        except TbpttError:
            raise
        except Exception as error:
            given = ", ".join(map(shown, (*tensors_of(outputs), *tensors_of(targets))))
            error.add_note(
                f"loss_fn was called with outputs and targets {given}; windows are cut into "
                "segments, and a few short ones measured, so that the number of steps varies"
            )
            raise
        if not all(map(torch.equal, before, [each.get_state() for each in generators])):
            raise ArgumentError(
                "loss_fn drew random numbers; it is not evaluated in every run of a step, so "
                "draw them in the module, where they are replayed"
            )
        return value, calls.made(value)

    def _learn(self, value: Any, call: TorchCall | None, count: int) -> None:
        if isinstance(value, Tensor) and call is None and value.dim() == 0 and not value.any():
            return  # perhaps what a loss returns where everything is masked
        self._returns_pairs = not isinstance(value, Tensor)
        if call is None or not call.counted.numel():
            return
        self.counting = counting_of(call, count)
        if not self.counting.foretold:
            warnings.warn(
                f"loss_fn calls {self.counting.name} on other targets than it was given, so that "
                "how many count is not known before: losses are evaluated in advances too. Give it "
                "the targets as they are, or return (loss_sum, weight)",
                TbpttWarning,
                stacklevel=2,
            )

    def _guarded(self, value: Tensor, counting: Counting) -> tuple[None, float, float]:
        """A loss that called nothing this time, since everything was masked."""
        if value.any():
            raise ArgumentError(
                f"loss_fn returned the result of {counting.name} once and another scalar another "
                "time; it must always do the same, or return (loss_sum, weight)"
            )
        return None, 0.0, 1.0


def _check_same(known: Counting, found: Counting) -> None:
    """Raise `ArgumentError` where a count that was foretold is not what counts now."""
    same = known.reduction == found.reduction
    if known.foretold and known.reduction == "mean":
        same = same and known.counts_like(found)
    if not same:
        raise ArgumentError(
            f"loss_fn called {known.name} in one way once and in another way now (other targets, "
            "ignore_index, weight or reduction), so that what its means count is not known; return "
            "(loss_sum, weight)"
        )
