"""The lengths of segments that are metered and timed, and what measuring may take."""

from __future__ import annotations

from dataclasses import dataclass

# Odd ones among them, since kernels round some sizes up.
_METERED = (1, 2, 3, 5, 8, 13, 21, 34, 55)
_SHORT_METERED = 8  # metered whatever the time
# Metered before anything longer is timed: bytes are a straight line from some 13 steps on. One
# through 5 and 8 steps predicts long leaves of an nn.LSTM of 3 layers 3.5 % too low.
_STRAIGHT_BY = 21
_TIMED = (1, 3, 8, 21, 55)
_LONGER = 4  # factor between lengths that are only timed
_SINGLE = {1, 2, 3, 5}  # steps that are metered beside whole blocks
_TIMED_BLOCKS = (1, 2, 5, 13)


@dataclass(frozen=True, slots=True)
class Limits:
    """What measuring may take.

    Attributes:
        max_steps: Longest leaf.
        max_seconds: Time after which no longer segment is begun; segments of up to 8 steps
            are always run.
        room_bytes: Bytes above those live at the start; segments of one step are always run.
        advance_steps: An advance of so many steps is run in any case.
        leaf_steps: So is a leaf, unless memory is short.
    """

    max_steps: int
    max_seconds: float = 1.6
    room_bytes: float = float("inf")
    advance_steps: int = 0
    leaf_steps: int = 0


class Lengths:
    """Lengths from one step on, and where steps run in blocks whole numbers of these.

    Attributes:
        metered: Those whose bytes are measured.
        rests: Others, of which most steps run one by one, as they are left of a block.
        short: Up to this one segments are run whatever the time.
        straight: Up to this one they are metered before any longer one is timed.
    """

    def __init__(self, block_steps: int) -> None:
        self._block = block = block_steps
        single = {n for n in _SINGLE if n < block}
        self.metered = sorted({block * n for n in _METERED} | single)
        self.rests = [n * block - 1 for n in (1, 2) if block > 1 and n * block > 2]
        self.short = max(_SHORT_METERED, 2 * block)
        self.straight = max(_STRAIGHT_BY, 3 * block)

    def timed(self, longest: int, most: int) -> list[int]:
        """Those that are timed, if up to `longest` they were metered and `most` is the last."""
        usual = _TIMED if self._block == 1 else _TIMED_BLOCKS
        found = sorted({1, *(n * self._block for n in usual if n * self._block <= longest)})
        if longest > self._block:
            longest -= longest % self._block
        while (longest := min(_LONGER * longest, most)) > found[-1]:
            found.append(longest)
        return found
