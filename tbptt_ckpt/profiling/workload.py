"""`Workload`: a module, its loss and its data, as they are trained, profiled and planned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.arguments import AboveZero, Dimension, check_fields
from tbptt_ckpt.data.source import Source, as_tensors, rows_of
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.engine.options import AnyK2, LossSteps, Reduction
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.storages import copy_sharing
from tbptt_ckpt.module.recurrence import parameters_of, recognise, time_of
from tbptt_ckpt.module.trees import Tree, join_trees, tensors_of

# What it hands to `TBPTT` by name.
_FURTHER = (
    *("per_step", "time_dim", "lane_dim"),
    *("loss", "reduction", "clip_grad_norm", "autocast_dtype"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What is trained, profiled or planned: all that `TBPTT` is given but windows and plans.

    A factory that `tbptt-ckpt train`, `plan` and `profile` are told of with `--model` returns one.

    Attributes:
        module: As for `TBPTT`, as is the loss function.
        loss_fn: A loss of torch's, another mean over the steps given, or `(loss_sum, weight)`.
        source: Where steps come from: an object with `read(start, stop)` and a length, which is
            read over and over. It, or `inputs` and `targets`, must be given.
        inputs: In place of a source: nested tensors with time on `time_dim`, such as [T, B, F].
        targets: The same, such as [T, B].
        init_state: The state at the first step.
        optimizer: Of the module's parameters. None: profiles measure windows without an update,
            and commands make an Adam.
        per_step: As for `TBPTT`.
        time_dim: Where a segment module wants time, and `inputs` have it; as for `run_window`.
        lane_dim: As for `TBPTT`, as are the attributes below.

    Raises:
        ArgumentError: An attribute that cannot work.
    """

    module: Callable[..., Any]
    loss_fn: Callable[[Any, Any], Any]
    _: KW_ONLY
    source: Any = None
    inputs: Any = None
    targets: Any = None
    init_state: Any = None
    optimizer: Any = None
    per_step: bool | None = None
    time_dim: Dimension | None = None
    lane_dim: Dimension | None = None
    loss: LossSteps = "new"
    reduction: Reduction = "mean"
    clip_grad_norm: AboveZero | None = None
    autocast_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.source is not None:
            self._check_source()
            return
        if self.targets is None:
            raise ArgumentError("targets=None leaves nothing to differentiate; or give a source")
        recurrence = recognise(self.module, self.per_step, self.time_dim, self.lane_dim)
        time_dim, recurrence = time_of(recurrence, self.time_dim, self.inputs)
        found = TensorSequence(self.inputs, self.targets, time_dim=time_dim)
        for name, value in (("source", found), ("time_dim", recurrence.time_dim)):
            object.__setattr__(self, name, value)
        for name in ("inputs", "targets"):  # they are in the source, and it alone is copied
            object.__setattr__(self, name, None)

    def _check_source(self) -> None:
        for name in ("inputs", "targets"):
            if getattr(self, name) is not None:
                raise ArgumentError(f"{name} and source are two ways to say what is read")
        if not (isinstance(self.source, Source) and hasattr(self.source, "__len__")):
            raise ArgumentError(
                f"source={shown(self.source)} must have read(start, stop) and a length; tensors "
                "are given as inputs and targets"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are, or else the first state; the CPU where there is neither."""
        tensors = [*parameters_of(self.module), *tensors_of(self.init_state)]
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def has_only_last_loss(self) -> bool:
        """Whether a window's last step is the only one with a loss."""
        return self.loss == "last"

    def engine(self, k1: int, k2: AnyK2, **choices: Any) -> TBPTT:
        """`TBPTT` for windows of these reaches, under these choices."""
        further = {name: getattr(self, name) for name in _FURTHER}
        return TBPTT(self.module, self.loss_fn, k1, k2, self.optimizer, **further, **choices)

    def held(self) -> tuple[Any, ...]:
        """The trees of tensors that are there before anything runs."""
        return (self.module, self.loss_fn, self.optimizer, self.init_state)

    def copied(self) -> Workload:
        """The same with copies of what training changes; `ArgumentError` if there are none."""
        try:
            module, loss_fn, optimizer, state = copy_sharing(self.held())
        except Exception as error:  # whatever the user's own __deepcopy__ raises
            raise ArgumentError(
                f"module, loss_fn, optimizer and init_state must be copied, so that yours stay as "
                f"they are, and cannot be ({type(error).__name__}: {error})"
            ) from error
        return replace(self, module=module, loss_fn=loss_fn, optimizer=optimizer, init_state=state)


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
        return None if stop <= self._silent_steps else self._rows("weights", start, stop)

    def resets(self, start: int, stop: int) -> Tensor | None:
        """The source's own resets of those steps, if it has any."""
        return self._rows("resets", start, stop)

    def _rows(self, method: str, start: int, stop: int) -> Tensor | None:
        parts = [rows_of(self._source, method, *piece) for piece in self._pieces(start, stop)]
        known = [torch.as_tensor(part, device="cpu") for part in parts if part is not None]
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
        return join_trees(partial(torch.cat, dim=self.time_dim), trees)
