"""Hooks of a tensor, taken off for a while and put back where they were."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class HooksOff:
    """Empties a tensor's hooks in place, since autograd holds on to their containers."""

    def __init__(self, tensor: Tensor) -> None:
        found = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = [
            (hooks, dict(hooks)) for hooks in found if hooks
        ]
        for hooks, _ in self._hooks:
            hooks.clear()

    def put_back(self) -> None:
        """All are as they were, and those behind them that were registered meanwhile."""
        for hooks, content in self._hooks:
            later = dict(hooks)
            hooks.clear()
            hooks.update(content | later)
