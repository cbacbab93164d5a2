"""The options that say how the states of a window are kept, of several commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.model_options import ModelOptions
from tbptt_ckpt.errors import ArgumentError

if TYPE_CHECKING:
    from tbptt_ckpt.executor import ReplayExecutor

_DTYPES = ("bfloat16", "float32")


def _check_dtype(option: str, text: str) -> None:
    if text not in _DTYPES:
        raise ArgumentError(f"{option} {text} is not one of {', '.join(_DTYPES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoringOptions(ModelOptions):
    """A model, its data, where it runs, and how the states of its windows are kept."""

    offload: Annotated[
        str | None,
        "Where the states that a window keeps lie: host (pinned memory), or a folder on a disk.",
        options.Default("in memory"),
    ] = None
    state_dtype: Annotated[
        str | None,
        "bfloat16 or float32: wider ones are rounded to it, and the gradient is another one.",
        _check_dtype,
        options.Default("as they are"),
    ] = None

    def check_stored(self, executor: str) -> None:
        """Refuse states that an executor does not keep by itself."""
        for option, value in (("--offload", self.offload), ("--state-dtype", self.state_dtype)):
            if value is not None and executor != "replay":
                raise ArgumentError(
                    f"{option} {value} needs --executor replay: {executor} keeps what its graph "
                    "holds"
                )

    def replay(self, *, exact: bool = False) -> ReplayExecutor:
        """The executor that keeps states so; with every bit of them where it must be exact."""
        import torch

        from tbptt_ckpt.executor import ReplayExecutor

        dtype = None if self.state_dtype is None or exact else getattr(torch, self.state_dtype)
        return ReplayExecutor(self.offload, dtype)

    def stored(self, executor: str) -> ReplayExecutor | str:
        """The same, or the executor of that name where nothing is asked for."""
        return executor if self.offload is self.state_dtype is None else self.replay()
