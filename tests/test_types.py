"""The package's types help: a type checker sees what is wrong in a user's script, and no more."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("typed_uses.py").relative_to(ROOT)


def wrong_lines() -> set[int]:
    lines = (ROOT / SCRIPT).read_text(encoding="utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


def said_by(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", *command, str(SCRIPT)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    ).stdout


def test_mypy_sees_what_is_wrong() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    found = re.findall(rf"{re.escape(str(SCRIPT))}:(\d+): error", said_by("mypy", "--strict"))
    assert {int(line) for line in found} == wrong_lines()


def test_basedpyright_sees_what_is_wrong() -> None:
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed")
    output = said_by("basedpyright", "--outputjson", "--pythonpath", sys.executable)
    found = [d for d in json.loads(output)["generalDiagnostics"] if d["severity"] == "error"]
    assert {1 + d["range"]["start"]["line"] for d in found} == wrong_lines()
