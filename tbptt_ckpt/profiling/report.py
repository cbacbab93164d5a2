"""What profiling found of one configuration, as plain data: a `MemoryReport`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ArgumentError

OK = "ok"
OUT_OF_MEMORY = "out of memory"
OVER_BUDGET = "over budget"
FAILED = "failed"
STATUSES = (OK, OUT_OF_MEMORY, OVER_BUDGET, FAILED)


@dataclass(frozen=True, slots=True)
class ActionSpan:
    """One action of a schedule as it was run.

    Attributes:
        kind: "advance", "differentiate", "keep" or "drop".
        start: First step; for "keep" and "drop" the step whose state is meant.
        stop: End of the steps; equal to `start` for "keep" and "drop".
        began_seconds: When it began, from the window's begin.
        ended_seconds: When it ended.
        gradient_seconds: When a leaf's forward was done and its gradient began; None for
            other actions.
        live_bytes: Tensor bytes live when it began.
        peak_bytes: Most tensor bytes live while it was run.
        predicted_bytes: What the simulator gives for the peak; None without measured costs.
    """

    kind: str
    start: int
    stop: int
    began_seconds: float
    ended_seconds: float
    gradient_seconds: float | None
    live_bytes: int
    peak_bytes: int
    predicted_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class WindowTrace:
    """One window in time, under the meter, which slows it down.

    Attributes:
        seconds: Its length.
        timeline: (seconds from its begin, live tensor bytes), thinned, the peak among them.
            Each action's peak is in it, at the begin of its gradient or at its end.
        actions: Its schedule as it was run, in order.
    """

    seconds: float
    timeline: tuple[tuple[float, int], ...]
    actions: tuple[ActionSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """One window of one configuration: what it took and what was predicted.

    All tensor bytes are totals on the device: weights, gradients, optimizer state, inputs,
    boundary states and leaf. A figure that was not measured is None.

    Attributes:
        strategy: Its name.
        k1: Steps between updates.
        k2: Steps the gradient reaches back.
        overlap: "refresh" or "stale".
        executor: "replay" or "checkpoint".
        time_batching: "true", "fused", "mixed", "false" or "auto"; plain BPTT has "false".
        device: Where it ran.
        budget_bytes: The memory budget it was given, if any.
        status: "ok", "out of memory", "over budget" or "failed".
        message: Why it is not "ok".
        peak_bytes: Peak of tensor memory over one warm window and its update.
        peak_bytes_of_ranks: The same of every rank, by rank, where several measured side by side.
        fixed_bytes: Of these, what no schedule changes: weights, gradients, optimizer
            state, states carried over, the window's inputs and targets, what libraries keep.
        library_bytes: Of these, what libraries keep of an accelerator's memory, such as cuBLAS's
            workspaces: no tensor has it.
        predicted_peak_bytes: The same peak, computed from measured costs; None where there was
            no memory to measure these.
        reserved_peak_bytes: What the accelerator's allocator took from the driver.
        requested_peak_bytes: What tensors of the process asked for; `peak_bytes` of an accelerator
            are what its allocator made of that, and depend on what ran before.
        allocation_retries: How often it had to give its cache back and try again.
        rss_peak_bytes: Peak of the process's resident memory, with no meter running.
        rss_before_bytes: Resident memory with the model and data loaded.
        seconds: Median time of a warm window and its update, with no meter running.
        seconds_range: The fastest and the slowest of these windows.
        ratio: Median time over that of plain BPTT at the same k1 and k2.
        ratio_range: The least and the greatest ratio of neighbours, which were run in turns; None
            where plain BPTT ran before, as on an accelerator or where both are too large.
        window_steps: Steps of the window.
        executed_steps: Module steps it ran, recomputed ones included.
        held_states: Most boundary states kept at once.
        kept_state_bytes: What one of them takes of the memory that is measured, predicted.
        store_seconds: The time of writing one elsewhere and reading it again, measured apart; 0
            where they are kept where steps leave them.
        gradient_error: What keeping states in fewer bits changed in its gradient, over that
            gradient's norm; None where it keeps all, or memory was missing.
        longest_leaf: Steps of its longest leaf.
        form: How its steps were made, "plain", "batched", "fused", "mixed" or by the rule "auto".
        forms: Predicted seconds of each form that was weighed; None where no plan fits.
        trace: The window in time.
    """

    strategy: str
    k1: int
    k2: int
    overlap: str = "refresh"
    executor: str = "replay"
    time_batching: str = "auto"
    device: str = "cpu"
    budget_bytes: int | None = None
    status: str = OK
    message: str | None = None
    peak_bytes: int | None = None
    peak_bytes_of_ranks: tuple[int | None, ...] | None = None
    fixed_bytes: int | None = None
    library_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    requested_peak_bytes: int | None = None
    allocation_retries: int | None = None
    rss_peak_bytes: int | None = None
    rss_before_bytes: int | None = None
    seconds: float | None = None
    seconds_range: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    window_steps: int | None = None
    executed_steps: int | None = None
    held_states: int | None = None
    kept_state_bytes: int | None = None
    store_seconds: float | None = None
    gradient_error: float | None = None
    longest_leaf: int | None = None
    form: str | None = None
    forms: dict[str, float | None] = field(default_factory=dict)
    trace: WindowTrace | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ArgumentError(f"status={self.status!r} is not one of {', '.join(STATUSES)}")

    @property
    def is_ok(self) -> bool:
        """Whether the window ran."""
        return self.status == OK

    @property
    def executed_steps_per_step(self) -> float | None:
        """Module steps run for each step of the window; 1.0 where none runs twice."""
        if self.executed_steps is None or not self.window_steps:
            return None
        return self.executed_steps / self.window_steps

    @property
    def prediction_error(self) -> float | None:
        """Predicted peak over the measured one, minus 1."""
        if self.predicted_peak_bytes is None or not self.peak_bytes:
            return None
        return self.predicted_peak_bytes / self.peak_bytes - 1

    def to_dict(self, *, trace: bool = True) -> dict[str, Any]:
        """Plain data for JSON; derived figures are in it.

        Args:
            trace: Whether the window in time is wanted, by far the largest part.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trace"}
        for name in _TUPLES:
            plain[name] = None if plain[name] is None else list(plain[name])
        plain["executed_steps_per_step"] = self.executed_steps_per_step
        plain["prediction_error"] = self.prediction_error
        if trace:
            plain["trace"] = None if self.trace is None else asdict(self.trace)
        return plain

    @classmethod
    @checked
    def from_dict(cls, plain: Mapping[str, Any]) -> MemoryReport:
        """The report that `to_dict` wrote.

        Raises:
            ArgumentError: Something else.
        """
        given = {k: v for k, v in plain.items() if k not in _DERIVED}
        try:
            if given.get("trace") is not None:
                given["trace"] = _trace_from(given["trace"])
            for name in _TUPLES:
                if given.get(name) is not None:
                    given[name] = tuple(given[name])
            return cls(**given)
        except (TypeError, KeyError, ValueError) as error:
            raise ArgumentError(f"this is no memory report: {error}") from error

    def to_json(self, *, trace: bool = True) -> str:
        """The report as a JSON object."""
        return json.dumps(self.to_dict(trace=trace), allow_nan=False)

    @classmethod
    @checked
    def from_json(cls, text: str) -> MemoryReport:
        """The report that `to_json` wrote."""
        return cls.from_dict(json_object(text))


_TUPLES = ("seconds_range", "ratio_range", "peak_bytes_of_ranks")
_DERIVED = {"executed_steps_per_step", "prediction_error"}


def _trace_from(plain: Mapping[str, Any]) -> WindowTrace:
    return WindowTrace(
        seconds=float(plain["seconds"]),
        timeline=tuple((float(when), int(live)) for when, live in plain["timeline"]),
        actions=tuple(ActionSpan(**action) for action in plain["actions"]),
    )


def json_object(text: str) -> Mapping[str, Any]:
    """The object in a JSON text; `ArgumentError` for anything else."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"this is no JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ArgumentError(f"a report is a JSON object, not {type(plain).__name__}")
    return plain
