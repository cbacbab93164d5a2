"""Pictures of a profile: what memory costs in time, and memory within one window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.profiling.report import MemoryReport, StrategyReport, are_in_turns, comparable_times

# Okabe & Ito's palette, which people with any colour vision can tell apart; differences are
# in shape and line as well.
_BLUE, _ORANGE, _VERMILLION, _GREY, _BLACK = "#0072B2", "#E69F00", "#D55E00", "#999999", "#000000"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "tbptt-ckpt",
}
_STAIRS = {"color": _BLUE, "drawstyle": "steps-post"}


def plot_front(report: StrategyReport, path: Path) -> None:
    """Peak memory against time for all rows, those on the Pareto front joined by a line.

    Raises:
        ArgumentError: No matplotlib, or nothing to draw.
    """
    rows = [row for row in report.rows if row.peak_bytes and row.seconds]
    if not rows:
        raise ArgumentError("there is nothing to draw: no row has both a peak and a time")
    times = {id(row): time for row, time in zip(rows, comparable_times(rows), strict=True)}
    front = report.pareto_front[::-1]  # by time
    predicted = [row for row in rows if row.predicted_peak_bytes]
    with _figure(path, figsize=(7.2, 4.2)) as (_, axes):
        x, y = [times[id(row)] for row in front], [_mib(row.peak_bytes) for row in front]
        axes.plot(x, y, **_STAIRS, linewidth=1.2, zorder=1, label="Pareto front")
        _draw_points(axes, rows, times, front)
        if predicted:
            x = [times[id(row)] for row in predicted]
            y = [_mib(row.predicted_peak_bytes) for row in predicted]
            style = {"marker": "_", "s": 180, "color": _VERMILLION, "linewidth": 1.4}
            axes.scatter(x, y, **style, zorder=4, label="predicted peak")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(x=0.2, y=0.08)
        _plain_ticks(axes)
        seconds = "time of a window and its update, s"
        axes.set_xlabel("time over plain BPTT" if are_in_turns(rows) else seconds)
        axes.set_ylabel("peak tensor memory, MiB")
        axes.grid(visible=True, which="major", color="#e5e5e5", linewidth=0.6, zorder=0)
        axes.legend(frameon=False, loc="best")


def plot_windows(report: StrategyReport, path: Path) -> None:
    """Memory over time within one window, a panel for each row that holds one.

    Raises:
        ArgumentError: No matplotlib, or nothing to draw.
    """
    rows = [row for row in report.rows if row.trace is not None]
    if not rows:
        raise ArgumentError("there is nothing to draw: no row holds a window in time")
    num_columns = min(2, len(rows))
    num_rows = math.ceil(len(rows) / num_columns)
    size = (3.9 * num_columns, 0.5 + 2.1 * num_rows)
    with _figure(path, num_rows, num_columns, figsize=size, squeeze=False) as (figure, grid):
        panels = list(grid.flat)
        for axes, row in zip(panels, rows, strict=False):
            _draw_window(axes, row)
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        figure.supxlabel("time in the window, ms, under the meter", fontsize=10)
        figure.supylabel("tensor memory, MiB", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)


def check_drawable(option: str, path: Path) -> None:
    """Raise `ArgumentError` unless pictures can be drawn into the file that an option names."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ArgumentError(f"{option} {path} must end in .png or .svg")
    pyplot()


def pyplot() -> Any:
    """Matplotlib's, or `ArgumentError` where it is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")  # no window, whatever the machine's default is
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ArgumentError(
            "pictures need matplotlib, which is not installed: pip install 'tbptt-ckpt[plots]'"
        ) from error
    return plt


@contextmanager
def _figure(path: Path, *shape: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes; what is drawn while the context is open is written at its end."""
    plt = pyplot()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(*shape, layout="constrained", **options)
        try:
            yield figure, axes
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(path, metadata=metadata)
        finally:
            plt.close(figure)


def _draw_points(
    axes: Any,
    rows: Sequence[MemoryReport],
    times: dict[int, float],
    front: Sequence[MemoryReport],
) -> None:
    several = len({(row.k1, row.k2) for row in rows}) > 1
    for row in rows:
        time, peak = times[id(row)], _mib(row.peak_bytes)
        style = {"marker": "s", "s": 36, "facecolor": "white", "edgecolor": _GREY}
        if row in front:
            style = {"marker": "o", "s": 46, "facecolor": _BLUE, "edgecolor": _BLUE}
        axes.scatter([time], [peak], **style, linewidth=1.4, zorder=3)
        name = f"{row.strategy} ({row.k1}, {row.k2})" if several else row.strategy
        if row.budget_bytes is not None:
            name += f" in {_mib(row.budget_bytes):.0f} MiB"
        beside = {"xytext": (7, 4), "textcoords": "offset points", "zorder": 3.5}  # above points
        axes.annotate(name, (time, peak), **beside, fontsize=9)


def _draw_window(axes: Any, row: MemoryReport) -> None:
    trace = row.trace
    assert trace is not None, "rows without one are not drawn"
    held = [(1e3 * action.began_seconds, _mib(action.live_bytes)) for action in trace.actions]
    held += [(1e3 * action.ended_seconds, _mib(action.live_bytes)) for action in trace.actions[-1:]]
    shade = {"color": _ORANGE, "alpha": 0.55, "linewidth": 0}
    axes.fill_between(*zip(*held, strict=True), step="post", **shade, label="held states")
    if row.fixed_bytes is not None:
        axes.axhspan(0, _mib(row.fixed_bytes), color="#dddddd", linewidth=0, label="fixed")
    measured = [(1e3 * seconds, _mib(live)) for seconds, live in trace.timeline]
    axes.plot(*zip(*measured, strict=True), **_STAIRS, linewidth=0.7, label="measured")
    label: str | None = "predicted"
    for action in trace.actions:
        if action.predicted_bytes is not None:
            times = [1e3 * action.began_seconds, 1e3 * action.ended_seconds]
            height = [_mib(action.predicted_bytes)] * 2
            axes.plot(times, height, color=_BLACK, linewidth=1.3, label=label)
            label = None
    axes.set_title(f"{row.strategy}: {_mib(row.peak_bytes):.1f} MiB", loc="left")
    axes.set_ylim(0, None)
    axes.set_xlim(0, measured[-1][0])


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


def _mib(num_bytes: int | None) -> float:
    assert num_bytes is not None, "only rows with this figure are drawn"
    return num_bytes / 2**20
