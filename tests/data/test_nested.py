"""Inputs, targets and states of every nesting a user may bring."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    bitwise,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from grids import covering
from models_for_tests import Seen, check_same_windows, flat, moving, observe
from runs_of_data import NUM_STEPS, RECURRENT, make_module, run, steps_of
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

# Nested inputs and targets


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Parts:
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class FrozenParts:
    first: Tensor
    second: Tensor


NESTINGS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "tuple": (lambda a, b: (a, b), lambda n: (n[0], n[1])),
    "list": (lambda a, b: [a, b], lambda n: (n[0], n[1])),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda n: (n["a"], n["b"])),
    "deep": (lambda a, b: {"a": (a,), "b": [{"c": b}]}, lambda n: (n["a"][0], n["b"][0]["c"])),
    "named_tuple": (Pair, lambda n: (n.first, n.second)),
    "dataclass": (Parts, lambda n: (n.first, n.second)),
    "frozen_dataclass": (FrozenParts, lambda n: (n.first, n.second)),
}


class NestedCell(nn.Module):
    """Takes its input in two parts and gives its output in two."""

    def __init__(self, nesting: str, module: nn.Module) -> None:
        super().__init__()
        (self.nest, self.split), self.module = NESTINGS[nesting], module

    def forward(self, x: Any, state: Any) -> Any:
        y, state = self.module(torch.cat(self.split(x), -1), state)
        return self.nest(y[..., :1], y[..., 1:]), state


def nested_loss(nesting: str) -> Callable[[Any, Any], Tensor]:
    _, split = NESTINGS[nesting]
    return lambda y, target: mean_loss(torch.cat(split(y), -1), torch.cat(split(target), -1))


@covering(source=["tensors", "list", "generator"], kind=RECURRENT, nesting=NESTINGS)
def test_nested_inputs_outputs_and_targets(nesting: str, kind: str, source: str) -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(make_module(kind), TensorSequence(inputs, targets))
    nest, _ = NESTINGS[nesting]
    nested = nest(inputs[..., :1], inputs[..., 1:]), nest(targets[..., :1], targets[..., 1:])
    if source == "tensors":
        sequence: Any = TensorSequence(*nested)
    else:
        sequence = [
            (nest(x[..., :1], x[..., 1:]), nest(y[..., :1], y[..., 1:]))
            for x, y in zip(inputs, targets, strict=True)
        ]
        sequence = iter(sequence) if source == "generator" else sequence
    actual = run(
        NestedCell(nesting, make_module(kind)),
        sequence,
        loss_fn=nested_loss(nesting),
        per_step=kind == "cell",
    )
    check_same_windows(actual, expected, tolerance=1e-12 if kind == "lstm" else 0.0)


@pytest.mark.parametrize("kind", RECURRENT)
def test_nested_arrays_with_time_in_the_middle(kind: str) -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(make_module(kind), TensorSequence(inputs, targets))
    arrays = {
        "a": inputs[..., :1].transpose(0, 1).numpy(),
        "b": inputs[..., 1:].transpose(0, 1).numpy(),
    }
    goals = {
        "a": targets[..., :1].transpose(0, 1).numpy(),
        "b": targets[..., 1:].transpose(0, 1).numpy(),
    }
    actual = run(
        NestedCell("dict", make_module(kind)),
        TensorSequence(arrays, goals, time_dim=1),
        loss_fn=nested_loss("dict"),
        per_step=kind == "cell",
    )
    check_same_windows(actual, expected, tolerance=1e-12)


@pytest.mark.parametrize("source", ["tensors", "steps"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_arrays_in_any_nesting(nesting: str, source: str) -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(tanh_cell(), TensorSequence(inputs, targets))
    nest, _ = NESTINGS[nesting]

    def arrays(tensor: Tensor) -> Any:
        return nest(tensor[..., :1].numpy(), tensor[..., 1:].numpy())

    sequence: Any = TensorSequence(arrays(inputs), arrays(targets))
    if source == "steps":
        sequence = [(arrays(x), arrays(y)) for x, y in zip(inputs, targets, strict=True)]
    actual = run(NestedCell(nesting, tanh_cell()), sequence, loss_fn=nested_loss(nesting))
    check_same_windows(actual, expected)


def test_steps_of_different_shapes() -> None:
    """Each step has its own number of points, which the module sums."""
    generator = torch.Generator().manual_seed(4)
    counts = [1, 4, 2, 2, 3, 1, 1, 5, 2, 4, 3, 3, 2]
    _, targets = random_data(NUM_STEPS)
    points = [
        torch.randn(LANES, count, WIDTH_IN, generator=generator, dtype=torch.float64)
        for count in counts
    ]

    class SetCell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = tanh_cell()

        def forward(self, x: Tensor, h: Any) -> Any:
            return self.cell(x.sum(1), h)

    expected = run(tanh_cell(), [(x.sum(1), y) for x, y in zip(points, targets, strict=True)])
    for make in (list, iter):
        sequence = make(list(zip(points, targets, strict=True)))
        check_same_windows(run(SetCell(), sequence), expected)


def test_targets_of_different_shapes() -> None:
    """A target says which of the outputs it is about; all of a window's elements count alike."""
    inputs, targets = random_data(NUM_STEPS)
    widths = [1 + t % WIDTH for t in range(NUM_STEPS)]

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return mean_loss(y[:, : target.shape[1]], target)

    def counted(y: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return (y[:, : target.shape[1]] - target).square().sum(), target.numel()

    sequence = [(x, y[:, :w]) for x, y, w in zip(inputs, targets, widths, strict=True)]
    reference = tanh_cell()
    problem = naive_problem(reference, inputs, targets, None, loss_fn=counted)
    problem.targets = [y for _, y in sequence]
    expected = naive.refresh(problem, 3, 7, optimizer=moving(reference))
    for seen, window in zip(run(tanh_cell(), sequence, loss_fn=loss_fn), expected, strict=True):
        assert relative_error(seen.grads, window.grads) <= 1e-12
        assert relative_error([seen.loss], [window.loss]) <= 1e-12


def test_python_numbers_as_inputs_and_targets() -> None:
    values = [0.5, -1.0, 0.25, 2.0, 0.0, 1.5, -0.5]

    class ScalarCell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

        def forward(self, x: Any, h: Any) -> Any:
            h = torch.tanh(self.weight[0] * x + (0.0 if h is None else self.weight[1] * h))
            return h, h

    def loss_fn(y: Tensor, target: Any) -> Tensor:
        return (y - target) ** 2

    tensors = [(torch.tensor(x, dtype=torch.float64), torch.tensor(-x).double()) for x in values]
    expected = run(ScalarCell(), tensors, 2, 4, loss_fn=loss_fn)
    check_same_windows(
        run(ScalarCell(), [(x, -x) for x in values], 2, 4, loss_fn=loss_fn), expected
    )


def test_steps_without_input() -> None:
    """An input None is handed to the module like any other."""
    _, targets = random_data(NUM_STEPS)

    class Autonomous(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = tanh_cell()

        def forward(self, x: Any, h: Any) -> Any:
            x = torch.zeros(LANES, WIDTH_IN, dtype=torch.float64) if x is None else x
            return self.cell(x, h)

    zeros = torch.zeros(NUM_STEPS, LANES, WIDTH_IN, dtype=torch.float64)
    expected = run(Autonomous(), TensorSequence(zeros, targets))
    check_same_windows(run(Autonomous(), [(None, y) for y in targets]), expected)


def test_tokens_as_inputs_and_class_indices_as_targets() -> None:
    """Integers: [T, B] of them, or one tensor of lanes per step."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(5, (NUM_STEPS + 1, LANES), generator=generator)

    class TokenModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(8)
            self.embedding, self.cell = nn.Embedding(5, WIDTH_IN), nn.GRUCell(WIDTH_IN, 5)
            self.double()

        def forward(self, x: Tensor, h: Any) -> Any:
            h = self.cell(self.embedding(x), h)
            return h, h

    expected = run(TokenModel(), TensorSequence(tokens[:-1], tokens[1:]), loss_fn=F.cross_entropy)
    steps = steps_of(tokens[:-1], tokens[1:])
    check_same_windows(run(TokenModel(), steps, loss_fn=F.cross_entropy), expected)
    reference = TokenModel()
    problem = naive.Problem(
        step=reference,
        loss_fn=F.cross_entropy,
        inputs=tokens[:-1],
        targets=tokens[1:],
        init_state=None,
        parameters=list(reference.parameters()),
    )
    loop = naive.refresh(problem, 3, 7, optimizer=moving(reference))
    for seen, window in zip(expected, loop, strict=True):
        assert relative_error(seen.grads, window.grads) <= 1e-12


# Nested states


@dataclass
class StateRecord:
    h: Tensor
    memory: Tensor


@dataclass(frozen=True)
class FrozenStateRecord:
    h: Tensor
    memory: Tensor


class StatePair(NamedTuple):
    h: Tensor
    memory: Tensor


class TwoStates(nn.Module):
    """The tanh cell and a slow average of its states, held in any container."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any], unpack: Callable[[Any], Any]) -> None:
        super().__init__()
        self.cell, self.pack, self.unpack = tanh_cell(), pack, unpack

    def forward(self, x: Tensor, state: Any) -> Any:
        h, memory = (None, None) if state is None else self.unpack(state)
        y, h = self.cell(x, h)
        memory = 0.1 * h if memory is None else 0.9 * memory + 0.1 * h
        return y + memory, self.pack(h, memory)


STATES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "tuple": (lambda h, m: (h, m), lambda s: s),
    "list": (lambda h, m: [h, m], lambda s: s),
    "dict": (lambda h, m: {"h": h, "m": m}, lambda s: (s["h"], s["m"])),
    "ordered_dict": (
        lambda h, m: collections.OrderedDict(h=h, m=m),
        lambda s: (s["h"], s["m"]),
    ),
    "deep": (lambda h, m: {"layers": [(h,), {"m": m}]}, lambda s: _deep(s)),
    "named_tuple": (StatePair, lambda s: (s.h, s.memory)),
    "dataclass": (StateRecord, lambda s: (s.h, s.memory)),
    "frozen_dataclass": (FrozenStateRecord, lambda s: (s.h, s.memory)),
    "with_words": (lambda h, m: ("kind", h, None, m, 3.5), lambda s: (s[1], s[3])),
}


def _deep(state: Any) -> tuple[Tensor, Tensor]:
    first, second = state["layers"]
    return first[0], second["m"]


@covering(form=STATES, overlap=OVERLAPS, executor=EXECUTORS, given=[False, True])
def test_nested_states(form: str, overlap: str, executor: str, given: bool) -> None:
    data, options = random_data(NUM_STEPS), {"overlap": overlap, "executor": executor}
    pack, unpack = STATES["tuple"]
    init = (random_state(2), random_state(3)) if given else None
    expected = run(
        TwoStates(pack, unpack),
        TensorSequence(*data),
        init_state=None if init is None else pack(*init),
        **options,
    )
    pack, unpack = STATES[form]
    actual = run(
        TwoStates(pack, unpack),
        TensorSequence(*data),
        init_state=None if init is None else pack(*init),
        **options,
    )
    for one, other in zip(actual, expected, strict=True):
        assert bitwise(one.grads, other.grads)
        assert bitwise(flat(one.state), flat(other.state))
        assert one.drift == other.drift
        assert type(one.state) is type(pack(*random_data(1)))
    if form == "with_words":
        assert (actual[-1].state[0], actual[-1].state[2], actual[-1].state[4]) == (
            "kind",
            None,
            3.5,
        )


class WritesIntoItsState(nn.Module):
    """Puts the new state into the container it was given, as many modules do."""

    def __init__(self, container: Callable[[Tensor], Any], key: Any, fresh: bool) -> None:
        super().__init__()
        self.cell, self.container, self.key, self.fresh = tanh_cell(), container, key, fresh

    def forward(self, x: Tensor, state: Any) -> Any:
        is_record = isinstance(state, OneState)
        y, h = self.cell(x, state.h if is_record else state[self.key])
        if self.fresh:
            return y, self.container(h)
        if is_record:
            state.h = h
        else:
            state[self.key] = h
        return y, state


@dataclass
class OneState:
    h: Tensor


@covering(
    form=[(lambda h: {"h": h}, "h"), (lambda h: [h], 0), (OneState, None)],
    overlap=OVERLAPS,
    executor=EXECUTORS,
    strategy=["retain", "uniform:2", "revolve:2"],
)
def test_the_module_may_write_into_the_container_of_its_state(
    form: tuple[Callable[[Tensor], Any], Any], overlap: str, executor: str, strategy: str
) -> None:
    """The tensors stay as they are; kept states and the user's own must not see it."""
    container, key = form

    def windows(fresh: bool, k2: int | None) -> list[Seen]:
        module, h = WritesIntoItsState(container, key, fresh), random_state().requires_grad_()
        tbptt = TBPTT(
            module,
            mean_loss,
            3,
            k2,
            moving(module, h),
            overlap=overlap,
            executor=executor,
            strategy=strategy,
        )
        sequence, init_state = TensorSequence(*random_data(NUM_STEPS)), container(h)
        seen = observe(tbptt, sequence, init_state, parameters=[*module.parameters(), h])
        assert flat(init_state)[0] is h
        return seen

    for k2 in (7, None):
        for one, other in zip(windows(False, k2), windows(True, k2), strict=True):
            assert bitwise(one.grads, other.grads)
            assert bitwise(flat(one.state), flat(other.state))


class Counting(nn.Module):
    """Its output depends on a step number that is part of the state."""

    def __init__(self, one: Any) -> None:
        super().__init__()
        self.cell, self.one = tanh_cell(), one

    def forward(self, x: Tensor, state: Any) -> Any:
        h, count = (None, 0 * self.one) if state is None else (state["h"], state["count"])
        y, h = self.cell(x, h)
        return y * (1.0 + 0.1 * count), {"h": h, "count": count + self.one}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("strategy", ["retain", "uniform:2", "revolve:2"])
def test_step_counters_in_the_state(strategy: str, overlap: str, executor: str) -> None:
    """An int tensor, or a Python number, that no gradient passes through."""
    data, options = random_data(NUM_STEPS), {"overlap": overlap, "executor": executor}
    for one in (torch.ones((), dtype=torch.int64), 1):
        reference = Counting(one)
        problem = naive_problem(reference, *data, None)
        loop = naive.OVERLAPS[overlap](problem, 3, 7, optimizer=moving(reference))
        seen = run(Counting(one), TensorSequence(*data), strategy=strategy, **options)
        for window, expected in zip(seen, loop, strict=True):
            assert relative_error(window.grads, expected.grads) <= 1e-12
            assert type(window.state["count"]) is type(one)
            assert int(window.state["count"]) == window.stop
            assert abs(window.drift - expected.drift) <= 1e-12


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("given", [False, True])
def test_cells_give_their_state_as_output(cell: Any, given: bool) -> None:
    torch.manual_seed(0)
    module = cell(WIDTH_IN, WIDTH).double()
    twin = copy.deepcopy(module)

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = twin

        def forward(self, x: Tensor, state: Any) -> Any:
            state = self.cell(x, state)
            return (state[0] if isinstance(state, tuple) else state), state

    init = None
    if given:
        init = (random_state(2), random_state(3)) if cell is nn.LSTMCell else random_state(2)
    data = TensorSequence(*random_data(NUM_STEPS))
    both = run(module, data, init_state=init), run(Written(), data, init_state=init)
    check_same_windows(*both, tolerance=1e-12)  # an LSTMCell runs as the kernel of nn.LSTM
