"""A runner for a user's module, with all that it takes."""

from __future__ import annotations

import torch

from tbptt_ckpt.executor.compiled_steps import CompiledSteps
from tbptt_ckpt.executor.found_parts import FoundParts
from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.module.recurrence import Recurrence, check_autocast, check_initialised
from tbptt_ckpt.time_batching.compiler import CompileChoice
from tbptt_ckpt.time_batching.policy import TimeBatching, TimeBatchingChoice


def make_runner(
    recurrence: Recurrence,
    autocast_dtype: torch.dtype | None,
    time_batching: TimeBatchingChoice = False,
    *,
    traces: bool = False,
    has_room: bool = True,
    compile: CompileChoice = False,  # noqa: A002
) -> Runner:
    """A runner for the user's module; the rest is as for `FoundParts`."""
    module = recurrence.module
    check_initialised("module", module)
    check_autocast(module, autocast_dtype)
    batching = TimeBatching(time_batching, module)
    traces = traces and autocast_dtype is None  # which no trace sees
    parts = FoundParts(recurrence, batching, traces=traces, has_room=has_room)
    compiled = CompiledSteps(recurrence, compile, batching, in_half=autocast_dtype is not None)
    return Runner(recurrence, autocast_dtype, batching, parts, compiled)
