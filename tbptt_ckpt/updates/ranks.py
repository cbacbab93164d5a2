"""Ranks of `torch.distributed` that make every update together.

NOTE [One vote a window]
Ranks run their windows by themselves, each under its own plan. With a window's gradient at hand a
rank tells the others what it found, in a few numbers over gloo, and does with them what all of them
say: how large its share of the update is, whether one is due, whether a loss somewhere is not
finite. One that missed memory says so, and votes anew when it has run the window again, as all do
then. A rank whose sequence has ended goes on voting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tbptt_ckpt.arguments import PositiveInt, check_fields
from tbptt_ckpt.errors import ArgumentError, RankError
from tbptt_ckpt.updates.ballots import Ballot, Outcome, ballots_of, outcome_of
from tbptt_ckpt.updates.checksums import checksums_of, differing

R = TypeVar("R")
_FIRST_UPDATES = 3  # before which weights are always compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """All ranks of `torch.distributed` train together.

    Attributes:
        check_every: Updates between two comparisons of the weights over ranks, by a checksum of
            each. They are compared before the first three updates and after the last one, too.
    """

    check_every: PositiveInt = 100

    def __post_init__(self) -> None:
        check_fields(self)


class RankGroup:
    """The ranks, seen from one of them. All of them make it, and call it, in the same order.

    `weights` are those that updates change, by their names; `sums` says that losses are summed over
    ranks, and not averaged.

    Attributes:
        sums: The same.
        num_votes: So far.

    Raises:
        ArgumentError: There is no process group.
        RankError: Ranks were given different weights or `settings`.
    """

    def __init__(
        self,
        options: Ranks,
        weights: Mapping[str, Tensor],
        settings: Mapping[str, object],
        *,
        sums: bool = False,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError(
                "ranks='all' needs a process group; call torch.distributed.init_process_group "
                "first, in processes that torchrun has started, or leave ranks out"
            )
        self._every, self._weights, self.sums = options.check_every, dict(weights), sums
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        is_gloo = dist.get_backend() == "gloo"
        self._group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo")
        self._updates, self.num_votes, self._wishes = 0, 0, (0, False)
        self._repeated: list[tuple[int, int]] = []
        self._agreed: tuple[int, bool] | None = None  # before the first vote
        shapes = {f"shape of {name}": tuple(w.shape) for name, w in weights.items()}
        self._check_same({**settings, "names of weights": tuple(weights), **shapes})

    def vote(self, ballot: Ballot) -> Outcome:
        """Give this rank's ballot and get what all come to.

        Where ranks have to run a window again the others vote once more, until all have run it.

        Raises:
            RankError: Ranks are at different windows, or one is gone.
        """
        self.num_votes += 1
        stop, saves = self._wishes
        ballots = self._cast(replace(ballot, stop=stop, saves=saves))
        while any(each.is_again for each in ballots):
            ballots = self._cast(replace(ballot, stop=stop, saves=saves))
        self._agreed = int(max(each.stop for each in ballots)), any(b.saves for b in ballots)
        return outcome_of(ballots, self.rank, sums=self.sums)

    def vote_again(self, window: int) -> None:
        """Memory was missing in a window: the others, which have run it, hear that and wait.

        Raises:
            RankError: Ranks are at different windows, or one is gone.
        """
        self._cast(Ballot(window=window, is_again=True))

    def take_repeated(self) -> list[tuple[int, int]]:
        """Rank and window, of windows that others have run again since this was asked."""
        found, self._repeated = self._repeated, []
        return found

    def _cast(self, ballot: Ballot) -> list[Ballot]:
        numbers = torch.tensor(astuple(ballot), dtype=torch.float64, device="cpu")
        ballots = ballots_of(self._gathered(numbers))
        self._repeated += [
            (rank, each.window)
            for rank, each in enumerate(ballots)
            if each.is_again and rank != self.rank
        ]
        return ballots

    def wish(self, stop: int, *, saves: bool) -> None:
        """What this rank says in its next vote: the signal to stop by, and if a snapshot is due."""
        self._wishes = stop, saves

    def agreed(self, stop: int, *, saves: bool) -> tuple[int, bool]:
        """The wishes of all ranks at the last vote, once.

        Before there was one all are asked.
        """
        if self._agreed is None:
            wishes = self._gathered(torch.tensor([stop, saves], device="cpu"))
            self._agreed = int(wishes[:, 0].max()), bool(wishes[:, 1].any())
        found, self._agreed = self._agreed, (0, False)
        self._wishes = 0, False
        return found

    def gather(self, thing: object) -> list[Any]:
        """What all ranks give, by rank, on the first one; nothing elsewhere."""
        found: list[Any] | None = None if self.rank else [None] * self.count
        with self._hearing():
            dist.gather_object(thing, found, group=self._group)
        return found or []

    def exchange(self, thing: object) -> list[Any]:
        """What all ranks give, by rank, on all of them."""
        found: list[Any] = [None] * self.count
        self.together(lambda group: dist.all_gather_object(found, thing, group=group))
        return found

    def together(self, act: Callable[[Any], R]) -> R:
        """What all ranks do within their process group on CPUs, which `act` is given."""
        with self._hearing():
            return act(self._group)

    def tell(self, thing: object) -> Any:
        """What the first rank gives, on all of them."""
        found = [thing]
        with self._hearing():
            dist.broadcast_object_list(found, group=self._group)
        return found[0]

    def mean(self, loss: float | None, weight: float) -> float | None:
        """Of all ranks, each of which gives that of its own and what it weighs."""
        own = [0.0 if loss is None else loss * weight, weight]
        numbers = torch.tensor(own, dtype=torch.float64, device="cpu")
        loss_sum, total = self._gathered(numbers).sum(0).tolist()
        return loss_sum / total if total else None

    def begin_update(self, weights: Sequence[Tensor]) -> list[bool]:
        """An update is due on all ranks: which of the weights have a gradient on any of them.

        Raises:
            RankError: The weights that it is to change are not the same, where they are compared.
        """
        if self._updates < _FIRST_UPDATES or self._updates % self._every == 0:
            self.compare()
        self._updates += 1
        mine = [weight.grad is not None for weight in weights]
        found = self._gathered(torch.tensor(mine, dtype=torch.uint8, device="cpu"))
        return [bool(each) for each in found.any(0).tolist()]

    def average(self, grads: Sequence[Tensor]) -> None:
        """The mean over ranks, in place: one all-reduce, or one for each of several devices.

        Among gradients of several types all are summed in the one that holds each of them.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for grad in grads:
            by_device.setdefault(grad.device, []).append(grad)
        for device, alike in by_device.items():
            sizes = [grad.numel() for grad in alike]
            flat = torch.empty(sum(sizes), dtype=widest(alike), device=device)
            places = zip(torch.split(flat, sizes), alike, strict=True)
            parts = [place.view(grad.shape) for place, grad in places]
            for part, grad in zip(parts, alike, strict=True):
                part.copy_(grad)
            flat.div_(self.count)
            dist.all_reduce(flat, group=self._group if device.type == "cpu" else None)
            for part, grad in zip(parts, alike, strict=True):
                grad.copy_(part)
            flat.untyped_storage().resize_(0)  # gloo's thread may hold the tensor for a while yet

    def compare(self) -> None:
        """Hold the weights of all ranks against each other, bit by bit; a shard against its copies.

        Raises:
            RankError: They are not the same.
        """
        found = differing(self._gathered(checksums_of(self._weights.values())))
        if not found:
            return
        rank, other, place = min(found)
        name = list(self._weights)[place]
        many = len({at for *_, at in found})
        raise RankError(
            f"{name} on rank {rank} is not what it is on rank {other} after {self._updates} "
            f"updates ({many} of {len(self._weights)} weights differ): ranks began from different "
            "weights, or something else changes weights or gradients on one of them"
        )

    def told(self, size: int | None) -> tuple[int | None, ...]:
        """What each rank says, by rank; all of them say something."""
        given = torch.tensor([-1 if size is None else size], dtype=torch.int64, device="cpu")
        return tuple(None if each < 0 else each for each in self._gathered(given)[:, 0].tolist())

    def most(self, size: int | None) -> int | None:
        """The largest that a rank says; None where one does not know."""
        sizes = self.told(size)
        return None if None in sizes else max(filter(None, sizes), default=0)

    def _check_same(self, facts: Mapping[str, object]) -> None:
        found = self.exchange(dict(facts))
        for rank, theirs in enumerate(found):
            for name in dict.fromkeys((*found[0], *theirs)):
                ours, other = found[0].get(name), theirs.get(name)
                if ours != other:
                    raise RankError(f"{name} is {ours} on rank 0 and {other} on rank {rank}")

    def _gathered(self, numbers: Tensor) -> Tensor:
        """One row of each rank."""
        rows = [torch.empty_like(numbers, device="cpu") for _ in range(self.count)]
        with self._hearing():
            dist.all_gather(rows, numbers, group=self._group)
        return torch.stack(rows)

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.count} heard no more of another one, which has ended "
                f"or has waited elsewhere; its own output says why ({error})"
            ) from error


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type in which all of some tensors can be held, of which there is one."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
