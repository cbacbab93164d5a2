"""The progress bar of a run; on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tbptt_ckpt.cli.train.outcome import Progress, Watch, unwatched
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.profiling.sweep import Progress as RowProgress
from tbptt_ckpt.profiling.sweep import Watch as RowWatch
from tbptt_ckpt.profiling.sweep import unwatched as unwatched_rows


@contextmanager
def progress_bar() -> Iterator[Watch]:
    """A bar on the standard error while the context is open; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield unwatched
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} steps"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=1, figures="")

        def watch(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.stage,
                completed=progress.num_steps,
                total=progress.total_steps,
                figures=figures(progress),
            )

        yield watch


def figures(progress: Progress) -> str:
    """Loss, speed and memory, in words for people."""
    if progress.bits is None:
        return ""
    return (
        f"{progress.bits:.3f} bits/byte  {progress.steps_per_second:,.0f} steps/s  "
        f"{format_bytes(progress.memory_bytes)}"
    )


@contextmanager
def row_progress() -> Iterator[RowWatch]:
    """A bar on the standard error while the context is open; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield unwatched_rows
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} rows"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1)

        def watch(progress: RowProgress) -> None:
            bar.update(
                task,
                description=progress.stage,
                completed=progress.num_rows,
                total=progress.total_rows,
            )

        yield watch
