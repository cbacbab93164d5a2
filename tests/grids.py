"""Grids of choices: a part that meets every pair of values by default, all under `exhaustive`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def chosen(axes: Sequence[Sequence[Any]], together: int = 2) -> list[tuple[int, ...]]:
    """Places of rows of the product in which any `together` values of different axes meet."""
    rows = list(product(*(range(len(axis)) for axis in axes)))
    groups = list(combinations(range(len(axes)), min(together, len(axes))))
    meetings = {row: {(g, *(row[axis] for axis in g)) for g in groups} for row in rows}
    missing, found = set[Any]().union(*meetings.values()), []
    for gain in range(len(groups), 0, -1):
        for row in rows:
            if len(meetings[row] & missing) >= gain:
                missing -= meetings[row]
                found.append(row)
    return sorted(found)


def covering(*, together: int = 2, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with the product of its axes, most of it under `exhaustive`.

    What runs by default has every value of every axis with every value of each other, so that
    a fault that two choices make is met; one that needs three is the whole grid's.
    """
    values = [list(axis) for axis in axes.values()]
    default = set(chosen(values, together))
    rows = []
    for places in product(*(range(len(axis)) for axis in values)):
        row = [axis[place] for axis, place in zip(values, places, strict=True)]
        marks = () if places in default else pytest.mark.exhaustive
        rows.append(pytest.param(*row, marks=marks))
    return pytest.mark.parametrize(tuple(axes), rows)


def later(*values: Any) -> Any:
    """The values of a case that runs under `exhaustive` only."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def parts(number: int) -> list[Any]:
    """The numbers of so many parts of a grid, of which one runs by default."""
    return [0, *map(later, range(1, number))]
