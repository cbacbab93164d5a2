"""What a command works on: a workload, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt import TensorSequence, Workload, evaluate
from tbptt_ckpt.cli.factory import in_one_line
from tbptt_ckpt.cli.lanes import EqualLanes
from tbptt_ckpt.data.source import Source, described
from tbptt_ckpt.engine import Evaluation
from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.module.recurrence import recognise
from tbptt_ckpt.module.trees import map_tensors


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a trained model should beat."""

    name: str
    score: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A workload with its words and its numbers for people."""

    data: str  # what it reads
    workload: Workload
    held_out: Source | None = None  # what it is judged by
    unit: str = "loss"
    unit_size: float = 1.0  # of the loss
    baseline: Baseline | None = None

    @property
    def module(self) -> nn.Module:
        """The workload's module."""
        assert isinstance(self.workload.module, nn.Module), "others are refused"
        return self.workload.module

    def evaluate(self, source: Source, segment_steps: int) -> Evaluation:
        """Mean loss over a source; memory does not grow with that.

        The module runs in eval mode and everything is left as it was.
        """
        work = self.workload
        return evaluate(
            work.module,
            work.loss_fn,
            source,
            work.init_state,
            segment_steps=segment_steps,
            per_step=work.per_step,
            time_dim=work.time_dim,
            lane_dim=work.lane_dim,
            autocast_dtype=work.autocast_dtype,
        )

    def check(self, name: str) -> None:
        """Raise `ArgumentError`, which names the model, unless the first two steps have a loss."""
        source = self.workload.source
        inputs, targets = source.read(0, min(2, len(source)))
        time_dim = getattr(source, "time_dim", None)
        try:
            self.evaluate(TensorSequence(inputs, targets, time_dim=time_dim), 2)
        except TbpttError as error:
            raise ArgumentError(f"--model {name}: {error}") from error
        except Exception as error:  # whatever the user's module raises
            given = f"called with {described(inputs)} and its first state,"
            raise ArgumentError(f"--model {name}, {given} raised {in_one_line(error)}") from error


def module_workload(
    module: nn.Module,
    loss_fn: Callable[[Any, Any], Any],
    source: EqualLanes,
    *,
    lr: float,
    **further: Any,
) -> Workload:
    """A workload of a module that says the rest itself: `per_step`, and `init_state(lanes)`."""
    if not any(p.requires_grad for p in module.parameters()):
        raise ArgumentError("--model is a module without trainable parameters")
    return Workload(
        module=module,
        loss_fn=loss_fn,
        source=source,
        init_state=initial_state(module, source.lanes),
        optimizer=torch.optim.Adam(module.parameters(), lr=lr),
        per_step=recognise(module, getattr(module, "per_step", None)).per_step,
        **further,
    )


def initial_state(module: nn.Module, lanes: int) -> Any:
    """What the module's own `init_state(lanes)` gives, or None where it has none.

    Its floating tensors are moved to where the weights are, in their dtype.
    """
    make = getattr(module, "init_state", None)
    if not callable(make):
        return None
    weight = next(module.parameters())

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else None)

    return map_tensors(place, make(lanes))
