"""What people see of a command: tables on the standard output, a bar on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tbptt_ckpt.profiling.sweep import Watch
from tbptt_ckpt.trainer.progress_bar import Bar


def table(title: str, caption: str | None = None, **options: Any) -> Table:
    """An empty table in the style of all commands.

    Titles are text, since a file name in brackets would be read as markup.
    """
    return Table(
        title=Text(title),
        caption=None if caption is None else Text(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        **options,
    )


def figure_table(
    title: str, figures: Iterable[tuple[str, str]], caption: str | None = None, **options: Any
) -> Table:
    """A table of names and their figures."""
    made = table(title, caption, show_header=False, **options)
    made.add_column()
    made.add_column(justify="right")
    for name, figure in figures:
        made.add_row(name, figure)
    return made


@contextmanager
def progress_bar(unit: str) -> Iterator[Watch]:
    """A bar on the standard error while the context is open; nothing where that is no terminal."""
    bar = Bar(unit)
    try:
        yield lambda progress: bar.show(
            progress.stage, progress.done, progress.total, progress.figures
        )
    finally:
        bar.close()


def format_seconds(seconds: float) -> str:
    """Seconds for people: '12.3 s', '4.56 ms', '0 s'."""
    if seconds == 0:
        return "0 s"
    units = (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
    unit, size = next((u for u in units if abs(seconds) >= u[1]), ("us", 1e-6))
    whole = len(str(int(abs(seconds) / size)))
    return f"{seconds / size:.{max(0, 3 - whole)}f} {unit}"
