"""From `--model` and the options beside it to what a command works on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tbptt_ckpt import Workload
from tbptt_ckpt.cli.bytes.models import VOCAB_SIZE, build_model
from tbptt_ckpt.cli.bytes.score import byte_task
from tbptt_ckpt.cli.devices import (
    DTYPES,
    ask_for_equal_bits,
    autocast_dtype,
    find_device,
)
from tbptt_ckpt.cli.factory import call_factory
from tbptt_ckpt.cli.lanes import Array, EqualLanes, parts
from tbptt_ckpt.cli.losses import find_loss
from tbptt_ckpt.cli.model_options import ABOUT_ARRAYS, ModelOptions
from tbptt_ckpt.cli.task import Task, module_workload
from tbptt_ckpt.data.arrays import map_file
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.recurrence import parameters_of

LEARNING_RATE = 4e-3

MAY_RETURN = (
    "a factory returns a tbptt_ckpt.Workload(module=..., loss_fn=..., inputs=..., targets=...), or "
    "an nn.Module, for which --data FILE.npy with --target FILE.npy or --next-step says the rest; "
    "tbptt-ckpt init FILE.py writes one to start from"
)


def make_task(options: ModelOptions, *, lr: float | None = None, seed: int = 0) -> Task:
    """The task; the same every time. Torch's global seed is set.

    Raises:
        ArgumentError: A model that cannot be made, or options that would change nothing.
    """
    torch.manual_seed(seed)
    device = find_device(options.device)
    ask_for_equal_bits(device)
    if ":" not in options.model:
        module = build_model(options.model, hidden=options.hidden, layers=options.layers)
        options.refuse(ABOUT_ARRAYS, f"{options.model} reads the bytes of a text")
        task = byte_task(options, module, device, lr or LEARNING_RATE)
    else:
        task = _own_task(options, device, lr)
    task.check(options.model)
    return task


def _own_task(options: ModelOptions, device: torch.device, lr: float | None) -> Task:
    offered = {
        "vocab_size": VOCAB_SIZE,
        "hidden": options.hidden,
        "layers": options.layers,
        "lanes": options.lanes,
        "device": device,
        "dtype": DTYPES[options.dtype],
        "data": options.data,
    }
    made, taken = call_factory(options.model, offered, options.given)
    if isinstance(made, Workload):
        return _workload_task(options, made, taken, lr)
    if not isinstance(made, nn.Module):
        returned = f"--model {options.model} returned {type(made).__name__}"
        raise ArgumentError(f"{returned}, not what a command can work on: {MAY_RETURN}")
    options.refuse({"hidden", "layers"} - taken, f"{options.model} takes no such argument")
    if options.reads_arrays:
        return array_task(options, made, device, lr or LEARNING_RATE)
    options.refuse(
        ABOUT_ARRAYS, f"{options.model} reads the bytes of a text, unless --data names a .npy file"
    )
    try:
        return byte_task(options, made, device, lr or LEARNING_RATE)
    except ArgumentError as error:
        raise ArgumentError(f"--model {options.model}: {error}") from error


def _workload_task(
    options: ModelOptions, work: Workload, taken: Collection[str], lr: float | None
) -> Task:
    about = {"hidden", "layers", "lanes", "device", "dtype", "data", *ABOUT_ARRAYS}
    returned = f"{options.model} returned a Workload, which says it, and takes no such argument"
    options.refuse(about - set(taken), returned)
    parameters = parameters_of(work.module)
    if not isinstance(work.module, nn.Module):
        raise ArgumentError(f"--model {options.model}: its module must be an nn.Module")
    if not any(p.requires_grad for p in parameters):
        raise ArgumentError(f"--model {options.model} has no trainable parameters")
    if work.optimizer is None:
        work = replace(work, optimizer=torch.optim.Adam(parameters, lr=lr or LEARNING_RATE))
    else:
        options.refuse({"lr"}, f"{options.model} returned a Workload with an optimizer")
    data = f"{options.data}" if "data" in taken and options.data else "its own data"
    return Task(data=data, workload=work)


def array_task(options: ModelOptions, module: nn.Module, device: torch.device, lr: float) -> Task:
    """A module on the steps of an array in a file."""
    if options.data is None:
        raise ArgumentError(f"--data is missing: a file of what {options.model} reads")
    if options.next_step == (options.target is not None):
        raise ArgumentError(
            "what each step is to answer is said with --target FILE, or with --next-step where "
            "it is the input of the step after it"
        )
    inputs = _mapped("--data", options, options.data)
    targets = None if options.target is None else _mapped("--target", options, options.target)
    if targets is not None and len(targets) != len(inputs):
        raise ArgumentError(f"--target has {len(targets)} steps, --data has {len(inputs)}")
    answers = inputs if targets is None else targets
    name, loss_fn = find_loss(options.loss, has_classes=answers.dtype.kind in "iu")
    lanes = None if inputs.ndim > 2 else options.lanes if "lanes" in options.given else 1
    if lanes is None:
        options.refuse({"lanes"}, f"{options.data} has its own, {inputs.shape[1]}")
    given: dict[str, Any] = {"dtype": DTYPES[options.dtype], "device": device}
    (train, held_out), (train_answers, held_out_answers) = parts(inputs), (None, None)
    if targets is not None:
        train_answers, held_out_answers = parts(targets)
    ahead = int(targets is None)
    scored = len(held_out) >= (lanes or 1) + ahead
    return Task(
        data=f"{options.data}, {name}",
        workload=module_workload(
            module.to(device, DTYPES[options.dtype]),
            loss_fn,
            EqualLanes(train, lanes, train_answers, **given),
            lr=lr,
            autocast_dtype=autocast_dtype(options.dtype),
        ),
        held_out=EqualLanes(held_out, lanes, held_out_answers, **given) if scored else None,
    )


def _mapped(option: str, options: ModelOptions, path: Any) -> Array:
    """A `.npy` file, or a raw one of `--data-dtype` and `--features`."""
    is_npy = path.suffix == ".npy"
    if not is_npy and options.data_dtype is None:
        raise ArgumentError(
            f"{option} {path} is no .npy file; say --data-dtype for a raw file, such as float32"
        )
    shape = (options.features,) if options.features and option == "--data" else ()
    try:
        array = map_file(path, None if is_npy else options.data_dtype, step_shape=shape)
    except ArgumentError as error:
        raise ArgumentError(f"{option} {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim == 0:
        raise ArgumentError(
            f"{option} {path} holds {array.dtype} {array.shape}, no steps of numbers"
        )
    return array
