"""Hooks on weights and states see the gradients that they see in a plain loop over the window."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    WIDTH,
    WIDTH_IN,
    check_window,
    clear_gradients,
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
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence, run_window
from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.updates.collected import _leaves_of

STEPS = 11


def clamped(weight: Tensor) -> None:
    weight.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))


def normalised(weight: Tensor) -> None:
    weight.register_hook(lambda grad: grad / (1e-3 + grad.norm()))


def clamped_later(weight: Tensor) -> None:
    def clamp(weight: Tensor) -> None:
        weight.grad.clamp_(-1e-2, 1e-2)

    weight.register_post_accumulate_grad_hook(clamp)


def several(weight: Tensor) -> None:
    weight.register_hook(lambda grad: grad.sign() + grad)
    clamped(weight)
    clamped_later(weight)


HOOKS = (several, *(pytest.param(h, marks=pytest.mark.exhaustive) for h in (clamped, normalised)))


def state_for(module: nn.Module) -> Any:
    h = random_state()
    if isinstance(module, nn.LSTM):
        return (h[None], 0.3 * h[None])
    return (h, 0.3 * h) if hasattr(module, "cell") else h


def hooked(make: Callable[[], nn.Module], hook: Callable[[Tensor], None]) -> nn.Module:
    module = make()
    for weight in module.parameters():
        hook(weight)
    return module


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("make", [tanh_cell, lstm_cell, lstm])
def test_hooks_see_the_gradient_of_a_window(
    make: Callable[[], nn.Module], overlap: str, hook: Callable[[Tensor], None]
) -> None:
    inputs, targets = random_data(STEPS)
    plain = hooked(make, hook)
    problem = naive_problem(plain, inputs, targets, state_for(plain))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = list(naive.OVERLAPS[overlap](problem, 3, 7, optimizer=optimizer))
    for strategy, executor, batching in itertools.product(
        ("retain", "uniform:2", "revolve:2"), EXECUTORS, (False, True)
    ):
        module = hooked(make, hook)
        how = {"strategy": strategy, "executor": executor, "time_batching": batching}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        tbptt = TBPTT(module, mean_loss, 3, 7, optimizer, overlap=overlap, **how)
        found = tbptt.windows(TensorSequence(inputs, targets), state_for(module))
        for window, wanted in zip(found, expected, strict=True):
            grads = gradients(list(module.parameters()))
            check_window(how, window, grads, wanted, bitwise_state=False)


def test_hooks_run_once_for_each_window_and_in_the_order_of_plain_bptt() -> None:
    def order_in(run: Callable[[nn.Module], object]) -> list[str]:
        module, seen = lstm_cell(), []
        for name, weight in module.named_parameters():
            weight.register_hook(lambda _, name=name: seen.append(name))
            weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
        run(module)
        return seen

    inputs, targets = random_data(STEPS)

    def plainly(module: nn.Module) -> None:
        list(naive.refresh(naive_problem(module, inputs, targets, None), STEPS, None))

    expected = order_in(plainly)
    assert len(expected) == 2 * len(list(lstm_cell().parameters()))
    for strategy, executor in itertools.product(("uniform:3", "step"), EXECUTORS):
        how = {"strategy": strategy, "executor": executor}
        assert order_in(lambda m, h=how: run_window(m, mean_loss, inputs, targets, **h)) == expected


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_optimizer_may_step_in_a_hook(executor: str) -> None:
    inputs, targets = random_data(STEPS)

    def stepping() -> nn.Module:
        module = lstm_cell()
        optimizers = {w: torch.optim.Adam([w], lr=0.05) for w in module.parameters()}

        def step(weight: Tensor) -> None:
            optimizers[weight].step()
            weight.grad = None

        for weight in module.parameters():
            weight.register_post_accumulate_grad_hook(step)
        return module

    plain, module = stepping(), stepping()
    wanted = list(naive.refresh(naive_problem(plain, inputs, targets, None), 3, 7))
    tbptt = TBPTT(module, mean_loss, 3, 7, strategy="uniform:2", executor=executor)
    for window, expected in zip(
        tbptt.windows(TensorSequence(inputs, targets)), wanted, strict=True
    ):
        assert relative_error([window.loss], [expected.loss]) <= 1e-12
    weights = list(module.parameters())
    assert relative_error(weights, list(plain.parameters())) <= 1e-12
    assert all(weight.grad is None for weight in weights)


def test_what_was_in_grad_is_added_to() -> None:
    inputs, targets = random_data(STEPS)
    plain, module = (hooked(tanh_cell, several) for _ in range(2))
    problem = naive_problem(plain, inputs, targets, random_state())
    list(naive.refresh(problem, 3, 7, zero_grad=False))
    earlier = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    for name, weight in module.named_parameters():
        weight.grad = earlier[name]
    tbptt = TBPTT(module, mean_loss, 3, 7, strategy="uniform:2")
    tbptt.train(TensorSequence(inputs, targets), random_state())
    assert (
        relative_error(gradients(list(module.parameters())), gradients(problem.parameters)) <= 1e-12
    )
    for name, weight in module.named_parameters():
        assert weight.grad is earlier[name]  # in place, as plain PyTorch adds


def test_a_group_of_windows_hands_over_each_of_them() -> None:
    inputs, targets = random_data(STEPS)
    plain, module = (hooked(tanh_cell, normalised) for _ in range(2))
    problem = naive_problem(plain, inputs, targets, random_state())
    expected = [window.grads for window in naive.refresh(problem, 4, 7)][:2]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    tbptt = TBPTT(module, mean_loss, 4, 7, optimizer, strategy="step", accumulate=2)
    windows = tbptt.windows(TensorSequence(inputs, targets), random_state())
    next(windows), next(windows)
    mean = [(one + other) / 2 for one, other in zip(*expected, strict=True)]
    assert relative_error(gradients(list(module.parameters())), mean) <= 1e-12


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_hook_on_an_incoming_state_that_is_also_the_output(overlap: str, executor: str) -> None:
    class Clamping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH_IN + WIDTH, WIDTH)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            if h.requires_grad:
                h.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3) + 0.5 * grad)
            h = torch.tanh(self.linear(torch.cat([x, h], 1)))
            if h.requires_grad:
                h.register_hook(lambda grad: 1.5 * grad)
            return h, h

    torch.manual_seed(0)
    module = Clamping().double()
    inputs, targets = random_data(STEPS)
    problem = naive_problem(module, inputs, targets, random_state())
    expected = list(naive.OVERLAPS[overlap](problem, 3, 7))
    for strategy in ("retain", "uniform:2", "step", "revolve:2"):
        how = {"strategy": strategy, "executor": executor, "overlap": overlap}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        tbptt = TBPTT(module, mean_loss, 3, 7, optimizer, **how)
        found = tbptt.windows(TensorSequence(inputs, targets), random_state())
        for window, wanted in zip(found, expected, strict=True):
            grads = gradients(problem.parameters)
            check_window(how, window, grads, wanted, bitwise_state=False)


def test_a_learned_state_that_lanes_reset_to_is_handed_over_once() -> None:
    inputs, targets = random_data(STEPS)
    resets = torch.zeros(STEPS, LANES, dtype=torch.bool)
    resets[5, 1] = resets[8, 0] = True
    module, seen = tanh_cell(), []
    init = nn.Parameter(random_state())
    init.register_hook(lambda grad: seen.append(grad) or grad.clamp(-1e-2, 1e-2))
    total, h = torch.zeros(()), init
    for t in range(STEPS):
        h = torch.where(resets[t][:, None], init, h)
        y, h = module(inputs[t], h)
        total = total + mean_loss(y, targets[t]) / STEPS
    total.backward()
    expected, init.grad = init.grad, None
    clear_gradients(list(module.parameters()))
    seen.clear()
    tbptt = TBPTT(module, mean_loss, STEPS, None, strategy="uniform:2")
    tbptt.train(TensorSequence(inputs, targets, resets=resets), init)
    assert len(seen) == 1
    assert relative_error([init.grad], [expected]) <= 1e-12


def test_a_functions_weights_are_known_by_the_optimizer() -> None:
    inputs, targets = random_data(STEPS)
    plain, module = (hooked(tanh_cell, normalised) for _ in range(2))
    problem = naive_problem(plain, inputs, targets, random_state())
    expected = [window.grads for window in naive.refresh(problem, 4, 7)]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    tbptt = TBPTT(lambda x, h: module(x, h), mean_loss, 4, 7, optimizer, strategy="uniform:3")
    for _, wanted in zip(
        tbptt.windows(TensorSequence(inputs, targets), random_state()), expected, strict=True
    ):
        assert relative_error(gradients(list(module.parameters())), wanted) <= 1e-12


def test_sparse_gradients_are_handed_over() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, WIDTH, sparse=True)
            self.embedding.weight.register_hook(lambda grad: 2 * grad)

        def forward(self, i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.embedding(i) + 0.5 * h)
            return h, h

    torch.manual_seed(0)
    module, ids = Embedded().double(), torch.randint(0, 9, (STEPS, LANES))
    targets, found = random_data(STEPS)[1], []
    for strategy in ("retain", "uniform:3"):
        clear_gradients(list(module.parameters()))
        run_window(module, mean_loss, ids, targets, random_state(), strategy=strategy)
        assert module.embedding.weight.grad.is_sparse
        found.append(module.embedding.weight.grad.to_dense())
    assert relative_error([found[1]], [found[0]]) <= 1e-12


def test_hooks_and_gradients_come_back_whatever_happens() -> None:
    inputs, targets = random_data(STEPS)
    module, calls = tanh_cell(), []
    weight = module.recurrence.weight
    handle = weight.register_hook(lambda _: calls.append("hook"))
    weight.register_post_accumulate_grad_hook(lambda _: calls.append("later"))
    before = weight.grad = torch.ones_like(weight)

    def failing(y: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(y, target)
        if target is not targets and len(failures) == 0 and loss.requires_grad:
            y.register_hook(lambda _: failures.append(1 / 0))
        return loss

    failures: list[float] = []
    with pytest.raises(ZeroDivisionError):
        run_window(module, failing, inputs, targets, random_state(), strategy="uniform:3")
    assert weight.grad is before
    assert torch.equal(before, torch.ones_like(before))
    assert calls == []
    handle.remove()
    mean_loss(*module(inputs[0], random_state())).backward()
    assert calls == ["later"]


def test_no_hook_runs_while_steps_are_measured() -> None:
    inputs, targets = random_data(STEPS)
    module, calls = tanh_cell(), []
    for weight in module.parameters():
        weight.register_post_accumulate_grad_hook(calls.append)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    tbptt = TBPTT(module, mean_loss, STEPS, None, optimizer, memory_budget="64MiB")
    tbptt.train(TensorSequence(inputs, targets), random_state())
    assert len(calls) == len(list(module.parameters()))


def test_a_budget_counts_what_waits() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.table = nn.Linear(64, 512)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.linear(h) + x)
            return self.table(h).mean(1, keepdim=True), h

    def planned(*, hooks: bool) -> TBPTT:
        torch.manual_seed(0)
        module = Wide()
        for weight in module.parameters() if hooks else ():
            clamped(weight)
        return TBPTT(module, mean_loss, 40, None, memory_budget="2MiB", measure_memory=True)

    x, y = torch.randn(40, 4, 64), torch.randn(40, 4, 1)
    waits = 4 * (64 * 64 + 64 + 512 * 64 + 512)
    fixed = []
    for hooks in (False, True):
        tbptt = planned(hooks=hooks)
        for _ in range(2):  # gradients accumulate
            (window,) = tbptt.windows(TensorSequence(x, y), torch.zeros(4, 64))
            assert window.peak_bytes <= 2 * 2**20
        fixed.append(tbptt.parts.budget._present._last[1].fixed.total(40))
    assert waits <= fixed[1] - fixed[0] <= waits + 1024


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("make", [tanh_cell, lstm_cell, lstm])
def test_delivered_once_what_hangs_on_accumulation_sees_a_window(
    make: Callable[[], nn.Module], executor: str
) -> None:
    inputs, targets = random_data(STEPS)
    plain = make()
    expected = list(naive.refresh(naive_problem(plain, inputs, targets, state_for(plain)), 3, 7))
    for strategy, batching in itertools.product(
        ("retain", "uniform:2", "revolve:2"), (False, True)
    ):
        module, seen = make(), []
        weights = list(module.parameters())
        nodes = [torch.autograd.graph.get_gradient_edge(weight).node for weight in weights]
        for node in nodes:
            node.register_hook(lambda *_, s=seen: s.append("node"))
        together = torch.autograd.graph.register_multi_grad_hook(weights, seen.append)
        how = {"strategy": strategy, "executor": executor, "time_batching": batching}
        optimizer = torch.optim.SGD(weights, lr=0.0)
        tbptt = TBPTT(module, mean_loss, 3, 7, optimizer, deliver="once", **how)
        found = tbptt.windows(TensorSequence(inputs, targets), state_for(module))
        for window, wanted in zip(found, expected, strict=True):
            check_window(how, window, gradients(weights), wanted, bitwise_state=False)
            assert seen.count("node") == len(weights)
            assert len(seen) == len(weights) + 1
            seen.clear()
        together.remove()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_delivered_once_other_leaves_get_their_gradients(executor: str) -> None:
    """Inputs, weights that only a function knows, and first states, with their own hooks."""
    torch.manual_seed(0)
    hidden = nn.Parameter(0.3 * torch.randn(WIDTH_IN + WIDTH, WIDTH, dtype=torch.float64))
    table = nn.Embedding(9, WIDTH_IN, sparse=True, dtype=torch.float64)
    scale = torch.randn(LANES, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs, targets = random_data(STEPS)
    inputs.requires_grad_()
    ids = torch.randint(0, 9, (STEPS, LANES))
    calls: list[Tensor] = []
    inputs.register_post_accumulate_grad_hook(calls.append)

    def step(x: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(torch.cat([x[0] + table(x[1]), h], 1) @ hidden)
        return h, h

    leaves = [hidden, table.weight, scale, inputs]
    total, h = torch.zeros(()), scale * scale
    for t in range(STEPS):
        y, h = step((inputs[t], ids[t]), h)
        total = total + mean_loss(y, targets[t]) / STEPS
    total.backward()
    expected = [leaf.grad.to_dense() for leaf in leaves]
    for strategy in ("retain", "uniform:2"):
        clear_gradients(leaves)
        calls.clear()
        how = {"strategy": strategy, "executor": executor, "deliver": "once"}
        tbptt = TBPTT(step, mean_loss, STEPS, None, **how)
        tbptt.train(TensorSequence((inputs, ids), targets), scale * scale)
        assert relative_error([leaf.grad.to_dense() for leaf in leaves], expected) <= 1e-12
        assert calls


class Experts(nn.Module):
    """Each step takes one of several unnamed weights, in graphs of one form; one passes a part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(WIDTH_IN, WIDTH, dtype=torch.float64)
        experts = [0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)]
        self.find = lambda which: experts[which]  # a closure that nobody looks into
        for expert in experts:
            expert.requires_grad_()

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, kept, count = state
        h = torch.tanh(self.inner(x) + h @ self.find(int(count) // 3))
        return h + kept, (h, kept, count + 1)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", ["uniform:1", "uniform:2", "revolve:2"])
def test_delivered_once_unnamed_weights_of_later_leaves_get_their_gradients(
    executor: str, strategy: str
) -> None:
    inputs, targets = random_data(STEPS)

    def grads(run: Callable[[nn.Module, Any], object]) -> list[Tensor]:
        module = Experts()
        run(module, (random_state(), random_state(3), torch.zeros((), dtype=torch.long)))
        return [weight.grad for weight in (*module.parameters(), *map(module.find, range(4)))]

    def plainly(module: nn.Module, state: Any) -> None:
        losses = []
        for x, target in zip(inputs, targets, strict=True):
            y, state = module(x, state)
            losses.append(mean_loss(y, target))
        (sum(losses) / len(losses)).backward()

    expected = grads(plainly)
    how = {"strategy": strategy, "executor": executor, "deliver": "once"}
    found = grads(lambda m, s: run_window(m, mean_loss, inputs, targets, s, **how))
    assert relative_error(found, expected) <= 1e-12


def test_a_graph_leads_to_each_leaf_once_also_where_it_begins_at_one() -> None:
    one, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    leaves = _leaves_of([one, one * other, (one + other).sum(), other.detach() * one, one])
    assert {id(leaf) for leaf in leaves} == {id(one), id(other)}
    assert len(leaves) == 2


def test_delivered_once_a_state_kept_elsewhere_is_an_error() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.kept = nn.Linear(WIDTH_IN + WIDTH, WIDTH), None

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            before = h if self.kept is None else self.kept
            self.kept = torch.tanh(self.linear(torch.cat([x, before], 1)))
            return self.kept, h

    inputs, targets = random_data(STEPS)
    for deliver, executor in itertools.product(("auto", "once"), EXECUTORS):
        how = {"strategy": "uniform:2", "deliver": deliver, "executor": executor}
        with pytest.raises(TbpttError):
            run_window(Keeping().double(), mean_loss, inputs, targets, random_state(), **how)


def test_how_to_deliver_is_checked() -> None:
    with pytest.raises(ArgumentError, match="deliver='twice'"):
        TBPTT(tanh_cell(), mean_loss, 3, 7, deliver="twice")
