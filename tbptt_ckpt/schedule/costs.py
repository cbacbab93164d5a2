"""What a module costs in bytes and seconds: measured once, or written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tbptt_ckpt.arguments import Dimension, PositiveInt, Size, check_fields, checked
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.schedule.curves import Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedBytes:
    """Device memory that is there whatever the schedule.

    Attributes:
        weights: Parameters and buffers.
        gradients: Their `.grad`.
        optimizer: Its state, also where the first step has yet to make it.
        states: The window's first state, the incoming state gradient, the states kept for
            later windows.
        step_inputs: Inputs and targets, for each step of a window.
        other: Anything else that is live.
        libraries: What libraries keep of an accelerator's memory, such as cuBLAS's workspaces.
    """

    weights: Dimension = 0
    gradients: Dimension = 0
    optimizer: Dimension = 0
    states: Dimension = 0
    step_inputs: Size = 0.0
    other: Dimension = 0
    libraries: Dimension = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def total(self, window_steps: int) -> int:
        """All of it for a window of that many steps."""
        held = self.weights + self.gradients + self.optimizer + self.states + self.other
        held += self.libraries
        return held + math.ceil(self.step_inputs * window_steps)


@dataclass(frozen=True, slots=True)
class QuietBytes:
    """What steps without a loss take, which make no outputs and have none to differentiate.

    Attributes:
        leaf: Peak of a leaf of such steps.
        advance: Peak of one call in an advance.
        graph: What its graph holds, beside the leaf's later steps while they are differentiated;
            None where a leaf is run in one piece wherever its losses begin.
        joined: Peak of a leaf of so many steps while it is differentiated, where only the last
            has a loss: it is run in two pieces, and the gradients of the later one are held until
            those of the other are there to be added. None where `graph` is.
        last_joined: The same of a leaf before gradients exist, which become gradients: fixed bytes.
        irregular: What a leaf takes more, as `Costs.irregular_bytes` says it.
    """

    leaf: Curve
    advance: Curve
    graph: Curve | None = None
    joined: Curve | None = None
    last_joined: Curve | None = None
    irregular: Curve | None = None

    def before_losses(
        self, steps: int, num_losses: int, losses: Curve, *, makes_gradients: bool
    ) -> float:
        """Peak of a leaf of such steps, and then of some with a loss, whose leaves take `losses`.

        `makes_gradients`: whether none exist before.
        """
        if self.graph is None:
            added = losses(num_losses) - self.leaf(num_losses)
            return self.leaf(steps + num_losses) + max(0.0, added)
        joined = self.last_joined if makes_gradients else self.joined
        meeting = joined(steps + 1) if joined is not None else 0.0
        return max(self.graph(steps) + losses(num_losses), self.leaf(steps), meeting)

    def beyond_graph(self, steps: int) -> float:
        """Of a leaf's bytes, what is there beside its graph; 0 where pieces are not told apart."""
        return max(0.0, self.leaf(steps) - self.graph(steps)) if self.graph else 0.0

    def changed(self, change: Callable[[Curve], Curve]) -> QuietBytes:
        """The same for leaves that take other bytes."""
        curves = {name: getattr(self, name) for name in ("leaf", "graph", "joined", "last_joined")}
        return replace(self, **{name: curve and change(curve) for name, curve in curves.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a module costs.

    A leaf of L steps takes `leaf_bytes(L)` above the fixed part and the kept boundary
    states, and `leaf_seconds(L)` to run with a graph and differentiate. Advancing L steps in
    one call takes `advance_bytes(L)` and `advance_seconds(L)`. Where the first steps of a leaf
    or an advance have no loss, it takes less: see `leaf_peak` and `advance_peak`.

    Attributes:
        state_bytes: One boundary state, with the generators and buffers kept with it.
        leaf_bytes: Peak of one leaf.
        leaf_seconds: Time of one leaf.
        advance_bytes: Peak of one call in an advance.
        advance_seconds: Time of one call in an advance.
        last_leaf_bytes: Peak of the leaf that is last in time, which runs before gradients
            exist; None where it takes `leaf_bytes` too. Counted above the same fixed part,
            the gradients included.
        update_bytes: Peak of the update of the weights above the fixed part.
        fixed: What is there in any case.
        host_step_bytes: Host memory besides tensors for each step of a leaf.
        host_state_bytes: The same for each kept boundary state.
        ambient_bytes: Of `state_bytes`, the generators and buffers that steps change; they are
            also kept at each update point within reach.
        handed_on_bytes: What steps hand on unchanged in their state, as an encoder's memory is; it
            is kept once, and no part of `state_bytes`.
        kept_bytes: Of a kept state what is in memory, where the rest is in a file; leaves and
            advances then take the state that they begin with too, and leaves the time of writing
            and reading it. None where all is in memory.
        store_seconds: Of `leaf_seconds`, the time of writing a kept state elsewhere and reading it.
        quiet: What steps without a loss take; None where it is as much as with one.
        irregular_bytes: What a leaf takes more where so many of its steps are irregular: lanes
            begin a sequence, or a segment is cut; beside as long a piece as before. None where
            that is nothing.
        weighed_step_bytes: What each step of a leaf takes more where lanes are left out.
        metered_steps: The longest leaf whose bytes were measured; 0 where that is not known.
        block_steps: Leaves are whole blocks of so many steps where these fit, since a compiler made
            code for them; 1 where steps are run one by one.
    """

    state_bytes: Dimension
    leaf_bytes: Curve
    leaf_seconds: Curve
    advance_bytes: Curve
    advance_seconds: Curve
    last_leaf_bytes: Curve | None = None
    update_bytes: Dimension = 0
    fixed: FixedBytes = FixedBytes()
    host_step_bytes: Size = 0.0
    host_state_bytes: Size = 0.0
    ambient_bytes: Dimension = 0
    handed_on_bytes: Dimension = 0
    kept_bytes: Dimension | None = None
    store_seconds: Size = 0.0
    quiet: QuietBytes | None = None
    irregular_bytes: Curve | None = None
    weighed_step_bytes: float = 0.0
    metered_steps: Dimension = 0
    block_steps: PositiveInt = 1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def kept_state_bytes(self) -> int:
        """Memory of one state that a schedule keeps."""
        return self.state_bytes if self.kept_bytes is None else self.kept_bytes

    def leaf_peak(self, steps: int, num_losses: int, *, is_last: bool = False) -> int:
        """Peak of a leaf whose last steps have losses; `is_last`: the one that is last in time."""
        curve, without = self.leaf_curve(is_last=is_last), steps - num_losses
        if self.quiet is None or not without:
            return math.ceil(curve(steps))
        peak = self.quiet.leaf(steps)
        if num_losses:
            makes = is_last and self.last_leaf_bytes is not None
            peak = self.quiet.before_losses(without, num_losses, curve, makes_gradients=makes)
        return math.ceil(min(peak, curve(steps)))

    def advance_peak(self, steps: int, num_losses: int, most_steps: int) -> int:
        """Peak of an advance in calls of at most `most_steps`, whose last steps have a loss."""
        peak = self.advance_bytes(min(steps, most_steps))
        if self.quiet is not None and num_losses < steps:
            without = self.quiet.advance(min(steps - num_losses, most_steps))
            later = self.advance_bytes(min(num_losses, most_steps)) if num_losses else 0.0
            peak = min(peak, max(later, without))
        return math.ceil(peak)

    def most_bytes(self, steps: int) -> int:
        """More than any action of up to so many steps takes."""
        curves = [self.leaf_bytes, self.leaf_curve(is_last=True), self.advance_bytes]
        if self.quiet is not None:
            quiet = self.quiet
            curves += [quiet.leaf, quiet.graph or quiet.leaf, quiet.advance]
            curves += [curve for curve in (quiet.joined, quiet.last_joined) if curve is not None]
        return math.ceil(sum(curve(steps) for curve in curves)) + 1

    def leaf_curve(self, *, is_last: bool) -> Curve:
        """Bytes of a leaf whose steps all have losses."""
        return (self.last_leaf_bytes if is_last else None) or self.leaf_bytes

    def with_leaves(
        self, change: Callable[[Curve], Curve], change_last: Callable[[Curve], Curve]
    ) -> Costs:
        """Costs whose leaves take other bytes."""
        last, quiet = self.last_leaf_bytes, self.quiet
        return replace(
            self,
            leaf_bytes=change(self.leaf_bytes),
            last_leaf_bytes=last and change_last(last),
            quiet=quiet and quiet.changed(change),
        )

    def of_blocks(self) -> Costs:
        """The same of so many blocks in place of so many steps."""
        block = self.block_steps

        def change(curve: Curve) -> Curve:
            return curve.of_blocks(block)

        quiet = self.quiet and self.quiet.changed(change)
        return replace(
            self.with_leaves(change, change),
            leaf_seconds=change(self.leaf_seconds),
            advance_bytes=change(self.advance_bytes),
            advance_seconds=change(self.advance_seconds),
            quiet=quiet and replace(quiet, advance=change(quiet.advance)),
            block_steps=1,
        )

    @classmethod
    def linear(
        cls,
        *,
        state_bytes: int,
        step_bytes: float,
        leaf_bytes: float = 0.0,
        step_seconds: float = 1.0,
        call_seconds: float = 0.0,
        backward_ratio: float = 2.0,
    ) -> Costs:
        """Costs by hand: straight lines.

        Args:
            state_bytes: One boundary state.
            step_bytes: Each step of a leaf.
            leaf_bytes: A leaf in addition, whatever its length.
            step_seconds: Running one step without a graph.
            call_seconds: Each call in addition, of an advance or a leaf.
            backward_ratio: Time of differentiating a step over that of running it.
        """
        leaf_step_seconds = step_seconds * (1 + backward_ratio)
        return cls(
            state_bytes=state_bytes,
            leaf_bytes=Curve.linear(leaf_bytes, step_bytes),
            leaf_seconds=Curve.linear(call_seconds, leaf_step_seconds),
            advance_bytes=Curve.linear(0, 0),
            advance_seconds=Curve.linear(call_seconds, step_seconds),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    @checked
    def from_dict(cls, plain: Mapping[str, Any]) -> Costs:
        """The costs that `to_dict` wrote, also before steps without a loss were told apart.

        Raises:
            ArgumentError: Names that costs do not have, or that are missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(map(str, set(plain) - known))
        if unknown:
            raise ArgumentError(f"costs have no {', '.join(unknown)}; known: {sorted(known)}")
        try:
            return cls(**{name: _parsed(name, value) for name, value in plain.items()})
        except (AttributeError, TypeError, ValueError) as error:
            raise ArgumentError(f"costs cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Curve):
        return [list(point) for point in value.points]
    if isinstance(value, FixedBytes | QuietBytes):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _parsed(name: str, value: Any) -> Any:
    if name == "fixed":
        return FixedBytes(**value)
    if name == "quiet" and value is not None:
        return QuietBytes(**{part: _parsed(part, points) for part, points in value.items()})
    if isinstance(value, list | tuple):
        return Curve(tuple((int(steps), float(y)) for steps, y in value))
    return value
