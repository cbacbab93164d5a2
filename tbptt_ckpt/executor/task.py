"""What one window is, for whoever runs it: its steps, its loss, what to note in passing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tbptt_ckpt.data.blocks import StepBlock, narrow_blocks
from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.trees import Tree, copy_containers, map_tensors, state_as_leaves, tensors_of


@dataclass(frozen=True, slots=True, eq=False)
class Boundary:
    """A detached state kept at a step, with the generators and buffers found there."""

    step: int
    state: Tree
    ambient: AmbientState
    _versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._state_versions())

    def copied(self) -> Boundary:
        """The same in memory of its own."""
        return Boundary(self.step, map_tensors(torch.clone, self.state), self.ambient)

    def check_untouched(self) -> None:
        """Raise if something wrote into the state since it was kept."""
        if self._versions != self._state_versions():
            raise TbpttError(
                f"the state kept at step {self.step} was modified in place, by the module or by "
                "whoever got it from a window; clone a state before writing into it"
            )

    def _state_versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in tensors_of(self.state))


def _ignore_arrival(step: int, state: Tree, ambient: AmbientState) -> None:
    """Note nothing."""


@dataclass(slots=True)
class WindowTask:
    """One window to run.

    The part that is differentiated is `[start, stop)`. The losses are those of
    `[loss_start, stop)`, and those before `start` are constants.

    Attributes:
        blocks: The steps, at least `[first, stop)`.
        first: First step that runs; smaller than `start` where new steps only advance.
        start: First step that is differentiated.
        stop: End of the window.
        loss_start: First step whose loss counts.
        ambient: The generators and buffers.
        stops_at: Steps in order at which runs are cut, the same under every strategy.
        ambients: Generators and buffers to restore when a run begins at a step.
        joints: Recorded states from which steps restart, whatever the steps before gave.
        resets: Lanes that begin a new sequence.
        wants_state_grads: Whether the gradient of the state at `start` is asked for.
        on_arrival: Called with each state in `stops_at`, or at `stop`, the first time a run
            ends there.
        executed_steps: Module steps run so far.
    """

    blocks: Sequence[StepBlock]
    first: int
    start: int
    stop: int
    loss_start: int
    ambient: Ambient
    stops_at: Sequence[int] = ()
    ambients: Mapping[int, AmbientState] = field(default_factory=dict)
    joints: Mapping[int, Boundary] = field(default_factory=dict)
    resets: Resets = field(default_factory=Resets)
    wants_state_grads: bool = True
    on_arrival: Callable[[int, Tree, AmbientState], None] = _ignore_arrival
    executed_steps: int = 0
    _arrived: set[int] = field(default_factory=set)

    def first_state(self, boundary: Boundary) -> Tree:
        """The state from which a leaf runs: new autograd leaves, where their gradient counts."""
        if boundary.step == self.start and not self.wants_state_grads:
            return copy_containers(boundary.state)
        return state_as_leaves(boundary.state)

    def pieces(self, start: int, stop: int, longest: int | None) -> Iterator[tuple[int, int]]:
        """Cut `[start, stop)` where states are noted, and into at most `longest` steps."""
        begin = start
        while begin < stop:
            position = bisect_right(self.stops_at, begin)
            end = self.stops_at[position] if position < len(self.stops_at) else stop
            end = min(end, stop, stop if longest is None else begin + longest)
            yield begin, end
            begin = end

    def enter(self, step: int) -> None:
        """Restore generators and buffers where a run begins at a recorded step."""
        recorded = self.ambients.get(step)
        if recorded is not None:
            self.ambient.restore(recorded)

    def arrive(self, step: int, state: Tree) -> None:
        """Note a state the first time a run ends at `step`."""
        if step in self._arrived or (step != self.stop and step not in self.stops_at):
            return
        self._arrived.add(step)
        self.on_arrival(step, state, self.ambient.capture())

    def steps(self, start: int, stop: int) -> Iterator[StepBlock]:
        """The steps `[start, stop)`, block by block."""
        return narrow_blocks(self.blocks, start, stop)


def has_loss(blocks: Sequence[StepBlock], start: int, stop: int) -> bool:
    """Whether any step in `[start, stop)` has a target that counts."""
    return any(block.has_loss() for block in narrow_blocks(blocks, start, stop))


def counted_weight(blocks: Sequence[StepBlock], start: int, stop: int) -> float:
    """The summed weight of a scalar loss over `[start, stop)`."""
    return sum(block.weight_sum() for block in narrow_blocks(blocks, start, stop))
