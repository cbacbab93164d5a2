"""One model of the table: how it is made, what it is fed, and what had to be written around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, LANES, WIDTH_IN, WIDTH = 32, 3, 4, 5


class Wrapped(nn.Module):
    """A library's module as `inner`; what its users write is the `forward` of a subclass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def plain_sequence(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of models that are given tokens."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True, kw_only=True)
class Model:
    """A row.

    Attributes:
        name: As its library calls it.
        make: Makes what is given to `TBPTT`, after torch's seed was set.
        library: The package to install.
        plain: Makes what the plain loop calls, with the same weights; None where that is the same.
        plain_steps: Makes the same as a module of one step, where numbers follow how calls are cut:
            what a run gives whose calls are all of one step.
        state: Makes the state before the first step.
        per_step: As for `TBPTT`.
        time_dim: As for `TBPTT`.
        width_in: Of the inputs, which are normal numbers.
        width: Of the targets.
        tokens: The inputs and targets are as many tokens, where this is not 0.
        lanes: Sequences side by side; 0 gives data without that dimension.
        k1: Steps between updates.
        k2: Steps that an update reaches back.
        dtype: Of weights and data; float32 where the library has it written down somewhere.
        tolerance: The largest relative error of a gradient that is rounding.
        lines: Written by the user where no `Wrapped` tells.
        note: What a reader of the table should know.
    """

    name: str
    make: Callable[[], Any]
    library: str = "torch"
    plain: Callable[[], Any] | None = None
    plain_steps: Callable[[], Any] | None = None
    state: Callable[[], Any] = lambda: None
    per_step: bool | None = None
    time_dim: int | None = None
    width_in: int = WIDTH_IN
    width: int = WIDTH
    tokens: int = 0
    lanes: int = LANES
    k1: int = 6
    k2: int = 15
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    lines: int | None = None
    note: str = ""

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, with time where the model has it."""
        random = torch.Generator().manual_seed(1)
        lanes = (self.lanes,) if self.lanes else ()
        if self.tokens:
            drawn = torch.randint(self.tokens, (2, STEPS, *lanes), generator=random)
            x, y = drawn[0], drawn[1]
        else:
            kind: dict[str, Any] = {"generator": random, "dtype": self.dtype}
            x = 2 * torch.randn(STEPS, *lanes, self.width_in, **kind)
            y = torch.randn(STEPS, *lanes, self.width, **kind)
        where = self.time_dim or 0
        return x.movedim(0, where).contiguous(), y.movedim(0, where).contiguous()

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error, or cross entropy of tokens."""
        if self.tokens:
            return plain_sequence(outputs, targets)
        return F.mse_loss(outputs, targets)

    def written_lines(self, module: Any) -> int:
        """What a user writes around the library's module: the lines of a `forward`."""
        if self.lines is not None:
            return self.lines
        if isinstance(module, Wrapped):
            return len(inspect.getsource(type(module).forward).splitlines())
        return 0
