"""The recipes within other frameworks' loops, as written, where these are installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
FRAMEWORKS = ("pytorch_lightning", "ignite", "accelerate")
PROGRAMS = re.findall(r"^```py\n(.*?)\n```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_there_is_a_program_for_each() -> None:
    assert len(PROGRAMS) == len(FRAMEWORKS)
    for name, program in zip(FRAMEWORKS, PROGRAMS, strict=True):
        assert f"import {name}" in program or f"from {name}" in program


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.filterwarnings("default")
def test_it_runs_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    program = PROGRAMS[FRAMEWORKS.index(name)]
    exec(compile(program, str(PAGE), "exec"), {"__name__": "__main__"})
