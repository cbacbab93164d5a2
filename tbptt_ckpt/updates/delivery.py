"""A window's gradient, handed to the weights once, so that whatever waits for it sees it whole.

NOTE [Delivered once]
A window is differentiated leaf by leaf, and autograd runs what hangs on a weight (clipping in a
hook, an optimizer inside the backward) whenever a gradient arrives there. That would be once for
each leaf, with a leaf's share. The hooks are therefore emptied, in place, while leaves are
differentiated, and put back before the weights are given the whole gradients: by one backward
through a ticket for each, made in the order in which plain BPTT would reach the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from operator import attrgetter
from typing import Any, Self

import torch
from torch import Tensor

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.updates.collected import collected
from tbptt_ckpt.updates.hooks import HooksOff
from tbptt_ckpt.updates.ranks import RankGroup, widest
from tbptt_ckpt.updates.shards import is_shard
from tbptt_ckpt.updates.wrappers import Wrappers


class Deliveries:
    """What waits for gradients, found once for a run.

    Args:
        *owners: Modules, and functions that name some.
        once: Whether every weight waits, since something may hang on it that cannot be seen.
        ranks: Those that update the weights together, so that every weight waits.

    Raises:
        ArgumentError: A wrapper that cannot be given a window's gradient at once.
    """

    def __init__(self, *owners: object, once: bool = False, ranks: RankGroup | None = None) -> None:
        self.wrappers = Wrappers(*owners, gathers=ranks is not None)
        self._once, self.ranks = once, ranks
        self._begun: int | None = None  # votes before the window that has begun
        self._last: Delivery = NOTHING_WAITS
        if ranks is not None:
            self.wrappers.shards.check(ranks.count)
        if once and self.wrappers.is_sharded:
            raise ArgumentError(
                "deliver='once' does not fit module: fully_shard needs the gradient of every "
                "backward; leave deliver='auto', or give ranks='all'"
            )

    def begin_sequence(self) -> None:
        """The next window is no second attempt of one that has begun."""
        self._begun = None

    def begin(self) -> None:
        """A window begins: what wrappers send before it is sent.

        Where one rank runs a window again the others do not gather weights, nor does it.
        """
        self.wrappers.begin()
        votes = None if self.ranks is None else self.ranks.num_votes
        if votes is not None and votes != self._begun:
            self.wrappers.shards.begin()
        self._begun = votes

    def waits(self, weight: Tensor) -> bool:
        """Whether a weight is given its gradient when a window is complete."""
        if self._is_shard(weight):
            return False  # what it was gathered in does
        hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
        is_waited_for = hooks or self._all_wait or id(weight) in self.wrappers.weights
        return bool(is_waited_for) and weight.requires_grad

    def _is_shard(self, weight: Tensor) -> bool:
        return self.wrappers.shards.is_any and is_shard(weight)

    @property
    def _all_wait(self) -> bool:
        return self._once or self.ranks is not None

    def any_waits(self, weights: Iterable[Tensor]) -> bool:
        """Whether any of `weights` does, or something that cannot be seen."""
        return self._all_wait or self.wrappers.is_any or any(map(self.waits, weights))

    def of(self, weights: Iterable[Tensor]) -> Delivery:
        """The delivery of one window's gradient to those of `weights`, and their own, that wait."""
        distinct = {id(weight): weight for weight in weights} | self.wrappers.weights
        distinct |= {id(weight): weight for weight in self.gathered}
        waiting = [weight for weight in distinct.values() if self.waits(weight)]
        if not (waiting or self.any_waits(())):
            return NOTHING_WAITS
        self._last = Delivery(waiting, self.wrappers, collects=self._once)
        return self._last

    def wholes(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """What leaves find of some weights: of a shard what it was gathered in."""
        return [self.wrappers.shards.whole(weight) for weight in weights]

    @property
    def gathered(self) -> list[Tensor]:
        """Weights that shards were gathered in, and that leaves give gradients to."""
        return self.wrappers.shards.gathered

    def gathered_bytes(self, weights: Iterable[Tensor]) -> int:
        """What gradients are gathered in when they are reduced."""
        flat = [] if self.ranks is None else [w for w in weights if self.waits(w)]
        apart = [weight for weight in flat if id(weight) not in self.wrappers.weights]
        num_bytes = widest(apart).itemsize * sum(w.numel() for w in apart) if apart else 0
        return max(num_bytes, self.wrappers.bucket_bytes)

    def reduce(self, ranks: RankGroup, weights: Iterable[Tensor]) -> None:
        """An update is due: give `weights` the mean over ranks of what has been delivered.

        Weights that got a gradient on some ranks have one on all; others have none.

        Raises:
            RankError: Ranks have come to hold different weights.
        """
        self._last.end()  # of a window without a loss, whose group has gradients
        learning = [w for w in weights if w.requires_grad and not self._is_shard(w)]
        is_there = ranks.begin_update(learning)
        for weight, there in zip(learning, is_there, strict=True):
            if there and weight.grad is None:
                weight.grad = torch.zeros_like(weight, device=weight.device)
        self.wrappers.reduce()
        reduced = {*self.wrappers.weights, *map(id, self.gathered)}
        others = [weight for weight in learning if id(weight) not in reduced]
        ranks.average([weight.grad for weight in others if weight.grad is not None])
        for weight, there in zip(learning, is_there, strict=True):
            if not there:
                weight.grad = None


class Delivery:
    """While entered, weights collect their gradients unseen by what waits for them.

    What `.grad` held before is set aside until then, and added to as plain BPTT would. Costs
    what is set aside where gradients accumulate.
    """

    def __init__(self, weights: Sequence[Tensor], wrappers: Wrappers, *, collects: bool) -> None:
        order = itertools.count()
        self._waiting = [_Waiting(weight, order) for weight in weights]
        self._wrappers, self._collects = wrappers, collects
        self._unseen = ExitStack()

    def __enter__(self) -> Self:
        for waiting in self._waiting:
            waiting.begin()
        self._unseen.enter_context(self._wrappers.no_sync())
        if self._collects:
            self._unseen.enter_context(collected)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Put everything back, as it was before what has not been delivered."""
        self._unseen.close()
        for waiting in self._waiting:
            waiting.end()

    def deliver(self, factor: float | None = None) -> None:
        """The gradients are whole: hand them over; with a `factor`, times that and unreduced."""
        self._unseen.close()
        with self._wrappers.no_sync() if factor is not None else nullcontext():
            with torch.enable_grad():
                # What is made last autograd reaches first.
                last_first = sorted(self._waiting, key=attrgetter("last_seen"), reverse=True)
                share = 1.0 if factor is None else factor
                tickets = {id(each.weight): each.ticket(share) for each in last_first}
                if factor is None:
                    roots = self._wrappers.hand_through(tickets)
                else:
                    roots = [ticket for ticket in tickets.values() if ticket is not None]
                del tickets
            if roots:
                torch.autograd.backward(roots)


class _NothingWaits(Delivery):
    def __init__(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def end(self) -> None:
        pass

    def deliver(self, factor: float | None = None) -> None:
        pass


NOTHING_WAITS = _NothingWaits()


class _Waiting:
    """A weight that waits for its gradient, without its hooks."""

    def __init__(self, weight: Tensor, order: itertools.count[int]) -> None:
        self.weight = weight
        self.last_seen = -1  # where its last part came among those of all weights
        self._order = order
        self._is_waiting, self._before = False, weight.grad

    def begin(self) -> None:
        """Take the hooks off, and what is in `.grad`."""
        self._hooks = HooksOff(self.weight)
        self._before, self.weight.grad = self.weight.grad, None
        self._handle = self.weight.register_hook(self._sees)  # type: ignore[no-untyped-call]
        self._is_waiting = True

    def end(self) -> Tensor | None:
        """Put everything back, once; what has come meanwhile."""
        if not self._is_waiting:
            return None
        self._is_waiting = False
        self._handle.remove()
        self._hooks.put_back()
        total, self.weight.grad = self.weight.grad, self._before
        return total

    def ticket(self, factor: float) -> Tensor | None:
        """Put everything back; what has come comes again by its backward, times `factor`."""
        total = self.end()
        if total is not None and factor != 1.0:
            total = total * factor
        return None if total is None else _Ticket.apply(self.weight, [total])  # type: ignore[no-untyped-call]

    def _sees(self, _: Tensor) -> None:
        self.last_seen = next(self._order)


class _Ticket(torch.autograd.Function):
    """Stands for a weight whose gradient is known, and is not held any longer than needed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, total: list[Tensor]) -> Tensor:
        ctx.total = total
        return torch.zeros((), device=weight.device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ctx.total.pop(), None
