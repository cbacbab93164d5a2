"""The two classes of the forum thread, rewritten, beside the class that takes their place.

discuss.pytorch.org, topic 15500, "Implementing Truncated Backpropagation Through Time".
"""

from __future__ import annotations

import collections
from typing import Any

import naive
import pytest
import torch
from cases import EXECUTORS, OVERLAPS, clear_gradients, gradients, relative_error
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import TBPTT

LAYER_SIZE, LANES, NUM_STEPS = 50, 200, 20
K1, K2 = 5, 7


class FirstClass:
    """Retains the graphs of the last k2 steps; the loss of each k1-th step only."""

    def __init__(
        self,
        one_step_module: nn.Module,
        loss_module: nn.Module,
        k1: int,
        k2: int,
        optimizer: Any,
        *,
        clear_state_gradients: bool = False,
    ) -> None:
        self.one_step_module, self.loss_module = one_step_module, loss_module
        self.k1, self.k2, self.optimizer = k1, k2, optimizer
        self.clear_state_gradients = clear_state_gradients

    def train(self, input_sequence: Any, init_state: Tensor) -> None:
        self.states: list[tuple[Tensor | None, Tensor]] = [(None, init_state)]
        self.recent: list[tuple[Tensor, Tensor]] = []
        for number, (inp, target) in enumerate(input_sequence, start=1):
            state = self.states[-1][1].detach().requires_grad_()
            output, new_state = self.one_step_module(inp, state)
            self.states = [*self.states, (state, new_state)][-self.k2 :]
            self.recent = [*self.recent, (output, target)][-self.k1 :]
            if number % self.k1 == 0:
                if self.clear_state_gradients:
                    self.forget_state_gradients()
                self.optimizer.zero_grad()
                self.walk_back()
                self.optimizer.step()

    def forget_state_gradients(self) -> None:
        for state, _ in self.states:
            if state is not None:
                state.grad = None

    def walk_back(self) -> None:
        retain = self.k1 < self.k2
        output, target = self.recent[-1]
        self.loss_module(output, target).backward(retain_graph=retain)
        for i in range(self.k2 - 1):
            if self.states[-i - 2][0] is None:
                break
            self.states[-i - 2][1].backward(self.states[-i - 1][0].grad, retain_graph=retain)


class SecondClass(FirstClass):
    """Adds the losses of the last k1 outputs on the way back."""

    def walk_back(self) -> None:
        for i in range(self.k2):
            if i < self.k1:
                output, target = self.recent[-i - 1]
                self.loss_module(output, target).backward(retain_graph=True)
            if i + 2 > len(self.states) or self.states[-i - 2][0] is None:
                break
            self.states[-i - 2][1].backward(self.states[-i - 1][0].grad, retain_graph=True)


class Pool:
    """In an optimizer's place: zeroes and notes gradients, leaves the weights alone."""

    def __init__(self, parameters: Any) -> None:
        self.parameters, self.seen = list(parameters), []

    def zero_grad(self) -> None:
        clear_gradients(self.parameters)

    def step(self) -> None:
        self.seen.append(gradients(self.parameters))


class ForumModule(nn.Module):
    """One linear map of input and state, split into output and new state."""

    def __init__(self, layer_size: int) -> None:
        super().__init__()
        self.layer_size = layer_size
        self.linear = nn.Linear(2 * layer_size, 2 * layer_size)

    def forward(self, inp: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        full = self.linear(torch.cat([inp, state], 1))
        return full[:, : self.layer_size], full[:, self.layer_size :]


def small_module() -> ForumModule:
    torch.manual_seed(0)
    return ForumModule(4).double()


def small_sequence() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(NUM_STEPS, 2, 3, 4, generator=generator, dtype=torch.float64)
    return [(inp, target) for inp, target in data]


def small_state() -> Tensor:
    return torch.zeros(3, 4, dtype=torch.float64)


def forum_gradients(
    kind: type[FirstClass], k1: int, k2: int, *, clear: bool
) -> list[list[Tensor | None]]:
    module = small_module()
    pool = Pool(module.parameters())
    kind(module, nn.MSELoss(), k1, k2, pool, clear_state_gradients=clear).train(
        small_sequence(), small_state()
    )
    return pool.seen


def problem_of(module: nn.Module, sequence: Any, state: Tensor) -> naive.Problem:
    return naive.Problem(
        step=module,
        loss_fn=nn.MSELoss(),
        inputs=[inp for inp, _ in sequence],
        targets=[target for _, target in sequence],
        init_state=state,
        parameters=list(module.parameters()),
    )


# What the forum's classes do on current PyTorch.


@pytest.mark.parametrize("kind", [FirstClass, SecondClass])
def test_the_forums_class_fails_where_windows_overlap_and_weights_move(
    kind: type[FirstClass],
) -> None:
    module = small_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    runner = kind(module, nn.MSELoss(), K1, K2, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        runner.train(small_sequence(), small_state())


@pytest.mark.parametrize("clear", [False, True])
def test_the_forums_class_works_where_windows_do_not_overlap(clear: bool) -> None:
    module = small_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    FirstClass(module, nn.MSELoss(), K1, K1, optimizer, clear_state_gradients=clear).train(
        small_sequence(), small_state()
    )
    again = small_module()
    problem = problem_of(again, small_sequence(), small_state())
    moving = torch.optim.SGD(again.parameters(), lr=1e-3)
    for _ in naive.refresh(problem, K1, K1, loss="last", optimizer=moving):
        pass
    error = relative_error(list(module.parameters()), list(again.parameters()))
    assert error <= 1e-12


@pytest.mark.parametrize(("k1", "k2"), [(1, 4), (2, 5), (4, 7), (5, 7), (5, 20), (10, 13)])
@pytest.mark.parametrize("kind", [FirstClass, SecondClass])
def test_its_gradients_are_wrong_for_overlapping_windows_until_state_gradients_are_cleared(
    kind: type[FirstClass], k1: int, k2: int
) -> None:
    """A state's gradient is still there when a later window hands it on again.

    The gradient of a window's first state is not handed on, so `k2 = k1 + 1` is spared.
    """
    problem = problem_of(small_module(), small_sequence(), small_state())
    loss, reduction = ("last", "mean") if kind is FirstClass else ("new", "sum")
    exact = [w.grads for w in naive.refresh(problem, k1, k2, loss=loss, reduction=reduction)]

    def errors(clear: bool) -> list[float]:
        pairs = zip(forum_gradients(kind, k1, k2, clear=clear), exact, strict=True)
        return [relative_error(theirs, ours) for theirs, ours in pairs]

    uncleared = errors(clear=False)
    assert uncleared[0] <= 1e-12
    assert uncleared[-1] > 1e-3
    assert max(errors(clear=True)) <= 1e-12


# Our class in their place.


@covering(
    kind=[FirstClass, SecondClass],
    executor=EXECUTORS,
    overlap=OVERLAPS,
    reach=[(1, 1), (1, 4), (2, 5), (5, 7), (5, 20), (10, 10)],
)
def test_at_frozen_weights_ours_equals_the_forums_class(
    kind: type[FirstClass], executor: str, overlap: str, reach: tuple[int, int]
) -> None:
    k1, k2 = reach
    expected = forum_gradients(kind, k1, k2, clear=True)
    how = {"loss": "last"} if kind is FirstClass else {"loss": "new", "reduction": "sum"}
    for learning_rate in (None, 0.0):
        module = small_module()
        parameters = list(module.parameters())
        optimizer = learning_rate if learning_rate is None else torch.optim.SGD(parameters, lr=0.0)
        tbptt = TBPTT(
            module, nn.MSELoss(), k1, k2, optimizer, overlap=overlap, executor=executor, **how
        )
        results = tbptt.windows(small_sequence(), small_state())
        for window, theirs in zip(results, expected, strict=True):
            assert relative_error(gradients(parameters), theirs) <= 1e-12, window.index
            if optimizer is None:
                clear_gradients(parameters)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_with_the_defaults_ours_equals_the_naive_loop(executor: str) -> None:
    module = small_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    problem = problem_of(module, small_sequence(), small_state())
    expected = list(naive.refresh(problem, K1, K2, optimizer=optimizer))
    final = [p.detach() for p in module.parameters()]

    module = small_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    runner = TBPTT(module, nn.MSELoss(), K1, K2, optimizer, executor=executor)
    for result, window in zip(
        runner.windows(small_sequence(), small_state()), expected, strict=True
    ):
        assert relative_error(gradients(list(module.parameters())), window.grads) <= 1e-12
        assert relative_error([result.loss], [window.loss]) <= 1e-12
        assert result.drift == pytest.approx(window.drift, abs=1e-12)
    assert relative_error([p.detach() for p in module.parameters()], final) <= 1e-12


# The thread's example, hooks included. `idx` and `backward_calls` are its globals.

idx = 0
backward_calls = 0


class ExampleModule(ForumModule):
    def forward(self, inp: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        global idx
        output, new_state = super().forward(inp, state)

        def print_on_backward(number: int) -> Any:
            def hook(*_: Any) -> None:
                global backward_calls
                backward_calls += 1
                print(f"doing backward {number}")

            return hook

        output.register_hook(print_on_backward(idx))
        new_state.register_hook(print_on_backward(idx))
        print(f"doing forward {idx}")
        idx += 1
        return output, new_state


def example_script(trainer_class: Any) -> nn.Module:
    """The script as the thread has it; only the class differs."""
    torch.manual_seed(0)
    one_step_module = ExampleModule(LAYER_SIZE)
    loss_module = nn.MSELoss()
    input_sequence = [(torch.rand(LANES, LAYER_SIZE), torch.rand(LANES, LAYER_SIZE))] * NUM_STEPS
    optimizer = torch.optim.SGD(one_step_module.parameters(), lr=1e-3)

    runner = trainer_class(one_step_module, loss_module, K1, K2, optimizer)
    runner.train(input_sequence, torch.zeros(LANES, LAYER_SIZE))
    return one_step_module


def test_the_example_fails_with_the_forums_class() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        example_script(FirstClass)


def test_the_example_runs_unchanged_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    global idx, backward_calls
    idx = backward_calls = 0
    module = example_script(TBPTT)
    printed = capsys.readouterr().out.splitlines()
    # Windows [0, 5), [3, 10), [8, 15), [13, 20): each output with a loss, and each new state
    # but a window's last, gets one gradient.
    assert backward_calls == (5 + 4) + 3 * (5 + 6)
    assert sum(line.startswith("doing backward") for line in printed) == backward_calls
    assert sum(line.startswith("doing forward") for line in printed) == idx
    assert idx > NUM_STEPS

    torch.manual_seed(0)
    again = ForumModule(LAYER_SIZE)
    sequence = [(torch.rand(LANES, LAYER_SIZE), torch.rand(LANES, LAYER_SIZE))] * NUM_STEPS
    problem = problem_of(again, sequence, torch.zeros(LANES, LAYER_SIZE))
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-3)
    for _ in naive.refresh(problem, K1, K2, optimizer=optimizer):
        pass
    assert relative_error(list(module.parameters()), list(again.parameters())) <= 1e-6


class HookedModule(ForumModule):
    """Counts, per step, the gradients that arrive; a step's input carries its number."""

    def __init__(self) -> None:
        super().__init__(4)
        self.outputs: collections.Counter[int] = collections.Counter()
        self.states: collections.Counter[int] = collections.Counter()

    def forward(self, inp: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, new_state = super().forward(inp, state)
        step = int(inp[0, 0])
        output.register_hook(lambda _: self.outputs.update([step]))
        new_state.register_hook(lambda _: self.states.update([step]))
        return output, new_state


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", ["auto", "retain", "step", "uniform:2", "revolve:2"])
def test_hooks_fire_once_for_each_step_of_each_window(
    strategy: str, executor: str, overlap: str
) -> None:
    sequence = small_sequence()
    for step, (inp, _) in enumerate(sequence):
        inp[:, 0] = step
    torch.manual_seed(0)
    module = HookedModule().double()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    runner = TBPTT(
        module,
        nn.MSELoss(),
        K1,
        K2,
        optimizer,
        overlap=overlap,
        strategy=strategy,
        executor=executor,
    )
    for window in runner.windows(sequence, small_state()):
        # No gradient arrives at a window's last state, nor at outputs without a loss.
        assert module.states == collections.Counter(range(window.start, window.stop - 1))
        assert module.outputs == collections.Counter(range(window.new_start, window.stop))
        module.states.clear()
        module.outputs.clear()
