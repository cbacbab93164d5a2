"""Windows in time as a trace that chrome://tracing and ui.perfetto.dev open.

The JSON object form of the trace-event format: `M` events name tracks, `X` events are spans
with a begin and a duration in microseconds, `C` events are counters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tbptt_ckpt.profiling.report import ActionSpan, MemoryReport

_TRACKS = ("window", "schedule", "passes over steps")  # of one configuration
_WINDOW, _SCHEDULE, _PASSES = range(3)
_ARGUMENTS = ("start", "stop", "live_bytes", "peak_bytes", "predicted_bytes")


def trace_json(rows: Iterable[MemoryReport]) -> str:
    """The trace of all rows that hold a window in time, as JSON.

    Every row is a process of its own with three tracks: the window; its schedule, one span
    for each action; and what was done to steps: `advance` without a graph, `first run` or
    `replay` of a leaf with its graph, and `differentiate`. Beside them is a counter of live
    tensor bytes, and one of the bytes that were predicted, where costs were measured.
    """
    traced = [row for row in rows if row.trace is not None]
    events = [{**event, "pid": pid} for pid, row in enumerate(traced, 1) for event in _events(row)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)


def _events(row: MemoryReport) -> Iterator[dict[str, Any]]:
    """The events of one row, without the number of its process."""
    assert row.trace is not None, "rows without a window in time are left out"
    process = ("process_name", 0, f"{row.strategy}, k1={row.k1}, k2={row.k2}")
    for kind, track, name in (process, *(("thread_name", *track) for track in enumerate(_TRACKS))):
        yield {"name": kind, "ph": "M", "tid": track, "args": {"name": name}}
    yield _span("window", "window", _WINDOW, 0.0, row.trace.seconds)
    for action in row.trace.actions:
        held = action.start == action.stop
        steps = f"{action.start}" if held else f"[{action.start}, {action.stop})"
        arguments = {name: getattr(action, name) for name in _ARGUMENTS}
        began, ended = action.began_seconds, action.ended_seconds
        yield _span(f"{action.kind} {steps}", "action", _SCHEDULE, began, ended, args=arguments)
    yield from _passes(row.trace.actions)
    for seconds, live_bytes in row.trace.timeline:
        yield _counter("tensor memory", seconds, live_bytes)
    for action in row.trace.actions:
        if action.predicted_bytes is not None:
            yield _counter("predicted", action.began_seconds, action.predicted_bytes)


def _passes(actions: Iterable[ActionSpan]) -> Iterator[dict[str, Any]]:
    reached = -1
    for action in actions:
        began, ended = action.began_seconds, action.ended_seconds
        if action.kind == "advance":
            yield _span("advance", "pass", _PASSES, began, ended)
        elif action.kind == "differentiate":
            middle = ended if action.gradient_seconds is None else action.gradient_seconds
            name = "replay" if action.stop <= reached else "first run"
            yield _span(name, "pass", _PASSES, began, middle)
            yield _span("differentiate", "pass", _PASSES, middle, ended)
        if action.stop > action.start:
            reached = max(reached, action.stop)


def _span(
    name: str, category: str, track: int, began: float, ended: float, **arguments: Any
) -> dict[str, Any]:
    begin = _micros(began)
    times = {"ts": begin, "dur": round(_micros(ended) - begin, 3)}
    return {"name": name, "ph": "X", "tid": track, "cat": category, **times, **arguments}


def _counter(name: str, seconds: float, num_bytes: int) -> dict[str, Any]:
    return {"name": name, "ph": "C", "tid": 0, "ts": _micros(seconds), "args": {"bytes": num_bytes}}


def _micros(seconds: float) -> float:
    """Microseconds, to the nanosecond; a clock that steps back a hair gives no negative time."""
    return max(0.0, round(seconds * 1e6, 3))
