"""How well a module does on a sequence, found without changing anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tbptt_ckpt.arguments import Dimension, PositiveInt, checked
from tbptt_ckpt.data.batches import Sequences, sequences_of
from tbptt_ckpt.data.window_reader import WindowReader
from tbptt_ckpt.engine.initial_state import for_lanes
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.resets import Resets
from tbptt_ckpt.executor.runner import Runner, make_runner
from tbptt_ckpt.executor.window_loss import WindowLoss
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.ambient import Ambient, in_eval_mode
from tbptt_ckpt.module.hooks import SilenceableHooks, silent_hooks
from tbptt_ckpt.module.host import Numbers
from tbptt_ckpt.module.recurrence import check_time_dim, parameters_of, recognise
from tbptt_ckpt.module.trees import Tree, copy_containers, detach_state


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Evaluation:
    """What running a module over a sequence gave.

    Attributes:
        loss: Summed loss over summed weight; None if no step had a target that counts.
        weight: The summed weight: the number of loss steps where no weight is given, of steps
            of lanes where weights are per lane.
        num_steps: Steps run.
        state: The final state, of the last sequence where there are several.
        positions: What the loss weighs beside that of other lanes: positions of targets for a loss
            of torch's that is a mean, the weight of a `(loss_sum, weight)`, else steps of lanes.
    """

    loss: float | None
    weight: float
    num_steps: int
    state: Any = field(repr=False)
    positions: float = field(repr=False)


@checked
def evaluate(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    sequence: Sequences,
    init_state: Any = None,
    *,
    segment_steps: PositiveInt = 64,
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    lane_dim: Dimension | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> Evaluation:
    """Mean loss over a whole sequence, with the state carried through it.

    Module and loss run in eval mode and without gradients. Modes, buffers, gradients, random
    generators and the state of a training run are left as they were. Memory does not grow
    with the sequence: inputs and outputs exist for `segment_steps` steps at a time.

    Args:
        module: As for `TBPTT`.
        loss_fn: As for `TBPTT`.
        sequence: As for `TBPTT.train`, or `Batches`; weights and resets count as they do there.
        init_state: The state at step 0 of every sequence, and where lanes reset.
        segment_steps: Steps read at a time, and run at a time by segment modules.
        per_step: As for `TBPTT`.
        time_dim: As for `TBPTT`.
        lane_dim: As for `TBPTT`.
        autocast_dtype: As for `TBPTT`.

    Raises:
        ArgumentError: An argument that cannot work.
    """
    recurrence = recognise(module, per_step, time_dim, lane_dim)
    check_time_dim(recurrence, time_dim)
    runner = make_runner(recurrence, autocast_dtype)
    return run_evaluation(runner, LossFunction(loss_fn), sequence, init_state, segment_steps)


def run_evaluation(
    runner: Runner,
    loss_function: LossFunction,
    sequence: object,
    init_state: Tree,
    segment_steps: int,
) -> Evaluation:
    """`evaluate` for what is made and checked already."""
    owners = (runner.recurrence.module, loss_function.loss_fn)
    initial = detach_state(for_lanes(init_state, runner.recurrence.lane_dim))
    loss_sum = weight = positions = 0.0
    num_steps, state = 0, initial
    for each in sequences_of(sequence):
        reader = WindowReader(each, segment_steps, segment_steps, runner.recurrence)
        with in_eval_mode(*owners), torch.no_grad(), SilenceableHooks(), silent_hooks():
            found = _run(runner, loss_function, reader, initial, segment_steps)
        loss_sum, weight = loss_sum + found[0], weight + found[1]
        num_steps, state, positions = num_steps + found[2], found[3], positions + found[4]
    mean = loss_sum / weight if weight else None
    return Evaluation(
        loss=mean, weight=weight, num_steps=num_steps, state=state, positions=positions
    )


def _run(
    runner: Runner,
    loss_function: LossFunction,
    reader: WindowReader,
    initial: Tree,
    segment_steps: int,
) -> tuple[float, float, int, Tree, float]:
    """One pass over a sequence, piece by piece.

    Summed loss and weight, steps, final state, and what the loss weighs beside others.
    """
    module, lane_dim = runner.recurrence.module, runner.recurrence.lane_dim
    ambient = Ambient([module], parameters_of(module))
    position, state = 0, copy_containers(initial)
    loss_sum = weight = positions = 0.0
    reader.look_ahead(segment_steps)
    while reader.num_steps is None or position < reader.num_steps:
        stop = position + segment_steps
        reader.look_ahead(stop)
        stop = stop if reader.num_steps is None else min(stop, reader.num_steps)
        if stop == position:
            break  # the end turned out to lie here
        blocks = reader.window(position, stop)
        loss = WindowLoss(loss_function, blocks, position, stop, "sum")
        piece = WindowPass(
            blocks=blocks,
            first=position,
            start=stop,  # nothing is differentiated: all losses are constants
            stop=stop,
            loss_start=position,
            ambient=ambient,
            runner=runner,
            loss=loss,
            resets=Resets(blocks, initial, lane_dim),
        )
        runner.parts.look(blocks, position, state)
        state = piece.run(position, stop, state, piece.sink(graph=False))
        loss.ask(Numbers())
        if loss.has_losses and not loss.is_empty():
            loss_sum, weight = loss_sum + loss.loss_sum, weight + float(loss.weight)
            positions += loss.mean_positions
        position = stop
    return loss_sum, weight, position, detach_state(state), positions
