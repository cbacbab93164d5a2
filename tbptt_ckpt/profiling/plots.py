"""Pictures: what memory costs in time, memory within one window, and how far back fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.profiling.figures import BLACK, BLUE, GREY, ORANGE, VERMILLION, mib, new_figure
from tbptt_ckpt.profiling.front import are_in_turns, comparable_times, pareto_front
from tbptt_ckpt.profiling.report import ActionSpan, MemoryReport

_STAIRS = {"color": BLUE, "drawstyle": "steps-post"}
_GRID = {"visible": True, "which": "major", "color": "#e5e5e5", "linewidth": 0.6, "zorder": 0}
_MOST_POINTS = 400  # of a line; what is denser is drawn as its envelope
_MOST_LABELLED = 60  # predicted peaks


def draw_front(reports: Sequence[MemoryReport], title: str, ax: Any = None) -> Any:
    """Peak memory against time for all rows, those on the Pareto front joined by a line."""
    rows = [row for row in reports if row.peak_bytes and row.seconds]
    if not rows:
        raise ArgumentError("there is nothing to draw: no row has both a peak and a time")
    times = {id(row): time for row, time in zip(rows, comparable_times(rows), strict=True)}
    with new_figure(figsize=(7.2, 4.6)) as make:
        axes = make().subplots() if ax is None else ax
        front = pareto_front(rows)[::-1]  # by time
        at = [times[id(row)] for row in front], [mib(row.peak_bytes) for row in front]
        axes.plot(*at, **_STAIRS, linewidth=1.2, zorder=1, label="nothing is faster and smaller")
        _draw_points(axes, rows, times, front)
        _draw_ranges(axes, rows, times)
        predicted = [row for row in rows if row.predicted_peak_bytes]
        if predicted:
            x = [times[id(row)] for row in predicted]
            y = [mib(row.predicted_peak_bytes) for row in predicted]
            style = {"marker": "_", "s": 180, "color": VERMILLION, "linewidth": 1.4}
            axes.scatter(x, y, **style, zorder=4, label="predicted peak")
        axes.set(xscale="log", yscale="log", ylabel="peak tensor memory, MiB")
        axes.margins(x=0.2, y=0.08)
        _plain_ticks(axes)
        seconds = "time of a window and its update, s"
        axes.set_xlabel("time over plain BPTT" if are_in_turns(rows) else seconds)
        axes.grid(**_GRID)
        axes.legend(frameon=False, loc="best")
        axes.set_title(title, loc="left", fontsize=9)
        return axes


def draw_windows(reports: Sequence[MemoryReport], title: str) -> Any:
    """Memory over time within one window, a panel for each row that holds one, on one scale."""
    rows = [row for row in reports if row.trace is not None]
    if not rows:
        raise ArgumentError("there is nothing to draw: no row holds a window in time")
    num_columns = min(2, len(rows))
    num_rows = math.ceil(len(rows) / num_columns)
    highest = max(mib(row.peak_bytes) for row in rows)
    with new_figure(figsize=(3.9 * num_columns, 1.1 + 2.1 * num_rows)) as make:
        figure = make()
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
        for axes, row in zip(grid.flat, rows, strict=False):
            _draw_window(axes, row, highest)
        for axes in list(grid.flat)[len(rows) :]:
            axes.set_visible(False)
        for axes in [*grid.flat][: len(rows)][-num_columns:]:
            axes.set_xlabel("ms in the window, under the meter")
        figure.supylabel("tensor memory, MiB", fontsize=10)
        known = {}
        for axes in grid.flat:
            handles, labels = axes.get_legend_handles_labels()
            known.update(dict(zip(labels, handles, strict=True)))
        where = {"loc": "outside lower center", "ncols": 3, "frameon": False}
        figure.legend(list(known.values()), list(known), **where)
        figure.suptitle(title, fontsize=9, x=0.02, ha="left")
        return figure


def draw_reaches(what: str, tables: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Any:
    """Peak memory and time against k2, a line for each budget, plain BPTT beside them.

    Args:
        what: What was planned.
        tables: Names of budgets, and rows as `tbptt-ckpt plan --json` prints them.
    """
    colours = (BLUE, VERMILLION, ORANGE, BLACK)
    marks = {None: "", 0: "o", 1: "^", 2: "s"}
    with new_figure(figsize=(7.2, 5.6)) as make:
        figure = make()
        above, below = figure.subplots(2, 1, sharex=True)
        plain = sorted({(r["k2"], r["retained_peak_bytes"]) for _, rows in tables for r in rows})
        style = {"color": GREY, "linestyle": "--", "label": "plain BPTT"}
        above.plot([k2 for k2, _ in plain], [mib(peak) for _, peak in plain], **style)
        for number, (name, rows) in enumerate(tables):
            colour = colours[number % len(colours)]
            line: dict[str, Any] = {"color": colour, "linewidth": 1.3}
            steps = [row["k2"] for row in rows]
            above.plot(steps, [mib(row["predicted_peak_bytes"]) for row in rows], **line)
            below.plot(steps, [row["over_retained"] for row in rows], **line, label=name)
            for row in (row for row in rows if row["longest_at_extra_forwards"] is not None):
                extra = row["longest_at_extra_forwards"]
                point = {"marker": marks[extra], "color": colour, "linestyle": ""}
                label = f"longest, {extra} extra forwards" if number == 0 else None
                below.plot([row["k2"]], [row["over_retained"]], **point, label=label)
        above.set(yscale="log", ylabel="peak tensor memory, MiB")
        below.set(ylabel="time over plain BPTT", xlabel="k2, steps an update reaches back")
        for axes in (above, below):
            axes.set_xscale("log")
            axes.grid(**_GRID)
            axes.legend(frameon=False)
        above.set_title(what, loc="left", fontsize=9)
        return figure


def _draw_points(
    axes: Any,
    rows: Sequence[MemoryReport],
    times: dict[int, float],
    front: Sequence[MemoryReport],
) -> None:
    several = len({(row.k1, row.k2) for row in rows}) > 1
    labelled = set[bool]()
    for row in rows:
        time, peak, is_best = times[id(row)], mib(row.peak_bytes), row in front
        style = {"marker": "s", "s": 36, "facecolor": "white", "edgecolor": GREY}
        label = "something is faster and smaller"
        if is_best:
            style = {"marker": "o", "s": 46, "facecolor": BLUE, "edgecolor": BLUE}
            label = "measured"
        style["label"] = None if is_best in labelled else label
        labelled.add(is_best)
        axes.scatter([time], [peak], **style, linewidth=1.4, zorder=3)
        name = f"{row.strategy} ({row.k1}, {row.k2})" if several else row.strategy
        if row.budget_bytes is not None and row.strategy in ("auto", "optimal"):
            name += f" in {mib(row.budget_bytes):.0f} MiB"
        offset = (7, 4) if is_best else (7, -12)
        beside = {"xytext": offset, "textcoords": "offset points", "zorder": 3.5}  # above points
        axes.annotate(name, (time, peak), **beside, fontsize=9)


def _draw_ranges(axes: Any, rows: Sequence[MemoryReport], times: dict[int, float]) -> None:
    """Lines from the fastest to the slowest repeat."""
    name = "ratio_range" if are_in_turns(rows) else "seconds_range"
    label: str | None = "fastest to slowest repeat"
    for row in rows:
        if (ends := getattr(row, name)) is not None:
            height = [mib(row.peak_bytes)] * 2
            axes.plot(ends, height, color=BLACK, linewidth=0.8, zorder=2, label=label)
            label = None


def _draw_window(axes: Any, row: MemoryReport, highest: float) -> None:
    trace = row.trace
    assert trace is not None, "rows without one are not drawn"
    held = [(1e3 * action.began_seconds, mib(action.live_bytes)) for action in trace.actions]
    held += [(1e3 * action.ended_seconds, mib(action.live_bytes)) for action in trace.actions[-1:]]
    shade = {"color": ORANGE, "alpha": 0.55, "linewidth": 0}
    axes.fill_between(*zip(*held, strict=True), step="post", **shade, label="there between actions")
    measured = [(1e3 * seconds, mib(live)) for seconds, live in trace.timeline]
    _draw_line(axes, measured)
    if row.fixed_bytes is not None:
        style = {"color": GREY, "linestyle": ":", "label": "whatever the schedule"}
        axes.axhline(mib(row.fixed_bytes), **style)
    _draw_predicted(axes, trace.actions)
    _draw_phases(axes, trace.actions, 1.12 * highest)
    axes.set_title(f"{row.strategy}: {mib(row.peak_bytes):.1f} MiB", loc="left")
    axes.set(xlim=(0, measured[-1][0]), ylim=(0, 1.16 * highest))


def _draw_line(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """What was live; where there are many points, between the least and the most of neighbours."""
    if len(points) <= _MOST_POINTS:
        axes.plot(*zip(*points, strict=True), **_STAIRS, linewidth=0.7, label="measured")
        return
    size = -(-len(points) // (_MOST_POINTS // 2))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    times = [part[0][0] for part in parts]
    low, high = ([f(live for _, live in part) for part in parts] for f in (min, max))
    axes.fill_between(times, low, high, step="post", color=BLUE, alpha=0.35, linewidth=0)
    axes.plot(times, high, **_STAIRS, linewidth=0.7, label="measured")


def _draw_predicted(axes: Any, actions: Sequence[ActionSpan]) -> None:
    known = [action for action in actions if action.predicted_bytes is not None]
    if len(known) > _MOST_LABELLED:
        times = [1e3 * action.began_seconds for action in known]
        peaks = [mib(action.predicted_bytes) for action in known]
        size = -(-len(known) // _MOST_LABELLED)
        starts = range(0, len(known), size)
        heights = [max(peaks[start : start + size]) for start in starts]
        style = {"drawstyle": "steps-post", "color": BLACK, "linewidth": 1.0}
        axes.plot([times[start] for start in starts], heights, **style, label="predicted peaks")
        return
    label: str | None = "predicted peaks"
    for action in known:
        times = [1e3 * action.began_seconds, 1e3 * action.ended_seconds]
        height = [mib(action.predicted_bytes)] * 2
        axes.plot(times, height, color=BLACK, linewidth=1.3, label=label)
        label = None


def _draw_phases(axes: Any, actions: Sequence[ActionSpan], top: float) -> None:
    """A strip that says what is done: steps advanced, or a leaf run and differentiated."""
    named = {"advance": ("advance, no graph", GREY), "differentiate": ("run a leaf", VERMILLION)}
    for kind, (label, colour) in named.items():
        spans = [
            (1e3 * a.began_seconds, 1e3 * (a.ended_seconds - a.began_seconds))
            for a in actions
            if a.kind == kind
        ]
        if spans:
            strip = (top - 0.05 * top, 0.05 * top)
            axes.broken_barh(spans, strip, color=colour, linewidth=0, label=label)


def _plain_ticks(axes: Any) -> None:
    """Numbers as people write them, on a logarithmic scale that spans less than a decade too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if high > 10 * low:
            axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        elif high > 2 * low:
            axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
        else:
            axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
