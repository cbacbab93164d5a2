"""Reads a sequence window by window, and finds out where it ends."""

from __future__ import annotations

import math
from typing import Any

import torch

from tbptt_ckpt.data.blocks import StepBlock, load_block, store_block
from tbptt_ckpt.data.steps import NoSteps, StepIterable, reader_for
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.meter import can_measure, peak_memory
from tbptt_ckpt.module.recurrence import Recurrence

# By what is saved of them.
_KINDS = {
    frozenset(["first"]): "an iterable of steps",
    frozenset(["source"]): "a source with a length",
    frozenset(["source", "held", "position", "num_steps"]): "a source without a length",
}


class WindowReader:
    """Holds the steps of the current window and finds out where the sequence ends.

    A source with a length is read window by window. One without is read in order, up to
    `k1` steps ahead, and its steps are held until no window needs them.

    Args:
        sequence: What is read.
        k1: Steps between updates.
        k2: Steps that a window reaches back.
        recurrence: Whose steps they are.
        device: Where what a read takes beside its steps is metered, of more steps than any before;
            None meters none.
    """

    # Steps packed into tensors at a time: one tensor per step would cost over a kilobyte
    # of host memory each.
    PACK_STEPS = 256

    def __init__(
        self,
        sequence: object,
        k1: int,
        k2: int | None,
        recurrence: Recurrence,
        device: torch.device | None = None,
    ) -> None:
        self._k1, self._k2, self._device = k1, k2, device
        self._metered_steps, self._beside_bytes = 0, 0  # of the longest read that was metered
        self._reader = reader_for(sequence, recurrence)
        self.num_steps = self._reader.num_steps
        self._in_order = self.num_steps is None or isinstance(self._reader, StepIterable)
        self._held: list[StepBlock] = []
        self._position = 0
        if not isinstance(sequence, NoSteps):
            self._check_not_empty()

    def drop_before(self, step: int) -> None:
        """Forget steps that no later window needs."""
        self._held = [block for block in self._held if block.stop > step]

    def look_ahead(self, stop: int) -> None:
        """Make sure that the end is known if it lies before `stop`."""
        if self.num_steps is None:
            self._pull(stop)
            self._check_not_empty()

    def window(self, first: int, stop: int, needed: int | None = None) -> list[StepBlock]:
        """The steps `[first, stop)` in blocks; blocks at the ends may reach further.

        Steps before `needed`, `first` if it is not given, are needed no more.
        """
        if not self._in_order:
            block = self._read(first, stop)
            assert block is not None, "a source with a length has its steps"
            return [block]
        self.drop_before(first if needed is None else needed)
        self._pull(stop)
        return [block for block in self._held if block.start < stop and block.stop > first]

    def ahead_bytes(self, stop: int) -> int:
        """Bytes of the steps from `stop` on that are held already."""
        return sum(block.num_bytes() for block in self._held if block.start >= stop)

    def beside_bytes(self, num_steps: int) -> int:
        """Bytes taken beside the steps of a window of so many while they are read, and packed."""
        longer = 1.0 if self._in_order else num_steps / max(1, self._metered_steps)
        return math.ceil(max(1.0, longer) * self._beside_bytes)

    def state_dict(self) -> dict[str, Any]:
        """What the reader of an equal sequence needs to go on from here.

        An iterable of steps is iterated anew and passed over up to the first step that is
        still needed. A source without a length goes on after the last step that it gave; the
        steps that are held are part of the state.
        """
        if isinstance(self._reader, StepIterable):
            return {"first": self._held[0].start if self._held else self._position}
        source = self._reader.source
        state: dict[str, Any] = {"source": getattr(source, "state_dict", dict)()}
        if not self._in_order:
            return state
        if not hasattr(source, "load_state_dict"):
            raise ArgumentError(
                f"source={shown(source)} has neither a length nor state_dict and load_state_dict, "
                "so where it stands cannot be saved; add one or the other"
            )
        held = [store_block(block) for block in self._held]
        return {**state, "held": held, "position": self._position, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any], *, changed: bool = False) -> None:
        """Go on where `state_dict` was called; one with a length may have `changed`.

        Raises:
            ArgumentError: The state is of another kind of sequence.
        """
        here, there = (_KINDS.get(frozenset(each)) for each in (self.state_dict(), state))
        if there is not None and here != there:
            raise ArgumentError(f"this sequence is {here}, the one that was saved was {there}")
        if isinstance(self._reader, StepIterable):
            self._reader.skip_to(state["first"])
            self._position = state["first"]
            return
        if hasattr(self._reader.source, "load_state_dict") and (self._in_order or not changed):
            self._reader.source.load_state_dict(state["source"])
        if self._in_order:
            self._held = [load_block(block) for block in state["held"]]
            self._position, self.num_steps = state["position"], state["num_steps"]

    def _pull(self, stop: int) -> None:
        while self._position < stop and (self.num_steps is None or self._position < self.num_steps):
            wanted = min(self._position + self.PACK_STEPS, stop, self._next_start())
            block = self._read(self._position, wanted)
            if block is not None:
                self._held.append(block)
                self._position = block.stop
            if block is None or block.stop < wanted:
                if self.num_steps is not None:
                    raise ArgumentError(
                        f"the sequence has length {self.num_steps} but ended after "
                        f"{self._position} steps"
                    )
                self.num_steps = self._position

    def _read(self, start: int, stop: int) -> StepBlock | None:
        is_longest = stop - start > self._metered_steps
        if self._device is None or not is_longest or not can_measure(self._device):
            return self._reader.read_block(start, stop)
        with peak_memory(self._device, held=(), rss=False) as memory:
            block = self._reader.read_block(start, stop)
        taken = memory.peak_bytes - max(0, memory.net_bytes)
        self._metered_steps = stop - start
        self._beside_bytes = max(self._beside_bytes, taken)
        return block

    def _next_start(self) -> int:
        """The next step at which a window may start: a block must not reach across it."""
        if self._k2 is None:
            return self._position + self.PACK_STEPS
        return self._position + self._k1 - (self._position + self._k2) % self._k1

    def _check_not_empty(self) -> None:
        if self.num_steps == 0:
            raise ArgumentError(
                "the sequence is empty; at least one step is needed (an iterator, such as a "
                "generator, is empty once it has been read)"
            )
