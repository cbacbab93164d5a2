"""What is profiled: a module, its loss, its data, and how to make them in a fresh process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import nn

from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.module.recurrence import parameters_of
from tbptt_ckpt.module.trees import tensors_of

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

    @property
    def device(self) -> torch.device:
        """Where the weights are, or else the first state; the CPU where there is neither."""
        tensors = [*parameters_of(self.module), *tensors_of(self.init_state)]
        return tensors[0].device if tensors else torch.device("cpu")

    def engine(self, k1: int, k2: int | None, **choices: Any) -> TBPTT:
        """`TBPTT` for windows of these reaches, under these choices."""
        return TBPTT(self.module, self.loss_fn, k1, k2, self.optimizer, **self.options, **choices)

    def held(self) -> tuple[Any, ...]:
        """The trees of tensors that are there before anything runs."""
        return (self.module, self.loss_fn, self.optimizer, self.init_state)

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
        handle = self.module.register_forward_pre_hook(read_now_and_then)
        try:
            yield
        finally:
            handle.remove()

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
