"""Pictures of a profile: what memory costs in time, and memory within one window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.profiling.report import (
    MemoryReport,
    StrategyReport,
    WindowTrace,
    are_in_turns,
    comparable_times,
)

# Okabe & Ito's palette, which people with any colour vision can tell apart; differences are
# in shape and line as well.
_BLUE, _ORANGE, _VERMILLION, _GREY, _BLACK = "#0072B2", "#E69F00", "#D55E00", "#999999", "#000000"
_MIB = 2**20
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "tbptt-ckpt",
}


def check_plots() -> None:
    """Raise `ArgumentError` where matplotlib is missing."""
    _pyplot()


def plot_front(report: StrategyReport, path: Path) -> None:
    """Peak memory against time for all rows, those on the Pareto front joined by a line.

    Args:
        report: What was measured.
        path: File to write, `.png` or `.svg`.

    Raises:
        ArgumentError: No matplotlib, or nothing to draw.
    """
    plt = _pyplot()
    rows = [row for row in report.rows if row.peak_bytes and row.seconds]
    if not rows:
        raise ArgumentError("there is nothing to draw: no row has both a peak and a time")
    times = dict(zip(map(id, rows), comparable_times(rows), strict=True))
    front = report.pareto_front[::-1]  # by time
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
        axes.plot(
            [times[id(row)] for row in front],
            [_mib(row.peak_bytes) for row in front],
            color=_BLUE,
            drawstyle="steps-post",
            linewidth=1.2,
            zorder=1,
            label="Pareto front",
        )
        for row in rows:
            _draw_point(axes, row, times[id(row)], on_front=row in front)
        _draw_predictions(axes, rows, times)
        _label(axes, rows, times)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(x=0.2, y=0.08)
        _plain_ticks(axes)
        in_turns = are_in_turns(rows)
        axes.set_xlabel(
            "time over plain BPTT" if in_turns else "time of a window and its update, s"
        )
        axes.set_ylabel("peak tensor memory, MiB")
        axes.grid(visible=True, which="major", color="#e5e5e5", linewidth=0.6, zorder=0)
        axes.legend(frameon=False, loc="best")
        _save(figure, path)


def plot_windows(report: StrategyReport, path: Path) -> None:
    """Memory over time within one window, a panel for each row that holds one.

    Args:
        report: What was measured, with traces.
        path: File to write, `.png` or `.svg`.

    Raises:
        ArgumentError: No matplotlib, or nothing to draw.
    """
    plt = _pyplot()
    rows = [row for row in report.rows if row.trace is not None]
    if not rows:
        raise ArgumentError("there is nothing to draw: no row holds a window in time")
    with plt.rc_context(_STYLE):
        num_columns = min(2, len(rows))
        num_rows = math.ceil(len(rows) / num_columns)
        figure, grid = plt.subplots(
            num_rows,
            num_columns,
            figsize=(3.9 * num_columns, 0.5 + 2.1 * num_rows),
            layout="constrained",
            squeeze=False,
        )
        panels = list(grid.flat)
        for axes, row in zip(panels, rows, strict=False):
            assert row.trace is not None, "chosen above"
            _draw_window(axes, row, row.trace)
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        figure.supxlabel("time in the window, ms, under the meter", fontsize=10)
        figure.supylabel("tensor memory, MiB", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        _save(figure, path)


def _draw_point(axes: Any, row: MemoryReport, time: float, *, on_front: bool) -> None:
    axes.scatter(
        [time],
        [_mib(row.peak_bytes)],
        marker="o" if on_front else "s",
        s=46 if on_front else 36,
        facecolor=_BLUE if on_front else "white",
        edgecolor=_BLUE if on_front else _GREY,
        linewidth=1.4,
        zorder=3,
    )


def _draw_predictions(axes: Any, rows: Sequence[MemoryReport], times: dict[int, float]) -> None:
    predicted = [row for row in rows if row.predicted_peak_bytes]
    if predicted:
        axes.scatter(
            [times[id(row)] for row in predicted],
            [_mib(row.predicted_peak_bytes) for row in predicted],
            marker="_",
            s=180,
            color=_VERMILLION,
            linewidth=1.4,
            zorder=4,
            label="predicted peak",
        )


def _label(axes: Any, rows: Sequence[MemoryReport], times: dict[int, float]) -> None:
    several = len({(row.k1, row.k2) for row in rows}) > 1
    for row in rows:
        name = f"{row.strategy} ({row.k1}, {row.k2})" if several else row.strategy
        if row.budget_bytes is not None:
            name += f" in {_mib(row.budget_bytes):.0f} MiB"
        axes.annotate(
            name,
            (times[id(row)], _mib(row.peak_bytes)),
            xytext=(7, 4),
            textcoords="offset points",
            fontsize=9,
        )


def _draw_window(axes: Any, row: MemoryReport, trace: WindowTrace) -> None:
    milliseconds = [1e3 * seconds for seconds, _ in trace.timeline]
    axes.fill_between(
        *_held(trace), step="post", color=_ORANGE, alpha=0.55, linewidth=0, label="held states"
    )
    if row.fixed_bytes is not None:
        axes.axhspan(0, _mib(row.fixed_bytes), color="#dddddd", linewidth=0, label="fixed")
    axes.plot(
        milliseconds,
        [_mib(live) for _, live in trace.timeline],
        drawstyle="steps-post",
        color=_BLUE,
        linewidth=0.7,
        label="measured",
    )
    predicted = [action for action in trace.actions if action.predicted_bytes is not None]
    for position, action in enumerate(predicted):
        axes.plot(
            [1e3 * action.began_seconds, 1e3 * action.ended_seconds],
            [_mib(action.predicted_bytes)] * 2,
            color=_BLACK,
            linewidth=1.3,
            label="predicted" if position == 0 else None,
        )
    axes.set_title(_window_title(row), loc="left")
    axes.set_ylim(0, None)
    axes.set_xlim(0, milliseconds[-1])


def _held(trace: WindowTrace) -> tuple[list[float], list[float]]:
    """What is live between actions, as a stair: (milliseconds, MiB)."""
    times = [1e3 * action.began_seconds for action in trace.actions]
    live = [_mib(action.live_bytes) for action in trace.actions]
    ends = [1e3 * action.ended_seconds for action in trace.actions[-1:]]
    return times + ends, live + live[-1:]


def _window_title(row: MemoryReport) -> str:
    assert row.peak_bytes is not None, "a window in time has a peak"
    return f"{row.strategy}: {_mib(row.peak_bytes):.1f} MiB"


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
    return num_bytes / _MIB


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        figure.savefig(path, metadata=metadata)
    finally:
        plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("agg")  # no window, whatever the machine's default is
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ArgumentError(
            "pictures need matplotlib, which is not installed: pip install 'tbptt-ckpt[plots]'"
        ) from error
    return plt
