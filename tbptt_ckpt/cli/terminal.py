"""What people see of a command: tables on the standard output, a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from tbptt_ckpt.profiling.sweep import Progress, Watch, unwatched


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
    if not sys.stderr.isatty():
        yield unwatched
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1, figures="")

        def watch(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.stage,
                completed=progress.done,
                total=progress.total,
                figures=progress.figures,
            )

        yield watch
