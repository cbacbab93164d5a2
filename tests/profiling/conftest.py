"""What all tests of profiles share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quickly(quick_collection): ...
