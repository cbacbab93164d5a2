"""A resume that is refused leaves everything as it was, whatever it is refused for."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from training_jobs import EXACT, Injected, Job, assert_equal, with_snapshots

from tbptt_ckpt import (
    ArgumentError,
    LaneSource,
    SharedState,
    SnapshotError,
    Snapshots,
    TensorSequence,
    Trainer,
)
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning

NOTHING = object()


class Average:
    """Something of the user's that is saved too."""

    def __init__(self) -> None:
        self.mean = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"] + 0


def all_of(trainer: Trainer, *owners: Any) -> dict[str, Any]:
    """Everything that a resume changes, copied."""
    state = trainer.state_dict()
    names = ("learning", "progress", "plan", "random", "extra")
    found = {name: state[name] for name in names}
    found["run"] = None if state["run"] is None else state["run"]["totals"]
    found["others"] = [owner.state_dict() for owner in owners]
    found["group"] = trainer.tbptt.parts.updater.group.state_dict()
    return copy.deepcopy(found)


def saved(job: Job, num_windows: int = 2) -> dict[str, Any]:
    """The state of a run after some windows."""
    trainer, _, _ = job.build(extra={"mean": Average()})
    windows = trainer.windows()
    for _ in range(num_windows):
        next(windows)
    windows.close()
    return copy.deepcopy(trainer.state_dict())


def disturb_generators() -> None:
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global one


def learned() -> SharedState:
    return SharedState(cases.random_state(lanes=1).requires_grad_(), cases.LANES)


def lanes() -> LaneSource:
    inputs, targets = cases.random_data(12)
    return LaneSource(TensorSequence(inputs[:, 0], targets[:, 0]), cases.LANES, seed=1)


JOB = Job(num_steps=8)
OTHERS: dict[str, tuple[Job, Callable[[], dict[str, Any]]]] = {
    "k2": (Job(k2=5), dict),
    "another module": (Job(module=cases.LSTMCellWithReadout), dict),
    "no optimizer": (Job(optimizer=None), dict),
    "an init_state": (JOB, lambda: {"init_state": learned()}),
    "data of another length": (Job(num_steps=5), dict),
    "identity": (JOB, lambda: {"identity": {"speed": 3}}),
    "fewer steps": (JOB, lambda: {"max_steps": 2}),
    "another source": (JOB, lambda: {"source": lanes()}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_and_nothing_changes(name: str, injected: Injected) -> None:
    state = saved(JOB)
    job, options = OTHERS[name]
    given, average = options(), Average()
    source = given.pop("source", None)
    other, _, _ = job.build(extra={"mean": average}, **given)
    if source is not None:
        other = Trainer(other.tbptt, source, extra={"mean": average})
        source.set_epoch(3)
    sources = [] if source is None else [source]
    disturb_generators()
    before = all_of(other, *sources)
    with pytest.raises(ArgumentError):
        other.load_state_dict(state)
    assert_equal(all_of(other, *sources), before, EXACT)
    assert other.num_steps == 0
    injected("bad input")


class _Stream:
    """A source without a length."""

    def __init__(self) -> None:
        self._position = 0
        self._data = TensorSequence(*cases.random_data(8))

    def read(self, start: int, stop: int) -> Any:
        return self._data.read(start, min(stop, 8)) if start < 8 else ((), None)

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]


READ = {
    "an iterable of steps": lambda: list(zip(*cases.random_data(8), strict=True)),
    "a source with a length": lambda: TensorSequence(*cases.random_data(8)),
    "a source without a length": _Stream,
}


@pytest.mark.parametrize(("here", "there"), [*itertools.permutations(READ, 2)])
def test_what_is_read_differently_is_another_run_and_no_broken_snapshot(
    here: str, there: str, tmp_path: Path, injected: Injected
) -> None:
    def build(kind: str) -> Trainer:
        engine = JOB.build()[0].tbptt
        every = Snapshots(directory=tmp_path, every_steps=2)
        return Trainer(engine, READ[kind](), snapshots=every)

    build(there).train()
    other = build(here)
    before = all_of(other)
    with pytest.raises(ArgumentError, match=f"sequence is {here}, .* saved was {there}"):
        other.resume()
    assert_equal(all_of(other), before, EXACT)
    injected("bad input")


def test_what_the_user_loads_may_fail_too(injected: Injected) -> None:
    state = saved(JOB)
    state["extra"]["mean"] = {"mean": None}  # raises a TypeError
    broken, _, _ = JOB.build(extra={"mean": Average()})
    before = all_of(broken)
    with pytest.raises(SnapshotError, match="it holds no state of this run: TypeError"):
        broken.load_state_dict(state)
    assert_equal(all_of(broken), before, EXACT)
    injected("hostile snapshot")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    if path:
        yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list | tuple) and len(value) < 10:
        items = enumerate(value)
    for key, item in items:
        yield from _places(item, (*path, key))


def _changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    """A copy of nested containers with another value in one place."""
    if not path:
        return to
    if isinstance(value, dict):
        changed = {k: _changed(v, path[1:], to) if k == path[0] else v for k, v in value.items()}
        return {k: v for k, v in changed.items() if v is not NOTHING}
    items = [_changed(v, path[1:], to) if i == path[0] else v for i, v in enumerate(value)]
    return type(value)(item for item in items if item is not NOTHING)


@pytest.mark.filterwarnings("ignore:strategy")
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_state_with_anything_missing_or_wrong_is_refused_whole(
    every: int, injected: Injected
) -> None:
    """Each place of a state in turn; what torch and the user load is theirs to check."""
    job = Job(num_steps=8, engine={"overlap": "stale"})
    state = saved(job, 3)
    other, _, _ = job.build(extra={"mean": Average()})
    refused = tried = 0
    theirs = ("optimizer", "scheduler", "metadata", "extra", "measured", "state")
    before = all_of(other)
    wrongs = (NOTHING, None, "text", -3, 10**30, torch.zeros(3, dtype=torch.int64))
    for path, wrong in list(itertools.product(_places(state), wrongs))[::every]:
        tried += 1
        try:
            other.load_state_dict(_changed(state, path, wrong))
        except (SnapshotError, ArgumentError):
            refused += 1
            assert_equal(all_of(other), before, EXACT, str((path, wrong)))
        else:
            tried -= any(name in path for name in theirs)
            other, _, _ = job.build(extra={"mean": Average()})
            before = all_of(other)
    assert refused > 0.8 * tried
    injected("hostile snapshot")


def _with_a_weight_of_nan(state: dict[str, Any]) -> dict[str, Any]:
    ((name, owner),) = state["learning"]["modules"].items()
    weights = {key: torch.full_like(value, torch.nan) for key, value in owner["state"].items()}
    return _changed(state, ("learning", "modules", name, "state"), weights)


@pytest.mark.parametrize(
    "change",
    [
        *(
            lambda state, place=place: _changed(state, place, -3)
            for place in (("progress", "epoch"), ("random",), ("learning", "modules"))
        ),
        _with_a_weight_of_nan,
    ],
)
def test_an_older_snapshot_is_tried_where_the_newest_holds_no_run(
    change: Callable[[Any], Any], tmp_path: Path, injected: Injected
) -> None:
    trainer, _, _ = with_snapshots(JOB, tmp_path)
    trainer.train()
    steps = trainer.num_steps
    SnapshotStore(tmp_path).save(steps, change(trainer.state_dict()))
    other, _, _ = with_snapshots(JOB, tmp_path)
    with pytest.warns(SnapshotWarning, match=f"PASSED OVER: .*step-{steps}: .*falling back"):
        assert other.resume()
    assert other.num_steps == steps - JOB.k1
    other.train()
    assert_equal(all_of(other), all_of(trainer), EXACT)
    injected("hostile snapshot")
