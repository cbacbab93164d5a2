"""A bar on a terminal; needs the package `rich`."""

from __future__ import annotations

import sys
from typing import Any

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.trainer.events import EventSink, Notice, WindowEvent


class Bar:
    """What is being done, how much of it is done, and figures, in one line that is gone afterwards.

    It is shown on the standard error, where that is a terminal, and in a notebook.

    Args:
        unit: What is counted.

    Raises:
        ArgumentError: The package is missing.
    """

    def __init__(self, unit: str) -> None:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
        except ImportError as error:
            raise ArgumentError(
                "a progress bar needs the package rich: pip install 'tbptt-ckpt[cli]'"
            ) from error
        console = Console(stderr=True)
        has_terminal = sys.stderr is not None and sys.stderr.isatty()  # a daemon has no stderr
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            expand=True,
            disable=not (has_terminal or console.is_jupyter),
        )
        self._unit = unit
        self._task: Any = None

    def show(self, stage: str, done: int, total: int | None, figures: str = "") -> None:
        """Where it stands; a `total` of None is not known."""
        count = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        figures = f"{count} {self._unit}  {figures}"
        if self._task is None:
            self._task = self._bar.add_task(stage, figures=figures)
            self._bar.start()
        given: dict[str, Any] = {"description": stage, "figures": figures}
        self._bar.update(self._task, completed=done, total=total, **given)

    def close(self) -> None:
        """Take it away, until it is shown again."""
        self._bar.stop()
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


class ProgressBar(EventSink):
    """Shows how far training is, with loss, speed and memory, while it runs.

    Raises:
        ArgumentError: The package `rich` is missing.
    """

    def __init__(self) -> None:
        self._bar, self._validated = Bar("steps"), ""

    def on_window(self, event: WindowEvent) -> None:
        """Move on."""
        figures = [] if event.loss is None else [f"loss {event.loss:.3g}"]
        figures += [self._validated] if self._validated else []
        figures.append(f"{event.steps_per_second:,.0f}/s")
        if event.peak_bytes is not None:
            figures.append(format_bytes(event.peak_bytes))
        self._bar.show("training", event.steps, event.total_steps, "  ".join(figures))

    def on_notice(self, event: Notice) -> None:
        """Show what a validation found from now on."""
        if event.kind == "validated":
            self._validated = f"val {event.figures['loss']:.3g}"

    def close(self) -> None:
        """Take it away."""
        self._bar.close()
