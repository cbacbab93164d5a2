"""The simulator against counts by hand."""

from __future__ import annotations

import pytest

from tbptt_ckpt import ArgumentError, Costs, ScheduleError, simulate
from tbptt_ckpt.schedule import Advance, Curve, Differentiate, Drop, FixedBytes, Keep, Schedule

COSTS = Costs(
    state_bytes=100,
    leaf_bytes=Curve.linear(5, 10),
    leaf_seconds=Curve.linear(1, 3),
    advance_bytes=Curve.linear(0, 2),
    advance_seconds=Curve.linear(0.5, 1),
    fixed=FixedBytes(weights=1000, step_inputs=1.5),
)
# Two states at once, beside the leaf [6, 8); every action's peak is worked out below.
WRITTEN = [
    Advance(0, 4),
    Keep(4),
    Advance(4, 6),
    Differentiate(6, 8),
    Differentiate(4, 6),
    Drop(4),
    Differentiate(0, 4),
]
FIXED = 1000 + 12


def test_every_action_is_counted() -> None:
    found = simulate(WRITTEN, COSTS)
    expected = [
        (0.0, FIXED + 8),  # from the first state
        (4.5, FIXED + 100 + 4),
        (7.0, FIXED + 200 + 25),
        (14.0, FIXED + 100 + 25),
        (21.0, FIXED + 45),
        (34.0, FIXED),  # the update takes nothing here
    ]
    assert list(found.timeline) == expected
    assert found.peak_bytes == FIXED + 225
    assert found.seconds == 34.0
    assert found.executed_steps == 6 + 8
    assert found.advanced_steps == 6
    assert (found.num_leaves, found.num_calls, found.num_boundaries) == (3, 5, 2)


def test_an_advance_is_cut_into_calls() -> None:
    found = simulate(WRITTEN, COSTS, advance_steps=3)
    assert found.seconds == 34.0 + 0.5  # [0, 4) takes two calls
    assert found.num_calls == 6
    assert found.timeline[0] == (0.0, FIXED + 6)


def test_by_default_calls_have_64_steps_or_those_of_the_longest_leaf() -> None:
    short = [Advance(0, 65), Differentiate(65, 66), Advance(0, 60), Differentiate(60, 65)]
    short += [Differentiate(0, 60)]
    assert simulate(short, COSTS).num_calls == 2 + 1 + 1 + 1 + 1
    long = [Advance(0, 100), Differentiate(100, 200), Differentiate(0, 100)]
    assert simulate(long, COSTS).num_calls == 1 + 1 + 1


def test_the_leaf_that_ends_the_window_may_have_costs_of_its_own() -> None:
    costs = Costs(**{**fields(COSTS), "last_leaf_bytes": Curve.linear(0, 1)})
    assert simulate(WRITTEN, costs).peak_bytes == FIXED + 200 + 2


def fields(costs: Costs) -> dict:
    return {name: getattr(costs, name) for name in costs.__dataclass_fields__}


def test_what_the_first_leaf_makes_is_not_beside_the_advances_before_it() -> None:
    later, early = (simulate(WRITTEN, COSTS, coming_bytes=coming).timeline for coming in (0, 300))
    ran = [isinstance(action, Differentiate) for action in WRITTEN if action_takes(action)]
    first = ran.index(True)
    spared = [peak - less for (_, peak), (_, less) in zip(later, early, strict=True)]
    assert first > 0
    assert spared == [300] * first + [0] * (len(spared) - first)


def action_takes(action: object) -> bool:
    return isinstance(action, Advance | Differentiate)


def test_the_update_is_a_floor_of_the_peak() -> None:
    costs = Costs(**{**fields(COSTS), "update_bytes": 5000})
    found = simulate(WRITTEN, costs)
    assert found.peak_bytes == FIXED + 5000
    assert found.timeline[-1] == (34.0, FIXED + 5000)


def test_given_states_take_nothing_and_recorded_ones_do() -> None:
    schedule = [Differentiate(4, 8), Differentiate(0, 4)]
    found = simulate(schedule, COSTS, given=[4], recorded_states=3)
    assert found.num_boundaries == 0
    assert found.peak_bytes == FIXED + 3 * 100 + 45


def test_an_advance_to_the_start_counts() -> None:
    schedule = [Advance(0, 3), Keep(3), Advance(3, 5), Differentiate(5, 8), Differentiate(3, 5)]
    schedule += [Drop(3)]
    found = simulate(schedule, COSTS)
    assert found.executed_steps == 3 + 2 + 5
    assert found.peak_bytes == FIXED + 200 + 35


@pytest.mark.parametrize(
    "schedule",
    [[], [Advance(0, 4)], [Differentiate(0, 4), Differentiate(4, 8)], [*WRITTEN[:-1], Drop(4)]],
)
def test_what_is_no_schedule_is_refused(schedule: list) -> None:
    with pytest.raises(ScheduleError):
        simulate(schedule, COSTS)


def test_calls_need_a_step() -> None:
    with pytest.raises(ArgumentError, match="advance_steps=0"):
        simulate(WRITTEN, COSTS, advance_steps=0)


def test_an_iterator_is_read_once() -> None:
    assert simulate(iter(WRITTEN), COSTS) == simulate(Schedule(lambda: iter(WRITTEN)), COSTS)


def test_a_long_timeline_is_thinned_and_keeps_the_peak() -> None:
    schedule = [Differentiate(step, step + 1) for step in range(19_999, -1, -1)]
    found = simulate(schedule, COSTS, given=range(20_000))
    assert len(found.timeline) < 9000
    assert max(held for _, held in found.timeline) == found.peak_bytes
    assert list(found.timeline) == sorted(found.timeline, key=lambda point: point[0])
