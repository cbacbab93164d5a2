"""States that are as large as what a step makes, in the device's memory and in the host's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from benchmarks.accelerator.bench import Bench, mib
from benchmarks.accelerator.check import Check, info, promised, skipped
from benchmarks.accelerator.memory import timed_wait
from benchmarks.accelerator.modules import distance, gradient_of
from benchmarks.large_states import ReactionDiffusion, first_state
from tbptt_ckpt import TBPTT, TensorSequence, run_window
from tbptt_ckpt.executor import ReplayExecutor

BUDGET_STATES = 40  # of the steps' number


def states_elsewhere(bench: Bench) -> Iterator[Check]:
    """States in the host's pinned memory: the same bits, less on the device, the time foreseen."""
    if not bench.is_accelerator:
        yield skipped("states in the host's memory", "they are there already")
        return
    grid, steps = (32, 64) if bench.is_quick else (1024, 400)
    state, rows = first_state(grid).to(bench.device), bench.randn(2, steps, 1, 2)
    feed, targets = rows[0, :, :, :1, None].abs() * 0.04, rows[1]
    module, places = ReactionDiffusion().to(bench.device), (None, "host")
    grads = []
    for place in places:
        module.zero_grad()
        how: Any = {"strategy": "step", "executor": ReplayExecutor(place)}
        run_window(module, nn.functional.mse_loss, feed, targets, state, **how)
        grads.append(gradient_of(module))
    apart = distance(grads[1], grads[0])
    yield promised(apart == 0, "a gradient with states in the host's memory", distance=apart)
    budget, executed = BUDGET_STATES * state.nbytes, {}
    for place in places:
        bench.fresh()
        module.zero_grad()
        how = {"memory_budget": budget, "measure_memory": True, "executor": ReplayExecutor(place)}
        tbptt = TBPTT(module, nn.functional.mse_loss, steps, None, **how)
        data, found = TensorSequence(feed, targets), []
        seconds = timed_wait(bench, lambda t=tbptt, d=data, f=found: f.extend(t.windows(d, state)))
        (window,) = found
        plan, executed[place] = window.plan, window.executed_steps
        figures = {
            "peak_mib": mib(window.peak_bytes),
            "budget_mib": mib(budget),
            "executed_per_step": window.executed_steps / steps,
            "seconds_with_measuring": seconds,
            "predicted_seconds": plan.predicted_seconds,
        }
        what = f"states of {grid} x {grid} {'on the device' if place is None else 'elsewhere'}"
        yield promised(window.peak_bytes <= budget, f"{what}: within a budget", **figures)
        again = timed_wait(bench, lambda t=tbptt, d=data: list(t.windows(d, state)))
        yield info(f"{what}: a window whose costs are known", seconds=again)
    fewer = executed["host"] <= executed[None]
    yield promised(fewer, "elsewhere no more steps run", **{str(k): v for k, v in executed.items()})
