"""Watches the weights while a window is differentiated, and explains what torch raises."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from tbptt_ckpt.data.blocks import Column, StepBlock
from tbptt_ckpt.errors import (
    ReplayMismatchError,
    StaleWeightsError,
    TbpttError,
    TbpttWarning,
)
from tbptt_ckpt.module.trees import Tree, tensors_of
from tbptt_ckpt.module.tripwires import IN_THE_STATE


class WeightGuard:
    """Notices weights that change between a window's advance and its replay.

    Those that are `renormalised`, by their identity, may.

    Attributes:
        expected: The fingerprint of the weights with which the window runs.
    """

    def __init__(
        self, parameters: Sequence[Tensor], renormalised: Container[int] = frozenset()
    ) -> None:
        self._parameters = [p for p in parameters if id(p) not in renormalised]
        self.expected = self.fingerprint()

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What is watched."""
        return self._parameters

    def fingerprint(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever a weight is written to or replaced."""
        return tuple([(p._version, p.data_ptr()) for p in self._parameters])

    def check(self, window_stop: int) -> None:
        """Raise `StaleWeightsError` if a weight changed."""
        if self.fingerprint() != self.expected:
            raise StaleWeightsError(
                f"weights changed while the window up to step {window_stop} was being "
                "differentiated, between its advance and its replay; call optimizer.step() only "
                "between windows"
            )


class InputGuard:
    """Notices steps that write into what a window is given."""

    def __init__(self, blocks: Sequence[StepBlock]) -> None:
        self._given = {
            "input": _watchable([block.inputs for block in blocks]),
            "target": _watchable([block.targets for block in blocks]),
        }
        self._expected = self._versions()

    def written(self) -> str:
        """What has been written into since this was made; empty if nothing."""
        found = zip(self._given, self._versions(), self._expected, strict=True)
        return next((name for name, now, before in found if now != before), "")

    def _versions(self) -> list[list[int]]:
        return [[tensor._version for tensor in tensors] for tensors in self._given.values()]

    def check(self, start: int, stop: int) -> None:
        """Raise `ReplayMismatchError` if steps of `[start, stop)`, which ran again, wrote there."""
        if written := self.written():
            raise ReplayMismatchError(_written(written), start=start, stop=stop, difference=0.0)


def _watchable(given: list[Tree]) -> list[Tensor]:
    values = [g.values if isinstance(g, Column) else g for g in given]
    return [t for t in tensors_of(values) if not t.is_inference()]


def _written(what: str) -> str:
    return (
        f"the module or the loss wrote into the {what} of a step, which is there for every run of "
        f"the step; write into a copy, as in {what}.clone().mul_(2), or use an operation that is "
        "not in place"
    )


class GradientWatch:
    """Warns once of a weight that had a gradient in an earlier window, and has none in a replay."""

    def __init__(self) -> None:
        self._had: set[int] = set()
        self._has_warned = False

    def look(self, weights: Sequence[Tensor], owner: object, *, replays: bool) -> None:
        """A window's gradient is complete; `replays` says whether steps of it ran again."""
        lost = [w for w in weights if w.grad is None and w.requires_grad and id(w) in self._had]
        given = [id(w) for w in weights if w.grad is not None]  # none where all losses are constant
        self._had.update(given)
        if not (lost and given and replays) or self._has_warned or not isinstance(owner, nn.Module):
            return
        named = ((name, w) for name, w in owner.named_parameters() for other in lost if w is other)
        for name, _ in islice(named, 1):  # of others nobody knows when they have one
            self._has_warned = True
            warnings.warn(
                f"weight {name!r} got no gradient in a window, and had one before: if the "
                "module keeps something that is made of it, such as a product or a normalised "
                "weight, an advance made that without a graph; make it anew in every step",
                TbpttWarning,
                stacklevel=2,
            )


@contextmanager
def advancing() -> Iterator[None]:
    """While entered, no graph is recorded, and the error of a step that needs one is explained."""
    try:
        with torch.no_grad():
            yield
    except RuntimeError as error:
        if "does not require grad and does not have a grad_fn" not in str(error):
            raise
        raise TbpttError(
            "the module differentiates within a step, and a step that is only advanced records no "
            "graph; put what is differentiated there under `with torch.enable_grad():`, and detach "
            "the state that goes into it"
        ) from error


class Differentiating:
    """While entered, a graph is recorded, weights are watched, and torch's errors explained."""

    def __init__(self, guard: WeightGuard, inputs: InputGuard, stop: int) -> None:
        self._guard, self._inputs, self._stop = guard, inputs, stop
        self._grad_mode = torch.enable_grad()

    def __enter__(self) -> None:
        self._guard.check(self._stop)
        self._grad_mode.__enter__()

    def __exit__(self, _: object, error: object, traceback: object) -> None:
        self._grad_mode.__exit__(type(error), error, traceback)
        if isinstance(error, RuntimeError):
            _explain(error, self._guard, self._inputs, self._stop)
        elif error is None:
            self._guard.check(self._stop)


def _explain(error: RuntimeError, guard: WeightGuard, inputs: InputGuard, stop: int) -> None:
    """Raise what a user can act on, where torch's error has a known cause."""
    if "backward through the graph a second time" in str(error):
        raise TbpttError(
            f"a tensor with the graph of an earlier run was used: {IN_THE_STATE}"
        ) from error
    if "in-place operation" not in str(error) and "inplace operation" not in str(error):
        return
    guard.check(stop)
    if written := inputs.written():
        raise TbpttError(_written(written)) from error
    raise TbpttError(
        "a tensor that the gradient needs was modified in place; the module must return a "
        f"new state, or clone it before writing into it ({str(error).splitlines()[0]})"
    ) from error
