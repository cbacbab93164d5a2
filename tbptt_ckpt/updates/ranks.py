"""Ranks of `torch.distributed` that make every update together.

NOTE [One vote a window]
Ranks run their windows by themselves, each under its own plan, and run them again where memory is
missing. With a window's gradient at hand a rank tells the others what it found, in a few numbers
over gloo, and does with them what all of them say: how large its share of the update is, whether
one is due, whether a loss somewhere is not finite. A rank whose sequence has ended goes on voting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tbptt_ckpt.arguments import PositiveInt, check_fields
from tbptt_ckpt.errors import ArgumentError, NonFiniteError, RankError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """What a rank says of a window; of none where its sequence has ended.

    Attributes:
        window: Its index; -1 of none.
        loss_sum: Its loss, times `positions` where it is a mean.
        positions: What its loss is a mean of, or would be.
        tokens: Valid new steps of its lanes.
        has_loss: Whether it was differentiated.
        is_last: Whether no window follows on the rank.
        is_fault: Whether it is not to be used, since something is not finite.
        stop: The signal that the rank was sent; 0 of none.
        saves: Whether a snapshot is due there.
    """

    window: int = -1
    loss_sum: float = 0.0
    positions: float = 0.0
    tokens: int = 0
    has_loss: bool = False
    is_last: bool = True
    is_fault: bool = False
    stop: int = 0
    saves: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the ballots of a window come to.

    Attributes:
        loss: Of all ranks; None where no rank has one.
        loss_sum: Of all ranks, not divided.
        positions: What a mean is divided by.
        tokens: Valid new steps of all lanes of all ranks.
        factor: What this rank's gradient is multiplied by before the mean over ranks is taken.
    """

    loss: float | None
    loss_sum: float
    positions: float
    tokens: int
    factor: float


class RankGroup:
    """The ranks, seen from one of them. All of them make it, and call it, in the same order.

    `weights` are those that updates change, by their names; `sums` says that losses are summed over
    ranks, and not averaged.

    Attributes:
        sums: The same.
        is_last: Whether the windows that were voted on last are the last ones of all ranks.
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
        self.is_last, self._updates, self.num_votes = True, 0, 0
        self._is_even, self._wishes = False, (0, False)
        self._agreed: tuple[int, bool] | None = None  # before the first vote
        shapes = {f"shape of {name}": tuple(w.shape) for name, w in weights.items()}
        self._check_same({**settings, "names of weights": tuple(weights), **shapes})

    def vote(self, ballot: Ballot) -> Outcome:
        """Give this rank's ballot and get what all come to.

        Raises:
            NonFiniteError: A rank has found what is not finite; no rank uses the window.
            RankError: Ranks are at different windows, or one is gone.
        """
        self.num_votes += 1
        stop, saves = self._wishes
        ballot = replace(ballot, stop=stop, saves=saves)
        rows = self._gathered(torch.tensor(astuple(ballot), dtype=torch.float64, device="cpu"))
        ballots = [Ballot(**dict(zip(_FIELDS, row, strict=True))) for row in rows.tolist()]
        at = {int(each.window) for each in ballots if each.window >= 0}
        if len(at) > 1:
            where = {rank: int(each.window) for rank, each in enumerate(ballots)}
            raise RankError(f"ranks are at different windows, by rank: {where}")
        self._agreed = int(max(each.stop for each in ballots)), any(b.saves for b in ballots)
        self.is_last = all(each.is_last for each in ballots)
        if self._is_even and self.is_last != any(each.is_last for each in ballots):
            ended = [rank for rank, each in enumerate(ballots) if each.is_last]
            raise RankError(
                f"the sequences of ranks {ended} end before those of others, and a Trainer counts "
                "steps; give all as many, with weight zero where lanes have ended (LaneSource)"
            )
        if faults := [rank for rank, each in enumerate(ballots) if each.is_fault]:
            raise NonFiniteError(
                f"window {max(at)} is not finite on rank {faults[0]} of {self.count}; no rank has "
                "updated its weights"
            )
        positions = sum(each.positions for each in ballots)
        loss_sum = sum(each.loss_sum for each in ballots)
        has_loss = any(each.has_loss for each in ballots) and positions > 0
        mean = loss_sum / positions if positions else 0.0
        share = ballot.positions / positions if positions else 0.0
        return Outcome(
            loss=(loss_sum if self.sums else mean) if has_loss else None,
            loss_sum=loss_sum,
            positions=positions,
            tokens=int(sum(each.tokens for each in ballots)),
            factor=self.count * (1.0 if self.sums else share),
        )

    def require_even(self) -> None:
        """From now on all ranks have as many windows, or votes raise `RankError`."""
        self._is_even = True

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
        """The mean over ranks, in place: one all-reduce for each dtype and device."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for grad in grads:
            kinds.setdefault((grad.dtype, grad.device), []).append(grad)
        for (_, device), alike in kinds.items():
            flat = torch.cat([grad.reshape(-1) for grad in alike]).div_(self.count)
            dist.all_reduce(flat, group=self._group if device.type == "cpu" else None)
            parts = torch.split(flat, [grad.numel() for grad in alike])
            for grad, part in zip(alike, parts, strict=True):
                grad.copy_(part.view_as(grad))
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


_FIELDS = tuple(Ballot.__dataclass_fields__)
