"""Leaves of whole blocks of steps: planned as if a block were a step."""

from __future__ import annotations

from tbptt_ckpt.planner.feasibility import Stretch
from tbptt_ckpt.schedule.nesting import Nesting, NestingBuilder


def in_blocks(stretch: Stretch, block_steps: int) -> Stretch:
    """A stretch of as many blocks as its steps need, the first perhaps of fewer steps."""
    steps, num_losses = -(-stretch.steps // block_steps), -(-stretch.num_losses // block_steps)
    return Stretch(steps, num_losses, stretch.is_last)


def in_steps(nesting: Nesting, block_steps: int, steps: int) -> Nesting:
    """A nesting of blocks as one of `steps` steps, of which the first leaf has what is left."""
    builder, made = NestingBuilder(), list[int]()
    for head, repeats, tail in nesting.nodes:
        if repeats:
            made.append(builder.split(made[head], repeats, made[tail]))
        else:
            made.append(builder.leaf(block_steps * head))
    missing = block_steps * nesting.node_steps[-1] - steps
    if not missing:
        return builder.build(made[-1])
    path = [len(nesting.nodes) - 1]
    while nesting.nodes[path[-1]][1]:
        path.append(nesting.nodes[path[-1]][0])
    first = builder.leaf(block_steps * nesting.nodes[path.pop()][0] - missing)
    for node in reversed(path):
        head, repeats, tail = nesting.nodes[node]
        first = builder.split(first, 1, builder.split(made[head], repeats - 1, made[tail]))
    return builder.build(first)
