"""Training by windows inside of Lightning's automatic optimization: every batch is one window.

NOTE [A gradient that waits]
A window's gradient is complete when its loss is known, and Lightning's own backward comes later,
from the loss that `training_step` returns. Gradients are set aside until then, and hang on it:
whatever scales, accumulates, clips or looks at gradients meets them where it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tbptt_ckpt.data.source import for_module
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.engine.options import AnyK2
from tbptt_ckpt.engine.results import WindowResult
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError, TbpttError, shown
from tbptt_ckpt.module.recurrence import recognise
from tbptt_ckpt.schedule.strategies import AnyStrategy

__all__ = ["WindowBatch", "WindowedTraining"]


class WindowBatch(NamedTuple):
    """One window, as `training_step` is given it.

    Attributes:
        batch: The loader's, whose first window it is; None with the windows after that.
        number: Which window of the batch it is, from 0.
        of: How many the batch has.
    """

    batch: Any
    number: int
    of: int


class WindowedTraining:
    """A mix-in for a `LightningModule`, named before it among the bases.

    Give `trainer.fit` the loader as `model.windows(loader)`, and have `training_step` return
    `self.window_loss(window)`. Every window is a batch of Lightning's, with an update of its own.

    Attributes:
        recurrent: The module that is trained by windows, `(x, state) -> (y, state)`.
        k1: As for `TBPTT`.
        k2: As for `TBPTT`.
        strategy: As for `TBPTT`.
        time_dim: Where a batch has time; by default where an `nn.RNN/LSTM/GRU` has it, otherwise 0.
        tbptt_options: Further options of `TBPTT`.
        window: The `WindowResult` of the last window.
    """

    recurrent: Any
    k1: int
    k2: AnyK2
    strategy: AnyStrategy = "auto"
    time_dim: int | None = None
    tbptt_options: ClassVar[Mapping[str, Any]] = {}
    window: WindowResult | None = None

    def loss_fn(self, outputs: Any, targets: Any) -> Any:
        """The loss, as `TBPTT` takes it: of one step, or of a segment of steps."""
        raise NotImplementedError("a WindowedTraining needs a loss_fn(outputs, targets)")

    def sequence(self, batch: Any) -> Any:
        """The source that a batch is; by default of `(inputs, targets)`."""
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ArgumentError(
                f"batch={shown(batch)} must be (inputs, targets), or sequence(batch) say how it is "
                "read"
            )
        return TensorSequence(*batch, time_dim=self.time_dim)

    def first_state(self, batch: Any) -> Any:
        """The state before the first step of a batch; by default None."""
        return None

    def windows(self, loader: Iterable[Any]) -> Iterable[WindowBatch]:
        """The loader's sequences, window by window, for `trainer.fit`."""
        return _Windows(loader, self._num_windows)

    def window_loss(self, window: WindowBatch) -> Tensor | None:
        """Run a window; its loss, whose backward gives its gradient, or None without a target.

        Raises:
            ArgumentError: It is not the next one, or Lightning trains in several processes.
        """
        run: _Run = self.__dict__.setdefault("_window_run", _Run())
        self.window, loss = run.loss(self, window)
        return loss

    def _tbptt(self) -> TBPTT:
        options = {"strategy": self.strategy, **self.tbptt_options}
        return TBPTT(self.recurrent, self.loss_fn, self.k1, self.k2, **options)

    def _num_windows(self, batch: Any) -> int:
        options = {name: self.tbptt_options.get(name) for name in ("per_step", "time_dim")}
        recurrence = recognise(self.recurrent, **options)
        return -(-len(for_module(self.sequence(batch), recurrence)) // self.k1)


class _Windows:
    """Can be iterated as often as the loader."""

    def __init__(self, loader: Iterable[Any], count: Callable[[Any], int]) -> None:
        self._loader, self._count = loader, count

    def __iter__(self) -> Iterator[WindowBatch]:
        for batch in self._loader:
            count = self._count(batch)
            yield from (WindowBatch(None if n else batch, n, count) for n in range(count))


class _Run:
    """Where the windows of a batch stand; a copy of the model has not begun."""

    def __init__(self) -> None:
        self._tbptt: TBPTT | None = None
        self._windows: Iterator[WindowResult] = iter(())
        self._next = 0

    def __reduce__(self) -> Any:
        return _Run, ()

    def loss(self, model: Any, window: WindowBatch) -> tuple[WindowResult, Tensor | None]:
        if model.trainer.world_size > 1:
            raise ArgumentError(
                f"Trainer(devices=...): windows are trained in one process, not in "
                f"{model.trainer.world_size}; use devices=1"
            )
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        if window.number == 0:
            self._tbptt = self._tbptt or model._tbptt()
            batch = window.batch
            self._windows = self._tbptt.windows(model.sequence(batch), model.first_state(batch))
        elif window.number != self._next:
            raise ArgumentError(
                f"window {window.number} of a batch was asked for where {self._next} is next: they "
                "run in order, once each, from the first (an optimizer that calls its closure "
                "again, such as LBFGS, cannot be used)"
            )
        self._next = (window.number + 1) % window.of
        with _set_aside(weights) as grads:
            result = next(self._windows)
            if self._next == 0:
                next(self._windows, None)  # what the first state was computed from
        if result.loss is None:
            return result, None
        loss: Tensor = _WithGradient.apply(result.loss, grads, *weights)  # type: ignore[no-untyped-call]
        return result, loss


@contextmanager
def _set_aside(weights: list[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """Collect the gradients that come, and leave those that there were."""
    before, found = [weight.grad for weight in weights], list[Tensor | None]()
    for weight in weights:
        weight.grad = None
    try:
        yield found
        found += [weight.grad for weight in weights]
    finally:
        for weight, grad in zip(weights, before, strict=True):
            weight.grad = grad


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *_: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> Any:  # of the loss: 1, or a scale
        if ctx.grads is None:
            raise TbpttError("the gradient of a window is differentiated once; it is handed on")
        grads, ctx.grads = ctx.grads, None
        return None, None, *(None if grad is None else grad.mul_(factors[0]) for grad in grads)
