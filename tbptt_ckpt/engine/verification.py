"""Does a plan give a user's own module the gradient of a plain loop?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from tbptt_ckpt.arguments import AboveZero, Dimension, checked
from tbptt_ckpt.data.blocks import StepBlock, to_time_dim
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.engine.options import ExecutorName
from tbptt_ckpt.engine.single_window import run_window
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.window_pass import Executor
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.first_call import call_first
from tbptt_ckpt.module.inside import is_layer, modules_in, owner_of
from tbptt_ckpt.module.recurrence import (
    Recurrence,
    following_time_dim,
    recognise,
    time_of,
)
from tbptt_ckpt.module.trees import Tree, state_as_leaves, tensors_of
from tbptt_ckpt.schedule.strategies import AnyStrategy

# Ten bits of a factor, over the steps and products of a window.
_OF_TF32 = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How far a plan is from a plain loop that retains everything.

    Attributes:
        loss_error: Relative difference of the losses.
        state_error: Relative difference of the final states.
        gradient_errors: Relative difference of each weight's gradient, by name.
        tolerance: The largest difference that counts as rounding.
        description: What was compared.
    """

    loss_error: float
    state_error: float
    gradient_errors: dict[str, float]
    tolerance: float
    description: str

    @property
    def max_relative_error(self) -> float:
        """The largest relative difference of a gradient."""
        return max(self.gradient_errors.values(), default=0.0)

    @property
    def ok(self) -> bool:
        """Whether all differences are rounding."""
        worst = max(self.loss_error, self.state_error, self.max_relative_error)
        return worst <= self.tolerance

    def __repr__(self) -> str:
        return f"Verification({self._verdict})"

    def __str__(self) -> str:
        lines = [self._verdict]
        rows = {"loss": self.loss_error, "final state": self.state_error, **self.gradient_errors}
        lines += [f"  {name:30s} {error:.1e}" for name, error in rows.items()]
        return "\n".join(lines)

    @property
    def _verdict(self) -> str:
        verdict = "equal to rounding" if self.ok else "DIFFERENT"
        return f"{self.description}: {verdict} (tolerance {self.tolerance:.1e})"


@checked
def verify(
    module: Callable[..., Any],
    loss_fn: Callable[[Any, Any], Any],
    inputs: Any,
    targets: Any,
    init_state: Any = None,
    *,
    strategy: AnyStrategy = "auto",
    executor: ExecutorName | Executor = "replay",
    per_step: bool | None = None,
    time_dim: Dimension | None = None,
    tolerance: AboveZero | None = None,
) -> Verification:
    """Compare a module under a plan with a plain loop that retains the whole graph.

    Use a short sequence: the plain loop holds all of it. Weights, gradients, buffers and
    random generators are left as they were. A module with inner dropout over whole segments
    draws other numbers when it is cut, and differs; set its dropout to 0.

    Args:
        module: As for `TBPTT`.
        loss_fn: As for `TBPTT`.
        inputs: Nested tensors with time on `time_dim`, such as [T, B, F].
        targets: The same.
        init_state: The state at the first step.
        strategy: As for `TBPTT`.
        executor: As for `TBPTT`.
        per_step: As for `TBPTT`.
        time_dim: Where time is; by default 1 for modules with `batch_first`, otherwise 0.
        tolerance: Largest relative difference; by default the square root of the machine epsilon,
            or 0.01 where products are in TF32, as cuDNN's are by default. To hold the module to
            float32, set `torch.backends.cudnn.allow_tf32 = False` before.

    Raises:
        ArgumentError: An argument that cannot work.
    """
    if targets is None:
        raise ArgumentError("targets=None leaves no loss to compare; give a target for every step")
    time_dim, recurrence = time_of(recognise(module, per_step, time_dim), time_dim, inputs)
    sequence = TensorSequence(inputs, targets, time_dim=time_dim)
    init_state = state_as_leaves(init_state)  # both runs differentiate it
    named = _named_parameters(module, loss_fn)
    tensors = [*named.values(), *tensors_of(init_state), *tensors_of(inputs)]
    with untouched(module, loss_fn, tensors=tensors) as start_over:
        loss, state = _plain_loop(recurrence, LossFunction(loss_fn), sequence, init_state)
        expected = [_grad(p) for p in named.values()]
        start_over()
        window = run_window(
            module,
            loss_fn,
            inputs,
            targets,
            init_state,
            strategy=strategy,
            executor=executor,
            per_step=per_step,
            time_dim=time_dim,
            check_replays=False,  # what differs is measured here
        )
        found = [_grad(p) for p in named.values()]
    planned_loss = torch.zeros_like(loss) if window.loss is None else window.loss
    in_tf32 = loss.dtype == torch.float32 and multiplies_in_tf32(module, loss.device)
    rounding = _OF_TF32 if in_tf32 else torch.finfo(loss.dtype).eps ** 0.5
    products = ", products in TF32" if in_tf32 else ""
    return Verification(
        loss_error=relative_difference([planned_loss], [loss]),
        state_error=relative_difference(tensors_of(window.state), tensors_of(state)),
        gradient_errors={
            name: relative_difference([ours], [theirs])
            for name, ours, theirs in zip(named, found, expected, strict=True)
        },
        tolerance=rounding if tolerance is None else tolerance,
        description=f"{len(sequence)} steps, strategy {strategy}, executor {executor}{products}",
    )


def multiplies_in_tf32(module: object, device: torch.device) -> bool:
    """Whether libraries may take float32 factors to ten bits, as Ampere and later cards can."""
    if device.type != "cuda" or not torch.cuda.is_tf32_supported():
        return False
    layers = [layer for _, layer in modules_in(module)]
    cudnn: Any = torch.backends.cudnn
    settings: list[Any] = [torch.backends.cuda.matmul]
    if not layers or any(map(is_layer, layers)):
        settings.append(cudnn.rnn)
    if not layers or any(isinstance(layer, _ConvNd) for layer in layers):
        settings.append(cudnn.conv)
    return any(setting.fp32_precision == "tf32" for setting in settings)


def _plain_loop(
    recurrence: Recurrence, loss: LossFunction, sequence: TensorSequence, state: Tree
) -> tuple[Tensor, Tree]:
    """Everything retained, one backward: the definition of the gradient."""
    block = StepBlock(0, len(sequence), sequence.inputs, sequence.targets, None, sequence.time_dim)
    losses = LossSum()
    call: Callable[[Any, Any], Any] = partial(call_first, recurrence)
    with torch.enable_grad():
        if recurrence.per_step:
            for inputs, target in zip(block.step_inputs(), block.step_targets(), strict=True):
                output, state = call(inputs, state)
                call = recurrence.call
                loss.add_step(losses, output, target, 1.0)
        else:
            time_dim = following_time_dim(recurrence.time_dim, sequence.inputs)
            inputs = to_time_dim(sequence.inputs, sequence.time_dim, time_dim)
            targets = to_time_dim(sequence.targets, sequence.time_dim, time_dim)
            outputs, state = call(inputs, state)
            loss.add_segment(losses, outputs, targets, None, len(sequence), time_dim)
        total = losses.value()
        assert total is not None, "every step has a target"
        value = total / loss.divisor(losses.weight or float(len(sequence)), len(sequence), "mean")
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach(), state


def _named_parameters(*owners: object) -> dict[str, torch.nn.Parameter]:
    named: dict[str, torch.nn.Parameter] = {}
    for prefix, owner in zip(("", "loss_fn."), map(owner_of, owners), strict=True):
        if isinstance(owner, torch.nn.Module):
            named.update((prefix + name, p) for name, p in owner.named_parameters())
    return named


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, all tensors together.

    Infinite where nothing is expected and something is found.
    """
    change, size = 0.0, 0.0
    for ours, theirs in zip(found, expected, strict=True):
        dtype = torch.complex128 if theirs.is_complex() else torch.float64
        ours, theirs = ours.detach().to(dtype), theirs.detach().to(dtype)
        change += float((ours - theirs).norm()) ** 2
        size += float(theirs.norm()) ** 2
    return 0.0 if change == 0.0 else (change / size) ** 0.5 if size else float("inf")
