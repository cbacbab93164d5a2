"""The actions of the fixed strategies, for one stretch of steps that begins at a given state."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tbptt_ckpt.schedule import Action, Advance, Differentiate, Drop, Keep


def uniform_actions(start: int, stop: int, leaf_steps: int) -> Iterator[Action]:
    """Equal leaves, a shorter one last in time."""
    last = start + (stop - start - 1) // leaf_steps * leaf_steps
    for leaf in range(start, last, leaf_steps):
        if leaf > start:
            yield Keep(leaf)
        yield Advance(leaf, leaf + leaf_steps)
    yield Differentiate(last, stop)
    for leaf in range(last - leaf_steps, start - 1, -leaf_steps):
        yield Differentiate(leaf, leaf + leaf_steps)
        if leaf > start:
            yield Drop(leaf)


def revolve_actions(start: int, stop: int, num_states: int) -> Iterator[Action]:
    """The binomial schedule with one-step leaves; walks its tree with a stack of its own."""
    todo: list[Action | tuple[int, int, int]] = [(start, stop, num_states)]
    while todo:
        item = todo.pop()
        if not isinstance(item, tuple):
            yield item
            continue
        begin, end, states = item
        if end - begin == 1:
            yield Differentiate(begin, end)
            continue
        middle = end - 1 if states == 1 else begin + revolve_split(end - begin, states)
        yield Advance(begin, middle)
        todo.append((begin, middle, states))
        if end - middle == 1:  # a leaf begins with the working state: nothing to keep
            todo.append(Differentiate(middle, end))
        else:
            yield Keep(middle)
            todo += [Drop(middle), (middle, end, states - 1)]


def revolve_split(num_steps: int, num_states: int) -> int:
    """Steps to advance before the next state is kept.

    With r advances per step, s states reach beta(s, r) = C(s + r, s) steps. Any split that
    leaves both sides between their reaches of one advance less and of r is optimal
    (Griewank & Walther 2000, theorem 1); this takes the shortest left side.
    """
    advances = 0
    while math.comb(num_states + advances, num_states) < num_steps:
        advances += 1
    left_reach = math.comb(num_states + advances - 2, num_states) if advances >= 2 else 0
    right_reach = math.comb(num_states - 1 + advances, advances)
    return max(1, left_reach, num_steps - right_reach)
