"""What `tbptt-ckpt plan` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tbptt_ckpt.arguments import check_positive_int, check_size
from tbptt_ckpt.cli import options
from tbptt_ckpt.cli.model_options import ModelOptions
from tbptt_ckpt.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningConfig(ModelOptions):
    """Options of `tbptt-ckpt plan`; sizes in bytes."""

    steps: Annotated[
        int | None,
        "Steps a window reaches back (k2): its plan. Without it, a table of reaches.",
        check_positive_int,
        options.Flags(("--steps", "--k2")),
    ] = None
    budget: Annotated[
        tuple[str, ...],
        "Peak of device memory, everything included: 512MiB, 8G, or a part of what is free: 0.5, "
        "50%; a list for the table.",
        options.TEXTS,
        options.check_budget,
        options.Default("no limit; 50% for the table"),
    ] = ()
    strategy: Annotated[str, "optimal, retain, sqrt, step, uniform:LENGTH or revolve:STATES."] = (
        "optimal"
    )
    plot: Annotated[Path | None, "Draw the table of reaches into this .png or .svg."] = None
    force: Annotated[bool, "Let --plot replace a file."] = False
    costs: Annotated[Path | None, "Take the costs of this JSON file, as --json prints them."] = None
    state_bytes: Annotated[
        int | None, "One boundary state, by hand; with --step-bytes.", options.SIZE
    ] = None
    step_bytes: Annotated[
        int | None, "Each step of a leaf, by hand; with --state-bytes.", options.SIZE
    ] = None
    leaf_bytes: Annotated[int, "A leaf in addition, by hand.", options.SIZE] = 0
    fixed_bytes: Annotated[
        int, "Weights, gradients and all else that is there, by hand.", options.SIZE
    ] = 0
    step_seconds: Annotated[float, "Running one step without a graph, by hand.", check_size] = 1e-3
    call_seconds: Annotated[float, "Each call in addition, by hand.", check_size] = 0.0
    backward_ratio: Annotated[
        float, "Differentiating a step over running it, by hand.", check_size
    ] = 2.0

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is measured."""
        super(PlanningConfig, self).check()  # slots make the class anew
        if (self.state_bytes is None) != (self.step_bytes is None):
            raise ArgumentError("--state-bytes and --step-bytes are given together or not at all")
        ways = {"model": None, "costs": self.costs, "state_bytes": self.state_bytes}
        given = [name for name, value in ways.items() if value is not None or name in self.given]
        if len(given) > 1:
            named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ArgumentError(f"{named} are different ways to say what steps take")
        if self.costs is not None or self.state_bytes is not None:
            self.refuse(("state_dtype",), "costs do not say how wide the numbers of a state are")
        if self.steps is not None and len(self.budget) > 1:
            raise ArgumentError("--steps is planned for one --budget; leave it out for a table")
        if self.plot is not None:
            self._check_plot(self.plot)

    def _check_plot(self, path: Path) -> None:
        from tbptt_ckpt.cli.files import check_target
        from tbptt_ckpt.profiling.figures import check_drawable

        if self.steps is not None:
            raise ArgumentError("--plot draws the table of reaches; leave --steps out")
        check_target("--plot", path, force=self.force)
        check_drawable("--plot", path)
