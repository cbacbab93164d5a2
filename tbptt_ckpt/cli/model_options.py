"""The options of every command that runs a model: which model, on what, where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tbptt_ckpt.cli import options

# Options that say something about an array of numbers; a text is bytes.
ABOUT_ARRAYS = frozenset({"target", "next_step", "loss", "data_dtype", "features"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(options.Configuration):
    """A model, its data, and where it runs."""

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
        options.Flags("--data", "--input"),
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

    @property
    def reads_arrays(self) -> bool:
        """Whether the data are steps of numbers, rather than the bytes of a text."""
        is_npy = self.data is not None and self.data.suffix == ".npy"
        return is_npy or any(getattr(self, name) for name in ABOUT_ARRAYS)
