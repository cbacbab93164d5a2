"""Gradients arrive as results of backward, or are added where they belong."""

from __future__ import annotations

import pytest

from tbptt_ckpt.time_batching import taps


@pytest.fixture(params=["given back", "added in place"])
def _where_gradients_go(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether gradients of small weights are added to `.grad` in place, as those of large ones."""
    if request.param == "added in place":
        monkeypatch.setattr(taps, "_SMALLEST_TOTAL", 0)
