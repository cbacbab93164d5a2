"""Modules as other people write them: against a plain loop, or refused with one clear error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    WIDTH,
    WIDTH_IN,
    check_window,
    clear_gradients,
    gradients,
    mean_loss,
    naive_problem,
    random_data,
    relative_error,
)
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, TbpttError, TensorSequence, run_window, unroll
from tbptt_ckpt.errors import ReplayMismatchError

STEPS = 11
STRATEGIES = ("retain", "uniform:2", "revolve:2")
SEVERAL = ("uniform:2", "revolve:2")


class Kept(nn.Module):
    """The state in an attribute, in a dict there, or in an object there."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH_IN, WIDTH)
        self.where, self.h, self.memories, self.box = where, None, {"v": [None]}, Box()

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.where == "attribute":
            h = self.h = self.cell(x, self.h)
        elif self.where == "dict":
            h = self.memories["v"][0] = self.cell(x, self.memories["v"][0])
        else:
            h = self.box.inside = self.cell(x, self.box.inside)
        return h, state


class Box:
    inside: Any = None


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


class Cached(nn.Module):
    """A state that is an object which holds objects with tensors."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.cell, self.wrap, self.unwrap = nn.GRUCell(WIDTH_IN, WIDTH), wrap, unwrap

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h = self.cell(x, None if state is None else self.unwrap(state))
        return h, self.wrap(h)


class Shadowed(nn.Module):
    """Leaves a shadow of its state in a buffer, and looks at the state or at the shadow."""

    def __init__(self, *, reads_buffer: bool = False) -> None:
        super().__init__()
        self.into, self.through = nn.Linear(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mem", torch.zeros(LANES, WIDTH))
        self.reads_buffer = reads_buffer

    def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        mem = self.mem if self.reads_buffer else mem
        both = torch.stack([torch.tanh(self.into(x) + self.through(mem)), x[:, :1] * mem])
        self.mem = both[0].view(LANES, WIDTH)  # of the same memory
        return both[1] + both[0], both[0]


class Logging(nn.Module):
    """Keeps what nobody reads, and reads what was there before the window."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH_IN, WIDTH)
        self.factor = nn.Parameter(torch.ones(WIDTH))
        self.scale, self.last, self.seen = None, None, []

    def forward(self, x: Tensor, h: Any) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        self.last = (h, 2 * h)
        self.seen.append(h)
        return h * self.scale, h


class Normed(nn.Module):
    """An embedding that renormalises the rows that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH_IN, max_norm=0.5)
        self.cell = nn.GRUCell(WIDTH_IN, WIDTH)

    def forward(self, i: Tensor, h: Any) -> tuple[Tensor, Tensor]:
        h = self.cell(self.embedding(i), h)
        return h, h


class Scripted(nn.Module):
    """With buffers, one in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH_IN + WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.steps = self.steps + 1
        h = torch.tanh(self.norm(self.linear(torch.cat([x, h], 1)))) / (1 + 0.1 * self.steps)
        return h, h


def made(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make().double()


def check(make: Callable[[], nn.Module], inputs: Tensor, targets: Tensor, state: Any) -> None:
    plain = made(make)
    problem = naive_problem(plain, inputs, targets, state)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = list(naive.refresh(problem, 3, 7, optimizer=optimizer))
    for strategy, executor, batching in itertools.product(STRATEGIES, EXECUTORS, (False, True)):
        module = made(make)
        how = {"strategy": strategy, "executor": executor, "time_batching": batching}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        tbptt = TBPTT(module, mean_loss, 3, 7, optimizer, **how)
        found = tbptt.windows(TensorSequence(inputs, targets), state)
        for window, wanted in zip(found, expected, strict=True):
            grads = gradients(list(module.parameters()))
            check_window(how, window, grads, wanted, bitwise_state=False)


@pytest.mark.parametrize("strategy", SEVERAL)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("where", ["attribute", "dict", "object"])
def test_a_state_in_attributes_is_refused(where: str, executor: str, strategy: str) -> None:
    inputs, targets = random_data(STEPS)
    module = made(lambda: Kept(where))
    with pytest.raises(TbpttError, match="belongs in the state"):
        run_window(module, mean_loss, inputs, targets, strategy=strategy, executor=executor)


@pytest.mark.parametrize("time_batching", [False, True])
@pytest.mark.parametrize("reach", [(1, 2), (1, 3), (2, 4), (3, 6), (2, 3)])
def test_a_state_in_attributes_is_refused_however_short_the_leaves_with_losses_are(
    reach: tuple[int, int], time_batching: bool
) -> None:
    """One that has all losses begins where an advance has left the attribute, without a graph."""
    inputs, targets = random_data(STEPS)
    for where, strategy in itertools.product(
        ("attribute", "object"), ("step", "uniform:2", "uniform:3", "revolve:2", "retain")
    ):
        module = made(lambda: Kept(where))  # noqa: B023 - called at once
        how: dict[str, Any] = {"strategy": strategy, "time_batching": time_batching}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with pytest.raises(TbpttError):
            TBPTT(module, mean_loss, *reach, optimizer, **how).train(
                TensorSequence(inputs, targets), None
            )


def test_unroll_refuses_a_state_in_attributes() -> None:
    outputs, _ = unroll(made(lambda: Kept("dict")), random_data(STEPS)[0], strategy="uniform:2")
    with pytest.raises(TbpttError, match=r"Kept.memories.v.*belongs in the state"):
        outputs.sum().backward()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_a_module_keeps_and_does_not_read_does_no_harm(executor: str) -> None:
    inputs, targets = random_data(STEPS)
    module, found = made(Logging), []
    for strategy in STRATEGIES:
        clear_gradients(list(module.parameters()))
        module.scale = module.factor.exp()  # computed before the window, and read in it
        if executor == "replay" and strategy != "retain":
            module.scale = module.scale.detach()
            clear_gradients([module.factor])
        run_window(module, mean_loss, inputs, targets, strategy=strategy, executor=executor)
        found.append([p.grad for p in module.cell.parameters()])
    assert all(relative_error(grads, found[0]) <= 1e-12 for grads in found)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda h: Slotted([Slotted(h)]), lambda s: s.inside[0].inside),
        (lambda h: Slotted({"layers": {1: (h,)}}), lambda s: s.inside["layers"][1][0]),
    ],
)
def test_objects_that_hold_tensors_at_any_depth_are_refused(
    executor: str, wrap: Any, unwrap: Any
) -> None:
    inputs, targets = random_data(STEPS)
    module = made(lambda: Cached(wrap, unwrap))
    for strategy in STRATEGIES:
        with pytest.raises(ArgumentError, match="Slotted with tensors in it"):
            run_window(module, mean_loss, inputs, targets, strategy=strategy, executor=executor)
    with pytest.raises(ArgumentError, match="Slotted with tensors in it"):
        unroll(module, inputs, strategy="uniform:2")


def test_a_buffer_may_be_a_shadow_of_the_state() -> None:
    check(Shadowed, *random_data(STEPS), torch.zeros(LANES, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_shadow_that_is_read_in_place_of_the_state_is_refused(executor: str) -> None:
    inputs, targets = random_data(STEPS)
    module, state = made(lambda: Shadowed(reads_buffer=True)), torch.zeros(LANES, WIDTH).double()
    for strategy in SEVERAL:
        how = {"strategy": strategy, "executor": executor}
        with pytest.raises(TbpttError, match="belongs in the state"):
            run_window(module, mean_loss, inputs, targets, state, **how)


def test_an_embedding_may_renormalise_what_it_reads() -> None:
    torch.manual_seed(1)
    check(Normed, torch.randint(0, 7, (STEPS, LANES)), random_data(STEPS)[1], None)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_modules_run_and_their_buffers_are_put_back() -> None:
    inputs, targets = random_data(STEPS)
    state = torch.zeros(LANES, WIDTH, dtype=torch.float64)
    plain = made(Scripted)
    expected = list(naive.refresh(naive_problem(plain, inputs, targets, state), 3, 7))
    for strategy, executor in itertools.product(STRATEGIES, EXECUTORS):
        module = torch.jit.script(made(Scripted))
        how = {"strategy": strategy, "executor": executor}
        weights = list(module.parameters())
        tbptt = TBPTT(module, mean_loss, 3, 7, torch.optim.SGD(weights, lr=0.0), **how)
        windows = tbptt.windows(TensorSequence(inputs, targets), state)
        for window, wanted in zip(windows, expected, strict=True):
            check_window(how, window, gradients(weights), wanted, bitwise_state=False)
        assert float(module.steps) == STEPS


class Inner(nn.Module):
    """Differentiates within a step, of the state as it is or detached."""

    def __init__(self, *, detached: bool, enabled: bool) -> None:
        super().__init__()
        self.cell, self.energy = nn.GRUCell(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.detached, self.enabled = detached, enabled

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self.enabled or torch.is_grad_enabled()):
            energy = self.energy(h.detach() if self.detached else h).square().sum()
            (grad,) = torch.autograd.grad(energy, self.energy.weight, create_graph=True)
        h = torch.tanh(self.cell(x, h) + self.energy(h))
        return h @ (self.energy.weight - 0.1 * grad), h


def inner_gradients(strategy: str, **how: Any) -> list[Tensor | None]:
    inputs, targets = random_data(STEPS)
    module, state = made(lambda: Inner(**how)), torch.ones(LANES, WIDTH, dtype=torch.float64)
    how = {"strategy": strategy, "time_batching": False}
    run_window(module, mean_loss, inputs, targets, state, **how)
    return gradients(list(module.parameters()))


def test_a_step_that_differentiates_is_told_what_to_do() -> None:
    with pytest.raises(TbpttError, match=r"torch.enable_grad\(\)"):
        inner_gradients("uniform:2", detached=True, enabled=False)
    for strategy in SEVERAL:
        found = inner_gradients(strategy, detached=True, enabled=True)
        expected = inner_gradients("retain", detached=True, enabled=True)
        assert relative_error(found, expected) <= 1e-12


def test_inner_gradients_that_reach_back_to_where_a_leaf_begins_are_an_error() -> None:
    """Through a state that is not detached they depend on the strategy."""
    inner_gradients("retain", detached=False, enabled=True)
    for strategy in ("step", *SEVERAL):
        with pytest.raises(ReplayMismatchError, match="how far back the graph"):
            inner_gradients(strategy, detached=False, enabled=True)


def test_a_counter_in_a_module_counts_every_run_of_a_step() -> None:
    class Counting(nn.GRUCell):
        calls = 0

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            self.calls += 1
            return super().forward(x, h)

    for strategy in STRATEGIES:
        module = made(lambda: Counting(WIDTH_IN, WIDTH))
        how = {"strategy": strategy, "check_replays": False}  # which runs some steps once more
        found = run_window(module, mean_loss, *random_data(STEPS), **how)
        assert module.calls == found.executed_steps


class Metric(nn.Module):
    """torchmetrics', as far as its attributes go: states are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self._update_count = list[Tensor](), 0
        self.total = torch.zeros((), dtype=torch.float64)

    def update(self, value: Tensor) -> None:
        self.total += value
        self.values.append(value)
        self._update_count += 1


Metric.__module__ = "torchmetrics.metric"


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_metric_in_a_module_counts_each_step_once(overlap: str, executor: str) -> None:
    class Measured(nn.GRUCell):
        def __init__(self) -> None:
            super().__init__(WIDTH_IN, WIDTH)
            self.metric = Metric()

        def forward(self, x: Tensor, h: Tensor | None) -> Tensor:
            self.metric.update(x.mean())
            return super().forward(x, h)

    inputs, targets = random_data(STEPS)
    budgets = (None, "1GiB") if executor == "replay" else (None,)
    for strategy, budget in itertools.product(STRATEGIES, budgets):
        module = made(Measured)
        how = {"strategy": strategy, "memory_budget": budget, "executor": executor}
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        tbptt = TBPTT(module, mean_loss, 3, 7, optimizer, overlap=overlap, **how)
        tbptt.train(TensorSequence(inputs, targets))
        assert module.metric._update_count == STEPS
        assert torch.equal(torch.stack(module.metric.values), inputs.mean((1, 2)))
        assert relative_error([module.metric.total], [inputs.mean((1, 2)).sum()]) <= 1e-12
