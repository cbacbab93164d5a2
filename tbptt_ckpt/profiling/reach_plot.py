"""The picture of a gradient's reach, and of what it costs to go that far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tbptt_ckpt.profiling.figures import BLACK, BLUE, GREY, ORANGE, VERMILLION, mib, new_figure
from tbptt_ckpt.profiling.measured_reach import MeasuredReach

_LEAST = 1e-12  # of what is drawn, relative to the largest


def draw_reach(
    what: str,
    measured: MeasuredReach,
    reaches: Sequence[tuple[float, int | None]],
    costs: Sequence[dict[str, Any]],
) -> Any:
    """Gradient and error against steps back, and below them, on the same axis, what a k2 costs.

    Args:
        what: What was measured.
        measured: The gradients of some windows.
        reaches: Tolerances, and the steps that are within each; None where it is not known.
        costs: Rows as `tbptt-ckpt explain --json` prints its settings, in order of `k2`.
    """
    with new_figure(figsize=(7.2, 5.6)) as make:
        figure = make()
        above, below = figure.subplots(2, 1, sharex=True)
        for number, decay in enumerate(measured.decays):
            known = [(b.steps_back, b.norm) for b in decay.borders if b.norm]
            errors = [(b.steps_back, b.error) for b in decay.borders if b.error]
            labels = ("norm of the state's gradient", "what is missing of the weights' gradient")
            for points, colour, label in zip((known, errors), (GREY, BLUE), labels, strict=True):
                _draw(above, points, color=colour, label=label if number == 0 else None)
        for tolerance, steps in reaches:
            style = {"color": VERMILLION, "linewidth": 0.8, "linestyle": ":"}
            above.axhline(tolerance, **style)
            if steps is not None:
                above.plot([steps], [tolerance], color=VERMILLION, marker="o", linestyle="")
                beside = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
                above.annotate(f"{steps:,} steps at {tolerance:g}", (steps, tolerance), **beside)
        above.set(yscale="log", ylabel="gradient, relative error")
        above.legend(frameon=False, loc="center right")
        above.set_title(what, loc="left", fontsize=9)
        _draw_costs(below, costs)
        below.set_xlabel("steps back, and k2")
        return figure


def _draw(axes: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    most = max((value for _, value in points), default=0.0)
    shown = [(steps, value) for steps, value in points if value > _LEAST * most]
    axes.plot([s for s, _ in shown], [value for _, value in shown], linewidth=1.3, **style)


def _draw_costs(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Peaks on the left, seconds of an update on the right."""
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    fits = [row for row in rows if row["predicted_peak_bytes"] is not None]
    every, steps = ([row["k2"] for row in some] for some in (rows, fits))
    plain = [mib(row["retained_peak_bytes"]) for row in rows]
    peaks = [mib(row["predicted_peak_bytes"]) for row in fits]
    seconds = [row["predicted_seconds"] for row in fits]
    lines = [
        *axes.plot(every, plain, color=GREY, linestyle="--", label="peak, plain BPTT"),
        *axes.plot(steps, peaks, color=BLACK, marker="s", label="peak"),
        *right.plot(steps, seconds, color=ORANGE, marker="^", label="time of an update"),
    ]
    for side, label in ((axes, "peak tensor memory, MiB"), (right, "time of an update, s")):
        side.set_ylabel(label)
        side.set_ylim(bottom=0)
    axes.legend(handles=lines, frameon=False, loc="upper left")
