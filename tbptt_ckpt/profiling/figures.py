"""How pictures look, and how they get into files.

Figures are made without pyplot, so that nobody's backend changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tbptt_ckpt.errors import ArgumentError

# Okabe & Ito's palette, which people with any colour vision can tell apart; differences are
# in shape and line as well.
BLUE, ORANGE, VERMILLION, GREY, BLACK = "#0072B2", "#E69F00", "#D55E00", "#999999", "#000000"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "tbptt-ckpt",
}


def check_drawable(option: str, path: Path) -> None:
    """Raise `ArgumentError` unless pictures can be drawn into the file that an option names."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ArgumentError(f"{option} {path} must end in .png or .svg")
    _matplotlib()


def write_figure(figure: Any, path: Path) -> None:
    """Write a picture; equal figures give equal files."""
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    with _matplotlib().rc_context(_STYLE):
        figure.savefig(path, metadata=metadata)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ArgumentError(
            "pictures need matplotlib, which is not installed: pip install 'tbptt-ckpt[plots]'"
        ) from error
    return matplotlib


@contextmanager
def new_figure(**options: Any) -> Iterator[Callable[[], Any]]:
    """Makes a figure in our style, while the context is open; with no pyplot in it."""
    with _matplotlib().rc_context(_STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        def make() -> Any:
            figure = Figure(layout="constrained", **options)
            FigureCanvasAgg(figure)
            return figure

        yield make


def mib(num_bytes: int | None) -> float:
    """Bytes of a row that has this figure, in MiB."""
    assert num_bytes is not None, "only rows with this figure are drawn"
    return num_bytes / 2**20
