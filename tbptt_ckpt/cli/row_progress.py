"""The progress bar over the rows of a table; on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from tbptt_ckpt.profiling import Progress, Watch, unwatched


@contextmanager
def row_progress() -> Iterator[Watch]:
    """A bar on the standard error while the context is open; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield unwatched
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} rows"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)

        def watch(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.stage,
                completed=progress.num_rows,
                total=progress.total_rows,
            )

        yield watch
