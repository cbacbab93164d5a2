"""How far off a window's gradient is where its states are kept in fewer bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from tbptt_ckpt.engine.verification import relative_difference
from tbptt_ckpt.executor.replay import storage_of
from tbptt_ckpt.memory.exhausted import is_out_of_memory, release_memory
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.workload import EndlessSource, Workload
from tbptt_ckpt.schedule.plan import Plan


def rounding_error(work: Workload, configuration: Configuration, plan: Plan) -> float | None:
    """What rounded states change in the gradient of a window of a plan, over its norm.

    None where none are rounded, and where memory is missing. The first window that reaches back
    all of k2 runs from rounded states and from exact ones, at today's weights and cut as in the
    plan, whatever made its steps; gradients and generators stay as they are.
    """
    if storage_of(configuration.executor).dtype is None:
        return None
    try:
        cuts = replace(plan, form="auto", forms=())
        return _rounding_error(work, replace(configuration, strategy=cuts))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return None


def _rounding_error(work: Workload, configuration: Configuration) -> float:
    free = replace(work, optimizer=None, clip_grad_norm=None)  # gradients alone, and all of them
    tensors, executor = tensors_of(work.init_state), configuration.executor
    with untouched(work.module, work.loss_fn, tensors=tensors) as start_over:
        rounded = _gradients(free, configuration, executor)
        start_over()
        exact = _gradients(free, configuration, executor.exact())
        return relative_difference(rounded, exact)


def _gradients(work: Workload, configuration: Configuration, executor: Any) -> list[Tensor]:
    k1, k2 = configuration.k1, configuration.k2
    engine = work.engine(
        k1,
        k2,
        strategy=configuration.strategy,
        overlap=configuration.overlap,
        executor=executor,
        time_batching=configuration.time_batching,
    )
    windows = engine.windows(EndlessSource(work.source, k2 // k1 * k1), work.init_state)
    next(window for window in windows if window.loss is not None)
    return [weight.grad.clone() for weight in engine.parts.weights() if weight.grad is not None]
