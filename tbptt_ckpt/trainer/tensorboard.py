"""Events as TensorBoard scalars; needs the package `tensorboard`."""

from __future__ import annotations

from typing import Any

from tbptt_ckpt.arguments import AnyPath, checked
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.trainer.events import Notice, UpdateEvent, WindowEvent


class TensorBoard:
    """Writes loss, gradient norm, learning rate, speed, work, memory, drift and reach over steps.

    Args:
        directory: Where its event files go.

    Raises:
        ArgumentError: The package is missing, or no path.
    """

    @checked
    def __init__(self, directory: AnyPath) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                "events to TensorBoard need the package tensorboard: "
                "pip install 'tbptt-ckpt[tensorboard]'"
            ) from error
        self._directory, self._make = directory, SummaryWriter
        self._writer: Any = None
        self._purge: int | None = None

    def on_window(self, event: WindowEvent) -> None:
        """Write its figures."""
        for name in (
            *("loss", "drift", "steps_per_second"),
            *("executed_steps_per_step", "peak_bytes"),
        ):
            self._add(f"window/{name}", getattr(event, name), event.steps)
        if event.reach is not None:
            self._add("window/reach_steps", event.reach.steps, event.steps)
        if event.chosen_k2 is not None:
            self._add("window/k2", event.chosen_k2.k2, event.steps)

    def on_update(self, event: UpdateEvent) -> None:
        """Write its figures."""
        self._add("update/grad_norm", event.grad_norm, event.steps)
        self._add("update/learning_rate", event.learning_rate, event.steps)

    def on_notice(self, event: Notice) -> None:
        """Write its message, and its figures."""
        self._open().add_text(event.kind, event.message, event.steps)
        for name, value in event.figures.items():
            if isinstance(value, int | float):
                self._add(f"{event.kind}/{name}", value, event.steps)

    def resume_at(self, steps: int) -> None:
        """Later events replace what was written of the same steps."""
        self.close()
        self._purge = steps + 1

    def flush(self) -> None:
        """Write out what is held back."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, name: str, value: float | None, steps: int) -> None:
        if value is not None:
            self._open().add_scalar(name, value, steps)

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = self._make(str(self._directory), purge_step=self._purge)
        return self._writer
