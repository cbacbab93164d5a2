"""Metrics inside a module, which count steps: one that runs again is not counted again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from tbptt_ckpt.module.inside import is_a, modules_in


class Counters:
    """The metrics of torchmetrics in a module."""

    def __init__(self, module: object) -> None:
        kinds = ("Metric", "MetricCollection")
        self._metrics = [m for _, m in modules_in(module) if is_a(m, "torchmetrics", *kinds)]

    def paused(self, is_again: bool) -> AbstractContextManager[None]:
        """While entered, they are left behind as they are found, if a run is not the first."""
        return self._left_as_found() if self._metrics and is_again else nullcontext()

    @contextmanager
    def _left_as_found(self) -> Iterator[None]:
        found = [(vars(metric), dict(vars(metric))) for metric in self._metrics]
        for present, attributes in found:
            present.update({name: _copied(value) for name, value in attributes.items()})
        try:
            yield
        finally:
            for present, attributes in found:
                present.clear()
                present.update(attributes)


def _copied(value: Any) -> Any:
    """What a metric may write into is copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, list | dict) else value
