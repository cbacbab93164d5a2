"""What is profiled: a module, its loss, its data, and how to make them in a fresh process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tbptt_ckpt.arguments import check_fields
from tbptt_ckpt.data.source import as_tensors
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.recurrence import parameters_of
from tbptt_ckpt.module.trees import Tree, replace_tensors, tensors_of

_CALLS_PER_READ = 64


@dataclass(slots=True, eq=False, kw_only=True)
class Work:
    """What `TBPTT` is given, without the choices that are profiled.

    Attributes:
        module: As for `TBPTT`, as is the loss function.
        source: Where steps come from; it has a length, and is read over and over.
        init_state: The state at the first step.
        optimizer: Of the module's parameters; None measures windows without an update.
        options: Further keywords of `TBPTT`.
    """

    module: Callable[..., Any]
    loss_fn: Callable[[Any, Any], Any]
    source: Any
    init_state: Any = None
    optimizer: Any = None
    options: dict[str, Any]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are, or else the first state; the CPU where there is neither."""
        tensors = [*parameters_of(self.module), *tensors_of(self.init_state)]
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def has_only_last_loss(self) -> bool:
        """Whether a window's last step is the only one with a loss."""
        return bool(self.options.get("loss") == "last")

    def engine(self, k1: int, k2: int | None, **choices: Any) -> TBPTT:
        """`TBPTT` for windows of these reaches, under these choices."""
        return TBPTT(self.module, self.loss_fn, k1, k2, self.optimizer, **self.options, **choices)

    def held(self) -> tuple[Any, ...]:
        """The trees of tensors that are there before anything runs."""
        return (self.module, self.loss_fn, self.optimizer, self.init_state)

    def copied(self) -> Work:
        """The same with copies of what training changes; `ArgumentError` if there are none."""
        try:
            module, loss_fn, optimizer, state = copy.deepcopy(self.held())
        except Exception as error:  # whatever the user's own __deepcopy__ raises
            raise ArgumentError(
                f"module, loss_fn, optimizer and init_state must be copied, so that yours stay as "
                f"they are, and cannot be ({type(error).__name__}: {error})"
            ) from error
        return replace(self, module=module, loss_fn=loss_fn, optimizer=optimizer, init_state=state)

    @contextmanager
    def reading(self, read: Callable[[], None]) -> Iterator[None]:
        """Have a meter's records read while the module runs, so that they stay few."""
        calls = count(1)

        def read_now_and_then(*_: object) -> None:
            if next(calls) % _CALLS_PER_READ == 0:
                read()

        if not isinstance(self.module, nn.Module):
            yield
            return
        with self.module.register_forward_pre_hook(read_now_and_then):
            yield

    def build(self) -> Work:
        """Itself: work that exists already is its own `Workload`."""
        return self


class Workload(Protocol):
    """Makes the work, in whatever process it is called; it can be pickled."""

    def build(self) -> Work:
        """The work, the same every time.

        Raises:
            ArgumentError: Work that cannot be made, for reasons the user can mend.
        """
        ...


class EndlessSource:
    """The steps of a source in a circle, so that little data serves windows of any reach.

    Windows without targets, before `silent_steps`, run forward only: a cheap way to the states
    that a window in the middle of a long sequence starts from. Every read is a copy, as it is
    for a stream.
    """

    def __init__(self, source: Any, silent_steps: int) -> None:
        if not hasattr(source, "__len__") or not len(source):
            raise ArgumentError(f"source={shown(source)} must have a length of at least one step")
        self._source, self._silent_steps = source, silent_steps
        self.time_dim: int = getattr(source, "time_dim", 0)

    def __len__(self) -> int:
        return sys.maxsize // 2

    def read(self, start: int, stop: int) -> tuple[Tree, Tree]:
        """Inputs and targets of the steps `[start, stop)`; the targets None while silent."""
        parts = [self._source.read(low, high) for low, high in self._pieces(start, stop)]
        inputs, targets = zip(*parts, strict=True)
        return self._joined(inputs), None if stop <= self._silent_steps else self._joined(targets)

    def weights(self, start: int, stop: int) -> Tensor | None:
        """The source's own weights of those steps, if it has any."""
        if not hasattr(self._source, "weights") or stop <= self._silent_steps:
            return None
        parts = [self._source.weights(low, high) for low, high in self._pieces(start, stop)]
        known = [torch.as_tensor(part) for part in parts if part is not None]
        return torch.cat(known) if known else None

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        length = len(self._source)
        while start < stop:
            low = start % length
            high = min(length, low + stop - start)
            yield low, high
            start += high - low

    def _joined(self, parts: tuple[Tree, ...]) -> Tree:
        trees = [as_tensors(part) for part in parts]
        if not tensors_of(trees[0]):
            return trees[0]
        columns = zip(*map(tensors_of, trees), strict=True)
        return replace_tensors(trees[0], [torch.cat(c, dim=self.time_dim) for c in columns])
