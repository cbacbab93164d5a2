"""What ranks say of a window, and what that comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from tbptt_ckpt.errors import RankError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """What a rank says of a window; of none where its sequence has ended.

    Attributes:
        window: Its index; -1 of none.
        reached: The update point at its end.
        loss_sum: Its loss, times `positions` where it is a mean.
        positions: What its loss is a mean of, or would be.
        tokens: Valid new steps of its lanes.
        has_loss: Whether it was differentiated.
        is_last: Whether no window follows on the rank.
        is_fault: Whether it is not to be used, since something is not finite.
        is_again: Whether it has to run again, since memory was missing.
        stop: The signal that the rank was sent; 0 of none.
        saves: Whether a snapshot is due there.
    """

    window: int = -1
    reached: int = 0
    loss_sum: float = 0.0
    positions: float = 0.0
    tokens: int = 0
    has_loss: bool = False
    is_last: bool = True
    is_fault: bool = False
    is_again: bool = False
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
        reached: The steps trained by then, of the rank that has come furthest.
        is_last: Whether no rank has a window that follows.
        fault: Why no rank is to use the window; empty where all do.
    """

    loss: float | None
    loss_sum: float
    positions: float
    tokens: int
    factor: float
    reached: int
    is_last: bool
    fault: str


def ballots_of(rows: Tensor) -> list[Ballot]:
    """The ballots of all ranks, of which each is a row.

    Raises:
        RankError: They are of different windows.
    """
    ballots = [
        Ballot(**{name: kind(number) for (name, kind), number in zip(_KINDS, row, strict=True)})
        for row in rows.tolist()
    ]
    if len({each.window for each in ballots if each.window >= 0}) > 1:
        where = {rank: each.window for rank, each in enumerate(ballots)}
        raise RankError(f"ranks are at different windows, by rank: {where}")
    return ballots


def outcome_of(ballots: Sequence[Ballot], rank: int, *, sums: bool) -> Outcome:
    """For one of the ranks; `sums` says that losses are summed over them, and not averaged."""
    window = max(each.window for each in ballots)
    faults = [rank for rank, each in enumerate(ballots) if each.is_fault]
    positions = sum(each.positions for each in ballots)
    loss_sum = sum(each.loss_sum for each in ballots)
    has_loss = any(each.has_loss for each in ballots) and positions > 0
    mean = loss_sum / positions if positions else 0.0
    share = ballots[rank].positions / positions if positions else 0.0
    return Outcome(
        loss=(loss_sum if sums else mean) if has_loss else None,
        loss_sum=loss_sum,
        positions=positions,
        tokens=sum(each.tokens for each in ballots),
        factor=len(ballots) * (1.0 if sums else share),
        reached=max(each.reached for each in ballots),
        is_last=all(each.is_last for each in ballots),
        fault=(
            f"window {window} is not finite on rank {faults[0]} of {len(ballots)}; no rank has "
            "updated its weights"
            if faults
            else ""
        ),
    )


_KINDS: list[tuple[str, Any]] = [(each.name, type(each.default)) for each in fields(Ballot)]
