"""Windows in time as a trace that chrome://tracing and ui.perfetto.dev open.

The JSON object form of the trace-event format: `M` events name tracks, `X` events are spans
with a begin and a duration in microseconds, `C` events are counters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tbptt_ckpt.profiling.report import ActionSpan, MemoryReport, WindowTrace

_WINDOW, _SCHEDULE, _PASSES = 0, 1, 2  # tracks of one configuration
_TRACKS = {_WINDOW: "window", _SCHEDULE: "schedule", _PASSES: "passes over steps"}


def trace_json(rows: Iterable[MemoryReport]) -> str:
    """The trace of all rows that hold a window in time, as JSON.

    Every row is a process of its own with three tracks: the window; its schedule, one span
    for each action; and what was done to steps: `advance` without a graph, `first run` or
    `replay` of a leaf with its graph, and `differentiate`. Beside them is a counter of live
    tensor bytes, and one of the bytes that were predicted, where costs were measured.
    """
    traced = [row for row in rows if row.trace is not None]
    events = [event for pid, row in enumerate(traced, 1) for event in row_events(row, pid)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)


def row_events(row: MemoryReport, pid: int) -> Iterator[dict[str, Any]]:
    """The events of one row, under a process number of its own."""
    assert row.trace is not None, "rows without a window in time are left out"
    yield _named("process_name", pid, 0, f"{row.strategy}, k1={row.k1}, k2={row.k2}")
    for track, name in _TRACKS.items():
        yield _named("thread_name", pid, track, name)
    yield _span("window", "window", pid, _WINDOW, 0.0, row.trace.seconds)
    for action in row.trace.actions:
        yield _action(action, pid)
    yield from _passes(row.trace, pid)
    yield from _counters(row.trace, pid)


def _action(action: ActionSpan, pid: int) -> dict[str, Any]:
    held = action.start == action.stop
    steps = f"{action.start}" if held else f"[{action.start}, {action.stop})"
    arguments = {
        "start": action.start,
        "stop": action.stop,
        "live_bytes": action.live_bytes,
        "peak_bytes": action.peak_bytes,
        "predicted_bytes": action.predicted_bytes,
    }
    began, ended = action.began_seconds, action.ended_seconds
    name = f"{action.kind} {steps}"
    return _span(name, "action", pid, _SCHEDULE, began, ended, args=arguments)


def _passes(trace: WindowTrace, pid: int) -> Iterator[dict[str, Any]]:
    reached = -1
    for action in trace.actions:
        began, ended = action.began_seconds, action.ended_seconds
        if action.kind == "advance":
            yield _span("advance", "pass", pid, _PASSES, began, ended)
        elif action.kind == "differentiate":
            middle = ended if action.gradient_seconds is None else action.gradient_seconds
            name = "replay" if action.stop <= reached else "first run"
            yield _span(name, "pass", pid, _PASSES, began, middle)
            yield _span("differentiate", "pass", pid, _PASSES, middle, ended)
        if action.stop > action.start:
            reached = max(reached, action.stop)


def _counters(trace: WindowTrace, pid: int) -> Iterator[dict[str, Any]]:
    for seconds, live_bytes in trace.timeline:
        yield _counter("tensor memory", pid, seconds, live_bytes)
    for action in trace.actions:
        if action.predicted_bytes is not None:
            yield _counter("predicted", pid, action.began_seconds, action.predicted_bytes)


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return _event("M", kind, pid, tid, args={"name": name})


def _span(
    name: str, category: str, pid: int, tid: int, began: float, ended: float, **arguments: Any
) -> dict[str, Any]:
    begin = _micros(began)
    duration = round(_micros(ended) - begin, 3)
    return _event("X", name, pid, tid, cat=category, ts=begin, dur=duration, **arguments)


def _counter(name: str, pid: int, seconds: float, num_bytes: int) -> dict[str, Any]:
    return _event("C", name, pid, 0, ts=_micros(seconds), args={"bytes": num_bytes})


def _event(phase: str, name: str, pid: int, tid: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "ph": phase, "pid": pid, "tid": tid, **more}


def _micros(seconds: float) -> float:
    """Microseconds, to the nanosecond; a clock that steps back a hair gives no negative time."""
    return max(0.0, round(seconds * 1e6, 3))
