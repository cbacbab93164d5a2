"""Windows whose new steps come chunk by chunk, from a loop that has its own backward and update.

NOTE [What a chunk's window begins with]
A window begins at a state that the one before has left, as those of `TBPTT` do. Which one that is
must be known while the window before runs: the next chunk is taken to have as many steps as the
first, or those that are left where the length is known. A last chunk that is shorter than that
begins at the same state, so that its gradient reaches less far back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.records import Notes, Records
from tbptt_ckpt.engine.single_window import run_in_graph
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.cuts import CallCuts
from tbptt_ckpt.executor.guard import InputGuard, WeightGuard
from tbptt_ckpt.executor.runner import Runner, make_runner
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.host import Numbers
from tbptt_ckpt.module.recurrence import (
    check_differentiable,
    parameters_of,
    recognise,
    renormalised_in,
    time_of,
)
from tbptt_ckpt.module.trees import Tree, copy_containers, map_tensors, tensors_of
from tbptt_ckpt.schedule.strategies import AnyStrategy
from tbptt_ckpt.schedule.truncation import Draw
from tbptt_ckpt.schedule.windows import Window, window_at

_KEPT: Any = object()


@dataclass(slots=True)
class _Sequence:
    """What the chunks so far have left for the windows to come."""

    options: Options  # with k1, the steps of the first chunk
    ambient: Ambient
    init_state: Tree = None
    records: Records = field(default_factory=Records)
    blocks: list[StepBlock] = field(default_factory=list)
    guards: list[InputGuard] = field(default_factory=list)  # one for each
    stop: int = 0

    def begin_at(self, state: Tree) -> None:
        """Where the sequence begins, as windows from there read it from now on."""
        self.init_state = state

    def first(self, window: Window) -> Boundary:
        """What a window begins with."""
        if window.start:
            return self.records.boundaries[window.start]
        return Boundary(0, self.init_state, self.records.ambients[0])

    def leave(self, notes: Notes, block: StepBlock) -> None:
        """A window has run, whose new steps `block` are."""
        notes.hand_on()
        self.stop = block.stop
        # Read anew by windows that begin there: a leaf with its gradient, others have had theirs.
        self.init_state = map_tensors(lambda t: t if t.is_leaf else t.detach(), self.init_state)
        self.blocks.append(block)
        self.guards.append(InputGuard([block]))
        past = sum(each.stop <= notes.next_start for each in self.blocks)
        del self.blocks[:past], self.guards[:past]


class Chunks:
    """Runs a segment module over a sequence, chunk by chunk, each with the steps before it.

    Args:
        module: As for `TBPTT`, with `per_step=False`.
        k2: Steps that a gradient reaches back from the end of a chunk; None for all.
        strategy: As for `TBPTT`.
        time_dim: As for `unroll`.
        check_replays: As for `unroll`.
        recomputes_all: Whether nothing of a window is kept for its backward but where it begins,
            since the windows of many chunks wait for theirs.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        k2: int | None,
        strategy: AnyStrategy = "auto",
        time_dim: int | None = None,
        check_replays: bool = True,
        *,
        recomputes_all: bool = False,
    ) -> None:
        self._module, self._time_dim = module, time_dim
        self._options = Options(k1=1, k2=k2, strategy=strategy)
        self._checks_replays, self._recomputes_all = check_replays, recomputes_all
        self._recurrence = recognise(module, False, time_dim)
        self._runner: Runner | None = None
        self._cuts = CallCuts()
        self._sequence: _Sequence | None = None
        self._num_steps: int | None = None

    @property
    def last(self) -> Boundary | None:
        """The state that the last chunk ended with; None before the first."""
        return None if self._sequence is None else self._sequence.records.carried

    @property
    def lane_dim(self) -> int:
        """Where the tensors of a state have lanes."""
        return self._recurrence.lane_dim

    def begin(self, num_steps: int | None = None) -> None:
        """The next chunk is the first of a sequence, of `num_steps` if that is known."""
        self._sequence, self._num_steps = None, num_steps

    def run(self, inputs: Tree, init_state: Tree | None = _KEPT) -> tuple[Tree, Tree]:
        """The outputs of the next chunk and the state after it, with the graph of its window.

        `init_state` is where the sequence begins; what was given with the chunk before, if it is
        left out.

        Raises:
            ArgumentError: A chunk that cannot be the next one.
        """
        time_dim, recurrence = time_of(self._recurrence, self._time_dim, inputs)
        check_differentiable(self._module)
        given = TensorSequence(inputs, time_dim=time_dim)
        if self._runner is None or self._runner.recurrence != recurrence:
            self._runner = make_runner(recurrence, None)
        sequence = self._sequence or self._begun(given)
        if init_state is not _KEPT:
            sequence.begin_at(init_state)
        window = self._next_window(sequence, len(given))
        block = StepBlock(window.new_start, window.stop, given.inputs, given.inputs, None, time_dim)
        found, records = sequence.ambient.found(), sequence.records
        records.find_ambient(window.new_start, found)
        draw = Draw(window, window)
        notes = Notes(sequence.options, draw, self._num_steps, records, Numbers())
        this_pass = self._pass(sequence, window, block, notes)
        first = sequence.first(window)
        if window.start:
            first.check_untouched()
        sequence.ambient.restore(first.ambient)
        try:
            strategy, state = self._options.parsed_strategy(), copy_containers(first.state)
            outputs, state = run_in_graph(
                this_pass,
                strategy,
                state,
                check_replays=self._checks_replays,
                recomputes_all=self._recomputes_all,
            )
            self._cuts.check(this_pass, first, found, notes.left)
            sequence.ambient.check_complete()
            found = notes.left
        finally:
            sequence.ambient.restore(found)
        # What is in front of the module has been differentiated when these steps run again.
        kept = map_tensors(Tensor.detach, given.inputs)
        sequence.leave(notes, replace(block, inputs=kept, targets=kept))
        self._sequence = sequence
        return outputs, state

    def _begun(self, first: TensorSequence) -> _Sequence:
        tensors = tensors_of((parameters_of(self._module), first.inputs))
        ambient = Ambient([self._recurrence.module], tensors)
        return _Sequence(replace(self._options, k1=len(first)), ambient)

    def _next_window(self, sequence: _Sequence, num_new_steps: int) -> Window:
        """Where the chunk's window lies."""
        k1, k2, begin = sequence.options.k1, sequence.options.most_k2, sequence.stop
        if k2 is not None and k2 < num_new_steps:
            raise ArgumentError(
                f"k2={k2} must be at least the steps of a chunk, and inputs have {num_new_steps}"
            )
        if num_new_steps > k1 or begin % k1:
            raise ArgumentError(
                f"inputs have {num_new_steps} steps after a chunk of {begin % k1 or k1}: all "
                "chunks of a sequence have as many as its first, only the last may have fewer; a "
                "state of None begins another sequence"
            )
        if any(guard.written() for guard in sequence.guards):
            raise ArgumentError(
                "inputs of an earlier chunk have been written into, and their steps run again; "
                "give each chunk tensors of its own"
            )
        stop = begin + num_new_steps
        if self._num_steps is not None and stop > self._num_steps:
            raise ArgumentError(
                f"inputs go up to step {stop} of a sequence that was begun with "
                f"num_steps={self._num_steps}"
            )
        window = window_at(begin // k1, stop, k1, k2)
        return sequence.records.placed(window, must_be_recorded=True)

    def _pass(
        self, sequence: _Sequence, window: Window, block: StepBlock, notes: Notes
    ) -> WindowPass:
        assert self._runner is not None, "it was made before"
        ambients = sequence.records.ambients_for(window.start, sequence.options.k1)
        stops = {window.new_start, *notes.stops(), *sequence.ambient.changes(ambients)}
        return WindowPass(
            [*sequence.blocks, block],
            *(window.start, window.start, window.stop, window.new_start),
            sequence.ambient,
            self._runner,
            guard=WeightGuard(parameters_of(self._module), renormalised_in(self._module)),
            stops_at=sorted(step for step in stops if window.start < step < window.stop),
            ambients=ambients,
            note=notes.arrives,
            new_start=window.new_start,
            calls=sequence.records.calls,
        )
