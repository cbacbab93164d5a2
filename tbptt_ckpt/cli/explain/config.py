"""What `tbptt-ckpt explain` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tbptt_ckpt.arguments import check_above_zero, check_positive_int
from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.model_options import ModelOptions
from tbptt_ckpt.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainConfig(ModelOptions):
    """Options of `tbptt-ckpt explain`."""

    k1: Annotated[int, "Steps between updates.", check_positive_int] = 64
    k2: Annotated[int, "Steps to look back at most.", check_positive_int] = 512
    tolerance: Annotated[
        tuple[float, ...],
        "Relative errors of the gradient that a k2 is looked for at; a list.",
        options.NUMBERS,
        check_above_zero,
    ] = (0.1, 0.01, 0.001)
    windows: Annotated[int, "Windows to measure, one after the other.", check_positive_int] = 2
    budget: Annotated[
        str,
        "Peak of device memory, everything included: 512MiB, 8G, or a part of what is free: 0.5.",
        options.check_budget,
    ] = "50%"
    plot: Annotated[Path | None, "Draw gradient and costs into this .png or .svg."] = None
    force: Annotated[bool, "Let --plot replace a file."] = False

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is measured."""
        super(ExplainConfig, self).check()  # slots make the class anew
        if self.k2 < self.k1:
            raise ArgumentError(f"--k2 {self.k2} is below --k1 {self.k1}; look back at least k1")
        if self.plot is not None:
            from tbptt_ckpt.cli.files import check_target
            from tbptt_ckpt.profiling.figures import check_drawable

            check_target("--plot", self.plot, force=self.force)
            check_drawable("--plot", self.plot)
