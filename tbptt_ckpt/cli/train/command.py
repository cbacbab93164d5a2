"""`tbptt-ckpt train`."""

from __future__ import annotations

from typing import Annotated

import typer

from tbptt_ckpt.cli.progress import progress_bar
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.job import run_training_job
from tbptt_ckpt.cli.train.outcome import outcome_json, print_outcome


def train(
    config: TrainingConfig,
    *,
    json: Annotated[
        bool, typer.Option("--json", help="Print the outcome as one JSON object.")
    ] = False,
) -> None:
    """Train a byte-level language model and report loss, speed and memory.

    Without options it learns the source text of Python's standard library,
    in about a minute on two cores, and compares itself with a bigram table
    on text that was held out.
    """
    with progress_bar("steps") as watch:
        outcome = run_training_job(config, watch)
    if json:
        typer.echo(outcome_json(outcome))
    else:
        print_outcome(outcome)
