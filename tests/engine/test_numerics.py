"""What is owed bitwise, within one device, and what to 1e-12, in float64.

Per-step modules: states, outputs and per-step losses have the same bits under every
strategy; gradients agree to 1e-12, since a leaf is summed before it is added. The
checkpoint executor's single backward has the bits of plain BPTT. The same plan twice has
the same bits in everything. Fused modules agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    OVERLAPS,
    STRATEGIES,
    StepByStep,
    bitwise,
    check_window,
    clear_gradients,
    engine_sequence,
    gradients,
    lstm,
    lstm_cell,
    masked_loss,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
    twin,
)
from devices import placed
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, Revolve, TensorSequence, Uniform, run_window, unroll
from tbptt_ckpt.schedule import Sqrt, Step

pytestmark = pytest.mark.usefixtures("device")

NUM_STEPS, K1, K2 = 13, 3, 8
EVERY_STRATEGY = (*STRATEGIES, "auto", "uniform:5", "uniform:100", "revolve:7")


class Recorder:
    """A loss that notes the output and loss of every step; the target carries the step."""

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}

    def __call__(self, y: Tensor, target: dict[str, Tensor]) -> Tensor:
        step = int(target["step"])
        loss = F.mse_loss(y, target["value"])
        for noted, value in ((self.outputs, y), (self.losses, loss)):
            before = noted.setdefault(step, value.detach().clone())
            assert torch.equal(before, value), f"step {step} had another value in another run"
        return loss


def frozen_run(strategy: str, executor: str, overlap: str) -> tuple[Recorder, list[Any], list[Any]]:
    """Recorded losses, states and gradients per window, with frozen weights."""
    module, (inputs, targets) = lstm_cell(), random_data(NUM_STEPS)
    data = placed({"value": targets, "step": torch.arange(NUM_STEPS)})
    recorder, states, grads = Recorder(), [], []
    how = {"strategy": strategy, "executor": executor, "time_batching": False}
    tbptt = TBPTT(module, recorder, K1, K2, overlap=overlap, **how)
    for result in tbptt.windows(TensorSequence(inputs, data), None):
        states.append(result.state)
        grads.append(gradients(list(module.parameters())))
        clear_gradients(list(module.parameters()))
        assert result.drift == 0.0
    return recorder, states, grads


@covering(strategy=EVERY_STRATEGY, executor=EXECUTORS, overlap=OVERLAPS)
def test_states_outputs_and_step_losses_are_bitwise_equal_under_every_strategy(
    strategy: str, executor: str, overlap: str
) -> None:
    expected, expected_states, expected_grads = frozen_run("retain", "replay", overlap)
    recorder, states, grads = frozen_run(strategy, executor, overlap)
    assert sorted(recorder.losses) == list(range(NUM_STEPS))
    for step in range(NUM_STEPS):
        assert torch.equal(recorder.outputs[step], expected.outputs[step]), step
        assert torch.equal(recorder.losses[step], expected.losses[step]), step
    assert bitwise(states, expected_states)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert relative_error(ours, theirs) <= 1e-12


def plain_bptt(
    module: nn.Module, inputs: Tensor, targets: Tensor, state: Any
) -> tuple[Tensor, list[Tensor | None], Any]:
    losses = []
    for x, target in zip(inputs, targets, strict=True):
        y, state = module(x, state)
        losses.append(F.mse_loss(y, target))
    loss = torch.stack(losses).sum() / len(losses)
    loss.backward()
    return loss.detach(), gradients(list(module.parameters())), naive.mapped(Tensor.detach, state)


@pytest.mark.parametrize("make", [tanh_cell, lstm_cell])
@pytest.mark.parametrize(
    ("executor", "strategy"),
    [("replay", "retain"), *(("checkpoint", strategy) for strategy in EVERY_STRATEGY)],
)
def test_one_backward_has_the_bits_of_plain_bptt(executor: str, strategy: str, make: Any) -> None:
    module, (inputs, targets) = make(), random_data(NUM_STEPS)
    init = random_state().requires_grad_()
    start = init if make is tanh_cell else (init, init)
    loss, expected, state = plain_bptt(module, inputs, targets, start)
    expected_init = init.grad
    clear_gradients([*module.parameters(), init])
    how = {"strategy": strategy, "executor": executor, "time_batching": False}
    tbptt = TBPTT(module, mean_loss, NUM_STEPS, NUM_STEPS, **how)
    (result,) = tbptt.windows(TensorSequence(inputs, targets), start)
    assert bitwise(gradients(list(module.parameters())), expected)
    assert bitwise(init.grad, expected_init)
    assert bitwise(result.state, state)
    assert relative_error([result.loss], [loss]) <= 1e-12


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_checkpoint_executor_has_the_bits_of_retain_in_every_window(
    strategy: str, overlap: str
) -> None:
    """Even while weights move: equal gradients keep the weights equal."""
    plain = {"time_batching": False}
    expected = training_run("retain", "checkpoint", overlap, lstm_cell(), **plain)
    assert bitwise(training_run(strategy, "checkpoint", overlap, lstm_cell(), **plain), expected)


def training_run(
    strategy: str, executor: str, overlap: str, module: nn.Module, **options: Any
) -> list[Any]:
    """Everything a run gives, as nested tensors."""
    options |= {"overlap": overlap, "strategy": strategy, "executor": executor}
    inputs, targets = random_data(NUM_STEPS)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, **options)
    seen: list[Any] = []
    for result in tbptt.windows(TensorSequence(inputs, targets), None):
        drift = torch.tensor(result.drift, dtype=torch.float64)
        seen.append([result.loss, result.state, drift, gradients(list(module.parameters()))])
    return [*seen, [p.detach().clone() for p in module.parameters()]]


@covering(
    strategy=["retain", "uniform:3", "sqrt", "revolve:2"],
    executor=EXECUTORS,
    overlap=OVERLAPS,
    make=[lstm_cell, lstm],
)
def test_the_same_plan_twice_is_bitwise_equal_in_everything(
    strategy: str, executor: str, overlap: str, make: Any
) -> None:
    first = training_run(strategy, executor, overlap, make())
    assert bitwise(training_run(strategy, executor, overlap, make()), first)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("step", Step()),
        ("sqrt", Sqrt()),
        ("uniform:3", Uniform(3)),
        ("revolve:2", Revolve(2)),
    ],
)
def test_a_name_and_the_equal_object_are_the_same_strategy(name: str, strategy: Any) -> None:
    first = training_run(name, "replay", "refresh", lstm_cell())
    assert bitwise(training_run(strategy, "replay", "refresh", lstm_cell()), first)


@covering(
    together=1,
    overlap=OVERLAPS,
    executor=EXECUTORS,
    loss_fn=[mean_loss, masked_loss],
    reduction=["mean", "sum"],
    loss=["new", "last"],
)
def test_nn_lstm_under_every_segmentation_equals_itself_step_by_step(
    overlap: str, executor: str, loss_fn: Any, reduction: str, loss: str
) -> None:
    inputs, targets = random_data(NUM_STEPS)

    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.2)

    def run(module: nn.Module, strategy: str) -> Iterator[tuple[Any, Any]]:
        tbptt = TBPTT(
            module,
            loss_fn,
            K1,
            K2,
            optimizer_of(module),
            loss=loss,
            reduction=reduction,
            overlap=overlap,
            strategy=strategy,
            executor=executor,
            per_step=isinstance(module, StepByStep) or None,
        )
        for result in tbptt.windows(TensorSequence(inputs, targets), None):
            yield result, gradients(list(module.parameters()))

    module = lstm()
    problem = naive_problem(module, inputs, targets, None, loss_fn=loss_fn)
    loop = naive.OVERLAPS[overlap](
        problem, K1, K2, loss=loss, reduction=reduction, optimizer=optimizer_of(module)
    )
    expected = list(loop)
    candidates = [(lstm(), strategy) for strategy in EVERY_STRATEGY]
    for candidate, strategy in [*candidates, (StepByStep(lstm()), "uniform:3")]:
        for (result, grads), window in zip(run(candidate, strategy), expected, strict=True):
            where = (type(candidate).__name__, strategy)
            check_window(where, result, grads, window, bitwise_state=False)


def test_nn_lstm_with_ignored_positions_divides_by_the_weight_of_the_window() -> None:
    """The divisor belongs to the window, so unequal segments cannot change the mean."""
    inputs, targets = random_data(NUM_STEPS)
    targets[: NUM_STEPS // 2, 1] = 9.0  # most positions of the early segments are ignored

    def ignoring(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        mask = (target < 5.0).to(y.dtype)
        return (mask * (y - target).square()).sum(), mask.sum()

    module = lstm()
    y, _ = module(inputs)
    mask = targets < 5.0
    loss = (y - targets)[mask].square().sum() / mask.sum()
    loss.backward()
    expected = gradients(list(module.parameters()))
    for strategy in EVERY_STRATEGY:
        for executor in EXECUTORS:
            again, _ = twin(module, None)
            clear_gradients(list(again.parameters()))
            tbptt = TBPTT(again, ignoring, NUM_STEPS, None, strategy=strategy, executor=executor)
            (result,) = tbptt.windows(TensorSequence(inputs, targets), None)
            assert relative_error([result.loss], [loss.detach()]) <= 1e-12, (strategy, executor)
            grads = gradients(list(again.parameters()))
            assert relative_error(grads, expected) <= 1e-12, (strategy, executor)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_run_window_equals_plain_bptt(strategy: str, executor: str) -> None:
    module, (inputs, targets) = tanh_cell(), random_data(NUM_STEPS)
    init = random_state().requires_grad_()
    loss, expected, state = plain_bptt(module, inputs, targets, init)
    expected_init = init.grad
    clear_gradients([*module.parameters(), init])
    run = run_window(module, mean_loss, inputs, targets, init, strategy=strategy, executor=executor)
    assert bitwise(run.state, state)
    assert relative_error([run.loss], [loss]) <= 1e-12
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12
    assert relative_error([run.init_state_grad], [expected_init]) <= 1e-12


@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_unroll_is_differentiable_and_has_the_bits_of_the_plain_loop(strategy: str) -> None:
    module, (inputs, targets) = lstm_cell(), random_data(NUM_STEPS)
    init = random_state().requires_grad_()
    _, expected, state = plain_bptt(module, inputs, targets, (init, init))
    expected_init = init.grad
    clear_gradients([*module.parameters(), init])
    outputs, final = unroll(module, inputs, (init, init), strategy=strategy)
    losses = [F.mse_loss(y, target) for y, target in zip(outputs, targets, strict=True)]
    (torch.stack(losses).sum() / NUM_STEPS).backward()
    assert bitwise(naive.mapped(Tensor.detach, final), state)
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12
    assert relative_error([init.grad], [expected_init]) <= 1e-12


def test_unroll_of_nn_lstm_equals_the_module() -> None:
    module, (inputs, _) = lstm(), random_data(NUM_STEPS)
    y, (h, c) = module(inputs)
    outputs, state = unroll(module, inputs, strategy="uniform:4")
    assert relative_error([outputs.detach()], [y.detach()]) <= 1e-12
    assert relative_error(naive.tensors(state), [h.detach(), c.detach()]) <= 1e-12


def test_unroll_reads_nested_arrays() -> None:
    module, (inputs, _) = tanh_cell(), random_data(NUM_STEPS)
    expected, _ = unroll(module, inputs, strategy="uniform:4")
    arrays = {"x": inputs.cpu().numpy()}
    outputs, _ = unroll(lambda x, h: module(placed(x["x"]), h), arrays, strategy="uniform:4")
    assert torch.equal(outputs, expected)


def test_losses_in_float32_stay_close_to_float64() -> None:
    """The dtype is the module's; nothing is silently widened or narrowed."""
    module, (inputs, targets) = tanh_cell().float(), random_data(NUM_STEPS)
    tbptt = TBPTT(module, mean_loss, K1, K2, strategy="uniform:2")
    sequence = engine_sequence(inputs.float(), targets.float())
    problem = naive_problem(tanh_cell(), inputs, targets, None)
    pairs = zip(tbptt.windows(sequence, None), naive.refresh(problem, K1, K2), strict=True)
    for result, window in pairs:
        assert result.loss.dtype == torch.float32
        assert result.state.dtype == torch.float32
        assert relative_error([result.loss.double()], [window.loss]) <= 1e-5
