"""Costs and windows for the planner, and predictions held against simulations."""

from __future__ import annotations

import random

import pytest

from tbptt_ckpt import Costs, Plan, simulate
from tbptt_ckpt.schedule import Curve, FixedBytes
from tbptt_ckpt.schedule.actions import check_schedule


def line_costs(state: int, step: int, leaf: int, call_seconds: float = 0.0) -> Costs:
    return Costs.linear(
        state_bytes=state, step_bytes=step, leaf_bytes=leaf, call_seconds=call_seconds
    )


def check_prediction(planned: Plan, costs: Costs, budget: int | None, window: dict) -> None:
    first = planned.first
    start, stop = first + planned.lead_steps, first + planned.lead_steps + planned.num_steps
    joints = [start + joint for joint in window.get("joints", ())]
    check_schedule(planned.schedule, first, start, stop, joints)
    simulation = simulate(
        planned.schedule,
        costs,
        given=joints,
        recorded_states=window.get("recorded_states", 0),
        advance_steps=planned.advance_steps,
        loss_start=stop - window["new_steps"] if "new_steps" in window else None,
    )
    assert simulation.peak_bytes == planned.predicted_peak_bytes
    assert simulation.seconds == pytest.approx(planned.predicted_seconds, rel=1e-9)
    assert simulation.executed_steps == planned.executed_steps
    assert simulation.num_boundaries == planned.num_boundaries
    assert budget is None or simulation.peak_bytes <= budget
    assert len(planned.schedule) == sum(1 for _ in planned.schedule)
    assert Plan.from_dict(planned.to_dict()) == planned


def random_curve(rng: random.Random, fixed: float, step: float) -> Curve:
    points, steps, value = [(1, fixed + step)], 1, fixed + step
    for _ in range(rng.randint(1, 4)):
        wide = rng.randint(1, 60)
        steps, value = steps + wide, value + wide * step * rng.uniform(0.5, 1.5)
        points.append((steps, value))
    return Curve.through(points)


def random_costs(rng: random.Random) -> Costs:
    step = rng.choice([0.5, 1, 7.3, 100])
    return Costs(
        state_bytes=rng.choice([0, 1, 3, 10, 100, 1000]),
        leaf_bytes=random_curve(rng, rng.choice([0, 20]), step),
        leaf_seconds=random_curve(rng, rng.choice([0, 5]), 3),
        advance_bytes=random_curve(rng, rng.choice([0, 5]), step / rng.choice([2, 10, 100])),
        advance_seconds=random_curve(rng, rng.choice([0, 2]), 1),
        last_leaf_bytes=rng.choice([None, random_curve(rng, 0, step)]),
        update_bytes=rng.choice([0, 500]),
        fixed=FixedBytes(weights=100, step_inputs=rng.choice([0, 0.3])),
    )


def random_window(rng: random.Random, num_steps: int) -> dict:
    kind = rng.choice(["plain", "plain", "lead", "joints"])
    if kind == "lead":
        return {"new_steps": num_steps + rng.randint(1, 9)}
    joints = range(rng.randint(1, 10), num_steps, rng.choice([10, 50]))
    if kind == "joints" and joints:
        return {"joints": tuple(joints), "recorded_states": len(joints) + 2}
    return {}
