"""Passes over a source: the sequences of each, what they begin with, and where they may end."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import chain, islice
from typing import Annotated, Any

import torch

from tbptt_ckpt.arguments import checked_where_used
from tbptt_ckpt.data.batches import Batches, Sequences
from tbptt_ckpt.data.blocks import load_block, narrow_blocks, store_block
from tbptt_ckpt.data.source import Source, for_module
from tbptt_ckpt.data.steps import NoSteps, check_sequence, length_of
from tbptt_ckpt.engine.initial_state import SharedState
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.observer import Observer
from tbptt_ckpt.module.trees import Tree, tensors_of
from tbptt_ckpt.schedule.windows import Window
from tbptt_ckpt.trainer.learning_state import restored_state
from tbptt_ckpt.trainer.sample import sampled

# What a trainer reads pass by pass.
StepsOfPasses = Annotated[Sequences | Callable[[int], Sequences], checked_where_used]


class Passes:
    """Begins passes.

    Args:
        tbptt: What the user asked for, and what runs.
        source: A source, an iterable, `Batches`, or a function of a pass's number that returns one.
        init_state: The state at the start of a sequence, or a function that returns it.
        max_steps: Steps of all passes together; None sets no bound.
        observer: Told of what is done.

    Attributes:
        limit: Where `max_steps` ends the present sequence between two update points, None where it
            does not; elsewhere it is enough to stop in time.
    """

    def __init__(
        self, tbptt: TBPTT, source: Any, init_state: Any, max_steps: int | None, observer: Observer
    ) -> None:
        self._options, self._parts = tbptt.options, tbptt.parts
        self._max_steps, self._observer = max_steps, observer
        self._source, self._init_state = source, init_state
        self.limit: int | None = None
        self._last: tuple[int, Any] | None = None  # number and source of the last pass begun
        self._batches: tuple[int, Iterator[Any]] = 0, iter(())  # of it, from that number on
        self._sample: dict[str, Any] | None = None  # of its steps, or of those of its first batch
        if isinstance(source, Source) or not callable(source):
            check_sequence(source)

    def sample(self, epoch: int | None) -> dict[str, Any] | None:
        """What its steps are known by, of a pass or of the last one; None before the first."""
        if epoch is not None:
            self._open(epoch)
        if self._last is not None:
            self._take_sample(*self._last)
        return self._sample

    def _take_sample(self, epoch: int, source: Any) -> None:
        if self._sample is None or self._sample["epoch"] != epoch:
            ranks = self._parts.updater.deliveries.ranks
            place = (
                None if ranks is None or ranks.count == 1 else f"rank {ranks.rank} of {ranks.count}"
            )
            self._sample = {"epoch": epoch, **sampled(source, self._parts.recurrence, place)}

    def _open(self, epoch: int) -> None:
        """Begin the pass of that number."""
        self._last = epoch, source = epoch, self._source_of(epoch)
        if not isinstance(source, Batches):
            self._batches = 0, iter((source,))
            return
        batches = iter(source)
        first = list(islice(batches, 1))
        if not first:
            raise ArgumentError(f"source={source!r} has no batch in pass {epoch}")
        self._take_sample(epoch, first[0])  # now, since it is not kept
        self._batches = 0, chain(first, batches)

    def _sequence(self, epoch: int, number: int) -> Any:
        """The sequence of that number in a pass; None where there are not as many."""
        if self._last is None or self._last[0] != epoch or self._batches[0] > number:
            self._open(epoch)
        position, batches = self._batches
        self._batches = number + 1, batches
        return next(islice(batches, number - position, None), None)

    def _source_of(self, epoch: int) -> Any:
        source = self._source
        if callable(source) and not isinstance(source, Source):
            source = source(epoch)
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        return for_module(source, self._parts.recurrence)

    def begin(
        self,
        epoch: int,
        number: int,
        steps_before: int,
        saved: Sequence[Mapping[str, Any]] | None = None,
        *,
        is_somewhere: Callable[[bool], bool] = bool,
    ) -> SequenceRun | None:
        """A sequence of a pass from its first step; None where the pass has not as many.

        `saved` are the first state's tensors as a snapshot has them, to go on with;
        `is_somewhere`, which is told if there is one here, says whether any rank has one: then it
        is here one without steps.
        """
        source, self.limit = self._sequence(epoch, number), None
        if is_somewhere(source is not None) and source is None:
            source = NoSteps()
        if source is None:
            return None
        if self._max_steps is not None:
            remaining = self._max_steps - steps_before
            length = length_of(source)
            is_longer = length is None or length > remaining
            if is_longer and remaining % self._options.k1 != 0:
                self.limit, source = remaining, limited(source, remaining)
        state = self._init_state() if callable(self._init_state) else self._init_state
        if saved is not None:
            state = restored_state(state, saved)
        return SequenceRun(self._options, self._parts, source, state, self._observer)

    def begins_shared(self) -> bool:
        """Whether all lanes begin from the same first state."""
        state = self._init_state() if callable(self._init_state) else self._init_state
        return isinstance(state, SharedState)

    def total_steps(self, epochs: int | None) -> int | None:
        """Steps of so many passes, as the first is laid out, or the most there may be."""
        length = length_of(self._source)
        if epochs is None or length is None:
            return self._max_steps
        return min(epochs * length, self._max_steps or sys.maxsize)

    def copied(self) -> Callable[[], None]:
        """Copy what `begin` changes of the user's; what is returned puts it back."""
        source, here = self._source, (self.limit, self._last, self._batches, self._sample)
        is_resumable = all(hasattr(source, name) for name in ("state_dict", "load_state_dict"))
        position = copy.deepcopy(source.state_dict()) if is_resumable else None
        given = () if callable(self._init_state) else tensors_of(self._init_state)
        learned = [t for t in given if t.requires_grad and t.is_leaf]
        values = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in learned]

        def put_back() -> None:
            self.limit, self._last, self._batches, self._sample = here
            with torch.no_grad():
                for tensor, value, grad in values:
                    tensor.copy_(value)
                    tensor.grad = grad
            if is_resumable:
                source.load_state_dict(position)

        return put_back


class PlanObserver(Observer):
    """Has something done as soon as a window is planned; keeps nobody alive."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = weakref.WeakMethod(act)

    def planned(self, window: Window) -> None:
        """Act, unless whoever does is gone."""
        act = self._act()
        if act is not None:
            act()


def limited(source: Any, num_steps: int) -> Any:
    """The first `num_steps` steps of a source or an iterable of steps."""
    if not isinstance(source, Source):
        return islice(source, num_steps)
    return SizedPart(source, num_steps) if isinstance(source, Sized) else Part(source, num_steps)


def refitted(reader: dict[str, Any], before: int | None, limit: int | None) -> dict[str, Any]:
    """What a reader of a stream that ended at `before` has read, where it ends at `limit`."""
    if "held" not in reader:
        return reader
    num_steps, position = reader["num_steps"], reader["position"]
    num_steps = None if num_steps == before else num_steps
    if limit is None or position <= limit:
        return {**reader, "num_steps": num_steps}
    blocks = [load_block(stored) for stored in reader["held"]]
    kept = narrow_blocks(blocks, blocks[0].start, limit) if blocks else ()
    held = [store_block(block) for block in kept]
    return {**reader, "held": held, "position": limit, "num_steps": limit}


class Part:
    """The first steps of a source of unknown length; all else is the source's own."""

    def __init__(self, source: Any, num_steps: int) -> None:
        self._source, self._num_steps = source, num_steps

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """The source's steps, as long as there may be any."""
        stop = min(stop, self._num_steps)
        result: tuple[Tree, Tree] = self._source.read(start, stop) if start < stop else ((), None)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


class SizedPart(Part):
    """The first steps of a source with a length."""

    def __len__(self) -> int:
        return min(len(self._source), self._num_steps)
