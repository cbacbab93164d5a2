"""A schedule as a tree: what is recomputed within what, which is how checkpoints nest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from tbptt_ckpt.errors import ScheduleError
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep


@dataclass(frozen=True, slots=True)
class Span:
    """Steps `[start, stop)`, recomputed as one piece.

    The last part is run with its graph when the span is; the others are advanced, and
    recomputed as spans of their own. A leaf has no parts.
    """

    start: int
    stop: int
    parts: tuple[Span, ...] = ()


def parse_spans(schedule: Iterable[Action], start: int, stop: int) -> Span:
    """The tree of a schedule that differentiates `[start, stop)`.

    Raises:
        ScheduleError: A schedule that is valid but is no tree of nested recomputations.
    """
    actions = (action for action in schedule if not isinstance(action, Keep | Drop))
    return _parse_span(actions, start, stop)


def _parse_span(actions: Iterator[Action], start: int, stop: int) -> Span:
    edges = [start]
    while isinstance(action := next(actions, None), Advance):
        if action.start != edges[-1]:
            raise ScheduleError(
                f"{action} advances from {action.start} while {edges[-1]} is the last state "
                "reached; executor='checkpoint' runs nested recomputations only"
            )
        edges.append(action.stop)
    needed = Differentiate(edges[-1], stop)
    if action != needed:
        raise ScheduleError(
            f"{action or 'the end'} comes where executor='checkpoint' needs {needed}"
        )
    leaf = Span(edges[-1], stop)
    if len(edges) == 1:
        return leaf
    parts = [leaf]
    for begin, end in reversed(list(pairwise(edges))):
        parts.append(_parse_span(actions, begin, end))
    return Span(start, stop, tuple(reversed(parts)))
