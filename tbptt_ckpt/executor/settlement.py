"""Settles what a difference between two runs of the same steps means, by running them again.

NOTE [A difference is a suspicion]
Two right forms of a step, or two ways to cut a segment, may differ by rounding, which a chaotic
state makes large. So the runs that differ are made once more: what is repeated bit by bit has
found no other world than before, and is held step by step, from identical states, where nothing
amplifies a difference, against one step's rounding. Kernels that are not deterministic differ
from run to run by as much each time; a module that counts, by more and more.

NOTE [How far back a graph reaches]
A step that takes an inner gradient through the history of its state repeats bit by bit, and gives
from a detached state in both forms the same. So does a segment module whose calls mix their steps.
So two steps of one call and graph are held against the same two with a cut in between, of the call
alone and of both; of the call alone where a window is one graph. The state at the cut lies in
memory as it does without one: a product of a part of a tensor may have other bits than the same
product of a copy, which lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NoReturn

from torch import Tensor

from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.causes import BUFFER, CALLS, FORM, HISTORY, KEPT_OUTSIDE, RANDOM
from tbptt_ckpt.executor.fingerprint import Fingerprint, read, same, step_difference
from tbptt_ckpt.executor.guard import Differentiating
from tbptt_ckpt.executor.noise import Noise, form, num_rare_runs, num_runs
from tbptt_ckpt.executor.observer import UNOBSERVED
from tbptt_ckpt.executor.sinks import LastOutput, LossSink
from tbptt_ckpt.executor.suspects import Reached, Suspect
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.trees import Tree, detach_state, map_tensors

_SETTLED_STEPS = 64


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run gave: the state at its end, also where a recorded one stands there, and more.

    `as_it_lies` is that state uncopied, a part of another tensor where the module gives one.
    """

    end: Boundary
    shown: Tree
    as_it_lies: Boundary

    @property
    def seen(self) -> tuple[Tree, Tree]:
        return self.end.state, self.shown


class Settlement:
    """Runs steps of a window again, from states that are `given`, as `links` say."""

    def __init__(
        self,
        *,
        window: WindowPass,
        given: Mapping[int, Boundary],
        links: Mapping[int, tuple[int, int]],
        reached: Mapping[int, Reached],
        print_seen: Callable[[int, tuple[Tree, Tree]], Fingerprint],
        in_graph: bool,
        in_half: bool,
        shows_all: bool = False,
    ) -> None:
        self._shows_all = shows_all and not in_graph  # outputs that have no loss too
        # What is run once more is neither told nor counted.
        self._window = replace(window, observer=UNOBSERVED, note=UNOBSERVED.arrives, calls=set())
        self._given, self._links, self._reached = given, links, reached
        self._print_seen, self._in_graph, self._in_half = print_seen, in_graph, in_half

    def settle(self, suspect: Suspect) -> None:
        """Find out what makes a leaf differ.

        Raises:
            ReplayMismatchError: It is not the run that it repeats.
        """
        self._run_again(suspect.stop, suspect)
        boundary = self._run_again(suspect.start, suspect)
        again = self._read(suspect.stop, self._run_leaf(boundary, suspect.stop))
        repeated = again.equals(suspect.reached.seen)
        self._judge(boundary, suspect.stop, suspect, repeated=repeated)

    def repeat(self, start: int, stop: int) -> None:
        """Run steps that were run in earlier windows too, twice."""
        edges = [start, *sorted(step for step in self._given if start < step < stop), stop]
        for begin, end in pairwise(edges):
            boundary = self._given[begin]
            both = [self._run(boundary, end, end - begin) for _ in range(2)]
            if not same(both[0].seen, both[1].seen):
                prints = [self._read(end, run) for run in both]
                digests = [run.end.ambient.digest() for run in both]
                before, reached = map(Reached, prints, digests)
                self._judge(boundary, end, Suspect(begin, end, before, reached), repeated=False)

    def look_back(self, start: int, stop: int) -> None:
        """Hold a few steps of one graph against the same with cuts in between."""
        boundary = self._given[start]
        whole = self._run_leaf(boundary, stop, graph_of_loss=False)
        cut = self._in_calls(boundary, stop, 1) if self._in_graph else whole
        state = boundary
        for step in () if self._in_graph else range(start + 1, stop + 1):
            cut = self._run_leaf(self._given.get(state.step, state), step, graph_of_loss=False)
            state = cut.as_it_lies
        if not same(whole.seen, cut.seen):
            both = Reached(self._read(stop, whole), whole.end.ambient.digest())
            self._judge(boundary, stop, Suspect(start, stop, both, both), repeated=True)

    def _run_again(self, step: int, suspect: Suspect) -> Boundary:
        """The state at a step, reached as before; what is not as before is judged."""
        path = [step]
        while path[-1] not in self._given:
            path.append(self._links[path[-1]][0])
        boundary = self._given[path.pop()]
        for stop in reversed(path):
            again = self._run(boundary, stop, self._links[stop][1])
            before = self._reached.get(stop)
            if before is not None and not self._read(stop, again).equals(before.seen):
                self._judge(boundary, stop, suspect, repeated=False)
            boundary = again.end
        return boundary

    def _judge(self, boundary: Boundary, stop: int, suspect: Suspect, *, repeated: bool) -> None:
        """Run steps from identical states until one shows that not only rounding differs."""
        noise, largest, start = Noise(), 0.0, boundary.step
        last = min(stop, start + _SETTLED_STEPS)
        for step in range(start, last):
            sought = not (repeated or noise.is_there)
            runs, by_chance = self._runs(boundary, last - start, repeated=repeated, sought=sought)
            if by_chance:
                noise.add([run.seen for run in runs])
            leaf = self._run_leaf(boundary, step + 1)
            pairs = [(runs[0].seen, runs[-1].seen, ""), (runs[0].end.state, leaf.end.state, FORM)]
            for one, other, cause in pairs:
                difference, is_rounding = self._difference(one, other, by_chance=by_chance)
                largest = max(largest, difference)
                if not is_rounding:
                    self._raise(step, step + 1, difference, suspect, runs, cause)
            if step + 2 <= stop:
                self._cut(boundary, suspect, runs)
            boundary = self._given.get(step + 1, runs[0].end)
        if noise.grows() or not (repeated or noise.is_there):
            self._raise(start, stop, largest, suspect, runs)

    def _runs(
        self, boundary: Boundary, num_steps: int, *, repeated: bool, sought: bool
    ) -> tuple[list[_Run], bool]:
        """Runs of one of so many steps, and whether any differ; more where noise is `sought`."""
        run = partial(self._run, boundary, boundary.step + 1, 1)
        runs = [run(), run()]
        if repeated and same(runs[0].seen, runs[1].seen):
            return runs, False
        runs += [run() for _ in range(num_runs(num_steps) - 2)]
        if not all(same(runs[0].seen, each.seen) for each in runs[1:]):
            return runs, True
        others = (run() for _ in range(num_rare_runs(num_steps) if sought else 0))
        rare = next((each for each in others if not same(runs[0].seen, each.seen)), None)
        return (runs, False) if rare is None else ([*runs, rare], True)

    def _cut(self, boundary: Boundary, suspect: Suspect, runs: list[_Run]) -> None:
        """Hold two steps of one call and graph against the same two with a cut between them."""
        step, stop, runner = boundary.step + 1, boundary.step + 2, self._window.runner
        whole = partial(self._run_leaf, boundary, stop, graph_of_loss=not self._in_graph)

        def in_two() -> _Run:  # from the beginning, where there may be noise too
            given = self._given.get(step)
            return self._run_leaf(given or self._run_leaf(boundary, step).as_it_lies, stop)

        pairs: list[tuple[Callable[[], _Run], Callable[[], _Run], str]] = []
        if not runner.recurrence.per_step:  # without a graph, for which there may be no room
            calls = [partial(self._in_calls, boundary, stop, steps) for steps in (1, 2)]
            pairs.append((calls[0], calls[1], CALLS))
        if not self._in_graph:
            pairs.append((in_two, whole, HISTORY))

        def draws() -> bool:
            return boundary.ambient.digest() != whole().end.ambient.digest()

        for cut, uncut, cause in pairs:
            difference, is_rounding = self._difference_of_forms(cut, uncut)
            # What a segment draws may depend on its length.
            is_rounding = is_rounding or (not runner.recurrence.per_step and draws())
            if not is_rounding:
                self._raise(boundary.step, stop, difference, suspect, runs, cause)

    def _difference_of_forms(
        self, cut: Callable[[], _Run], uncut: Callable[[], _Run]
    ) -> tuple[float, bool]:
        """How far two forms are apart, and whether rounding or chance explains it.

        Two runs of one form may be the same by chance, where noise is rare; so many are not.
        """
        one, other = cut().seen, uncut().seen
        difference, is_rounding = self._difference(one, other, by_chance=False)
        if same(one, other) or (is_rounding and not self._window.runner.promises_bits):
            return difference, True
        if all(same(one, cut().seen) and same(other, uncut().seen) for _ in range(num_runs(1))):
            return difference, False
        return self._difference(one, other, by_chance=True)

    def _difference(self, one: Tree, other: Tree, *, by_chance: bool) -> tuple[float, bool]:
        if form(one) != form(other):
            return float("inf"), False
        return step_difference(one, other, in_half=self._in_half, by_chance=by_chance)

    def _run(self, boundary: Boundary, stop: int, longest: int) -> _Run:
        """A run in the form of first runs."""
        if self._in_graph:
            return self._run_leaf(boundary, stop)
        return self._in_calls(boundary, stop, longest)

    def _in_calls(self, boundary: Boundary, stop: int, longest: int) -> _Run:
        """An advance in calls of at most so many steps, or a run in the graph of its window."""
        if self._in_graph:
            return self._run_leaf(boundary, stop, longest, graph_of_loss=False)
        sink = self._sink(stop, graph=False)
        state = self._window.reach(boundary, stop, longest, sink)
        return self._ended(stop, state, sink.take_seen())

    def _sink(self, stop: int, *, graph: bool) -> LossSink | LastOutput:
        if self._shows_all:
            return LastOutput(stop)
        return self._window.sink(graph=graph, looks_at=stop)

    def _run_leaf(
        self,
        boundary: Boundary,
        stop: int,
        longest: int | None = None,
        *,
        graph_of_loss: bool = True,
    ) -> _Run:
        """A run in one graph, in calls of at most `longest` steps; its outputs or loss are seen."""
        window = self._window
        window.ambient.restore(boundary.ambient)
        with Differentiating(window.guard, window.inputs, window.stop):
            sink = self._sink(stop, graph=graph_of_loss)
            state = window.first_state(boundary)
            state = window.run(boundary.step, stop, state, sink, longest)
            by_loss = self._in_graph and graph_of_loss
            return self._ended(stop, state, sink.tensors() if by_loss else sink.take_seen())

    def _ended(self, stop: int, state: Tree, shown: Tree) -> _Run:
        end = self._window.boundary(stop, state)
        return _Run(end, detach_state(shown), replace(end, state=map_tensors(Tensor.detach, state)))

    def _read(self, step: int, run: _Run) -> Fingerprint:
        return read([self._print_seen(step, run.seen)])[0]

    def _raise(
        self,
        start: int,
        stop: int,
        difference: float,
        suspect: Suspect,
        runs: list[_Run],
        cause: str = "",
    ) -> NoReturn:
        self._window.ambient.check_complete()  # a new buffer is the better explanation
        drawn = suspect.reached.generators != suspect.before.generators
        ambients = [run.end.ambient for run in runs]
        if drawn or ambients[0].digest() != ambients[-1].digest():
            cause = RANDOM
        elif not same(*([value.values for value in a.buffers] for a in ambients[:2])):
            cause = BUFFER
        by = f"by {difference:.1e} of its size" if difference else "from what its first run gave"
        raise ReplayMismatchError(
            f"steps [{start}, {stop}) ran again and reached another state, which differs {by}: "
            f"{cause or KEPT_OUTSIDE}; check_replays=False leaves replays unchecked",
            start=start,
            stop=stop,
            difference=difference,
        )
