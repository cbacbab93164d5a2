"""Learned initial states, frozen parameters, inputs that require grad."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    WIDTH,
    bitwise,
    check_window,
    gradients,
    lstm,
    lstm_cell,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from models_for_tests import moving
from small_runs import K1, K2, NUM_STEPS, STRATEGIES, data
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

# Learned initial states


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("k2", [2, 7, None])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_learned_initial_state(
    overlap: str, executor: str, k2: int | None, optimized: bool
) -> None:
    """In the optimizer it moves with the weights; outside it only gets its gradients."""

    def learned() -> nn.Parameter:
        return nn.Parameter(random_state())

    inputs, targets = random_data(NUM_STEPS)
    reference, init = tanh_cell(), learned()
    problem = naive_problem(reference, inputs, targets, init, extra_parameters=[init])
    optimizer = moving(reference, *([init] if optimized else []))
    expected = list(naive.OVERLAPS[overlap](problem, K1, k2, optimizer=optimizer))

    module, init = tanh_cell(), learned()
    optimizer = moving(module, *([init] if optimized else []))
    tbptt = TBPTT(
        module,
        mean_loss,
        K1,
        k2,
        optimizer,
        overlap=overlap,
        executor=executor,
        strategy="uniform:2",
    )
    for result, window in zip(tbptt.windows(data(), init), expected, strict=True):
        grads = gradients([*module.parameters(), init])
        check_window("learned", result, grads, window, bitwise_state=False)
        assert (init.grad is None) == (result.start > 0)
    has_moved = not bitwise(init, random_state())
    assert has_moved == (optimized and k2 != 2)  # k2 < k1 never reaches back to the start


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_initial_state_computed_by_a_layer(overlap: str, executor: str) -> None:
    """With a graph of its own, and gradients that accumulate."""
    inputs, targets = random_data(NUM_STEPS)

    def encoder() -> nn.Linear:
        torch.manual_seed(5)
        return nn.Linear(4, WIDTH).double()

    context = torch.linspace(-1, 1, LANES * 4, dtype=torch.float64).view(LANES, 4)
    reference, layer = tanh_cell(), encoder()
    leaf = layer(context).detach().requires_grad_()
    problem = naive_problem(reference, inputs, targets, leaf)
    for _ in naive.OVERLAPS[overlap](problem, K1, None, zero_grad=False):
        pass
    layer(context).backward(leaf.grad)
    expected = gradients([*reference.parameters(), *layer.parameters()])

    module, layer = tanh_cell(), encoder()
    tbptt = TBPTT(module, mean_loss, K1, None, overlap=overlap, executor=executor)
    tbptt.train(data(), layer(context))
    actual = gradients([*module.parameters(), *layer.parameters()])
    assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("computed", [False, True])
def test_one_tensor_in_two_places_of_the_initial_state(computed: bool) -> None:
    """It gets the gradients of both places, each once."""

    def start(leaf: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.sin(leaf) if computed else leaf
        return h, h

    inputs, targets = random_data(NUM_STEPS)
    reference, leaf = lstm_cell(), random_state().requires_grad_()
    expected = torch.zeros_like(leaf)
    for _, new_start, stop in naive.windows(NUM_STEPS, K1, None):
        state, losses = start(leaf), []
        for step in range(stop):
            y, state = reference(inputs[step], state)
            losses.append(mean_loss(y, targets[step]))
        expected += torch.autograd.grad(sum(losses[new_start:]) / (stop - new_start), leaf)[0]

    module, leaf = lstm_cell(), random_state().requires_grad_()
    TBPTT(module, mean_loss, K1, None).train(data(), start(leaf))
    assert relative_error([leaf.grad], [expected]) <= 1e-12


def test_initial_state_is_not_changed_by_a_run() -> None:
    module, init = tanh_cell(), random_state()
    TBPTT(module, mean_loss, K1, K2, moving(module)).train(data(), init)
    assert bitwise(init, random_state())
    assert init.grad is None


# Frozen parameters, inputs that require grad


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_parameters_get_no_gradient(strategy: str, executor: str) -> None:
    inputs, targets = random_data(NUM_STEPS)

    def frozen() -> nn.Module:
        module = tanh_cell()
        module.readout.requires_grad_(False)
        return module

    reference, module = frozen(), frozen()
    problem = naive_problem(reference, inputs, targets, None)
    own = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.2)
    expected = naive.refresh(problem, K1, K2, optimizer=own)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.2)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, strategy=strategy, executor=executor)
    for result, window in zip(tbptt.windows(data()), expected, strict=True):
        assert all(p.grad is None for p in module.readout.parameters())
        grads = gradients(list(module.parameters()))
        check_window("frozen", result, grads, window, bitwise_state=False)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_initial_state_is_learned(strategy: str, executor: str) -> None:
    module, (inputs, targets) = tanh_cell().requires_grad_(False), random_data(NUM_STEPS)
    init = random_state().requires_grad_()
    problem = naive_problem(module, inputs, targets, init, extra_parameters=[init])
    *_, expected = naive.refresh(problem, K1, None, zero_grad=False)
    init = random_state().requires_grad_()
    TBPTT(module, mean_loss, K1, None, strategy=strategy, executor=executor).train(data(), init)
    assert relative_error([init.grad], expected.grads[-1:]) <= 1e-12


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_to_learn_is_no_error(strategy: str, executor: str) -> None:
    module = tanh_cell().requires_grad_(False)
    result = TBPTT(module, mean_loss, K1, K2, strategy=strategy, executor=executor).train(data())
    assert result.loss is not None
    assert all(p.grad is None for p in module.parameters())


def learned_inputs(kind: str) -> tuple[list[Tensor], Any]:
    """Leaf tensors that require grad, and the sequence that they are the inputs of."""
    inputs, targets = random_data(NUM_STEPS)
    if kind == "tensor":
        return [inputs.requires_grad_()], TensorSequence(inputs, targets)
    steps = [x.clone().requires_grad_() for x in inputs]
    pairs = list(zip(steps, targets, strict=True))
    return steps, (pairs if kind == "list" else iter(pairs))


@pytest.mark.parametrize("kind", ["tensor", "list", "generator"])
@pytest.mark.parametrize("k2", [4, None])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_leaf_inputs_get_the_gradient_of_plain_bptt(
    executor: str, k2: int | None, kind: str
) -> None:
    leaves, _ = learned_inputs("tensor")
    problem = naive_problem(tanh_cell(), leaves[0], random_data(NUM_STEPS)[1], None)
    for _ in naive.refresh(problem, K1, k2):
        pass
    expected = leaves[0].grad
    assert expected is not None
    leaves, sequence = learned_inputs(kind)
    tbptt = TBPTT(tanh_cell(), mean_loss, K1, k2, strategy="uniform:2", executor=executor)
    tbptt.train(sequence)
    actual = leaves[0].grad if kind == "tensor" else torch.stack([x.grad for x in leaves])
    assert relative_error([actual], [expected]) <= 1e-12


def test_leaf_inputs_of_a_segment_module_get_the_gradient_of_plain_bptt() -> None:
    inputs, targets = random_data(NUM_STEPS)
    inputs.requires_grad_()
    mean_loss(lstm()(inputs)[0], targets).backward()
    expected, inputs.grad = inputs.grad, None
    TBPTT(lstm(), mean_loss, NUM_STEPS, None, strategy="uniform:4").train(
        TensorSequence(inputs, targets)
    )
    assert relative_error([inputs.grad], [expected]) <= 1e-12
