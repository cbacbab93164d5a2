"""What is to be planned: the options of `tbptt-ckpt plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tbptt_ckpt.cli import options
from tbptt_ckpt.errors import ArgumentError, check_positive_int


def _refuse_below_zero(option: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ArgumentError(f"{option} {value} must be a finite number of at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningConfig:
    """Options of `tbptt-ckpt plan`; sizes in bytes."""

    steps: Annotated[int, "Steps a window reaches back (k2).", check_positive_int] = 1000
    budget: Annotated[
        int | None,
        "Peak of device memory, everything included, such as 512MiB.",
        options.SIZE,
        options.Default("no limit"),
    ] = None
    strategy: Annotated[str, "optimal, retain, sqrt, step, uniform:LENGTH or revolve:STATES."] = (
        "optimal"
    )
    model: Annotated[
        str | None,
        "Measure this: lstm, gru, rnn, lstmcell, or your own package.module:factory.",
        options.Default("lstm, unless costs are given"),
    ] = None
    hidden: options.Hidden = 192
    layers: options.Layers = 1
    lanes: options.Lanes = 32
    device: options.Device = None
    dtype: options.Dtype = "float32"
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
    step_seconds: Annotated[
        float, "Running one step without a graph, by hand.", _refuse_below_zero
    ] = 1e-3
    call_seconds: Annotated[float, "Each call in addition, by hand.", _refuse_below_zero] = 0.0
    backward_ratio: Annotated[
        float, "Differentiating a step over running it, by hand.", _refuse_below_zero
    ] = 2.0

    def check(self) -> None:
        """Raise `ArgumentError` for options that cannot work, before anything is measured."""
        options.check_options(self)
        if (self.state_bytes is None) != (self.step_bytes is None):
            raise ArgumentError("--state-bytes and --step-bytes are given together or not at all")
        ways = {
            "--model": self.model,
            "--costs": self.costs,
            "--state-bytes": self.state_bytes,
        }
        given = [option for option, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ArgumentError(f"{' and '.join(given)} are different ways to say what steps take")
