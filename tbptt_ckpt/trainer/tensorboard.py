"""Events as TensorBoard scalars; needs the package `tensorboard`."""

from __future__ import annotations

from typing import Any

from tbptt_ckpt.arguments import AnyPath, checked
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.trainer.events import Notice
from tbptt_ckpt.trainer.scalars import ScalarSink


class TensorBoard(ScalarSink):
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

    def _write(self, scalars: dict[str, float], steps: int) -> None:
        for name, value in scalars.items():
            self._open().add_scalar(name, value, steps)

    def _say(self, notice: Notice) -> None:
        self._open().add_text(notice.kind, notice.message, notice.steps)

    def _open(self) -> Any:
        if self._writer is None:
            self._writer = self._make(str(self._directory), purge_step=self._purge)
        return self._writer
