"""Short windows: the fastest nesting of all, by dynamic programming over every split."""

from __future__ import annotations

from functools import lru_cache
from math import inf

from tbptt_ckpt.costs import Costs
from tbptt_ckpt.nesting import Nesting, NestingBuilder
from tbptt_ckpt.planner.leaves import LeafRoom

SHORT_STEPS = 64

Row = list[tuple[float, int]]  # by steps: least seconds, and steps of the left part or 0


class ShortTable:
    """The fastest segments of up to `SHORT_STEPS` steps that start at every depth.

    Args:
        free_bytes: For the states and one leaf.
        costs: What steps take.
        is_last: Whether the window ends with the segment.
    """

    def __init__(self, free_bytes: int, costs: Costs, *, is_last: bool) -> None:
        room = LeafRoom(SHORT_STEPS, free_bytes, costs, is_last, SHORT_STEPS)
        lengths = range(SHORT_STEPS + 1)
        self._leaf = [costs.leaf_seconds(steps) for steps in lengths]
        self._advance = [costs.advance_seconds(steps) for steps in lengths]
        self._inner = self._rows(room.lengths(SHORT_STEPS), None)
        self._ending = self._inner
        if is_last:
            deepest = int(min(room.deepest_last, SHORT_STEPS - 1))
            self._ending = self._rows([room.last(d) for d in range(deepest + 1)], self._inner)

    def nesting(self, steps: int) -> Nesting | None:
        """The fastest nesting of a stretch, None where none fits."""
        if not self._ending or self._ending[0][steps][0] == inf:
            return None
        builder = NestingBuilder()
        return builder.build(self._node(builder, self._ending, 0, steps))

    def _node(self, builder: NestingBuilder, rows: list[Row], depth: int, steps: int) -> int:
        left = rows[depth][steps][1]
        if not left:
            return builder.leaf(steps)
        head = self._node(builder, self._inner, depth, left)
        return builder.split(head, 1, self._node(builder, rows, depth + 1, steps - left))

    def _rows(self, longest: list[int], inner: list[Row] | None) -> list[Row]:
        """Rows by depth; `inner` has the left parts where they are not of the same kind."""
        rows: list[Row] = []
        for depth in range(len(longest) - 1, -1, -1):
            lefts = inner[depth] if inner and depth < len(inner) else None
            rights = rows[-1] if rows and (lefts or inner is None) else []
            rows.append(self._row(longest[depth], lefts, rights, SHORT_STEPS - depth))
        return rows[::-1]

    def _row(self, longest: int, lefts: Row | None, rights: Row, most: int) -> Row:
        row: Row = [(inf, 0)]
        left_row = row if lefts is None else lefts
        for steps in range(1, most + 1):
            best = (self._leaf[steps] if steps <= longest else inf, 0)
            for left in range(max(1, steps + 1 - len(rights)), steps):
                seconds = self._advance[left] + left_row[left][0] + rights[steps - left][0]
                if seconds < best[0]:
                    best = (seconds, left)
            row.append(best)
        return row


@lru_cache(maxsize=64)
def short_table(free_bytes: int, costs: Costs, *, is_last: bool) -> ShortTable:
    """The table, made once for windows of all short lengths."""
    return ShortTable(free_bytes, costs, is_last=is_last)
