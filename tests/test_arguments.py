"""Every argument of every public callable meets wrong values: a typed error, or it works."""

from __future__ import annotations

import importlib
import inspect
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wrong_values import VALUES, calls, value_of

import tbptt_ckpt
from tbptt_ckpt.arguments import Dimension, PositiveInt, check_path, checked
from tbptt_ckpt.errors import ArgumentError, TbpttError, shown
from tbptt_ckpt.module.trees import tensors_of

ROOMS = (
    *("budget", "data", "engine", "executor", "memory", "module", "planner", "profiling"),
    *("schedule", "snapshot", "time_batching", "trainer"),
)
# What nobody calls with arguments of their own: results, events, errors, protocols, parts that the
# package makes, and actions and windows, which are looked at where they are used.
NOT_CALLED = {
    *("ActionTrace", "Advance", "BatchedOperation", "Border", "ChosenK2", "Differentiate", "Drop"),
    *("Evaluation", "Reach"),
    *("EventSink", "Executor", "Keep", "Lap", "Lifted", "Loaded", "Notice", "Observer"),
    *("PeakMeter", "ProcessBench", "ProfileError", "Progress", "ProgressBar", "RecurrentParts"),
    *("Retain", "RoulettePrice", "RssBytes"),
    *("Simulation", "SnapshotReport", "SnapshotWarning", "Source", "Sqrt", "Step"),
    *("TensorBoard", "TrainResult", "TrainerResult", "TrainingStopped"),
    *("UpdateEvent", "Verification", "Window", "WindowEvent", "WindowFigures", "WindowResult"),
    *("outputs_needed", "rss_bytes", "sweep"),
}
# What a user's own function or class raises is the user's.
OWN = {
    *("context_fn", "executor", "init_state", "loss_fn", "make_actions", "module", "observer"),
    *("optimizer", "sequence", "source", "strategies", "strategy", "watch"),
}
DATA = {"init_state", "inputs", "lanes", "targets", "time_dim"}  # of which modules say what fits
SHORT = ("None", "10**30", "float('nan')", "'x'", "torch.ones(2, 3)", "np.zeros(3)", "object()")
SLOW = (
    *("CheckpointExecutor", "Trainer.resume", "measure_costs", "profile_strategies"),
    "profile_window",
)
CPU_SECONDS = 4  # until something counts as endless; the load of a machine does not count


def parameters_of(call: Callable[..., Any]) -> list[str]:
    named = inspect.signature(call).parameters.values()
    return [p.name for p in named if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def a_while() -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail(f"it takes more than {CPU_SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def is_own(error: Exception, name: str, value: Any) -> bool:
    """Whether the error is of the user's own code or module."""
    is_asked = str(error) == "asked" and name in OWN
    has_data = (
        name in ("time_dim", "lanes") or isinstance(value, np.ndarray) or bool(tensors_of(value))
    )
    return is_asked or (callable(value) and name in OWN) or (name in DATA and has_data)


def check(folder: Path, name: str, values: tuple[str, ...]) -> None:
    for parameter in parameters_of(calls(folder)[name]()[0]):
        for text in values:
            call, given = calls(folder)[name]()
            value = value_of(text)
            try:
                with a_while():
                    call(**{**given, parameter: value})
            except TbpttError as error:
                if len(str(error).splitlines()) != 1:
                    pytest.fail(f"{name}({parameter}={text}): not in one line: {error}")
            except Exception as error:
                if not is_own(error, parameter, value):
                    pytest.fail(f"{name}({parameter}={text}): {type(error).__name__}: {error}")


NAMES = sorted(calls(Path()))
SOME = [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in SLOW else name for name in NAMES
]


@pytest.mark.parametrize("name", SOME)
def test_what_is_given_works(name: str, tmp_path: Path) -> None:
    call, given = calls(tmp_path)[name]()
    call(**given)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW])
def test_a_wrong_argument_is_one_typed_error(name: str, tmp_path: Path) -> None:
    check(tmp_path, name, SHORT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_any_wrong_argument_is_one_typed_error(name: str, tmp_path: Path) -> None:
    check(tmp_path, name, VALUES)


def test_every_public_callable_is_called() -> None:
    public = set(tbptt_ckpt.__all__)
    for room in ROOMS:
        public |= set(importlib.import_module(f"tbptt_ckpt.{room}").__all__)
    errors = set(tbptt_ckpt.errors.__all__)
    called = {name.partition(".")[0] for name in NAMES}
    assert public - errors == called | NOT_CALLED
    assert not called & NOT_CALLED


@checked
def counted(count: PositiveInt, names: list[str] | None = None, *, size: Dimension = 0) -> int:
    return count + size


class TestMechanism:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"count": 0}, "count=0 must be an integer of at least 1"),
            ({"count": True}, "count=True must be an integer of at least 1"),
            ({"count": 1, "size": -1}, "size=-1 must be an integer of at least 0"),
            ({"count": 1, "names": [1]}, r"names=\[1\] must be a list of texts, or None"),
            ({"count": 1, "names": "x"}, "names='x' must be a list of texts, or None"),
        ],
    )
    def test_the_error_names_argument_value_and_what_works(self, given, message):
        with pytest.raises(ArgumentError, match=f"^{message}"):
            counted(**given)

    def test_positions_and_defaults_are_as_ever(self):
        assert counted(2, ["a"], size=1) == 3
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'count'"):
            counted()

    def test_a_path_that_no_file_system_has_is_refused(self):
        for path in ("a\0b", "\ud800", "a" * 5000):
            with pytest.raises(ArgumentError, match="a path that a file system can have"):
                check_path("path", path)

    def test_a_value_is_shown_in_one_short_line_whatever_it_is(self):
        for text in VALUES:
            line = shown(value_of(text))
            assert len(line) <= 200
            assert "\n" not in line
