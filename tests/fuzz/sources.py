"""The same steps from sources of several kinds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tbptt_ckpt import TensorSequence

from .case import Case


class Reader:
    """Has a length and copies what it reads."""

    def __init__(self, case: Case) -> None:
        self._case, self.time_dim = case, case.time_dim

    def __len__(self) -> int:
        return self._case.num_steps

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        case, dim = self._case, self.time_dim
        cut = (t.narrow(dim, start, stop - start).clone() for t in (case.inputs, case.targets))
        inputs, targets = cut
        return inputs, targets


class Stream:
    """Any iterable of steps, of unknown length; what weighs nothing has no target."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        case, dim = self._case, self._case.time_dim
        for t in range(case.num_steps):
            target = case.targets.select(dim, t).clone()
            is_absent = case.weight is not None and not case.weight[t]
            yield case.inputs.select(dim, t).clone(), None if is_absent else target


def source_of(case: Case) -> Any:
    """What `TBPTT` reads; always other memory than the loop's."""
    if case.data is not None:
        return case.data()
    if case.source == "reader":
        return Reader(case)
    if case.source == "stream":
        return Stream(case)
    further = {} if case.source == "unsaid" else {"time_dim": case.time_dim}
    inputs, targets = case.inputs.clone(), case.targets.clone()
    resets = None if case.resets is None else case.resets.clone()
    return TensorSequence(inputs, targets, weight=case.weight, resets=resets, **further)
