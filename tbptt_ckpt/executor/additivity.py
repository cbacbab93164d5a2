"""Is a scalar loss of a segment the mean over its steps? Asked of its own parts, now and then.

NOTE [What is asked]
A whole segment against two unequal parts of it tells sums, sparse masks and distant couplings;
three steps cost less and show near ones larger. They take turns. A mask shows where the number of
targets that it may stand for changes from one step to the next: such steps are asked at once; on a
device, where counting them makes the host wait, as often as the rest.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.weighted_steps import narrow
from tbptt_ckpt.module.host import is_waited_for, sent
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of

# The share of the time that asking may take, once it has been done so many times.
_SHARE, _AT_ONCE = 0.005, 8
# Relative to the sum of magnitudes, of which rounding may leave more where signs differ: what is
# asked again in float64, and what is an error then.
_SUSPICIOUS_BITS, _MOST_SUSPICIOUS, _IN_DOUBLE, _OTHERWISE = 100, 1e-2, 1e-6, 5e-2
_MASKS = (0.0, -1.0, -100.0, float("nan"))  # targets that mark what is left out
_Values = tuple[float, float, float]


class MeanCheck:
    """Holds a loss against its own parts: in its first calls, then as time allows.

    A value that marks nothing, as steps with more and with less of it have shown, is ordinary.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any]) -> None:
        self._loss_fn = loss_fn
        self._number, self._due = 0, 0.0
        self._masks: tuple[float, ...] = _MASKS  # not known to be ordinary
        self._window_steps: int | None = None  # with a loss, where windows are known
        self._looks_at_targets = True
        self._last_numbers: list[int] = []

    def begin(self, targets: Iterable[Tree], num_steps: int) -> None:
        """A window begins, with the targets of so many steps."""
        self._window_steps = num_steps
        if self._number:  # there are segments, of two steps and more
            parts = [tensors_of(part) for part in targets]
            waits = any(is_waited_for(target) for part in parts for target in part)
            looks = self._is_due(time.perf_counter()) or not waits
            self._looks_at_targets = looks and any(any(_numbers(p, self._masks)) for p in parts)

    def check(self, part: tuple[Tree, Tree], num_steps: int, time_dim: int) -> None:
        """A call over so many steps was taken as a mean.

        Raises:
            ArgumentError: It is none.
        """
        if num_steps < 2:
            return
        if self._looks_at_targets:
            self._follow_targets(part, num_steps, time_dim)
        begun = time.perf_counter()
        if not self._is_due(begun):
            return
        self._number = number = self._number + 1
        if number % 2 and num_steps > 3:
            first = (7 * number) % (num_steps - 2)
            self._ask(part, num_steps, time_dim, (first, first + 1, first + 3))
        else:
            self._ask(part, num_steps, time_dim, (0, 1 + (7 * number) % (num_steps - 1), num_steps))
        ended = time.perf_counter()
        self._due = ended + (ended - begun) / _SHARE

    def _is_due(self, now: float) -> bool:
        return self._number < _AT_ONCE or now >= self._due

    def _follow_targets(self, part: tuple[Tree, Tree], num_steps: int, time_dim: int) -> None:
        """Ask two steps whose numbers of a target differ, where a segment has other numbers."""
        targets = tensors_of(part[1])
        numbers = _numbers(targets, self._masks)
        if numbers == self._last_numbers:
            return
        self._last_numbers = numbers
        for place, mask in reversed(list(enumerate(self._masks))):
            rows = [_hits(t, mask).movedim(time_dim, 0).reshape(num_steps, -1) for t in targets]
            hits = torch.stack([row.sum(1) for row in rows]).sum(0)
            changes = (hits[1:] != hits[:-1]).nonzero()
            if len(changes):
                first = int(changes[0])
                self._ask(part, num_steps, time_dim, (first, first + 1, first + 2))
                self._masks = tuple(other for other in self._masks if other is not mask)
                del self._last_numbers[place]

    def _ask(
        self, part: tuple[Tree, Tree], num_steps: int, time_dim: int, cuts: tuple[int, int, int]
    ) -> None:
        """Compare `[first, last)` with what its parts make, cut between."""
        first, cut, last = cuts
        few = narrow(map_tensors(Tensor.detach, part), first, last, num_steps, time_dim)
        sizes = cut - first, last - cut
        is_whole = num_steps == (self._window_steps or num_steps)
        with torch.no_grad():
            try:
                values, dtype = _values(self._loss_fn, few, sizes, time_dim)
            except (RuntimeError, ValueError, IndexError) as error:
                if is_whole:
                    return  # where no segment is shorter, nobody asks for it
                raise ArgumentError(
                    f"loss_fn fails on {sizes[0]} or {sizes[1]} steps of a segment, and one may "
                    f"have as few: {error}"
                ) from error
            rounding = min(_SUSPICIOUS_BITS * torch.finfo(dtype).eps, _MOST_SUSPICIOUS)
            if _difference(values, sizes) > rounding:
                self._settle(few, sizes, time_dim, values, is_whole=is_whole)

    def _settle(
        self, few: Tree, sizes: tuple[int, int], time_dim: int, values: _Values, *, is_whole: bool
    ) -> None:
        """Raise unless float64 says that it was rounding."""
        loss_fn, limit, double = self._loss_fn, _OTHERWISE, map_tensors(_in_double, few)
        try:
            if isinstance(loss_fn, nn.Module):
                loss_fn = copy.deepcopy(loss_fn).double()
            values, dtype = _values(loss_fn, double, sizes, time_dim)
            few, limit = double, _IN_DOUBLE if dtype == torch.float64 else _OTHERWISE
        except RuntimeError:  # a function with weights of its own
            loss_fn = self._loss_fn
        if _difference(values, sizes) <= limit:
            return
        whole, one, two = values
        told = (
            f"loss_fn gave {whole:.6g} for {sum(sizes)} steps of a segment, {one:.6g} for the "
            f"first {sizes[0]} and {two:.6g} for the others"
        )
        if not _knows_order(loss_fn, few, sum(sizes), time_dim, limit):
            raise ArgumentError(
                f"{told}: no mean of its steps, so the gradient would depend on where segments "
                "end. If it sums or leaves positions out, return (loss_sum, weight), the sum over "
                "the positions that count and their number"
            )
        if not is_whole:
            raise ArgumentError(
                f"{told}, and something else for the same steps in another order: it couples "
                "neighbouring steps, and what couples two segments would be missing from the "
                "gradient. Make that part of the module's output, or each window one leaf "
                '(strategy="retain")'
            )


def _values(
    loss_fn: Callable[[Any, Any], Any], few: Tree, sizes: tuple[int, int], time_dim: int
) -> tuple[_Values, torch.dtype]:
    """The loss of all, of the first and of the others; and their dtype."""
    num_steps = sum(sizes)
    parts = ((0, num_steps), (0, sizes[0]), (sizes[0], num_steps))
    found = [loss_fn(*narrow(few, low, high, num_steps, time_dim)) for low, high in parts]
    whole, one, two = torch.stack(found).tolist()
    return (whole, one, two), found[0].dtype


def _difference(values: _Values, sizes: tuple[int, int]) -> float:
    """How far the whole is from the mean of its parts, relative to the magnitudes."""
    whole, one, two = values
    shares = [size / sum(sizes) for size in sizes]
    expected = shares[0] * one + shares[1] * two
    size = abs(whole) + shares[0] * abs(one) + shares[1] * abs(two)
    if whole != whole or expected != expected:
        return 0.0 if whole != whole and expected != expected else 1.0
    return abs(whole - expected) / size if size else 0.0


def _knows_order(
    loss_fn: Callable[[Any, Any], Any], few: Tree, num_steps: int, time_dim: int, limit: float
) -> bool:
    """Whether a loss depends on the order of steps, the first of them twice."""

    def of(order: list[int]) -> float:
        return float(
            loss_fn(*map_tensors(lambda t: t.index_select(time_dim, _index(order, t)), few))
        )

    steps = list(range(num_steps))
    found = [of([*steps, 0]), of([0, *steps]), of([0, 1, 0, *steps[2:]])]
    return max(found) - min(found) > limit * sum(map(abs, found))


def _index(order: list[int], tensor: Tensor) -> Tensor:
    return sent(torch.tensor(order, device="cpu"), tensor.device)


def _hits(targets: Tensor, mask: float) -> Tensor:
    return targets != targets if mask != mask else targets == mask


def _numbers(targets: list[Tensor], masks: tuple[float, ...]) -> list[int]:
    """How many targets have each of some values, in one read."""
    if not (targets and masks):
        return []
    found = [torch.count_nonzero(_hits(t, mask)) for mask in masks for t in targets]
    numbers, each = torch.stack(found).tolist(), len(targets)
    return [sum(numbers[place : place + each]) for place in range(0, len(numbers), each)]


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
