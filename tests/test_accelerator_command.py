"""`python -m benchmarks.accelerator` where there is no accelerator: what runs, and what would."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY))  # last: the installed package comes first

from benchmarks.accelerator import launches, memory, times  # noqa: E402
from benchmarks.accelerator.__main__ import SECTIONS, main, run_sections  # noqa: E402
from benchmarks.accelerator.bench import Bench  # noqa: E402
from benchmarks.accelerator.check import SKIPPED  # noqa: E402

MOST = 2**17  # bytes of a tensor that a device with too little memory has room for
SLOW = {
    "truth",
    "randomness",
    "precision",
    "autocast",
    "small_device",
    "peaks",
    "budgets",
    "states_elsewhere",
    "times",
    "commands",
}
FEW = {"waits", "graphs", "compiled"}  # sections that take a moment


class Pretended(Bench):
    """A CPU taken for a CUDA device, of which all that is asked is counted."""

    is_accelerator = is_cuda = True
    limit: float = float("inf")

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__(torch.device("cpu"), is_quick=True, seconds=10_000)
        self.calls = calls

    @property
    def module(self) -> Any:
        return SimpleNamespace(set_per_process_memory_fraction=self._limit)

    def _limit(self, fraction: float) -> None:
        self.calls["limited"] += 1
        self.limit = MOST if fraction < 1 else float("inf")

    def randn(self, *shape: int, **options: Any) -> Tensor:
        made = super().randn(*shape, **options)
        if made.nbytes > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
        return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of torch's functions of an accelerator was called, by name."""
    counted: Counter[str] = Counter()

    def stand_in(owner: Any, name: str, result: Any = None) -> None:
        def call(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return result(*arguments) if callable(result) else result

        monkeypatch.setattr(owner, name, call)

    statistics = {f"{kind}_bytes.all.peak": 1 for kind in ("allocated", "requested", "reserved")}
    for name, result in {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1,
        "memory_stats": statistics,
        "get_memory_info": (10**9, 10**9),
    }.items():
        stand_in(torch.accelerator, name, result)
    stand_in(torch.cuda, "set_sync_debug_mode")
    stand_in(torch.cuda, "make_graphed_callables", lambda module, _: module)
    stand_in(torch, "compile", lambda module: module)
    monkeypatch.setattr(memory, "STRATEGIES", ("uniform:32",))
    monkeypatch.setattr(times, "CELLS", ())
    monkeypatch.setattr(launches, "RUNS", {"stale": (4, 8, {"overlap": "stale"})})
    return counted


def check_all(names: set[str], calls: Counter[str]) -> None:
    sections = tuple(section for section in SECTIONS if section.__name__ in names)
    checks = list(run_sections(Pretended(calls), sections))
    assert {check.section for check in checks} == names
    for check in checks:
        assert "raised" not in check.figures, check
        # What torch on a CPU has none of, pretended or not.
        is_of_torch = str(check.figures.get("why")).startswith(
            ("torch cannot", "a CPU has no such")
        )
        assert check.verdict != SKIPPED or is_of_torch, check
        assert check.line().startswith(check.verdict)
    json.dumps([check.to_dict() for check in checks])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_few_sections_run_with_stand_ins(calls: Counter[str]) -> None:
    check_all(FEW, calls)
    assert calls["set_sync_debug_mode"] == 4  # two runs, on and off
    assert calls["make_graphed_callables"] == calls["compile"] == 1
    assert calls["synchronize"] > 0


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_needs_a_device_runs_with_stand_ins(calls: Counter[str]) -> None:
    names = {section.__name__ for section in SECTIONS} - SLOW
    check_all(names, calls)
    assert calls["set_sync_debug_mode"] == 4  # two runs, on and off
    assert calls["make_graphed_callables"] == calls["compile"] == 1
    assert calls["limited"] == 4
    assert min(calls[name] for name in ("synchronize", "empty_cache", "memory_stats")) > 0


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_other_sections_run_with_stand_ins(calls: Counter[str]) -> None:
    check_all(SLOW - {"commands"}, calls)
    assert calls["memory_stats"] > 0


def test_on_a_cpu_it_says_what_it_could_not(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "figures.json"
    only = ["randomness", "waits", "out_of_memory", "longest", "kernels", "graphs", "compiled"]
    assert main(["--json", str(file), "--quick", "--only", *only, "--threads", "1"]) == 0
    found = {check["section"]: check for check in json.loads(file.read_text())["checks"]}
    assert list(found) == [s.__name__ for s in SECTIONS if s.__name__ in only]
    for name, check in found.items():
        assert check["verdict"] == ("ok" if name == "randomness" else "skipped")
        assert (name == "randomness") != bool(check["figures"].get("why"))
    assert "written to" in capsys.readouterr().out
