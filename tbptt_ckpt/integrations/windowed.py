"""A module for others' loops over chunks: each call runs a window that reaches further back.

NOTE [Names of weights]
What `Windowed` saves has the names of the module's own weights, and it loads such. So checkpoints
go from one to the other, whoever saves them: a library, or a module with this one inside.
"""

from __future__ import annotations

from collections import deque
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked
from tbptt_ckpt.engine.chunks import Chunks
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.boundary import address_of
from tbptt_ckpt.module.trees import Tree, tensors_of
from tbptt_ckpt.schedule.strategies import AnyStrategy

__all__ = ["Windowed"]

_INSIDE = "module."


class Windowed(nn.Module):
    """A module that is called chunk by chunk, and whose gradients reach `k2` steps back.

    It takes the place of `module` in a loop over the chunks of a sequence, with its own loss,
    backward and update after each: `outputs, state = net(x[:, n : n + k1], state)`. A call runs the
    steps before the chunk again, from the state that the window before has left there, and returns
    the outputs of the chunk and the state after it. The gradient is that of `TBPTT`, in the memory
    of the strategy: the loop's backward recomputes what is not kept.

    A state of None, or one that the call before has not returned, begins a sequence. All chunks of
    a sequence have as many steps as the first, which is `k1`; only the last may be shorter. Where
    nothing is differentiated (`torch.no_grad()`), calls are the module's own.

    Args:
        module: Takes chunks: `(x, state) -> (y, state)`.
        k2: Steps that a gradient reaches back from the end of a chunk; None for back to the start.
        strategy: As for `TBPTT`; no costs are measured.
        time_dim: Where chunks have time; by default 1 for modules with `batch_first`, otherwise 0.
        check_replays: As for `unroll`.

    Raises:
        ArgumentError: An argument that cannot work.
    """

    module: nn.Module

    @checked
    def __init__(
        self,
        module: nn.Module,
        k2: PositiveInt | None,
        *,
        strategy: AnyStrategy = "auto",
        time_dim: Dimension | None = None,
        check_replays: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self._options = (k2, strategy, time_dim, check_replays)
        self._chunks = Chunks(module, *self._options)
        self._earlier = deque[Tree](maxlen=16)  # last states of sequences before this one
        self._before: Tree = None  # what the last chunk began with
        self.register_state_dict_post_hook(_without_own_name)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_own_name)  # type: ignore[no-untyped-call]

    def begin(self, num_steps: int | None = None) -> None:
        """The next call begins a sequence, whatever state it is given.

        Args:
            num_steps: Its length, if that is known: then a last chunk that is shorter reaches `k2`
                steps back as well. Otherwise it reaches as far as a whole one would have.
        """
        self._chunks.begin(num_steps)

    def forward(self, inputs: Tree, state: Tree = None) -> tuple[Any, Any]:
        """The outputs of the next chunk, and the state after it."""
        if not torch.is_grad_enabled():
            return self.module(inputs, state)  # type: ignore[no-any-return]
        if (last := self._chunks.last) is not None:
            if state is not None:
                last.check_untouched()
            if self._goes_on(state, last.state):
                found, self._before = self._chunks.run(inputs), last.state
                return found
            self._earlier.append(last.state)
            self._before = None
            self._chunks.begin()
        return self._chunks.run(inputs, state)

    def _goes_on(self, given: Tree, last: Tree) -> bool:
        """Whether a state is the last one.

        Raises:
            ArgumentError: It is in some lanes, or it is one of an earlier sequence.
        """
        equal = _equal_lanes(given, last, self._chunks.lane_dim)
        if equal.all():
            return True
        if equal.any():
            raise ArgumentError(
                f"state is the one that the call before returned in {int(equal.sum())} of "
                f"{equal.numel()} lanes: it must be so in all, or in none, which begins a "
                "sequence; lanes that begin one by one are for TBPTT, with "
                "TensorSequence(..., resets=...)"
            )
        if _equal_lanes(given, self._before, self._chunks.lane_dim).all():
            raise ArgumentError(
                "state is what the chunk before began with: a chunk is run once, by one call with "
                "a gradient (others under torch.no_grad()); call begin() to begin a sequence there"
            )
        if any(_equal_lanes(given, each, self._chunks.lane_dim).all() for each in self._earlier):
            raise ArgumentError(
                "state was returned by an earlier call, and another sequence has begun since: "
                "sequences that take turns, such as parts of a batch, need a Windowed(net, k2) each"
            )
        return False

    def __getattr__(self, name: str) -> Any:
        """What is not found here is the module's, such as `hidden_size`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins a sequence of its own."""
        own = ("_chunks", "_earlier", "_before")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._chunks = Chunks(self.module, *self._options)
        self._earlier, self._before = deque(maxlen=16), None


def _equal_lanes(given: Tree, last: Tree, lane_dim: int) -> Tensor:
    """In which lanes states are equal, in whatever memory and dtype; one answer for all, if simple.

    Whoever passes states on may have changed both. The very same tensors are not looked into.
    """
    pairs = list(zip(tensors_of(given), tensors_of(last), strict=False))
    shapes = [[tensor.shape for tensor in tensors_of(state)] for state in (given, last)]
    if given is None or shapes[0] != shapes[1]:
        return torch.tensor(False, device="cpu")
    if all(_is_the_very(*pair) for pair in pairs):
        return torch.tensor(True, device="cpu")
    return reduce(torch.logical_and, (_lanes(*pair, lane_dim) for pair in pairs))


def _is_the_very(theirs: Tensor, ours: Tensor) -> bool:
    at = address_of(theirs)
    return at != 0 and at == address_of(ours) and theirs.stride() == ours.stride()


def _lanes(theirs: Tensor, ours: Tensor, lane_dim: int) -> Tensor:
    equal = theirs.detach() == ours.to(theirs)
    return equal.movedim(lane_dim, 0).flatten(1).all(1) if equal.dim() > lane_dim else equal.all()


def _without_own_name(_: nn.Module, states: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [each for each in states if each.startswith(prefix + _INSIDE)]:
        states[prefix + name.removeprefix(prefix + _INSIDE)] = states.pop(name)


def _with_own_name(_: nn.Module, states: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [each for each in states if each.startswith(prefix)]:
        states[prefix + _INSIDE + name.removeprefix(prefix)] = states.pop(name)
