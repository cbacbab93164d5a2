"""One thread per process, plans that repeat, and an account of the faults that were injected."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Tests are tiny, and threads of several processes wait for each other. Before torch is
# imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What counts as an injected "bad input" by being run at all.
BAD_INPUTS = ("test_bad_inputs.py", "test_refused_modes.py")
FAULTS = pytest.StashKey[Counter[str]]()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Also where the environment says otherwise, or a test before asked for more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that ask for a device run on each of this machine's."""
    if "device" in metafunc.fixturenames:
        import devices

        metafunc.parametrize("device", devices.found(), ids=str, indirect=True)


@pytest.fixture(autouse=True)
def quick_collection() -> Iterator[None]:
    """No collection, and no search for tensors, goes through all that exists already.

    Those are a million objects where all tests are collected, gone through at each measuring. What
    is about the collector itself has a fixture of this name that does nothing.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The device on which a test runs; in full precision, as its references are."""
    import devices
    import torch

    if request.param != devices.CPU:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with devices.running_on(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _auto_follows_from_the_window_alone(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strategy "auto" times the module, so two runs may differ in their plans.

    Tests that hold runs against each other are not about that. Those that are say so with the
    marker `times_the_module`; a budget has its costs measured in every test.
    """
    if request.node.get_closest_marker("times_the_module") is None:
        from tbptt_ckpt.budget import measured_budget

        monkeypatch.setattr(measured_budget, "SHORT_WINDOW_STEPS", sys.maxsize)


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Counts a fault that was injected and did fire, under its row of the fault table.

    A test that asks for this and injects nothing fails.
    """
    counts = request.node.stash[FAULTS] = Counter()

    def count(row: str, number: int = 1) -> None:
        counts[row] += number

    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    counts = item.stash.get(FAULTS, None)
    if counts is not None:
        assert sum(counts.values()), "no fault fired"
        item.user_properties.append(("faults", dict(counts)))
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many faults the tests injected, row by row of the fault table."""
    rows: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "faults":
                rows.update(value)
        if report.nodeid.split("::")[0].endswith(BAD_INPUTS):
            rows["bad input"] += 1
    if rows:
        terminalreporter.section("faults injected")
        for row, number in sorted(rows.items()):
            terminalreporter.write_line(f"{number:7,}  {row}")
        terminalreporter.write_line(f"{sum(rows.values()):7,}  in all")
