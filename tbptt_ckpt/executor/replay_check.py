"""Holds what a replay reaches against what its first run reached.

Differences are suspicions: `settlement` finds out what they mean, once all leaves have been run.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tbptt_ckpt.errors import ReplayMismatchError, TbpttWarning
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.causes import KEPT_OUTSIDE
from tbptt_ckpt.executor.compared_states import STEPS_AT_FIRST, ComparedStates
from tbptt_ckpt.executor.fingerprint import Fingerprint, fingerprint, read
from tbptt_ckpt.executor.guard import GradientWatch
from tbptt_ckpt.executor.settlement import Settlement
from tbptt_ckpt.executor.suspects import Reached, Suspect
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.trees import Tree

_SETTLED_LEAVES = 4  # of a window, spread over those that differ
_LOOKED_BACK = 4  # steps whose graph is held against steps that are cut from each other
# How many were, of a module, where a window is one graph and where it is not.
_LOOKED_AT: dict[bool, WeakKeyDictionary[object, int]] = {
    in_graph: WeakKeyDictionary() for in_graph in (True, False)
}


class ReplayCheck:
    """Checks the replays of all windows of an engine.

    `in_graph` says that first runs and replays are one and the same, with a graph and cut alike,
    and that both evaluate the losses.
    """

    def __init__(self, *, in_graph: bool = False) -> None:
        self._in_graph = in_graph
        self._bits_hold = True  # as far as is known; else advances and leaves differ by rounding
        self._has_repeated = False
        self.compared = ComparedStates()
        self.gradients = GradientWatch()

    def of(self, window: WindowPass, first: Boundary) -> WindowCheck:
        """The check of one window that runs from `first`."""
        if not window.checks_replays:
            return UNCHECKED
        exact = self._bits_hold and (self._in_graph or window.runner.promises_bits)
        self.compared.begin_window()
        return WindowCheck(window, first, self, exact=exact, in_graph=self._in_graph)

    def rounding_differs(self) -> None:
        """Leaves and advances of this module are equal to rounding only."""
        self._bits_hold = False
        self.compared.compare_all()

    def must_repeat(self, window: WindowPass) -> bool:
        """Whether the overlap of a window of which nothing is compared is run twice, once."""
        due = not self._has_repeated and window.first < window.new_start
        self._has_repeated = self._has_repeated or due
        return due

    def must_look_back(self, window: WindowPass, longest_leaf: int) -> bool:
        """Whether it is seen, once for a module, if a step depends on how leaves are cut.

        A module of one step, in one graph, cannot.
        """
        recurrence, looked_at = window.runner.recurrence, _LOOKED_AT[self._in_graph]
        fits = window.has_room or longest_leaf >= _LOOKED_BACK
        known = looked_at.get(recurrence.module, 0)
        depends = not (self._in_graph and recurrence.per_step)
        if not (depends and fits and known < _LOOKED_BACK):
            return False
        looked_at[recurrence.module] = known + window.stop - window.first
        return True


class WindowCheck:
    """Checks the replays of one window.

    `exact` says that bits are promised, so that a sketch of the states is not needed.
    """

    def __init__(
        self,
        window: WindowPass,
        first: Boundary,
        checks: ReplayCheck,
        *,
        exact: bool,
        in_graph: bool,
    ) -> None:
        self._window, self._first, self._checks = window, first, checks
        self._exact, self._in_graph = exact, in_graph
        self._given = {**window.joints, first.step: first}
        # How each state was reached first, and what it was where that is to be compared.
        self._links: dict[int, tuple[int, int]] = {}
        self._reached: dict[int, Reached] = {}
        self._ambient: AmbientState | None = None  # what `_digest` is of
        self._digest = 0
        self._leaf_lengths: set[int] = set()
        self._replays = False  # whether steps run again within the window
        self._shown_at: int | None = None  # the one step whose output is compared
        self._suspects: list[Suspect] = []  # leaves that differ, or have not been read

    def looks_at(self, stop: int) -> int:
        """Where the output of a run up to `stop` is to be looked at; -1 for nowhere."""
        return stop if self._shown_at in (None, stop) and not self._in_graph else -1

    def advanced(self, start: int, reached: Boundary, longest: int, shown: Tree = None) -> None:
        """A state was reached from another, in calls of at most `longest` steps."""
        self._reaches(start, reached.step, longest, (reached.state, shown), reached.ambient)

    def ran(self, start: int, stop: int, state: Tree, shown: Tree) -> None:
        """The same in a run with a graph."""
        self._reaches(start, stop, stop - start, (state, shown), None)

    def replayed(self, start: int, stop: int, state: Tree, shown: Tree) -> None:
        """A leaf has been run with its graph."""
        self._leaf_lengths.add(stop - start)
        before = self._reached.get(stop)
        if before is None:
            return
        reached = self._print(stop, (state, shown))
        if not (before.seen.is_on_host and before.seen.is_near(reached)):
            digest = self._window.ambient.digest()
            self._suspects.append(Suspect(start, stop, before, Reached(reached, digest)))

    def settle(self) -> None:
        """All leaves have been run: find out what their differences mean.

        Raises:
            ReplayMismatchError: A replay that is not the run that it repeats.
        """
        window = self._window
        repeats = not self._reached and self._checks.must_repeat(window)
        if self._replays or window.first < window.new_start:
            window.inputs.check(window.first, window.stop)
        suspects = [each for each in self._read_suspects() if not each.is_near()]
        for suspect in suspects[:: -(-len(suspects) // _SETTLED_LEAVES) or 1]:
            self._settlement().settle(suspect)
            self._checks.rounding_differs()
        if repeats:
            self._settlement().repeat(self._first.step, window.new_start)
        if self._replays and self._checks.must_look_back(window, max(self._leaf_lengths)):
            stop = min(self._first.step + _LOOKED_BACK, window.stop)
            self._settlement(shows_all=True).look_back(self._first.step, stop)
        owner = window.runner.recurrence.module
        replays = self._replays and not window.borders.stops
        self._checks.gradients.look(window.guard.parameters, owner, replays=replays)

    def _reaches(
        self,
        start: int,
        step: int,
        longest: int,
        seen: tuple[Tree, Tree],
        ambient: AmbientState | None,
    ) -> None:
        if step in self._given or step in self._links:
            return
        self._links[step] = start, longest
        if step <= self._window.start:  # no leaf ends there
            return
        self._replays = True
        if self._checks.compared.takes(seen[0], step - start):
            if self._shown_at is None and seen[1] is not None:
                self._shown_at = step
            digest = self._digest_of(ambient)
            self._reached[step] = Reached(self._print(step, seen), digest)

    def _digest_of(self, ambient: AmbientState | None) -> int:
        """Where the generators stand, which are mostly where they stood."""
        if ambient is None:
            return self._window.ambient.digest()
        if ambient is not self._ambient:  # the same object where nothing was drawn
            self._ambient, self._digest = ambient, ambient.digest()
        return self._digest

    @cached_property
    def _in_half(self) -> bool:
        return self._window.runner.is_in_half(self._first.state)

    def _print(self, step: int, seen: tuple[Tree, Tree]) -> Fingerprint:
        """The fingerprint of a state, with what was shown at the same step if that counts."""
        state, shown = seen
        tree = (state, shown) if self._in_graph or step == self._shown_at else state
        if self._exact:
            return fingerprint(tree, sketched=False, in_half=False)
        return fingerprint(tree, sketched=True, in_half=self._in_half)

    def _read_suspects(self) -> list[Suspect]:
        pairs = [p for each in self._suspects for p in (each.before.seen, each.reached.seen)]
        prints = iter(read(pairs, self._window.numbers))
        return [each.with_prints(next(prints), next(prints)) for each in self._suspects]

    def _settlement(self, *, shows_all: bool = False) -> Settlement:
        prints = read([reached.seen for reached in self._reached.values()])
        known = zip(self._reached.items(), prints, strict=True)
        return Settlement(
            window=self._window,
            given=self._given,
            links=self._links,
            reached={step: replace(reached, seen=seen) for (step, reached), seen in known},
            print_seen=self._print,
            in_graph=self._in_graph,
            in_half=self._in_half,
            shows_all=shows_all,
        )


class _Nothing(WindowCheck):
    def __init__(self) -> None:
        pass

    def looks_at(self, stop: int) -> int:
        return -1

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    advanced = ran = replayed = settle = _ignore


class CheckInBackward(_Nothing):
    """Checks the replays of what a user differentiates: each as it comes, on a device all at last.

    Nothing is settled by running steps again. On the CPU, where equal runs are equal bit by bit,
    what differs by more than rounding is an error; elsewhere kernels may differ: a warning.
    """

    def __init__(self, window: WindowPass) -> None:
        self._window = window
        self._leaves: dict[int, int] = {}  # the one in so many steps that is looked at
        self._prints: dict[int, Fingerprint] = {}
        self._unread: list[tuple[int, int, Fingerprint]] = []

    def ran(self, start: int, stop: int, state: Tree, shown: Tree) -> None:
        """A leaf ran, whether for the first time or again."""
        if self._leaves.setdefault(stop // STEPS_AT_FIRST, stop) != stop:
            return
        in_half = self._window.runner.is_in_half(state)
        seen = fingerprint((state, shown), sketched=True, in_half=in_half)
        before = self._prints.setdefault(stop, seen)
        if not seen.is_on_host:
            self._unread += [] if before is seen else [(start, stop, seen)]
        elif not seen.is_near(before):
            raise ReplayMismatchError(
                f"{_differs(start, stop)}; check_replays=False leaves replays unchecked",
                start=start,
                stop=stop,
                difference=0.0,
            )

    def replayed(self, start: int, stop: int, state: Tree, shown: Tree) -> None:
        """The same where its graph is kept; the first steps are the last of a backward."""
        self.ran(start, stop, state, shown)
        if start == self._window.start and self._unread:
            self._read()

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        seen = read([*self._prints.values(), *(each[2] for each in unread)])
        self._prints = dict(zip(self._prints, seen, strict=False))
        pairs = zip(unread, seen[len(self._prints) :], strict=True)
        differ = [each for each, found in pairs if not found.is_near(self._prints[each[1]])]
        for start, stop, _ in differ[:1]:
            problem = f"{_differs(start, stop)}; or its kernels are not exact"
            warnings.warn(problem, TbpttWarning, stacklevel=2)


def _differs(start: int, stop: int) -> str:
    return f"steps [{start}, {stop}) ran again and gave something else: {KEPT_OUTSIDE}"


UNCHECKED = _Nothing()
