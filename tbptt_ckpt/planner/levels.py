"""Several levels: nestings in which steps are advanced more than once.

With r levels the longest stretch at depth d is `N_r(d) = N_{r-1}(d) + N_r(d + 1)`: the left
part is advanced once and then has r - 1 levels, the right part starts one state deeper
(Griewank & Walther 2000, with leaves of many steps). A stretch of one level is a row of leaves.
Where less is needed than r levels can reach, rows end early: at the smallest depth that
suffices, and one leaf earlier where even that leaves slack. That keeps the leaves long and
few, while the splits above them go as deep as they can.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from tbptt_ckpt.nesting import NestingBuilder

DEEPEST = 1 << 14  # states; more levels are taken rather than more states


@dataclass(slots=True)
class Rooms:
    """The longest leaves by depth, and the longest last ones; at most one entry longer."""

    leaves: list[int]
    lasts: list[int]


class LevelTable:
    """Reaches for every number of levels and depth, rows ending at `row_end`.

    Args:
        rooms: Leaves by depth.
        row_end: Depth of the deepest leaf in a row that begins above it.
    """

    def __init__(self, rooms: Rooms, row_end: int) -> None:
        self.rooms, self.row_end = rooms, row_end
        leaves = rooms.leaves
        sums = [0, *accumulate(leaves)]
        row = [sums[max(row_end, d) + 1] - sums[d] for d in range(len(leaves))]
        self.inner: list[list[int]] = [leaves, row]
        self.final: list[list[int]] = [rooms.lasts, self._final_reaches(leaves)]

    def reach(self, levels: int, depth: int, *, is_last: bool) -> int:
        """The longest stretch at a depth."""
        while len(self.inner) <= levels:
            self._add_level()
        return (self.final if is_last else self.inner)[levels][depth]

    def _add_level(self) -> None:
        below = self.inner[-1]
        self.final.append(self._final_reaches(below))
        reaches = self.rooms.leaves[-1:]
        for left in below[-2::-1]:
            reaches.append(left + reaches[-1])
        self.inner.append(reaches[::-1])

    def _final_reaches(self, below: list[int]) -> list[int]:
        """Reaches of stretches at the window's end, given those of one level less inside."""
        reaches = self.rooms.lasts[-1:]
        for left in below[: len(self.rooms.lasts) - 1][::-1]:
            reaches.append(left + reaches[-1])
        return reaches[::-1]


class LevelBuilder:
    """Builds one nesting of several levels.

    Args:
        builder: Collects the nodes.
        high: Reaches that suffice.
        low: Reaches with rows that end one leaf earlier, which do not.
    """

    def __init__(self, builder: NestingBuilder, high: LevelTable, low: LevelTable) -> None:
        self.builder, self.high, self.low = builder, high, low
        self.rooms = high.rooms
        self._full: dict[tuple[bool, int, bool], list[int]] = {}

    def build(self, steps: int, levels: int, *, is_last: bool) -> int:
        """The node of a stretch at depth 0.

        NOTE [One side at full reach]
        The stretch lies between its reaches in `low` and in `high`. A split hands one side a
        full reach of either table, so that the rest lies between the two reaches of the other
        side; only that rest is split further.
        """
        known: list[tuple[int, bool]] = []  # (node, whether it is the left side)
        depth = 0
        while (node := self._undivided(steps, depth, levels, is_last=is_last)) is None:
            if levels > 1 and self.high.reach(levels - 1, depth, is_last=is_last) >= steps:
                levels -= 1
                continue
            most_left = self.high.reach(levels - 1, depth, is_last=False)
            least_right = self.low.reach(levels, depth + 1, is_last=is_last)
            if steps - most_left >= least_right:
                known.append((self._full_node(False, levels - 1, depth, False), True))
                steps, depth = steps - most_left, depth + 1
            else:
                known.append((self._full_node(True, levels, depth + 1, is_last), False))
                steps, levels, is_last = steps - least_right, levels - 1, False
        for other, is_left in reversed(known):
            pair = (other, node) if is_left else (node, other)
            node = self.builder.split(pair[0], 1, pair[1])
        return node

    def _undivided(self, steps: int, depth: int, levels: int, *, is_last: bool) -> int | None:
        """A leaf, or a row of leaves where one level is left."""
        longest = self.rooms.lasts if is_last else self.rooms.leaves
        if steps <= longest[depth]:
            return self.builder.leaf(steps)
        if levels > 1:
            return None
        leaves: list[int] = []
        left = steps
        while left > longest[depth + len(leaves)]:
            leaves.append(self.rooms.leaves[depth + len(leaves)])
            left -= leaves[-1]
        last = min(longest[depth + len(leaves)], steps - len(leaves))
        leaves[-1] += left - last
        return self.builder.chain([(length, 1) for length in [*leaves, last]])

    def _full_node(self, is_low: bool, levels: int, depth: int, is_last: bool) -> int:
        """The node of a full reach."""
        for below in range(levels):
            self._make_nodes(is_low, below, depth, False)
        nodes = self._make_nodes(is_low, levels, depth, is_last)
        return nodes[len(self._ends(is_last)) - 1 - depth]

    def _make_nodes(self, is_low: bool, levels: int, depth: int, is_last: bool) -> list[int]:
        """The nodes of full reaches from the deepest depth to at least `depth`."""
        nodes = self._full.setdefault((is_low, levels, is_last), [])
        below = self._full.get((is_low, levels - 1, False), [])
        ends, row_end = self._ends(is_last), (self.low if is_low else self.high).row_end
        for at in range(len(ends) - 1 - len(nodes), depth - 1, -1):
            row_ends = levels == 1 and not is_last and at >= row_end
            if levels == 0 or row_ends or at == len(ends) - 1:
                nodes.append(self.builder.leaf(ends[at]))
            else:
                left = below[len(self.rooms.leaves) - 1 - at]
                nodes.append(self.builder.split(left, 1, nodes[-1]))
        return nodes

    def _ends(self, is_last: bool) -> list[int]:
        return self.rooms.lasts if is_last else self.rooms.leaves
