"""The lanes of one of several ranks, out of a source or a loader of the lanes of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked
from tbptt_ckpt.data.batches import Batches, Sequences
from tbptt_ckpt.data.source import Source, as_tensors, for_module, rows_of
from tbptt_ckpt.data.steps import check_sequence
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.recurrence import Recurrence
from tbptt_ckpt.module.trees import Tree, map_tensors

Lanes = Callable[[int], slice]  # those of a rank, of so many


@checked
def lane_range(
    lanes: PositiveInt, *, rank: Dimension | None = None, ranks: PositiveInt | None = None
) -> slice:
    """Which of `lanes` lanes are a rank's: as many on each as can be, in the order of ranks.

    Args:
        lanes: Of all ranks together.
        rank: Which one; by default this process of `torch.distributed`, 0 without a process group.
        ranks: How many there are; by default those of `torch.distributed`, 1 without a group.

    Raises:
        ArgumentError: Ranks without a lane, or a rank that there is not.
    """
    is_one_of_several = dist.is_available() and dist.is_initialized()
    ranks = ranks or (dist.get_world_size() if is_one_of_several else 1)
    rank = (dist.get_rank() if is_one_of_several else 0) if rank is None else rank
    if rank >= ranks:
        raise ArgumentError(f"rank={rank} must be below ranks={ranks}")
    if lanes < ranks:
        raise ArgumentError(f"lanes={lanes} are too few for {ranks} ranks, each of which needs one")
    least, longer = divmod(lanes, ranks)
    start = rank * least + min(rank, longer)
    return slice(start, start + least + (rank < longer))


@checked
def own_lanes(
    source: Sequences, *, rank: Dimension | None = None, ranks: PositiveInt | None = None
) -> Any:
    """A rank's lanes, `lane_range` of them, of what has those of all ranks.

    Each rank makes the same source and takes its own lanes: any number of ranks then trains on the
    same data. A `LaneSource` reads no other lanes; of others they are left out of what was read.

    Args:
        source: A source, an iterable of steps [B, ...], or `Batches`.
        rank: As for `lane_range`.
        ranks: As for `lane_range`.

    Raises:
        ArgumentError: It is no such thing; when it is read, that it has too few lanes, or none.
    """
    check_sequence(source)
    lanes = partial(lane_range, rank=rank, ranks=ranks)
    if isinstance(source, Batches):
        return _OwnBatches(source, lanes)
    if isinstance(source, Source):
        return (_SizedShare if isinstance(source, Sized) else _Share)(source, lanes)
    return (_SizedSteps if isinstance(source, Sized) else _Steps)(source, lanes)


class _Share:
    """A rank's lanes of a source of unknown length; all else is the source's own.

    Attributes:
        whole: The source of all lanes.
    """

    def __init__(self, whole: Any, lanes: Lanes, time_dim: int | None = None) -> None:
        self.whole, self._own = whole, lanes
        self._time_dim = getattr(whole, "time_dim", 0) if time_dim is None else time_dim

    def for_module(self, recurrence: Recurrence) -> _Share:
        """The same for a module, with time where its layer has it unless the source says it."""
        whole = for_module(self.whole, recurrence)
        follows = recurrence.layer is not None
        time_dim = getattr(whole, "time_dim", recurrence.time_dim if follows else 0)
        return type(self)(whole, self._own, time_dim)

    @property
    def lanes(self) -> int:
        """This rank's."""
        own = self._own(self.whole.lanes)
        return int(own.stop - own.start)

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """The rank's lanes of the steps `[start, stop)`."""
        if hasattr(self.whole, "read_lanes"):
            inputs, targets = self.whole.read_lanes(start, stop, self._own(self.whole.lanes))
        else:
            found = as_tensors(tuple(self.whole.read(start, stop)))
            inputs, targets = own_part(found, 1 - self._time_dim, self._own)
        return inputs, targets

    def weights(self, start: int, stop: int) -> Tensor | None:
        """[n] or [n, own lanes]."""
        return self._rows("weights", start, stop)

    def resets(self, start: int, stop: int) -> Tensor | None:
        """[n] or [n, own lanes]."""
        return self._rows("resets", start, stop)

    def _rows(self, method: str, start: int, stop: int) -> Tensor | None:
        rows = rows_of(self.whole, method, start, stop)
        return rows if rows is None or rows.dim() == 1 else rows[:, self._own(rows.shape[1])]

    def __getattr__(self, name: str) -> Any:
        if name == "whole":  # while it is copied
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __repr__(self) -> str:
        return f"own_lanes({self.whole!r})"


class _SizedShare(_Share):
    """A rank's lanes of a source with a length."""

    def __len__(self) -> int:
        return len(self.whole)


class _OwnBatches(Batches):
    """A rank's lanes of every batch."""

    def __init__(self, whole: Batches, lanes: Lanes) -> None:
        self._whole, self._own = whole, lanes

    def set_epoch(self, epoch: int) -> None:
        """The pass that is iterated next."""
        self._whole.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        for sequence in self._whole:
            yield _SizedShare(sequence, self._own)

    def __repr__(self) -> str:
        return f"own_lanes({self._whole!r})"


class _Steps:
    """A rank's lanes of an iterable of steps."""

    def __init__(self, whole: Iterable[Any], lanes: Lanes) -> None:
        self._whole, self._own = whole, lanes

    def __iter__(self) -> Iterator[Any]:
        for step in self._whole:
            yield own_part(as_tensors(step), 0, self._own)


class _SizedSteps(_Steps):
    """A rank's lanes of a list of steps."""

    def __len__(self) -> int:
        return len(self._whole)  # type: ignore[arg-type]


def own_part(tree: Tree, dim: int, lanes: Lanes = lane_range) -> Tree:
    """Views of a rank's lanes of nested tensors, which have those of all on a dimension."""

    def own(tensor: Tensor) -> Tensor:
        if not 0 <= dim < tensor.dim():
            raise ArgumentError(
                f"a tensor of shape {tuple(tensor.shape)} has no dimension {dim} with lanes, of "
                "which a rank could take its own"
            )
        part = lanes(tensor.shape[dim])
        return tensor.narrow(dim, part.start, part.stop - part.start)

    return map_tensors(own, tree)
