"""Options that several commands have, with one meaning and one help text."""

from __future__ import annotations

from typing import Annotated

import typer

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
