"""Steps that make a leaf take more: lanes begin a sequence or are left out, segments are cut."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.samples import QuietSample, SegmentBytes
from tbptt_ckpt.budget.window_budget import Cuts, Request
from tbptt_ckpt.data.blocks import narrow_blocks
from tbptt_ckpt.schedule.actions import Differentiate
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import Curve, higher
from tbptt_ckpt.schedule.plan import Plan

_SEVERAL = 5  # cuts that are measured at once
_SURELY = 0.9  # of what shorter pieces spare: no measured length was cut in every way


class IrregularSteps:
    """How many irregular steps leaves of some length have, and how long their pieces are.

    Every irregular step takes more, and most where it cuts a leaf in two; but a segment that is
    cut is differentiated piece by piece, so that what the backward of a longer one would take is
    never needed. A leaf's first step cuts nothing, even where lanes begin: leaves of one step
    take no more in the most irregular window than the first one knew, and a budget that was
    accepted stays so.
    """

    def __init__(self) -> None:
        # By length: how often leaves are cut, and the longest piece of those that are cut so
        # often; leaves that another exceeds in both are left out.
        self._found: dict[int, dict[int, int]] = {}
        self._uncut = 0  # steps of the longest window that had none
        self._weighs = False

    def take(
        self, resets: Iterable[int], cuts: Iterable[int], window: tuple[int, int], *, weighs: bool
    ) -> bool:
        """Take in where a window's lanes begin sequences, and where else segments are cut.

        Args:
            resets: The steps at which lanes begin; segments are cut there too.
            cuts: The other cuts.
            window: Its first step and its end.
            weighs: Whether lanes are left out, or weigh otherwise from step to step.

        Returns:
            Whether some leaf may take more than any before.
        """
        (first, stop), inner = window, {*resets, *cuts}
        is_new = weighs and not self._weighs
        self._weighs |= weighs
        if not inner:
            is_new |= stop - first > self._uncut and bool(self._found)
            self._uncut = max(self._uncut, stop - first)
            return is_new
        at = np.array(sorted(inner))
        pieces = _Pieces([first, *sorted(inner - {first}), stop])
        for length in _lengths(stop - first):
            steps_run = min(length, stop - first)
            begins = np.arange(first, stop - steps_run + 1)
            ends = np.searchsorted(at, begins + steps_run - 1, "right")
            counts = ends - np.searchsorted(at, begins, "right")  # its first step cuts no leaf
            longest = pieces.longest(begins, steps_run)
            for count in np.unique(counts)[::-1]:
                is_new |= self._note(length, int(count), int(longest[counts == count].max()))
        return is_new

    def _note(self, length: int, count: int, piece: int) -> bool:
        """A leaf is cut so often and has so long a piece; whether that is new."""
        known = self._found.setdefault(length, {})
        if any(more >= count and longer >= piece for more, longer in known.items()):
            return False
        for more in [n for n, longest in known.items() if n <= count and longest <= piece]:
            del known[more]
        known[count] = piece
        return True

    def added(
        self,
        curve: Curve,
        more: Curve | None,
        spared: Callable[[int], float],
        weighed_step_bytes: float = 0.0,
    ) -> Curve:
        """Bytes of leaves that hold what takes most of what was found.

        Args:
            curve: Bytes of leaves without irregular steps.
            more: What so many cuts take, and a first step at which lanes begin and are left out;
                None for nothing.
            spared: Of a leaf's bytes, those that only its longest piece needs.
            weighed_step_bytes: What each step takes more where lanes are left out.
        """
        if more is None and not weighed_step_bytes:
            return curve
        lengths = sorted(self._found)
        begins = more(0) if more is not None else 0.0  # what any leaf's first step may take
        alone = (1, curve(1) + (weighed_step_bytes if more is None else begins))
        if self._weighs:
            curve = curve.plus(weighed_step_bytes)
        if more is None or not lengths:
            longer = {2, 3, *(steps for steps, _ in curve.points if steps > 1)}
            return Curve.through([alone, *((n, curve(n) + begins) for n in longer)])
        pieces = {piece for found in self._found.values() for piece in found.values()}
        after = {length + 1 for length in lengths[:-1]}  # up to the next one as much as there
        points = [alone]
        for steps in sorted({*lengths, *after, *pieces, *(steps for steps, _ in curve.points)}):
            found = self._found[next((n for n in lengths if n >= steps), lengths[-1])]
            taken = [begins] if steps <= self._uncut else []
            for most, piece in found.items():
                less = _SURELY * max(0.0, spared(steps) - spared(min(steps, piece)))
                taken.append(more(most) - less)
            if steps > 1:
                points.append((steps, curve(steps) + max(taken)))
        return Curve.through(points)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = [[length, [*map(list, most.items())]] for length, most in self._found.items()]
        return {"found": found, "uncut": self._uncut, "weighs": self._weighs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these."""
        self._found = {length: dict(most) for length, most in state["found"]}
        self._uncut, self._weighs = state["uncut"], state["weighs"]


class _Pieces:
    """The uncut pieces of a window, between `edges`."""

    def __init__(self, edges: list[int]) -> None:
        self._edges = np.array(edges)
        # The longest of 1, 2, 4, ... neighbours, by the first of them.
        self._rows = [np.diff(self._edges)]
        while (apart := 1 << (len(self._rows) - 1)) < len(self._rows[-1]):
            last = self._rows[-1]
            self._rows.append(np.maximum(last[:-apart], last[apart:]))

    def longest(self, begins: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The longest piece, or part of one, in leaves of a length that begin there."""
        edges, ends = self._edges, begins + length
        low, high = np.searchsorted(edges, begins), np.searchsorted(edges, ends, "right") - 1
        found = np.where(low > high, length, np.maximum(edges[low] - begins, ends - edges[high]))
        for power, row in enumerate(self._rows):  # whole pieces between the edges low and high
            fits = (high - low >= 1 << power) & (high - low < 2 << power)
            last = high[fits] - (1 << power)
            found[fits] = np.maximum(found[fits], np.maximum(row[low[fits]], row[last]))
        return found


def _lengths(longest: int) -> list[int]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... up to the first that is no less."""
    powers = range(longest.bit_length())
    grid = sorted({1, 2, 3, *(n << power for n in range(4, 8) for power in powers)})
    return grid[: bisect_left(grid, longest) + 1]


def cuts_within_leaves(plan: Plan, request: Request) -> Cuts:
    """Which cuts of segments leaves go on across; costs know the first loss of the last leaf."""
    leaves = [action for action in plan.schedule if isinstance(action, Differentiate)]
    known = request.window.stop, request.loss_start
    crossed = [
        cut
        for cut in request.cuts
        if any(leaf.start < cut < leaf.stop and (leaf.stop, cut) != known for leaf in leaves)
    ]
    if not crossed:
        return Cuts.NONE
    return Cuts.EARLY if max(crossed) <= request.loss_start else Cuts.ALL


def more_bytes(
    probe: SegmentProbe,
    samples: Sequence[SegmentBytes | QuietSample],
    fitting: Collection[int],
    gradients: int,
    *,
    has_losses: bool,
) -> Curve | None:
    """What cuts add to a leaf that still has as long a piece: `Costs.irregular_bytes`.

    The first one adds most, since gradients then meet. Leaves of the `fitting` lengths may be run,
    and those of one step, in which lanes begin and are left out, and nothing is cut.
    """
    if not probe.may_be_irregular:
        return None
    is_loop = not probe.runner.calls_segments
    resets = any(block.resets is not None for block in probe.blocks)
    weighs = any(block.weight is not None for block in probe.blocks)
    beyond = {s.steps: 0 if is_loop else s.leaf.most - s.graph for s in samples}

    def more(sample: SegmentBytes | QuietSample, num_resets: int) -> float:
        stop = probe.stop - (not has_losses)
        cut = list(narrow_blocks(probe.blocks, stop - sample.steps, probe.stop))
        if sample.steps == 1:
            cut = [block.leaving_out_lanes() for block in cut]
        if resets or sample.steps > 1:
            cut = [block.with_resets(stop - num_resets) for block in cut]
        such = replace(probe, blocks=cut, resets=probe.resets.of(cut))
        taken = (such.bytes_of if has_losses else such.quiet_bytes_of)(sample.steps).leaf.most
        share = min(1.0, num_resets / max(1, sample.steps - 1))
        return max(0.0, taken - sample.leaf.most + share * max(0, beyond[sample.steps] - beyond[1]))

    begins = more(samples[0], 1) if resets or weighs else 0.0
    if (block := probe.runner.block_steps) > 1:
        return Curve.linear(begins, _of_rests(samples, block))
    if samples[-1].steps < 2:
        return Curve(((0, begins),))
    cut = [s for s in samples if 1 < s.steps <= _SEVERAL and s.steps in fitting]
    if not cut:
        return Curve.linear(begins, gradients)
    shortest, several = cut[0], cut[-1]
    all_cut = more(shortest, shortest.steps)
    first = max(more(several, 1), all_cut)
    if several is shortest:
        return Curve.linear(begins, max(0, first - begins))
    last = first + max(0, more(several, several.steps) - all_cut)
    return Curve.through([(0, begins), (1, first), (1 + several.steps - shortest.steps, last)])


def _of_rests(samples: Sequence[SegmentBytes | QuietSample], block_steps: int) -> float:
    """What a cut adds at most to a leaf of blocks: the steps of one more run one by one."""
    first, *_, last = [s for s in samples if s.steps < block_steps] * 2
    longer = last.leaf.most - first.leaf.most if last is not first else last.leaf.most
    return block_steps * max(0, longer) / max(1, last.steps - first.steps)


def weighed_step_bytes(probe: SegmentProbe, samples: Sequence[SegmentBytes]) -> float:
    """What each step of a leaf takes more where lanes are left out, in which weights say so."""
    if all(block.weight is None for block in probe.blocks):
        return 0.0
    sample = [s for s in samples if s.steps <= _SEVERAL][-1]
    blocks = narrow_blocks(probe.blocks, probe.stop - sample.steps, probe.stop)
    such = replace(probe, blocks=[block.leaving_out_lanes() for block in blocks])
    return max(0, such.bytes_of(sample.steps).leaf.most - sample.leaf.most) / sample.steps


def cut_at_first_loss(costs: Costs, num_losses: int) -> Costs:
    """Costs of leaves that may be two segments, of which only the later one has losses."""
    quiet, last = costs.quiet, costs.last_leaf_bytes
    if quiet is None or quiet.graph is None:
        return costs
    if quiet.joined is not None:
        costs = replace(costs, leaf_bytes=higher(costs.leaf_bytes, quiet.joined))
    if last is None:
        return costs
    bends = {steps for curve in (quiet.leaf, quiet.graph) for steps, _ in curve.points if steps}
    whole = {n: last(n) for n in (num_losses, *(steps for steps, _ in last.points))}
    for steps in {n + num_losses for n in bends} | {n for n in whole if n > num_losses}:
        parts = quiet.before_losses(steps - num_losses, num_losses, last, makes_gradients=True)
        whole[steps] = max(last(steps), parts)
    return replace(costs, last_leaf_bytes=Curve.through(whole.items()))
