"""Time against memory, a panel for each size: the lower left corner is where to be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.entries import BASELINE, OURS
from benchmarks.peers.summary import Row

# Okabe & Ito's palette, which the common kinds of colour blindness tell apart; the markers
# differ as well. doi:10.1038/nmeth.1618
_STYLES = {
    "PyTorch": ("#000000", "s"),
    "torch.utils.checkpoint": ("#E69F00", "D"),
    "forum": ("#999999", "X"),
    "Ignite": ("#CC79A7", "P"),
    "JAX": ("#56B4E9", "^"),
    "equinox": ("#009E73", "v"),
    OURS: ("#D55E00", "o"),
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with the rows of all sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({row.size for row in rows}, key=lambda size: (size.num_steps, size.width))
    columns = min(2, len(sizes))
    lines = -(-len(sizes) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns, 3.9 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(sizes) :]:
        axis.axis("off")
    for axis, size in zip(axes.flat, sizes, strict=False):
        _panel(axis, [row for row in rows if row.size == size])
        axis.set_title(str(size), fontsize=11)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=11, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for family, (colour, marker) in _STYLES.items():
        ours = family == OURS
        mine = sorted((r for r in rows if r.entry.family == family), key=lambda r: r.peak_bytes)
        if not mine:
            continue
        axis.scatter(
            [row.peak_mib for row in mine],
            [row.median_seconds for row in mine],
            s=70 if ours else 60,
            color=colour,
            marker=marker,
            edgecolors="white",
            linewidths=0.6,
            label=family,
            zorder=3 if ours else 2,
        )
    _front(axis, [row for row in rows if row.entry.family == OURS])
    plain = [row for row in rows if row.entry == BASELINE]
    if plain:
        axis.axhline(
            plain[0].median_seconds,
            color="#000000",
            linewidth=0.8,
            linestyle=":",
            label="time of plain BPTT",
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(bottom=0)
    axis.set_xlabel("peak of temporaries, MiB")
    axis.set_ylabel("seconds for forward and backward")
    axis.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)


def _front(axis: Any, ours: Sequence[Row]) -> None:
    """A line through those of ours that nothing of ours beats in both."""
    front: list[Row] = []
    for row in sorted(ours, key=lambda row: row.peak_bytes):
        if not front or row.median_seconds < front[-1].median_seconds:
            front.append(row)
    colour, _ = _STYLES[OURS]
    axis.step(
        [row.peak_mib for row in front],
        [row.median_seconds for row in front],
        where="post",
        color=colour,
        linewidth=1.4,
        label="ours, the best at each peak",
        zorder=1,
    )
