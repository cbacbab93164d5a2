"""The programs of pages that need other libraries run, each where its own is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
_PART = re.compile(r"^## (.+)$", re.MULTILINE)
_PROGRAM = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LIBRARY = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


LIBRARIES = {
    "integrations.md": {"ignite", "lightning", "torchrl", "snntorch"},
    "recipes.md": {"ignite", "pytorch_lightning", "accelerate"},
}


@pytest.mark.parametrize("page", LIBRARIES)
def test_there_is_a_program_for_each(page: str) -> None:
    text = "".join(_PROGRAM.findall((DOCS / page).read_text("utf-8")))
    assert LIBRARIES[page] <= set(_LIBRARY.findall(text))


def _programs() -> Iterator[object]:
    for page in LIBRARIES:
        _, *parts = _PART.split((DOCS / page).read_text("utf-8"))
        for title, text in zip(parts[::2], parts[1::2], strict=True):
            for program in _PROGRAM.findall(text):
                yield pytest.param(page, program, id=f"{page}-{title}")


@pytest.mark.filterwarnings("default")  # those of the libraries
@pytest.mark.parametrize(("page", "program"), list(_programs()))
def test_a_program_runs_and_prints(
    page: str,
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for library in _LIBRARY.findall(program):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, page, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
