"""Ignite's trainer for truncated BPTT, with updates that reach further back than to the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked
from tbptt_ckpt.budget.amount import MemoryBudget
from tbptt_ckpt.engine.options import AnyK2
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.integrations.hosts import imported
from tbptt_ckpt.schedule.strategies import AnyStrategy
from tbptt_ckpt.updates.updater import AnyOptimizer

__all__ = ["create_supervised_tbptt_trainer"]


class _Batch:
    """A batch as a source; `prepare` is given the steps of one window at a time."""

    def __init__(self, batch: tuple[Tensor, Tensor], prepare: Callable[..., Any], dim: int) -> None:
        self._batch, self._prepare, self.time_dim = batch, prepare, dim

    def __len__(self) -> int:
        return self._batch[0].shape[self.time_dim]

    def read(self, start: int, stop: int) -> tuple[Any, Any]:
        inputs, targets = self._prepare(self._steps(start, stop))
        return inputs, targets

    def parts(self, chunk_steps: int) -> list[_Batch]:
        """Its whole chunks, and the short one at the end."""
        cut = len(self) - len(self) % chunk_steps
        spans = [(start, stop) for start, stop in ((0, cut), (cut, len(self))) if start < stop]
        return [_Batch(self._steps(*span), self._prepare, self.time_dim) for span in spans]

    def _steps(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        x, y = (each.narrow(self.time_dim, start, stop - start) for each in self._batch)
        return x, y


@checked
def create_supervised_tbptt_trainer(
    model: nn.Module,
    optimizer: AnyOptimizer,
    loss_fn: Callable[[Any, Any], Any],
    tbtt_step: PositiveInt,
    dim: Dimension = 0,
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., Any] | None = None,
    *,
    k2: AnyK2 | Literal["tbtt_step"] = "tbtt_step",
    strategy: AnyStrategy = "auto",
    memory_budget: MemoryBudget = None,
    **options: Any,
) -> Any:
    """An Ignite `Engine` as `ignite.contrib.engines.tbptt` makes it, with windows of `k2` steps.

    Events are Ignite's `Tbptt_Events`: one pair for every `tbtt_step` new steps, with their loss in
    `engine.state.output`. A batch's output is the mean of these. With `k2` left out, or equal to
    `tbtt_step`, chunks do not overlap, the short one at the end of a batch included: what is
    trained is what Ignite trains.

    Args:
        model: Takes a chunk of steps: `(x, state) -> (y, state)`, first with None as its state.
        optimizer: As for Ignite.
        loss_fn: As for `TBPTT`.
        tbtt_step: Steps between updates, which is `k1`; the last chunk of a batch may be shorter.
        dim: Where batches and chunks have time.
        device: Where `prepare_batch` sends them.
        non_blocking: Whether that may be done while the host goes on.
        prepare_batch: `(batch, device=, non_blocking=) -> (x, y)`, called with the steps of one
            window; Ignite's own by default.
        k2: Steps an update reaches back; None reaches back to the start of the batch; "auto" as for
            `TBPTT`.
        strategy: As for `TBPTT`.
        memory_budget: As for `TBPTT`.
        **options: Further ones of `TBPTT`.

    Raises:
        ArgumentError: An argument that cannot work, or Ignite is missing.
    """
    engines = imported("ignite.engine", "ignite")
    events = imported("ignite.contrib.engines.tbptt", "ignite").Tbptt_Events
    prepare_batch = engines._prepare_batch if prepare_batch is None else prepare_batch
    k2 = tbtt_step if k2 == "tbtt_step" else k2
    tbptt = TBPTT(
        model,
        loss_fn,
        tbtt_step,
        k2,
        optimizer,
        **{"per_step": False, "time_dim": dim, **options},
        strategy=strategy,
        memory_budget=memory_budget,
    )

    def prepared(chunk: tuple[Tensor, Tensor]) -> Any:
        return prepare_batch(chunk, device=device, non_blocking=non_blocking)

    def update(engine: Any, batch: Any) -> float:
        steps, state, losses = _Batch(_checked_pair(batch), prepared, dim), None, list[float]()
        for part in steps.parts(tbtt_step) if k2 == tbtt_step else [steps]:
            windows = tbptt.windows(part, state)
            for _ in range(0, len(part), tbtt_step):
                engine.fire_event(events.TIME_ITERATION_STARTED)
                model.train()
                window = next(windows)
                engine.state.output = window.loss_value
                losses.append(engine.state.output)
                engine.fire_event(events.TIME_ITERATION_COMPLETED)
                state = window.state
            next(windows, None)  # all have run
        return sum(losses) / len(losses)

    engine = engines.Engine(update)
    engine.register_events(*events)
    return engine


def _checked_pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise ArgumentError(f"a batch must be (x, y), two tensors with time, not {shown(batch)}")
    x, y = batch
    return x, y
