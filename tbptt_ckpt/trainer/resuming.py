"""What a resumed run must have in common with the one that was saved, and how it goes on."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.sequence_run import SequenceRun
from tbptt_ckpt.engine.stored_records import check_records, load_records
from tbptt_ckpt.errors import ArgumentError, SnapshotError, TbpttError, first_line
from tbptt_ckpt.memory.exhausted import is_out_of_memory
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.trainer.learning_state import copied_learning_state
from tbptt_ckpt.trainer.options import Stateful
from tbptt_ckpt.trainer.passes import Passes, refitted
from tbptt_ckpt.trainer.progress import Progress
from tbptt_ckpt.trainer.randomness import random_state, set_random_state
from tbptt_ckpt.trainer.schema import check_schema


@contextmanager
def all_or_nothing(
    state: Any, parts: Parts, passes: Passes, owners: Iterable[Stateful]
) -> Iterator[None]:
    """While entered, a state is loaded; where that fails, all is as it was before.

    It is copied for that time. Plans are not: they are loaded last.

    Raises:
        SnapshotError: It is no state of a run.
    """
    check_schema(state)
    put_back = (parts.updater.group, parts.loss_function, parts.truncation, parts.reach)
    try:
        with ExitStack() as stack:
            used = parts.weights()
            stack.callback(set_random_state, random_state(used), used)  # the last one called
            for owner in (*owners, *put_back):
                stack.callback(owner.load_state_dict, copy.deepcopy(owner.state_dict()))
            stack.callback(passes.copied())
            stack.callback(copied_learning_state(parts))
            yield
            stack.pop_all()
    except Exception as error:  # whoever can sign a snapshot can write anything into it
        if isinstance(error, TbpttError) or is_out_of_memory(error):
            raise
        raise SnapshotError(f"it holds no state of this run: {first_line(error)}") from error


def loaded_progress(state: Mapping[str, Any], k1: int, max_steps: int | None) -> Progress:
    """How far a saved run had come.

    Raises:
        ArgumentError: That is too far to end at `max_steps`.
        SnapshotError: Numbers that no run has.
    """
    progress, run = Progress(**state["progress"]), state["run"]
    index, trained = (0, 0) if run is None else (run["index"], run["totals"]["num_steps"])
    if run is not None:  # another rank may have come further
        trained = max(trained, run.get("reached", 0))
    # Every pass and window has a step, and all windows but a last one have k1.
    if progress.epoch > progress.steps_before or not 0 <= index * k1 - trained < k1:
        raise SnapshotError(
            f"it counts {progress.epoch} passes of {progress.steps_before} steps in all, and "
            f"{index} windows of {trained} steps, which do not agree"
        )
    steps = progress.steps_before + trained
    if max_steps is not None and max_steps < steps:
        raise ArgumentError(
            f"max_steps={max_steps} is below the {steps} steps that were trained already"
        )
    return progress


def check_run(run: Mapping[str, Any] | None, parts: Parts) -> None:
    """Raise unless what windows have left in a saved run can be put back here."""
    if run is not None and run["records"] is not None:
        ambient = Ambient([parts.recurrence.module], parts.parameters)
        check_records(*load_records(run["records"]), ambient)


def resume_run(
    run: SequenceRun | None,
    state: Mapping[str, Any],
    limit: int | None,
    k1: int,
    accepted: Container[str],
) -> None:
    """Have a run go on that `max_steps` ends at `limit`, which may be elsewhere than before.

    Raises:
        ArgumentError: What windows there are depends on that, and what they need was not kept.
    """
    if run is None:
        number = state["progress"]["sequence"]
        raise ArgumentError(f"the source has no batch {number} any more, in which the run stood")
    reader = refitted(state["run"]["reader"], state["limit"], limit)
    changed = "data" in accepted or "lanes" in accepted or limit != state["limit"]
    run.load_state_dict({**state["run"], "reader": reader}, accepted)
    if (window := run.unkept_window(limit, changed=changed)) is not None:
        done = run.totals.num_steps
        problem = (
            f"window {window.start} to {window.stop} starts at a state that was not kept"
            if done % k1 == 0
            else f"it has updated at step {done}, between two update points"
        )
        if not changed:
            raise SnapshotError(f"it stands at step {done}, and {problem}")
        raise ArgumentError(
            f"this pass cannot go on from step {done}: it ends elsewhere than it did when it was "
            f"saved, and {problem}. Go on from an earlier snapshot (remove the last), and let "
            f"max_steps be a multiple of k1={k1} where runs are to go on"
        )


def plan_state(parts: Parts, asked: str) -> dict[str, Any]:
    """How windows are planned, as plain data."""
    return {
        "asked": asked,
        "used": str(parts.budget.strategy),
        "measured": parts.budget.state_dict(),
        "time_batching": parts.runner.time_batching.choice,
    }


def resume_plan(parts: Parts, asked: str, plan: Mapping[str, Any], device: str) -> list[str]:
    """Go on with a saved plan, unless another was asked for; what is to be told of it.

    What was measured on another device is measured anew.
    """
    messages, choice = [], parts.runner.time_batching.choice
    if plan["time_batching"] != choice:
        messages.append(
            f"time_batching={choice!r} replaces {plan['time_batching']!r}; from here on the run "
            "equals the other to rounding"
        )
    measured = plan["measured"]
    if device != str(parts.device):
        measured = {}
        is_alike = torch.device(device).type == parts.device.type
        draws = "" if is_alike else ", and not where the device draws random numbers"
        messages.append(
            f"device {parts.device} replaces {device}; from here on the run equals the other to "
            f"rounding{draws}"
        )
    if plan["asked"] == asked:
        shared = (parts.updater, parts.budget.strategy, *parts.parameters)
        rehearsing = copy.deepcopy(parts.budget, {id(each): each for each in shared})
        for budget in (rehearsing, parts.budget):  # where it fails, nothing has changed
            budget.load_state_dict(measured, plan["used"])
    else:
        messages.append(
            f"strategy {asked} replaces {plan['used']}; from here on the run equals the other to "
            "rounding"
        )
    return messages
