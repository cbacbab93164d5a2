"""Windows whose new steps come chunk by chunk, from a loop that has its own backward and update.

NOTE [What a chunk's window begins with]
A window begins at a state that the one before has left, as those of `TBPTT` do. Which one that is
must be known while the window before runs: the next chunk is taken to have as many steps as the
first, or those that are left where the length is known. A last chunk that is shorter than that
begins at the same state, so that its gradient reaches less far back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.single_window import over_time
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.checkpoint import CheckpointedSpans
from tbptt_ckpt.executor.cuts import CallCuts
from tbptt_ckpt.executor.guard import InputGuard, WeightGuard
from tbptt_ckpt.executor.replay_check import UNCHECKED, CheckInBackward
from tbptt_ckpt.executor.runner import Runner, make_runner
from tbptt_ckpt.executor.sinks import Sink
from tbptt_ckpt.executor.spans import parse_spans
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.recurrence import (
    check_differentiable,
    parameters_of,
    recognise,
    renormalised_in,
    time_of,
)
from tbptt_ckpt.module.trees import (
    Tree,
    copy_containers,
    detach_state,
    map_tensors,
    tensors_of,
)
from tbptt_ckpt.schedule.plan import plan_window
from tbptt_ckpt.schedule.strategies import AnyStrategy
from tbptt_ckpt.schedule.windows import Window, window_at


@dataclass(slots=True)
class _Sequence:
    """What the chunks so far have left for the windows to come."""

    k1: int  # steps of the first chunk
    ambient: Ambient
    states: dict[int, Boundary] = field(default_factory=dict)
    ambients: dict[int, AmbientState] = field(default_factory=dict)  # as new steps found them
    blocks: list[StepBlock] = field(default_factory=list)
    guards: list[InputGuard] = field(default_factory=list)  # one for each
    calls: set[tuple[int, int]] = field(default_factory=set)
    stop: int = 0

    def found(self, window: Window) -> dict[int, AmbientState]:
        """Generators and buffers that steps of a window find anew."""
        steps = [s for s in sorted(self.ambients) if s == window.start or s % self.k1 == 0]
        return {step: self.ambients[step] for step in steps}

    def leave(self, window: Window, next_start: int, noted: list[Boundary]) -> None:
        """A window has run."""
        self.stop = window.stop
        self.states |= {boundary.step: boundary for boundary in noted}
        if 0 in self.states:  # read anew, which for leaves is with their gradient
            first = self.states[0]
            state = map_tensors(lambda t: t if t.is_leaf else t.detach(), first.state)
            self.states[0] = Boundary(0, state, first.ambient)
        wanted = (next_start, window.stop)
        self.states = {step: each for step, each in self.states.items() if step in wanted}
        self.ambients = {step: each for step, each in self.ambients.items() if step >= next_start}
        self.calls = {call for call in self.calls if call[1] > next_start}
        past = sum(block.stop <= next_start for block in self.blocks)
        del self.blocks[:past], self.guards[:past]


class _NewOutputs(Sink):
    """Keeps the outputs of the steps from `start` on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self._start = start

    def wanted(self, begin: int, end: int) -> range:
        return range(max(begin, self._start), end)


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
        self._module, self._k2, self._time_dim = module, k2, time_dim
        self._strategy = Options(k1=1, k2=k2, strategy=strategy).parsed_strategy()
        self._checks_replays, self._recomputes_all = check_replays, recomputes_all
        self._recurrence = recognise(module, False, time_dim)
        self._runner: Runner | None = None
        self._cuts = CallCuts()
        self._sequence: _Sequence | None = None
        self._num_steps: int | None = None

    @property
    def last(self) -> Boundary | None:
        """The state that the last chunk ended with; None before the first."""
        return None if self._sequence is None else self._sequence.states[self._sequence.stop]

    @property
    def lane_dim(self) -> int:
        """Where the tensors of a state have lanes."""
        return self._recurrence.lane_dim

    def begin(self, num_steps: int | None = None) -> None:
        """The next chunk is the first of a sequence, of `num_steps` if that is known."""
        self._sequence, self._num_steps = None, num_steps

    def run(self, inputs: Tree, init_state: Tree) -> tuple[Tree, Tree]:
        """The outputs of the next chunk and the state after it, with the graph of its window.

        `init_state` is where the sequence begins; later chunks do not read it.

        Raises:
            ArgumentError: A chunk that cannot be the next one.
        """
        time_dim, recurrence = time_of(self._recurrence, self._time_dim, inputs)
        check_differentiable(self._module)
        given = TensorSequence(inputs, time_dim=time_dim)
        if self._runner is None or self._runner.recurrence != recurrence:
            self._runner = make_runner(recurrence, None)
        sequence = self._sequence
        if sequence is None:
            tensors = tensors_of((parameters_of(self._module), init_state, given.inputs))
            sequence = _Sequence(len(given), Ambient([recurrence.module], tensors))
        window = self._next_window(sequence, len(given))
        steps, time_dim = (window.new_start, window.stop), given.time_dim
        found = sequence.ambients[window.new_start] = sequence.ambient.found()
        if window.stop == sequence.k1:
            sequence.states[0] = Boundary(0, init_state, found)
        block = StepBlock(*steps, given.inputs, given.inputs, None, time_dim)
        next_start = self._next_start(sequence, window)
        noted: list[Boundary] = []
        this_pass = self._pass(sequence, window, block, next_start, noted)
        try:
            outputs, state = self._run(this_pass, sequence.states[window.start])
            first = sequence.states[window.start]
            self._cuts.check(this_pass, first, found, noted[-1].ambient)
            sequence.ambient.check_complete()
        except BaseException:
            sequence.ambient.restore(found)
            raise
        # What is in front of the module is differentiated before these steps run again.
        kept = map_tensors(Tensor.detach, given.inputs)
        sequence.blocks.append(StepBlock(*steps, kept, kept, None, time_dim))
        sequence.guards.append(InputGuard(sequence.blocks[-1:]))
        sequence.leave(window, next_start, noted)
        self._sequence = sequence
        return outputs, state

    def _next_window(self, sequence: _Sequence, num_new_steps: int) -> Window:
        """Where the chunk's window lies."""
        k1, k2, begin = sequence.k1, self._k2, sequence.stop
        if k2 is not None and k2 < num_new_steps:
            raise ArgumentError(
                f"k2={k2} must be at least the steps of a chunk, and inputs have {num_new_steps}"
            )
        if num_new_steps > k1 or begin % k1:
            before = begin % k1 or k1
            raise ArgumentError(
                f"inputs have {num_new_steps} steps after a chunk of {before}: all chunks of a "
                "sequence have as many as its first, only the last may have fewer; a state of "
                "None begins another sequence"
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
        earliest = 0 if k2 is None else max(0, stop - k2)
        start = min([step for step in sequence.states if step >= earliest], default=0)
        return Window(begin // k1, start, begin, stop)

    def _next_start(self, sequence: _Sequence, window: Window) -> int:
        """Where the next window begins, as far as that is known."""
        upcoming = window_at(window.index + 1, self._num_steps, sequence.k1, self._k2)
        return min(upcoming.start, window.stop)

    def _pass(
        self,
        sequence: _Sequence,
        window: Window,
        block: StepBlock,
        next_start: int,
        noted: list[Boundary],
    ) -> WindowPass:
        """The window's steps, at the ends of which states are `noted`."""
        assert self._runner is not None, "it was made before"
        ambients = sequence.found(window)
        cuts = {window.new_start, next_start, *sequence.ambient.changes(ambients)}

        def note(step: int, state: Tree, ambient: AmbientState) -> None:
            if step in (next_start, window.stop):
                noted.append(Boundary(step, detach_state(state), ambient))

        return WindowPass(
            [*sequence.blocks, block],
            *(window.start, window.start, window.stop, window.new_start),
            sequence.ambient,
            self._runner,
            guard=WeightGuard(parameters_of(self._module), renormalised_in(self._module)),
            stops_at=sorted(step for step in cuts if window.start < step < window.stop),
            ambients=ambients,
            note=note,
            new_start=window.new_start,
            calls=sequence.calls,
        )

    def _run(self, window: WindowPass, first: Boundary) -> tuple[Tree, Tree]:
        """The outputs of the new steps, and the last state."""
        first_run: list[Sink] | None = []

        def new_sink() -> Sink:
            sink = _NewOutputs(window.new_start)
            if first_run is not None:  # what recomputations make must not outlive them
                first_run.append(sink)
            return sink

        if first.step:
            first.check_untouched()
        window.ambient.restore(first.ambient)
        plan = plan_window(self._strategy, window.start, window.start, window.stop)
        check = CheckInBackward(window) if self._checks_replays else UNCHECKED
        spans = CheckpointedSpans(window, new_sink, check=check)
        tree = parse_spans(plan.schedule, window.start, window.stop)
        run = spans.run_again_as_a_whole if self._recomputes_all else spans.run
        collected, state = run(tree, copy_containers(first.state))
        frame = next(sink.outputs[0] for sink in first_run if sink.outputs)
        first_run = None
        return over_time(collected, frame, False, window.blocks[-1].time_dim), state
