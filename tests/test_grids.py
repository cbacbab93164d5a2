"""What of a grid runs by default, held against the pairs of values that it is to meet."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from grids import covering

AXES = {"a": range(6), "b": range(4), "c": range(2), "d": range(2)}


@pytest.mark.parametrize("together", [1, 2, 3])
def test_what_runs_by_default_meets_all_that_is_asked_and_the_rest_is_exhaustive(
    together: int,
) -> None:
    names, rows = covering(together=together, **AXES).args
    assert list(names) == list(AXES)
    assert [row.values for row in rows] == list(product(*AXES.values()))
    default = [row.values for row in rows if not row.marks]
    assert all(mark.name == "exhaustive" for row in rows for mark in row.marks)
    for places in combinations(range(len(AXES)), together):
        wanted = set(product(*([*AXES.values()][place] for place in places)))
        assert {tuple(row[place] for place in places) for row in default} == wanted
    assert len(default) == {1: 6, 2: 24, 3: 48}[together]


def test_axes_of_one_value_are_no_reason_for_more_rows() -> None:
    _, rows = covering(a=[1], b=[2], c=[3, 4]).args
    assert [bool(row.marks) for row in rows] == [False, False]
