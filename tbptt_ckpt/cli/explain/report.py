"""How far back a gradient reaches, and what that costs: one page, or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tbptt_ckpt.cli.explain.job import Explanation, Setting
from tbptt_ckpt.cli.terminal import format_seconds, table
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.figures import write_figure
from tbptt_ckpt.profiling.reach_plot import draw_reach

_NOTE = (
    "error: of the weights' gradient, relative to that of {k2:,} steps, for these weights and",
    "this data; training changes both, and may learn as well from a coarser gradient: begin",
    "with the shortest. plain: with everything kept, as plain BPTT has it.",
)


def print_explanation(found: Explanation) -> None:
    """Print the page on the standard output."""
    console = Console(highlight=False)
    for line in sentences(found):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_table(found))
    for line in _NOTE:
        console.print(line.format(k2=found.measured.k2), markup=False, soft_wrap=True)


def sentences(found: Explanation) -> list[str]:
    """What there is to be said."""
    measured = found.measured
    count = f"{len(measured.decays)} windows" if len(measured.decays) > 1 else "one window"
    said = [f"The gradient of {count} of {measured.k2:,} steps: {found.what}."]
    for reach in found.reaches:
        said.append(f"  It reaches back {reach}.")
    if any(reach.within is None for reach in found.reaches):
        said.append(
            f"  Where it is more than was looked at, --k2 {2 * measured.k2} looks further back."
        )
    if (growth := measured.growth) is not None and growth > 1:
        said.append(
            f"  It grows with distance, {growth:.3g}-fold over the window: exploding gradients. No "
            "k2 is enough; what helps is clip_grad_norm, smaller or orthogonal recurrent weights, "
            "a smaller forget bias, or a k2 that leaves most of it out on purpose."
        )
    return said + [_priced(setting) for setting in found.settings[:-1][-1:]]


def _priced(setting: Setting) -> str:
    peak, seconds = _taken(setting)
    plain, time = setting.retained.predicted_peak_bytes, setting.retained.predicted_seconds
    return (
        f"  k2 = {setting.k2:,}, which is enough at {setting.tolerance:g}, takes {peak} and "
        f"{seconds} an update; plain BPTT takes {format_bytes(plain)} and {format_seconds(time)}."
    )


def _taken(setting: Setting) -> tuple[str, str]:
    if setting.plan is None:
        return "more than that", "no time"
    peak, seconds = setting.plan.predicted_peak_bytes, setting.plan.predicted_seconds
    return format_bytes(peak), format_seconds(seconds)


def _table(found: Explanation) -> Table:
    within = format_bytes(found.budget_bytes)
    made = table(f"Settings worth trying, within {within}", pad_edge=False)
    for name in ("k2", "error\nbelow", "peak", "time of\nan update", "plain\npeak", "plain\ntime"):
        made.add_column(name, justify="right")
    for setting in found.settings:
        made.add_row(
            f"{setting.k2:,}",
            "" if setting.tolerance is None else f"{setting.tolerance:g}",
            *_taken(setting),
            format_bytes(setting.retained.predicted_peak_bytes),
            format_seconds(setting.retained.predicted_seconds),
        )
    return made


def setting_row(setting: Setting) -> dict[str, Any]:
    """A setting as data; what does not fit is null."""
    plan, retained = setting.plan, setting.retained
    return {
        "k2": setting.k2,
        "tolerance": setting.tolerance,
        "predicted_peak_bytes": None if plan is None else plan.predicted_peak_bytes,
        "predicted_seconds": None if plan is None else plan.predicted_seconds,
        "retained_peak_bytes": retained.predicted_peak_bytes,
        "retained_seconds": retained.predicted_seconds,
    }


def draw_explanation(found: Explanation, path: Path) -> None:
    """Draw the gradient and the costs into a file."""
    rows = sorted((*found.settings, *found.others), key=lambda setting: setting.k2)
    reaches = [(reach.tolerance, reach.within) for reach in found.reaches]
    figure = draw_reach(found.what, found.measured, reaches, [*map(setting_row, rows)])
    write_figure(figure, path)


def explanation_json(found: Explanation) -> str:
    """The page as one JSON object on one line."""
    measured = found.measured
    plain = {
        "what": found.what,
        "k1": measured.k1,
        "k2": measured.k2,
        "growth": measured.growth,
        "reaches": [asdict(reach) for reach in found.reaches],
        "settings": [setting_row(setting) for setting in found.settings],
        "budget_bytes": found.budget_bytes,
        "decays": [asdict(decay) for decay in measured.decays],
        "costs": found.costs.to_dict(),
    }
    return json.dumps(plain, allow_nan=False)
