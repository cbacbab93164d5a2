"""A small text, the options of a run that takes a moment, and factories outside the package."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from command_lines import FACTORIES


@pytest.fixture
def text(tmp_path):
    """A file of 8,000 bytes that repeats a stretch of 40; pairs of bytes tell little about it."""
    stretch = np.random.default_rng(3).choice(np.frombuffer(b"abcd", np.uint8), 40)
    path = tmp_path / "text"
    path.write_bytes(stretch.tobytes() * 200)
    return path


@pytest.fixture
def small(text):
    """Options of a run that takes a moment."""
    return (
        f"train --data {text} --device cpu --hidden 8 --lanes 4 "
        "--k1 8 --k2 16 --strategy uniform:4 --max-steps 64"
    ).split()


@pytest.fixture
def own(small):
    """The same for models of one's own, which need not take a width."""
    at = small.index("--hidden")
    return small[:at] + small[at + 2 :]


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """The name of a module in the current directory, outside the package."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)
