"""Options that several commands have, with one meaning and one help text."""

from __future__ import annotations

from typing import Annotated

import typer

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.schedule.strategies import parse_strategy

Hidden = Annotated[int, typer.Option(help="Width of the recurrent layers.")]
Layers = Annotated[int, typer.Option(help="Recurrent layers.")]
Lanes = Annotated[int, typer.Option(help="Parallel streams.")]
Overlap = Annotated[str, typer.Option(help="refresh or stale.")]
ExecutorName = Annotated[str, typer.Option(help="replay or checkpoint.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ...", show_default="the accelerator, or else cpu"),
]
Dtype = Annotated[str, typer.Option(help="float32, float64, or bfloat16 (autocast).")]


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ArgumentError` unless an option is one of the choices."""
    if value not in choices:
        raise ArgumentError(f"{option} {value} is not one of {', '.join(choices)}")


def check_strategy(text: str) -> None:
    """Raise `ArgumentError` unless `--strategy` names one."""
    try:
        parse_strategy(text)
    except ArgumentError as error:
        raise ArgumentError(
            f"--strategy {text} is not one of auto, optimal, retain, sqrt, step, uniform:LENGTH, "
            "revolve:STATES"
        ) from error
