"""From a few short segments to the costs of a module."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tbptt_ckpt.budget.irregular import more_bytes, weighed_step_bytes
from tbptt_ckpt.budget.kept_states import host_state_bytes, kept_bytes
from tbptt_ckpt.budget.lengths import Lengths, Limits
from tbptt_ckpt.budget.measuring import measuring, settled_bytes
from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.rests import Rest, with_rests
from tbptt_ckpt.budget.samples import JoinedBytes, Peaks, QuietSample, SegmentBytes, peaks_curve
from tbptt_ckpt.budget.stored_states import with_stored_states
from tbptt_ckpt.budget.update_bytes import UpdateBytes
from tbptt_ckpt.executor.storage import Storage
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.schedule.costs import Costs, FixedBytes, QuietBytes
from tbptt_ckpt.schedule.curves import Curve, bounding_curve, seconds_curve

_log = logging.getLogger("tbptt_ckpt")

_LONG_ADVANCE = 64  # what most advances are cut into
_HOST_STEPS = (2, 8, 21)  # lengths at which host memory is looked at
_BACKWARD_SHARE = 1.5  # bytes a step adds to a peak, over those of its graph, at most
_METERED_SHARE = 0.5  # of the time, for metering; the rest is for timing
_ROUNDS = 4  # of timing; what disturbs one length in a round spares it in another
_ASSUMED_HOST_STEP_BYTES = 24 * 1024  # a loop over cells, where the C library does not say


def calibrate(
    probe: SegmentProbe,
    limits: Limits,
    update: UpdateBytes,
    fixed: FixedBytes,
    storage: Storage = Storage(),  # noqa: B008 - frozen
) -> Costs:
    """Measure a module; gradients, generators and buffers are left as they were.

    Hooks on weights run, unless within a delivery. Of `fixed`, weights and inputs are known; the
    rest is filled in.
    """
    with measuring(probe) as (own, before):
        own.warm_up()
        samples = _Measuring(own, limits, time.perf_counter())
        samples.run()
        if samples.bytes[-1].steps > 1:  # one step shows nothing
            own.loss.learn_no_more()
        costs = samples.costs(kept_bytes(own.boundary, before, own.device), update, fixed)
        saved = storage.saved_bytes(own.boundary, own.boundary.handed_on(before))
    _log.info(samples.summary(costs))
    return with_stored_states(storage, costs, probe.device, saved)


@dataclass(slots=True)
class _Measuring:
    """Samples of growing length, as far as time and memory allow."""

    probe: SegmentProbe
    limits: Limits
    begun: float
    bytes: list[SegmentBytes] = field(default_factory=list)
    seconds: dict[int, tuple[float, float]] = field(default_factory=dict)  # least, of both kinds
    host: list[tuple[int, int | None]] = field(default_factory=list)
    spent: float = 0.0
    quiet: list[QuietSample] = field(default_factory=list)
    long_advances: dict[bool, tuple[int, int]] = field(default_factory=dict)
    lengths: Lengths = field(init=False)
    rests: list[Rest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths = Lengths(self.probe.runner.block_steps)

    def run(self) -> None:
        """Meter growing lengths, and time longer ones too."""
        for steps in self.lengths.metered:
            if steps > self.limits.max_steps or not self._may_meter(steps):
                break
            self._meter(steps)
        while (steps := self._longest_that_fits()) > self.bytes[-1].steps:
            self._meter(steps)
        # Curves bend where losses begin: longer segments have no more of them.
        asked = self.limits.leaf_steps
        for steps in (min(asked, self.probe.stop - self.probe.loss_start), asked):
            if steps > self.bytes[-1].steps and self._peak(steps) <= self.limits.room_bytes:
                self._meter(steps)
        self._meter_rests()
        self._meter_long_advance()
        # In rounds, from one step to the whole window, of which none depends on luck.
        lengths = self.lengths.timed(self.bytes[-1].steps, self.limits.max_steps)
        for number in range(_ROUNDS):
            for steps in lengths:
                if self._may_time(steps, is_first=number == 0):
                    self._time(steps)

    def _meter(self, steps: int) -> None:
        began = time.perf_counter()
        self.bytes.append(settled_bytes(self.probe, steps))
        if steps < self.probe.num_steps:
            self.quiet.append(self._quiet_bytes_of(self.bytes[-1]))
        if steps in _HOST_STEPS:
            self.host.append((steps, self.probe.host_bytes_of(self.bytes[-1])))
        self.spent = time.perf_counter() - began

    def _meter_rests(self) -> None:
        """Where steps run in blocks, what is left of one takes what they take one by one."""
        for steps in self.lengths.rests:
            if steps < self.probe.num_steps and self._peak(steps) <= self.limits.room_bytes:
                loud = self.probe.bytes_of(steps)
                self.rests.append((loud, self.probe.quiet_bytes_of(steps, joins=False)))

    def _quiet_bytes_of(self, sample: SegmentBytes) -> QuietSample:
        joins = sample.peak + sample.gradients <= self.limits.room_bytes
        quiet = self.probe.quiet_bytes_of(sample.steps, joins=joins)
        if joins or sample.steps == 1 or not self.probe.runner.calls_segments:
            return quiet
        return replace(quiet, joined=JoinedBytes.at_most(sample))

    def _longest_that_fits(self) -> int:
        """The longest leaf to meter between two of the usual lengths, where room ends there.

        Kernels may take more from some length on, and plans use every length that fits.
        """
        last = self.bytes[-1].steps
        usual = next((steps for steps in self.lengths.metered if steps > last), last)
        longest = min(usual - 1, self.limits.max_steps)
        while longest > last and not self._may_meter(longest):
            longest -= 1
        return longest

    def _meter_long_advance(self) -> None:
        """An advance may batch what short ones do not, and must not take more than foreseen."""
        steps = min(max(_LONG_ADVANCE, self.limits.advance_steps), self.probe.num_steps)
        longest = self.bytes[-1]
        per_step = (longest.advance + 3 * longest.graph) / longest.steps
        in_time = self._elapsed() + self.spent * steps / longest.steps / 2
        fits = in_time <= self.limits.max_seconds and per_step * steps <= self.limits.room_bytes
        if steps > longest.steps and (fits or steps <= self.limits.advance_steps):
            for has_losses in (True, False):
                taken = self.probe.advance_bytes_of(steps, has_losses=has_losses)
                self.long_advances[has_losses] = steps, taken

    def _time(self, steps: int) -> None:
        leaf, advance = self.probe.seconds_of(steps)
        least_leaf, least_advance = self.seconds.get(steps, (leaf, advance))
        self.seconds[steps] = min(leaf, least_leaf), min(advance, least_advance)

    def _may_meter(self, steps: int) -> bool:
        if steps == 1:
            return True
        ends = self._elapsed() + 1.7 * self.spent
        share = 1.0 if steps <= self.lengths.straight else _METERED_SHARE
        in_time = steps <= self.lengths.short or ends <= share * self.limits.max_seconds
        return in_time and self._peak(steps) <= self.limits.room_bytes

    def _may_time(self, steps: int, *, is_first: bool) -> bool:
        if steps > 1 and self._peak(steps) > self.limits.room_bytes:
            return False
        if is_first and steps <= self.lengths.short:
            return True
        known = steps if steps in self.seconds else max(self.seconds)
        seconds = sum(self.seconds[known]) * steps / known
        return self._elapsed() + 1.1 * seconds <= self.limits.max_seconds

    def _elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def _peak(self, steps: int) -> float:
        """What a longer segment may take: its graph grows, what a backward adds does not."""
        last = self.bytes[-1]
        if last.steps == 1 and not self.probe.runner.parts.are_one_call():
            return last.peak * float(steps) - self.probe.once_made_bytes() * (steps - 1)
        per_step = _BACKWARD_SHARE * last.graph / last.steps
        return last.peak + per_step * (steps - last.steps)

    def costs(self, kept: tuple[int, int, int], update: UpdateBytes, fixed: FixedBytes) -> Costs:
        """The samples as curves."""
        longest = self.bytes[-1]
        found = Costs(
            state_bytes=kept[0],
            leaf_bytes=self._peaks_curve((s.steps, s.leaf) for s in self.bytes),
            leaf_seconds=seconds_curve((steps, leaf) for steps, (leaf, _) in self.seconds.items()),
            advance_bytes=self._advance_curve(self.bytes, kept[0], has_losses=True),
            advance_seconds=seconds_curve((steps, at) for steps, (_, at) in self.seconds.items()),
            last_leaf_bytes=self._peaks_curve(
                (s.steps, s.last_leaf_beside_gradients) for s in self.bytes
            ),
            update_bytes=update.transient,
            fixed=replace(
                fixed,
                gradients=longest.gradients,
                optimizer=update.state,
                states=4 * kept[0] + longest.state_gradients,
            ),
            host_step_bytes=self._host_step_bytes(),
            host_state_bytes=host_state_bytes(self.probe.boundary),
            ambient_bytes=kept[1],
            handed_on_bytes=kept[2],
            quiet=self._quiet_bytes(kept[0]),
            irregular_bytes=self._irregular_bytes(self.bytes, has_losses=True),
            weighed_step_bytes=weighed_step_bytes(self.probe, self.bytes),
            metered_steps=longest.steps,
            block_steps=self.probe.runner.block_steps,
        )
        return with_rests(found, self.rests)

    def _irregular_bytes(
        self, samples: Sequence[SegmentBytes | QuietSample], *, has_losses: bool
    ) -> Curve | None:
        gradients, one = self.bytes[-1].gradients, self.bytes[0]
        room = self.limits.room_bytes - 2 * gradients
        of_a_piece = one.graph if self.probe.runner.calls_segments else 0  # cut at every step
        fitting = {
            sample.steps
            for sample in self.bytes
            if max(sample.peak, one.peak + (sample.steps - 1) * of_a_piece) <= room
        }
        return more_bytes(self.probe, samples, fitting, gradients, has_losses=has_losses)

    def _quiet_bytes(self, state_bytes: int) -> QuietBytes | None:
        """What steps without a loss take, where there was more than one step to measure it."""
        if not self.quiet:
            return None
        is_loop = not self.probe.runner.calls_segments  # its steps may be batched over time
        graph = self._bytes_curve((s.steps, s.graph) for s in self.quiet)
        joined = [(s.steps, s.joined) for s in self.quiet if s.joined is not None]
        if not joined and not is_loop:  # two pieces of one step did not fit
            joined = [(2, JoinedBytes.at_most(self.bytes[0]))]
        alone = (1, 0)  # in one piece
        return QuietBytes(
            leaf=self._peaks_curve((s.steps, s.leaf) for s in self.quiet),
            graph=None if is_loop else graph,
            advance=self._advance_curve(self.quiet, state_bytes, has_losses=False),
            joined=(joined and bounding_curve([alone, *((n, j.leaf) for n, j in joined)])) or None,
            last_joined=(joined and bounding_curve([alone, *((n, j.last_leaf) for n, j in joined)]))
            or None,
            irregular=self._irregular_bytes(self.quiet, has_losses=False),
        )

    def _peaks_curve(self, values: Iterable[tuple[int, Peaks]]) -> Curve:
        samples = list(values)
        if len(samples) == 1:
            return self._bytes_curve((steps, peaks.most) for steps, peaks in samples)
        return peaks_curve(samples)

    def _bytes_curve(self, values: Iterable[tuple[int, int]]) -> Curve:
        samples = list(values)
        if len(samples) == 1 and self.limits.max_steps > 1:
            # Two steps would not have fitted, and must not look as if they did.
            samples.append((2, 2 * max(samples[0][1], self.bytes[0].peak)))
        return bounding_curve(samples)

    def _advance_curve(
        self,
        samples: Sequence[SegmentBytes | QuietSample],
        state_bytes: int,
        *,
        has_losses: bool,
    ) -> Curve:
        # A call that follows another begins with a state of its own, beside the advance's first.
        beside = state_bytes if self.probe.runner.calls_segments else 0
        curve = self._bytes_curve((s.steps, s.advance + beside) for s in samples)
        if has_losses not in self.long_advances:
            return curve
        steps, taken = self.long_advances[has_losses]
        shorter = (point for point in curve.points if point[0] < steps)
        return Curve.through([*shorter, (steps, taken + beside)])

    def _host_step_bytes(self) -> float:
        known = [(steps, size) for steps, size in self.host if size is not None]
        if not known:
            return _ASSUMED_HOST_STEP_BYTES if self.probe.runner.recurrence.per_step else 0.0
        (short, low), (long, high) = ([(0, 0), *known])[-2:]
        return max(0.0, (high - low) / (long - short))

    def summary(self, costs: Costs) -> str:
        """What was done, in a line."""
        leaf = costs.leaf_bytes
        return (
            f"measured segments of 1 to {max(self.seconds)} steps in {self._elapsed():.2f} s: "
            f"a leaf takes {format_bytes(leaf(0))} + {format_bytes(leaf.slope)} per step, "
            f"a boundary state {format_bytes(costs.state_bytes)}, "
            f"a step {1e3 * costs.advance_seconds.slope:.3g} ms, "
            f"with its gradient {1e3 * costs.leaf_seconds.slope:.3g} ms"
        )
