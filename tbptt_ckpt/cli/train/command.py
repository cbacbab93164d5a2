"""`tbptt-ckpt train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tbptt_ckpt.cli.options import Device, Dtype, ExecutorName, Hidden, Lanes, Layers, Overlap
from tbptt_ckpt.cli.progress import progress_bar
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.job import run_training_job
from tbptt_ckpt.cli.train.report import outcome_json, print_outcome
from tbptt_ckpt.errors import ArgumentError

_DEFAULT = TrainingConfig()


def train(
    data: Annotated[
        Path | None,
        typer.Option(
            help="File to learn, memory-mapped.", show_default="the Python standard library"
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="lstm, gru, rnn, lstmcell, or your own: package.module:factory."),
    ] = _DEFAULT.model,
    hidden: Hidden = _DEFAULT.hidden,
    layers: Layers = _DEFAULT.layers,
    lanes: Lanes = _DEFAULT.lanes,
    k1: Annotated[int, typer.Option(help="Steps between updates.")] = _DEFAULT.k1,
    k2: Annotated[
        str, typer.Option(help="Steps an update reaches back; none: to the start.")
    ] = str(_DEFAULT.k2),
    strategy: Annotated[
        str | None,
        typer.Option(
            help="auto, optimal, retain, sqrt, step, uniform:LENGTH or revolve:STATES.",
            show_default=f"{_DEFAULT.strategy}; optimal with --budget",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Peak of tensor memory, such as 200MiB, or a fraction of what is free: 0.5.",
            show_default="none",
        ),
    ] = None,
    overlap: Overlap = _DEFAULT.overlap,
    executor: ExecutorName = _DEFAULT.executor,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = _DEFAULT.lr,
    max_steps: Annotated[
        int, typer.Option(help="Time steps per lane, in total.")
    ] = _DEFAULT.max_steps,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = _DEFAULT.seed,
    device: Device = None,
    dtype: Dtype = _DEFAULT.dtype,
    save: Annotated[Path | None, typer.Option(help="Write the weights to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --save replace a file.")] = False,
    snapshot_dir: Annotated[
        Path | None, typer.Option(help="Directory for snapshots of the training state.")
    ] = None,
    snapshot_every: Annotated[
        int | None, typer.Option(help="Time steps between snapshots.", show_default="none")
    ] = None,
    snapshot_minutes: Annotated[
        float | None, typer.Option(help="Minutes between snapshots.", show_default="none")
    ] = None,
    keep: Annotated[int, typer.Option(help="Snapshots that stay, the newest.")] = _DEFAULT.keep,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest valid snapshot, if there is one."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the outcome as one JSON object.")
    ] = False,
) -> None:
    """Train a byte-level language model and report loss, speed and memory.

    Without options it learns the source text of Python's standard library,
    in about a minute on two cores, and compares itself with a bigram table
    on text that was held out.
    """
    config = TrainingConfig(
        data=data,
        model=model,
        hidden=hidden,
        layers=layers,
        lanes=lanes,
        k1=k1,
        k2=parse_reach(k2),
        strategy=strategy or ("optimal" if budget else _DEFAULT.strategy),
        budget=budget,
        overlap=overlap,
        executor=executor,
        lr=lr,
        max_steps=max_steps,
        seed=seed,
        device=device,
        dtype=dtype,
        save=save,
        force=force,
        snapshot_dir=snapshot_dir,
        snapshot_every=snapshot_every,
        snapshot_minutes=snapshot_minutes,
        keep=keep,
        resume=resume,
    )
    with progress_bar() as watch:
        outcome = run_training_job(config, watch)
    if json:
        typer.echo(outcome_json(outcome))
    else:
        print_outcome(outcome)


def parse_reach(text: str) -> int | None:
    """What `--k2` means: a number of steps, or None for `none`."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"--k2 {text} is neither a number of steps nor none") from None
