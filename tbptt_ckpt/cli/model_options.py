"""The options of every command that runs a model: which model, on what, where, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tbptt_ckpt.cli import options
from tbptt_ckpt.errors import ArgumentError

if TYPE_CHECKING:
    from tbptt_ckpt.executor import ReplayExecutor

# Options that say something about an array of numbers; a text is bytes.
ABOUT_ARRAYS = frozenset({"target", "next_step", "loss", "data_dtype", "features"})
_STATE_DTYPES = ("bfloat16", "float32")


def _check_state_dtype(option: str, text: str) -> None:
    if text not in _STATE_DTYPES:
        raise ArgumentError(f"{option} {text} is not one of {', '.join(_STATE_DTYPES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(options.Configuration):
    """A model, its data, where it runs, and how the states of its windows are kept."""

    model: Annotated[
        str,
        "lstm, gru, rnn or lstmcell, which read bytes; or your own, file.py:factory or "
        "package.module:factory, which returns a tbptt_ckpt.Workload, or a module for --data; "
        "tbptt-ckpt init FILE.py writes one.",
    ] = "lstm"
    data: Annotated[
        Path | None,
        "File to learn, memory-mapped: a text, a .npy of steps, or a raw file with --data-dtype.",
        options.Default("the Python standard library"),
        options.Flags(("--data", "--input")),
    ] = None
    target: Annotated[Path | None, "File of targets, a step for each of --data."] = None
    next_step: Annotated[bool, "Targets are the inputs one step later."] = False
    loss: Annotated[
        str | None,
        "mse, l1, huber, cross_entropy, bce, or your own file.py:function.",
        options.Default("cross_entropy for whole numbers, or mse"),
    ] = None
    data_dtype: Annotated[str | None, "Numbers in a raw file, such as float32 or '>i2'."] = None
    features: Annotated[
        int | None, "Numbers of a step in a raw --data.", options.check_positive_int
    ] = None
    hidden: Annotated[
        int, "Width of the recurrent layers, or your factory's.", options.check_positive_int
    ] = 192
    layers: Annotated[int, "Recurrent layers, or your factory's.", options.check_positive_int] = 1
    lanes: Annotated[
        int,
        "Parallel streams that data is cut into.",
        options.check_positive_int,
        options.Default("32; 1 for arrays"),
    ] = 32
    device: Annotated[
        str | None, "cpu, cuda, cuda:1 ...", options.Default("the accelerator, or else cpu")
    ] = None
    dtype: Annotated[options.Dtype, "Arithmetic; bfloat16 is autocast."] = "float32"
    offload: Annotated[
        str | None,
        "Where the states that a window keeps lie: host (pinned memory), or a folder on a disk.",
        options.Default("in memory"),
    ] = None
    state_dtype: Annotated[
        str | None,
        "bfloat16 or float32: wider ones are rounded to it, and the gradient is another one.",
        _check_state_dtype,
        options.Default("as they are"),
    ] = None

    @property
    def reads_arrays(self) -> bool:
        """Whether the data are steps of numbers, rather than the bytes of a text."""
        is_npy = self.data is not None and self.data.suffix == ".npy"
        return is_npy or any(getattr(self, name) for name in ABOUT_ARRAYS)

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
