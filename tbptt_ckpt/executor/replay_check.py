"""Holds what a replay reaches against what its first run reached, and settles what differs.

NOTE [A difference is a suspicion]
Two right forms of a step, or two ways to cut a segment, may differ by rounding, which a chaotic
state makes large. So the runs that differ are made once more: what is repeated bit by bit has
found no other world than before, and is held step by step, from identical states, where nothing
amplifies a difference, against one step's rounding. Kernels that are not deterministic differ
from run to run by as much each time; a module that counts, by more and more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NoReturn

from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.fingerprint import (
    Fingerprint,
    fingerprint,
    read,
    step_difference,
)
from tbptt_ckpt.executor.guard import differentiating
from tbptt_ckpt.executor.observer import UNOBSERVED
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.trees import Tree, tensors_of

_CHECKED_STEPS = 8  # one leaf in so many steps is checked, each where leaves are as long
_SETTLED_LEAVES = 4  # of a window, spread over those that differ
_SETTLED_STEPS = 64
_RUNS = 8  # of a step whose kernels may not be deterministic
# How much more the first and the last of these may differ than two in a row, where they differ by
# chance: of few numbers, and of many.
_GROWTH = (12.0, 4.0)


class ReplayCheck:
    """Checks the replays of all windows of an engine."""

    def __init__(self) -> None:
        self._bits_hold = True  # as far as is known; else advances and leaves differ by rounding
        self._has_repeated = False

    def of(self, window: WindowPass, first: Boundary) -> WindowCheck:
        """The check of one window that runs from `first`."""
        return WindowCheck(window, first, self, self._bits_hold and window.runner.promises_bits)

    def rounding_differs(self) -> None:
        """Leaves and advances of this module are equal to rounding only."""
        self._bits_hold = False

    def must_repeat(self, window: WindowPass) -> bool:
        """Whether the overlap of a window that replays nothing is run twice: once is enough."""
        due = not self._has_repeated and window.first < window.new_start
        self._has_repeated = self._has_repeated or due
        return due


class Unchecked(ReplayCheck):
    """Checks nothing."""

    def of(self, window: WindowPass, first: Boundary) -> WindowCheck:
        """One that does nothing."""
        return _NO_CHECK


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A leaf, what was reached at its end before, and what it reached."""

    start: int
    stop: int
    before: Fingerprint
    reached: Fingerprint
    generators: int


class WindowCheck:
    """Checks the replays of one window.

    `exact` says that bits are promised, so that a sketch of the states is not needed.
    """

    def __init__(
        self, window: WindowPass, first: Boundary, checks: ReplayCheck, exact: bool
    ) -> None:
        # What is run once more is neither told nor counted.
        self._window, self._checks = replace(window, observer=UNOBSERVED), checks
        self._exact = exact
        self._given = {**window.joints, first.step: first}
        self._first = first
        self._in_half = window.runner.is_in_half(first.state)
        # How each state was reached first, and what it was where that is to be compared.
        self._links: dict[int, tuple[int, int]] = {}
        self._reached: dict[int, Fingerprint] = {}
        self._generators: dict[int, int] = {}
        self._ambient, self._digest = first.ambient, first.ambient.digest()
        self._checked: set[int] = set()
        self._leaves: list[_Leaf] = []  # whose bits differ, or have not been read

    def advanced(self, start: int, reached: Boundary, longest: int) -> None:
        """A state was reached from another, in calls of at most `longest` steps."""
        step = reached.step
        part = (step - self._first.step) // _CHECKED_STEPS
        if step in self._given or self._links.setdefault(step, (start, longest))[0] != start:
            return
        if part not in self._checked:
            self._checked.add(part)
            self._reached[step] = self._print(reached.state)
            if reached.ambient is not self._ambient:  # the same object where nothing was drawn
                self._ambient, self._digest = reached.ambient, reached.ambient.digest()
            self._generators[step] = self._digest

    def replayed(self, start: int, stop: int, state: Tree) -> None:
        """A leaf has been run with its graph."""
        before = self._reached.get(stop)
        if before is None:
            return
        reached = self._print(state)
        if not (before.is_on_host and before.is_near(reached)):
            digest = self._window.ambient.digest()
            self._leaves.append(_Leaf(start, stop, before, reached, digest))

    def settle(self) -> None:
        """All leaves have been run: find out what their differences mean.

        Raises:
            ReplayMismatchError: A replay that is not the run that it repeats.
        """
        prints = iter(read([p for leaf in self._leaves for p in (leaf.before, leaf.reached)]))
        leaves = [replace(leaf, before=next(prints), reached=next(prints)) for leaf in self._leaves]
        suspects = [leaf for leaf in leaves if not leaf.reached.is_near(leaf.before)]
        if suspects:
            self._reached = dict(zip(self._reached, read([*self._reached.values()]), strict=True))
            for leaf in suspects[:: -(-len(suspects) // _SETTLED_LEAVES)]:
                self._settle(leaf)
            self._checks.rounding_differs()
        if not self._links and self._checks.must_repeat(self._window):
            self._repeat_overlap()

    def _settle(self, leaf: _Leaf) -> None:
        self._run_again(leaf.stop, leaf)
        boundary = self._run_again(leaf.start, leaf)
        again = self._read(self._run_leaf(boundary, leaf.stop))
        self._judge(boundary, leaf.stop, leaf, repeated=again.equals(leaf.reached))

    def _run_again(self, step: int, leaf: _Leaf) -> Boundary:
        """The state at a step, reached as before; what is not as before is judged."""
        path = [step]
        while path[-1] not in self._given:
            path.append(self._links[path[-1]][0])
        boundary = self._given[path.pop()]
        for stop in reversed(path):
            again = self._window.advance(boundary, stop, self._links[stop][1])
            before = self._reached.get(stop)
            if before is not None and not self._read(again.state).equals(before):
                self._judge(boundary, stop, leaf, repeated=False)
            boundary = again
        return boundary

    def _repeat_overlap(self) -> None:
        """Run the steps that were run in earlier windows too, twice."""
        window, first = self._window, self._first
        once, again = (window.advance(first, window.new_start, window.stop) for _ in range(2))
        before, reached = self._read(once.state), self._read(again.state)
        if not reached.equals(before):
            digest = again.ambient.digest()
            leaf = _Leaf(first.step, window.new_start, before, reached, digest)
            self._generators[window.new_start] = once.ambient.digest()
            self._judge(first, window.new_start, leaf, repeated=False)

    def _judge(self, boundary: Boundary, stop: int, leaf: _Leaf, *, repeated: bool) -> None:
        """Run steps from identical states until one shows that not only rounding differs."""
        window, noise, largest, start = self._window, _Noise(), 0.0, boundary.step
        for step in range(start, min(stop, start + _SETTLED_STEPS)):
            runs = [window.advance(boundary, step + 1, 1) for _ in range(2)]
            states = [run.state for run in runs]
            if not _same(*states):
                states += [window.advance(boundary, step + 1, 1).state for _ in range(_RUNS - 2)]
                noise.add(states)
            for other, cause in ((states[-1], ""), (self._run_leaf(boundary, step + 1), _FORM)):
                difference, is_rounding = step_difference(states[0], other, in_half=self._in_half)
                largest = max(largest, difference)
                if not is_rounding:
                    self._raise(step, step + 1, difference, leaf, runs, cause)
            boundary = runs[0]
        if noise.grows() or not (repeated or noise.is_there):
            self._raise(start, stop, largest, leaf, runs)

    def _run_leaf(self, boundary: Boundary, stop: int) -> Tree:
        window = self._window
        window.ambient.restore(boundary.ambient)
        with differentiating(window.guard, window.stop):
            state, sink = window.first_state(boundary), window.sink(graph=True)
            return window.run(boundary.step, stop, state, sink)

    def _print(self, state: Tree) -> Fingerprint:
        return fingerprint(state, sketched=not self._exact, in_half=self._in_half)

    def _read(self, state: Tree) -> Fingerprint:
        return read([self._print(state)])[0]

    def _raise(
        self,
        start: int,
        stop: int,
        difference: float,
        leaf: _Leaf,
        runs: list[Boundary],
        cause: str = "",
    ) -> NoReturn:
        self._window.ambient.check_complete()  # a new buffer is the better explanation
        drawn = leaf.generators != self._generators.get(leaf.stop, leaf.generators)
        if drawn or runs[0].ambient.digest() != runs[1].ambient.digest():
            cause = _RANDOM
        elif not _same(*([value.values for value in run.ambient.buffers] for run in runs)):
            cause = _BUFFER
        by = f"by {difference:.1e} of its size" if difference else "from what its first run gave"
        raise ReplayMismatchError(
            f"steps [{start}, {stop}) ran again and reached another state, which differs {by}: "
            f"{cause or _OTHER}; check_replays=False leaves replays unchecked",
            start=start,
            stop=stop,
            difference=difference,
        )


_RANDOM = (
    "a random generator stood elsewhere; another thread that draws from torch's generator while "
    "a window runs, or a module that draws depending on what is not in its state, must not"
)
_BUFFER = (
    "a buffer was changed in another way; a step may depend on its input, state, weights, buffers "
    "and torch's generators only"
)
_FORM = (
    "the module acts otherwise where a graph is recorded, or where outputs are needed; its state "
    "must depend on neither"
)
_OTHER = (
    "the module keeps something outside of its state, such as a counter or a tensor on self, or "
    "draws from a generator that is not found; put it into the state, or register it as a buffer"
)


@dataclass(slots=True)
class _Noise:
    """How much runs of one step differ, over the steps where they do."""

    is_there: bool = False
    _numbers: int = 0
    _in_a_row: float = 0.0
    _first_to_last: float = 0.0

    def add(self, states: list[Tree]) -> None:
        """Several runs of a step."""
        self.is_there = True
        self._numbers += sum(t.numel() for t in tensors_of(states[0]))
        in_a_row = [_squared_distance(a, b) for a, b in pairwise(states)]
        self._in_a_row += sum(in_a_row) / len(in_a_row)
        self._first_to_last += _squared_distance(states[0], states[-1])

    def grows(self) -> bool:
        """Whether runs differ the more the longer they are apart, which chance does not do."""
        return self._first_to_last > _GROWTH[self._numbers >= 64] * self._in_a_row


def _squared_distance(state: Tree, other: Tree) -> float:
    pairs = zip(tensors_of(state), tensors_of(other), strict=True)
    return sum(float((a.double() - b.double()).abs().square().sum()) for a, b in pairs)


def _same(state: Tree, other: Tree) -> bool:
    mine, its = read([fingerprint(s, sketched=False, in_half=False) for s in (state, other)])
    return mine.equals(its)


class _Nothing(WindowCheck):
    def __init__(self) -> None:
        pass

    def advanced(self, start: int, reached: Boundary, longest: int) -> None:
        pass

    def replayed(self, start: int, stop: int, state: Tree) -> None:
        pass

    def settle(self) -> None:
        pass


_NO_CHECK = _Nothing()
