"""A nesting: which segments are recomputed within which, written down compactly.

A segment is a leaf, or a number of equal segments followed by one last segment. The equal
ones are advanced first, and a state is kept at the end of each; then the last is
differentiated, and the others after it, from the last in time to the first, each from the
state kept at its start. Equal segments are written once, so that a nesting of millions of
steps has some hundred nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tbptt_ckpt.errors import ScheduleError
from tbptt_ckpt.schedule.actions import Action, Advance, Counts, Differentiate, Drop, Keep

# (length, 0, 0) is a leaf of that many steps; (head, repeats, tail) stands for `repeats` times
# node `head`, then node `tail`.
Node = tuple[int, int, int]


@dataclass(frozen=True)
class Nesting:
    """How one stretch of steps is differentiated."""

    # Every node after those it refers to; the last one is the whole stretch.
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ScheduleError("a nesting needs at least one leaf")
        for index, (head, repeats, tail) in enumerate(self.nodes):
            is_leaf = repeats == 0 and head >= 1 and tail == 0
            is_split = repeats >= 1 and 0 <= head < index and 0 <= tail < index
            if not (is_leaf or is_split):
                raise ScheduleError(
                    f"node {index} of a nesting is {(head, repeats, tail)}, neither (length, 0, 0) "
                    "nor (head, repeats, tail) made of nodes before it"
                )

    @cached_property
    def node_steps(self) -> tuple[int, ...]:
        """Steps of each node."""
        steps: list[int] = []
        for head, repeats, tail in self.nodes:
            steps.append(repeats * steps[head] + steps[tail] if repeats else head)
        return tuple(steps)

    @cached_property
    def counts(self) -> Counts:
        """What its schedule comes to."""
        found: list[Counts] = []
        for head, repeats, tail in self.nodes:
            if not repeats:
                found.append(Counts(head, 0, 0, 1, 1))
                continue
            part, last = found[head], found[tail]
            kept = repeats - 1 + (not self.is_leaf(tail))
            counts = Counts(
                repeats * (self.node_steps[head] + part.executed_steps) + last.executed_steps,
                max(repeats - 1 + part.num_boundaries, repeats + last.num_boundaries),
                max(1 + part.num_levels, last.num_levels),
                repeats * part.num_leaves + last.num_leaves,
                repeats * (1 + part.num_actions) + 2 * kept + last.num_actions,
            )
            found.append(counts)
        return found[-1]

    @property
    def longest_leaf(self) -> int:
        """Steps of the longest leaf."""
        return max(head for head, repeats, _ in self.nodes if not repeats)

    def is_leaf(self, node: int) -> bool:
        """Whether a node is a leaf."""
        return self.nodes[node][1] == 0

    def placed(self, start: int) -> Iterator[Action]:
        """The schedule of the stretch, if its first step is `start`."""
        todo: list[Action | tuple[int, int, int]] = [(len(self.nodes) - 1, start, -1)]
        while todo:
            item = todo.pop()
            if not isinstance(item, tuple):
                yield item
                continue
            node, begin, copies_left = item
            if copies_left >= 0:
                todo += self._copies(node, begin, copies_left)
                continue
            head, repeats, tail = self.nodes[node]
            if not repeats:
                yield Differentiate(begin, begin + head)
                continue
            length, end = self.node_steps[head], begin
            for copy in range(1, repeats + 1):
                yield Advance(end, end + length)
                end += length
                if copy < repeats or not self.is_leaf(tail):
                    yield Keep(end)  # a leaf begins with the working state
            todo.append((head, begin, repeats - 1))
            todo += [(tail, end, -1)] if self.is_leaf(tail) else [Drop(end), (tail, end, -1)]

    def _copies(self, head: int, begin: int, index: int) -> list[Action | tuple[int, int, int]]:
        """What is left to do, in reverse: copy number `index` of `head`, then those before it."""
        if index == 0:
            return [(head, begin, -1)]
        start = begin + index * self.node_steps[head]
        return [(head, begin, index - 1), Drop(start), (head, start, -1)]


class NestingBuilder:
    """Collects nodes, each kind once."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}

    def leaf(self, steps: int) -> int:
        """The number of a leaf."""
        return self._number((steps, 0, 0))

    def split(self, head: int, repeats: int, tail: int) -> int:
        """The number of `repeats` times node `head`, then node `tail`."""
        if repeats == 0:
            return tail
        next_head, next_repeats, next_tail = self._nodes[tail]
        if next_repeats and next_head == head:  # one way to write it
            repeats, tail = repeats + next_repeats, next_tail
        return self._number((head, repeats, tail))

    def chain(self, runs: Sequence[tuple[int, int]]) -> int:
        """The number of a row of leaves, (steps, count), in time order."""
        *before, (last, count) = runs
        node = self.split(self.leaf(last), count - 1, self.leaf(last))
        for steps, count in reversed(before):
            node = self.split(self.leaf(steps), count, node)
        return node

    def build(self, root: int) -> Nesting:
        """The nesting of a node, numbered by when nodes are first met."""
        needed, todo = set(), [root]
        while todo:
            node = todo.pop()
            if node in needed:
                continue
            needed.add(node)
            head, repeats, tail = self._nodes[node]
            if repeats:
                todo += [head, tail]
        numbers: dict[int, int] = {}
        nodes: list[Node] = []
        for node in sorted(needed):
            head, repeats, tail = self._nodes[node]
            numbers[node] = len(nodes)
            nodes.append((numbers[head], repeats, numbers[tail]) if repeats else (head, 0, 0))
        return Nesting(tuple(nodes))

    def _number(self, node: Node) -> int:
        number = self._numbers.setdefault(node, len(self._nodes))
        if number == len(self._nodes):
            self._nodes.append(node)
        return number
