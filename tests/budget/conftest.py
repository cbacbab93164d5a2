"""Budgets are tested beside all the garbage that there may be."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick_collection() -> None: ...
