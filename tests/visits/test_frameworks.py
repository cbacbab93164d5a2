"""Programs within other frameworks' loops, as written, where these are installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FRAMEWORKS = {
    "recipes.md": ("pytorch_lightning", "ignite", "accelerate"),
    "integrations.md": ("ignite", "lightning.pytorch", "torchrl"),
}
PAIRS = [(page, place) for page, names in FRAMEWORKS.items() for place in range(len(names))]
_PROGRAM = re.compile(r"^```py\n(.*?)\n```", re.MULTILINE | re.DOTALL)


def programs(page: str) -> list[str]:
    return _PROGRAM.findall((DOCS / page).read_text("utf-8"))


@pytest.mark.parametrize("page", FRAMEWORKS)
def test_there_is_a_program_for_each(page: str) -> None:
    for name, program in zip(FRAMEWORKS[page], programs(page), strict=True):
        assert f"import {name}" in program or f"from {name}" in program


@pytest.mark.parametrize(("page", "place"), PAIRS)
@pytest.mark.filterwarnings("default")
def test_it_runs_as_written(
    page: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = FRAMEWORKS[page][place]
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(programs(page)[place], str(DOCS / page), "exec"), {"__name__": "__main__"})
