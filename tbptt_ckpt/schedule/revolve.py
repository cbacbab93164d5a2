"""The nestings of the fixed strategies."""

from __future__ import annotations

import math

from tbptt_ckpt.schedule.nesting import Nesting, NestingBuilder


def uniform_nesting(steps: int, leaf_steps: int) -> Nesting:
    """Equal leaves, a shorter one last in time."""
    builder = NestingBuilder()
    before = (steps - 1) // leaf_steps
    last = builder.leaf(steps - before * leaf_steps)
    return builder.build(builder.split(builder.leaf(leaf_steps), before, last))


def revolve_nesting(steps: int, num_states: int) -> Nesting:
    """The binomial schedule with one-step leaves; walks its tree with a stack of its own."""
    builder = NestingBuilder()
    made: dict[tuple[int, int], int] = {}
    todo = [(steps, num_states)]
    while todo:
        stretch = todo[-1]
        if stretch in made:
            todo.pop()
            continue
        length, states = stretch
        if length == 1:
            made[stretch] = builder.leaf(1)
            continue
        left = length - 1 if states == 1 else revolve_split(length, states)
        parts = [(left, states), (length - left, max(1, states - 1))]
        missing = [part for part in parts if part not in made]
        if missing:
            todo += missing
        else:
            made[stretch] = builder.split(made[parts[0]], 1, made[parts[1]])
    return builder.build(made[steps, num_states])


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
