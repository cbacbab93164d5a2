"""What `tbptt-ckpt profile` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tbptt_ckpt.arguments import check_positive_int
from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.model_options import ModelOptions
from tbptt_ckpt.errors import ArgumentError

if TYPE_CHECKING:
    from tbptt_ckpt.profiling.configuration import Configuration

_TIME_BATCHING: dict[str, bool | str] = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig(ModelOptions):
    """Options of `tbptt-ckpt profile`; the defaults take some minute on two cores."""

    k1: Annotated[
        tuple[int, ...],
        "Steps between updates; 16,64 measures both.",
        options.WHOLE_NUMBERS,
        check_positive_int,
    ] = (64,)
    k2: Annotated[
        tuple[int, ...],
        "Steps an update reaches back; a list too.",
        options.WHOLE_NUMBERS,
        check_positive_int,
    ] = (512,)
    strategy: Annotated[
        tuple[str, ...],
        "auto, retain, sqrt, step, uniform:LENGTH, revolve:STATES; a list too.",
        options.TEXTS,
        options.check_strategy,
    ] = ("step", "uniform:32", "sqrt", "revolve:20", "auto")
    budget: Annotated[
        tuple[str, ...],
        "Memory budgets: 64MiB,8G, or parts of what is free: 0.5, 50%.",
        options.TEXTS,
        options.check_budget,
        options.Default("none"),
    ] = ()
    overlap: Annotated[options.Overlap, "What later windows start from."] = "refresh"
    executor: Annotated[options.ExecutorName, "What runs a schedule."] = "replay"
    time_batching: Annotated[
        Literal["auto", "fused", "mixed", "true", "false"],
        "Products over time; plain BPTT is measured without.",
    ] = "auto"
    repeats: Annotated[int, "Windows to time for a row.", check_positive_int] = 5
    csv: Annotated[Path | None, "Write the rows to this file."] = None
    plot: Annotated[
        Path | None,
        "Draw peak against time into this .png or .svg, and memory within each window "
        "into a second file, NAME-windows beside it.",
    ] = None
    trace: Annotated[
        Path | None, "Write the windows in time for chrome://tracing or ui.perfetto.dev."
    ] = None
    memory_history: Annotated[
        Path | None,
        "On CUDA, write PyTorch's memory history of every row for pytorch.org/memory_viz. "
        "The name gets strategy, k1 and k2.",
    ] = None
    force: Annotated[bool, "Let files be replaced."] = False

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is started."""
        from tbptt_ckpt.cli.devices import find_device
        from tbptt_ckpt.cli.files import check_target
        from tbptt_ckpt.profiling.figures import check_drawable
        from tbptt_ckpt.profiling.sweep import with_baselines

        super(ProfileConfig, self).check()  # slots make the class anew
        self.check_stored(self.executor)
        rows = with_baselines(self.configurations())
        targets = [("--csv", self.csv), ("--plot", self.plot)]
        targets += [("--plot, second picture", self.window_plot), ("--trace", self.trace)]
        targets += [("--memory-history", self.history_of(row)) for row in rows]
        for option, path in targets:
            if path is not None:
                check_target(option, path, force=self.force)
        if self.plot is not None:
            check_drawable("--plot", self.plot)
        if self.memory_history is not None and find_device(self.device).type != "cuda":
            raise ArgumentError(
                f"--memory-history {self.memory_history} needs --device cuda: PyTorch keeps a "
                "history of CUDA's allocator only; --trace FILE.json works on every device"
            )

    @property
    def window_plot(self) -> Path | None:
        """File for the second picture, of memory within windows: beside the first."""
        return self.plot and self.plot.with_stem(f"{self.plot.stem}-windows")

    def history_of(self, row: Configuration) -> Path | None:
        """File for PyTorch's memory history of a row, None where none is wanted."""
        if self.memory_history is None:
            return None
        parts = (self.memory_history.stem, row.strategy_name.replace(":", "-"), row.k1, row.k2)
        known = (str(part) for part in (*parts, row.budget_bytes) if part is not None)
        return self.memory_history.with_stem("-".join(known))

    def configurations(self) -> list[Configuration]:
        """The rows asked for, in order."""
        from tbptt_ckpt.cli.devices import find_device
        from tbptt_ckpt.profiling.configuration import combinations

        return combinations(
            self.k1,
            self.k2,
            self.strategy,
            self.budget or (None,),
            device=find_device(self.device),
            overlap=self.overlap,
            executor=self.stored(self.executor),
            time_batching=_TIME_BATCHING.get(self.time_batching, self.time_batching),
        )
