"""Sequences, inputs, targets, weights and states of every shape a user may bring.

Each is held against the plainest form of the same data, bitwise for per-step modules, or
against a naive loop.
"""

from __future__ import annotations

import collections
import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import naive
import numpy as np
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
    check_window,
    clear_gradients,
    gradients,
    lstm,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from models_for_tests import CountedCalls, Seen, check_same_windows, flat, moving, observe
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.data.window_reader import WindowReader

NUM_STEPS = 13
REACHES = ((3, 7), (3, 2), (4, None), (2, 2))
RECURRENT = ("cell", "lstm")


def make_module(kind: str) -> nn.Module:
    return lstm() if kind == "lstm" else tanh_cell()


def run(
    module: nn.Module,
    sequence: object,
    k1: int = 3,
    k2: int | None = 7,
    *,
    loss_fn: Any = mean_loss,
    init_state: Any = None,
    most: int | None = None,
    **options: Any,
) -> list[Seen]:
    """Windows of a run whose weights move."""
    options = {"strategy": "uniform:2"} | options
    tbptt = TBPTT(module, loss_fn, k1, k2, moving(module), **options)
    return observe(tbptt, sequence, init_state, parameters=module.parameters(), most=most)


def steps_of(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs, targets, strict=True))


# Sources


class Steps:
    """An iterable of steps with a length that can be read more than once."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.steps = steps_of(inputs, targets)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.steps)


class OpenSource:
    """A source without a length: a short read, or none at all, marks its end."""

    def __init__(self, inputs: Tensor, targets: Tensor, weight: Tensor | None = None) -> None:
        self.inputs, self.targets, self.weight = inputs, targets, weight
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        self.reads.append((start, stop))
        return self.inputs[start:stop], self.targets[start:stop]


class Source(OpenSource):
    def __len__(self) -> int:
        return len(self.inputs)


class WeightedOpenSource(OpenSource):
    def weights(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


class WeightedSource(Source):
    def weights(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


SOURCES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "list": steps_of,
    "sized_iterable": Steps,
    "generator": lambda x, y: ((a, b) for a, b in zip(x, y, strict=True)),
    "lists_as_pairs": lambda x, y: ([a, b] for a, b in zip(x, y, strict=True)),
    "arrays": lambda x, y: TensorSequence(x.numpy(), y.numpy()),
    "steps of arrays": lambda x, y: list(zip(x.numpy(), y.numpy(), strict=True)),
    "source": Source,
    "open_source": OpenSource,
}


@pytest.mark.parametrize(("k1", "k2"), REACHES)
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_every_source_gives_the_same_run(overlap: str, kind: str, k1: int, k2: int | None) -> None:
    # Under stale overlap an unknown length may move the start of a short last window.
    num_steps = 12 if overlap == "stale" else NUM_STEPS
    data = random_data(num_steps)
    expected = run(make_module(kind), TensorSequence(*data), k1, k2, overlap=overlap)
    for make_source in SOURCES.values():
        actual = run(make_module(kind), make_source(*data), k1, k2, overlap=overlap)
        check_same_windows(actual, expected, tolerance=1e-12 if kind == "lstm" else 0.0)


@pytest.mark.parametrize("num_steps", range(1, 11))
def test_refresh_without_a_length_equals_refresh_with_one(num_steps: int) -> None:
    data = random_data(num_steps)
    for k1, k2 in itertools.product((1, 2, 3, 4), (1, 3, 5, None)):
        expected = run(tanh_cell(), steps_of(*data), k1, k2)
        check_same_windows(run(tanh_cell(), iter(steps_of(*data)), k1, k2), expected)


def stale_start(num_steps: int, k1: int, k2: int) -> int:
    """Where a short last window starts: the first state recorded at or after `T - k2`.

    States are recorded at every update point and where a full window would start. The end
    is known from the window before the last on, so that `T - k2` itself is recorded there.
    """
    last_new_start = (num_steps - 1) // k1 * k1
    wanted = max(0, num_steps - k2)
    if wanted in (0,) or wanted > last_new_start - k1:
        return wanted
    return next(t for t in itertools.count(wanted) if t % k1 == 0 or (t + k2) % k1 == 0)


@pytest.mark.parametrize(
    ("num_steps", "name"), [*((t, "generator") for t in range(1, 12)), (11, "open_source")]
)
def test_stale_without_a_length_starts_a_short_last_window_at_a_recorded_state(
    num_steps: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, moved = random_data(num_steps), 0
    layout = naive.windows
    for k1, k2 in itertools.product((1, 2, 3, 4), (1, 2, 4, 5, 7, 8)):
        cuts = layout(num_steps, k1, k2)
        if num_steps % k1:
            moved += cuts[-1][0] != stale_start(num_steps, k1, k2)
            cuts[-1] = (stale_start(num_steps, k1, k2), *cuts[-1][1:])
        monkeypatch.setattr(naive, "windows", lambda *_, cuts=cuts: cuts)
        reference, module = tanh_cell(), tanh_cell()
        problem = naive_problem(reference, *data, None)
        expected = naive.stale(problem, k1, k2, optimizer=moving(reference))
        tbptt = TBPTT(module, mean_loss, k1, k2, moving(module), overlap="stale", strategy="step")
        for result, window in zip(tbptt.windows(SOURCES[name](*data)), expected, strict=True):
            grads = gradients(list(module.parameters()))
            check_window((k1, k2), result, grads, window, bitwise_state=False)
    assert moved or num_steps < 7  # the exception does occur


# Streams


class Stream:
    """Counts how many steps were taken from it, and how many of their inputs are alive."""

    def __init__(self, num_steps: int | None) -> None:
        self.num_steps, self.taken = num_steps, 0
        self.alive: weakref.WeakSet[Item] = weakref.WeakSet()

    def __iter__(self) -> Iterator[tuple[Item, Tensor]]:
        for t in itertools.count() if self.num_steps is None else range(self.num_steps):
            self.taken += 1
            item = Item(stream_input(t))
            self.alive.add(item)
            yield item, stream_input(t + 1)[:, :1].expand(LANES, WIDTH)
            del item


class Item:
    """An input that is no tensor, so that it is handed through as it is."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class ItemCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = tanh_cell()

    def forward(self, item: Item, h: Any) -> Any:
        return self.cell(item.x, h)


def stream_input(t: int) -> Tensor:
    return torch.sin(torch.arange(t, t + LANES * WIDTH_IN, dtype=torch.float64)).view(LANES, -1)


STREAM_REACHES = ((3, 7), (3, 2), (4, 4), (1, 5), (5, 1), (300, 301))


@pytest.mark.parametrize(("k1", "k2"), STREAM_REACHES)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_stream_is_read_once_and_at_most_k1_steps_ahead(
    overlap: str, k1: int, k2: int | None
) -> None:
    num_steps = 5 * k1 + k1 // 2
    stream, module = Stream(num_steps), CountedCalls(ItemCell())
    tbptt = TBPTT(module, mean_loss, k1, k2, overlap=overlap, strategy="retain")
    windows = tbptt.windows(stream)
    assert stream.taken == 0
    for window in windows:
        assert window.stop <= stream.taken <= min(num_steps, window.stop + k1)
    assert stream.taken == num_steps


@pytest.mark.parametrize(("k1", "k2"), STREAM_REACHES)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_at_most_one_window_and_k1_steps_are_held(overlap: str, k1: int, k2: int) -> None:
    stream = Stream(5 * k1 + k1 // 2)
    held: list[int] = []

    class Watching(ItemCell):
        def forward(self, item: Item, h: Any) -> Any:
            held.append(len(stream.alive))
            return super().forward(item, h)

    TBPTT(Watching(), mean_loss, k1, k2, overlap=overlap, strategy="retain").train(iter(stream))
    assert max(held) <= max(k1, k2) + k1


def test_full_bptt_holds_its_window() -> None:
    stream = Stream(20)
    TBPTT(ItemCell(), mean_loss, 3, None).train(stream)
    assert stream.taken == 20


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(("k1", "k2"), [(3, 7), (3, 2), (2, None)])
def test_endless_streams(k1: int, k2: int | None, overlap: str) -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for t in itertools.count():
            yield stream_input(t), stream_input(t + 1)[:, :1].expand(LANES, WIDTH)

    finite = list(itertools.islice(endless(), 8 * k1))
    expected = run(tanh_cell(), finite, k1, k2, overlap=overlap, most=5)
    actual = run(tanh_cell(), endless(), k1, k2, overlap=overlap, most=5)
    check_same_windows(actual, expected)


def test_a_window_of_a_stream_is_yielded_before_the_stream_goes_on() -> None:
    """A live source: what a window needs beyond its own steps is at most k1 more."""
    asked: list[int] = []

    def live() -> Iterator[tuple[Tensor, Tensor]]:
        for t in range(12):
            asked.append(t)
            yield stream_input(t), stream_input(t + 1)[:, :1].expand(LANES, WIDTH)

    windows = TBPTT(tanh_cell(), mean_loss, 2, 4).windows(live())
    next(windows)
    assert len(asked) <= 4
    next(windows)
    assert len(asked) <= 6


def test_an_iterable_can_be_trained_on_again_if_it_can_be_iterated_again() -> None:
    data = random_data(NUM_STEPS)
    module = tanh_cell()
    tbptt = TBPTT(module, mean_loss, 3, 7, torch.optim.SGD(module.parameters(), lr=0.0))
    for sequence in (Steps(*data), TensorSequence(*data), OpenSource(*data), steps_of(*data)):
        first = observe(tbptt, sequence, parameters=module.parameters())
        check_same_windows(observe(tbptt, sequence, parameters=module.parameters()), first)


class LoaderSteps(torch.utils.data.IterableDataset[Any]):
    """Steps for a `DataLoader`, which then has `__len__` but no length."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.steps = steps_of(inputs, targets)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.steps)


def test_a_data_loader_of_a_stream_has_no_length() -> None:
    data = random_data(NUM_STEPS)
    loader = torch.utils.data.DataLoader(LoaderSteps(*data), batch_size=None)
    check_same_windows(run(tanh_cell(), loader), run(tanh_cell(), iter(steps_of(*data))))


@pytest.mark.parametrize("k2", [2, 7])
def test_a_source_with_a_length_is_read_window_by_window(k2: int) -> None:
    source = Source(*random_data(NUM_STEPS))
    TBPTT(tanh_cell(), mean_loss, 3, k2).train(source)
    first_steps = [min(start, new) for start, new, _ in naive.windows(NUM_STEPS, 3, k2)]
    stops = [stop for _, _, stop in naive.windows(NUM_STEPS, 3, k2)]
    assert source.reads == list(zip(first_steps, stops, strict=True))


def test_a_source_without_a_length_is_read_once_in_order() -> None:
    source = OpenSource(*random_data(NUM_STEPS))
    TBPTT(tanh_cell(), mean_loss, 3, 7).train(source)
    position = 0
    for start, stop in source.reads:
        assert start == position
        assert stop - start <= 6
        position = min(stop, NUM_STEPS)
    assert position == NUM_STEPS


# Where time is


class SegmentWithTimeLast(nn.Module):
    """[B, F, T], and the same for its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm()

    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.lstm(x.permute(2, 0, 1), state)
        return y.permute(1, 2, 0), state


def batch_first_lstm() -> nn.LSTM:
    module = nn.LSTM(WIDTH_IN, WIDTH, batch_first=True).double()
    module.load_state_dict(lstm().state_dict())
    return module


class SourceWithTimeDim(Source):
    time_dim = 1

    def __len__(self) -> int:
        return self.inputs.shape[1]

    def read(self, start: int, stop: int) -> Any:
        return self.inputs[:, start:stop], self.targets[:, start:stop]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("make", [tanh_cell, lstm, batch_first_lstm])
@pytest.mark.parametrize("data_dim", [0, 1, 2])
def test_time_may_be_anywhere_in_the_data(data_dim: int, make: Any, overlap: str) -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(
        lstm() if make is batch_first_lstm else make(),
        TensorSequence(inputs, targets),
        overlap=overlap,
    )
    moved = inputs.movedim(0, data_dim).contiguous(), targets.movedim(0, data_dim).contiguous()
    actual = run(make(), TensorSequence(*moved, time_dim=data_dim), overlap=overlap)
    check_same_windows(actual, expected, tolerance=1e-12)


@pytest.mark.parametrize("make", [tanh_cell, lstm, batch_first_lstm])
def test_a_source_says_where_its_time_is(make: Any) -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(lstm() if make is batch_first_lstm else make(), TensorSequence(inputs, targets))
    source = SourceWithTimeDim(inputs.transpose(0, 1), targets.transpose(0, 1))
    check_same_windows(run(make(), source), expected, tolerance=1e-12)


@pytest.mark.parametrize("data_dim", [0, 1, 2])
def test_a_segment_module_says_where_it_wants_time(data_dim: int) -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(lstm(), TensorSequence(inputs, targets))
    moved = inputs.movedim(0, data_dim), targets.movedim(0, data_dim)
    sequence = TensorSequence(*moved, time_dim=data_dim)
    actual = run(SegmentWithTimeLast(), sequence, per_step=False, time_dim=2)
    check_same_windows(actual, expected, tolerance=1e-12)
    steps = run(SegmentWithTimeLast(), steps_of(inputs, targets), per_step=False, time_dim=2)
    check_same_windows(steps, expected, tolerance=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_lstm_equals_one_lane(batch_first: bool, overlap: str, executor: str) -> None:
    (inputs, targets), make = random_data(NUM_STEPS), batch_first_lstm if batch_first else lstm
    options = {"overlap": overlap, "executor": executor}
    expected = run(lstm(), TensorSequence(inputs[:, :1], targets[:, :1]), **options)
    for sequence in (
        TensorSequence(inputs[:, 0], targets[:, 0]),
        steps_of(inputs[:, 0], targets[:, 0]),
        iter(steps_of(inputs[:, 0], targets[:, 0])),
    ):
        if overlap == "stale" and isinstance(sequence, Iterator):
            continue  # its last window starts elsewhere
        check_same_windows(run(make(), sequence, **options), expected, tolerance=1e-12)


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


@pytest.mark.parametrize("source", ["tensors", "list", "generator"])
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("nesting", NESTINGS)
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
    """A target says which of the outputs it is about."""
    inputs, targets = random_data(NUM_STEPS)
    widths = [1 + t % WIDTH for t in range(NUM_STEPS)]

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return mean_loss(y[:, : target.shape[1]], target)

    sequence = [(x, y[:, :w]) for x, y, w in zip(inputs, targets, widths, strict=True)]
    reference = tanh_cell()
    problem = naive_problem(reference, inputs, targets, None, loss_fn=loss_fn)
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


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("form", STATES)
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


@pytest.mark.parametrize("strategy", ["retain", "uniform:2", "revolve:2"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(
    ("container", "key"),
    [(lambda h: {"h": h}, "h"), (lambda h: [h], 0), (OneState, None)],
    ids=["dict", "list", "dataclass"],
)
def test_the_module_may_write_into_the_container_of_its_state(
    container: Callable[[Tensor], Any], key: Any, overlap: str, executor: str, strategy: str
) -> None:
    """The tensors stay as they are; kept states and the user's own must not see it."""

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
    check_same_windows(run(module, data, init_state=init), run(Written(), data, init_state=init))


# Absent targets


def with_targets_at(present: set[int], inputs: Tensor, targets: Tensor) -> list[tuple[Any, Any]]:
    return [(x, y if t in present else None) for t, (x, y) in enumerate(steps_of(inputs, targets))]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("k2", [5, None])
def test_many_to_one_runs_each_step_once_until_the_label(
    k2: int | None, kind: str, overlap: str
) -> None:
    data, k1 = random_data(12), 2
    module = CountedCalls(make_module(kind), time_dim=None if kind == "cell" else 0)
    before = [p.detach().clone() for p in module.parameters()]
    tbptt = TBPTT(
        module,
        mean_loss,
        k1,
        k2,
        moving(module),
        overlap=overlap,
        strategy="retain",
        per_step=kind == "cell",
    )
    for window in tbptt.windows(with_targets_at({11}, *data)):
        if window.stop < 12:
            assert module.num_steps == window.stop
            assert window.recomputed_steps == 0
            assert window.loss is None
            assert window.plan is None
            assert window.drift == 0.0
            assert not window.updated
            assert bitwise(list(module.parameters()), before)
    reach = 12 if k2 is None else k2
    assert (window.start, window.new_start, window.stop) == (12 - reach, 10, 12)
    assert module.num_steps == 10 + reach
    assert window.updated

    reference = make_module(kind)
    state, (inputs, targets) = None, data
    for t in range(12):
        state = naive.mapped(Tensor.detach, state) if t == window.start else state
        x = inputs[t] if kind == "cell" else inputs[t : t + 1]
        y, state = reference(x, state)
    mean_loss(y if kind == "cell" else y[0], targets[11]).backward()
    actual, expected = gradients(list(module.parameters())), gradients(list(reference.parameters()))
    assert relative_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("as_function", [False, True])
def test_forward_only_windows_run_whole_after_an_update(as_function: bool) -> None:
    """Under refresh the state handed on is today's; under stale it is carried."""
    data, present = random_data(18), {0, 1, 2, 9, 10, 11}

    def executed(overlap: str) -> list[int]:
        module = CountedCalls(tanh_cell())
        called: Any = (lambda x, state: module(x, state)) if as_function else module
        tbptt = TBPTT(called, mean_loss, 3, 6, moving(module), overlap=overlap, strategy="retain")
        counts, before = [], 0
        for window in tbptt.windows(with_targets_at(present, *data)):
            assert window.updated == (window.stop in (3, 12))
            counts.append(module.num_steps - before)
            assert window.recomputed_steps == counts[-1] - 3
            before = module.num_steps
        return counts

    # Windows end at 3*, 6, 9, 12*, 15, 18; those with a star have targets and update.
    assert executed("refresh") == [3, 6, 3, 6, 6, 3]
    assert executed("stale") == [3, 3, 3, 6, 3, 3]


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("source", ["list", "generator", "weight"])
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("present", [{2}, {0, 5, 6, 14}, {4, 12, 13}, set(range(1, 15, 2))])
def test_scattered_targets_equal_a_naive_loop(
    present: set[int], executor: str, overlap: str, source: str, kind: str
) -> None:
    num_steps = 15
    inputs, targets = random_data(num_steps)
    reference, module = make_module(kind), make_module(kind)
    absent = sorted(set(range(num_steps)) - present)
    problem = naive_problem(reference, inputs, targets, None, absent=absent)
    loop = naive.OVERLAPS[overlap](problem, 3, 7, optimizer=moving(reference))
    sequence: Any = with_targets_at(present, inputs, targets)
    if source == "generator":
        sequence = iter(sequence)
    elif source == "weight":
        weight = torch.tensor([float(t in present) for t in range(num_steps)])
        sequence = TensorSequence(inputs, targets, weight=weight)
    tbptt = TBPTT(
        module,
        mean_loss,
        3,
        7,
        moving(module),
        overlap=overlap,
        executor=executor,
        strategy="uniform:2",
    )
    for result, window in zip(tbptt.windows(sequence), loop, strict=True):
        grads = gradients(list(module.parameters()))
        check_window(sorted(present), result, grads, window, bitwise_state=False)
        assert result.updated == (window.loss is not None)


def test_without_any_target_a_run_only_runs_forward() -> None:
    inputs, _ = random_data(NUM_STEPS)
    module = CountedCalls(tanh_cell())
    result = TBPTT(module, mean_loss, 3, 7, moving(module)).train(TensorSequence(inputs))
    state = None
    with torch.no_grad():
        for x in inputs:
            _, state = tanh_cell()(x, state)
    assert result.loss is None
    assert bitwise(result.state, state)
    assert module.num_steps == NUM_STEPS
    assert all(p.grad is None for p in module.parameters())


# Weights


def lane_losses(y: Tensor, target: Tensor) -> Tensor:
    """[..., B] mean squared errors, lane by lane."""
    return (y - target).square().mean(-1)


def weighted_bptt(
    module: nn.Module, inputs: Tensor, targets: Tensor, weight: Tensor, reduction: str
) -> tuple[Tensor, list[Tensor | None]]:
    """By hand: sum of w * loss over all steps and lanes, over the sum of w; plain BPTT."""
    clear_gradients(list(module.parameters()))
    state, total = None, torch.zeros((), dtype=torch.float64)
    for t, x in enumerate(inputs):
        y, state = module(x, state)
        total = total + (weight[t] * lane_losses(y, targets[t])).sum()
    loss = total / weight.sum() if reduction == "mean" else total
    loss.backward()
    return loss.detach(), gradients(list(module.parameters()))


LANE_WEIGHTS = torch.tensor(
    [[1.0, 1.0], [0.0, 2.0], [0.5, 0.0], [0.0, 0.0], [3.0, 0.5], [1.0, 0.0], [2.0, 2.0]],
    dtype=torch.float64,
)


def pair_loss(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over lanes, with the number of lanes as weight."""
    losses = lane_losses(y, target)
    return losses.sum(), torch.tensor(float(losses.numel()))


@pytest.mark.parametrize("loss_fn", [mean_loss, pair_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("source", ["tensors", "source", "open_source"])
@pytest.mark.parametrize("make", [tanh_cell, lstm, batch_first_lstm])
@pytest.mark.parametrize("strategy", ["retain", "uniform:2"])
def test_lane_weights_equal_a_hand_computation(
    strategy: str, make: Any, source: str, reduction: str, loss_fn: Any
) -> None:
    inputs, targets = random_data(len(LANE_WEIGHTS))
    reference = tanh_cell() if make is tanh_cell else _StepLSTM()
    loss, grads = weighted_bptt(reference, inputs, targets, LANE_WEIGHTS, reduction)
    sequence: Any = TensorSequence(inputs, targets, weight=LANE_WEIGHTS)
    if source == "source":
        sequence = WeightedSource(inputs, targets, LANE_WEIGHTS)
    elif source == "open_source":
        sequence = WeightedOpenSource(inputs, targets, LANE_WEIGHTS)
    module = make()
    tbptt = TBPTT(module, loss_fn, len(inputs), None, reduction=reduction, strategy=strategy)
    (window,) = tbptt.windows(sequence)
    assert relative_error([window.loss], [loss]) <= 1e-12
    assert relative_error(gradients(list(module.parameters())), grads) <= 1e-12


class _StepLSTM(nn.Module):
    """`nn.LSTM` one step at a time; its parameters in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm()

    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.lstm(x[None], state)
        return y[0], state


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_step_weights_scale_losses_and_count_in_the_divisor(
    overlap: str, kind: str, reduction: str
) -> None:
    (inputs, targets), weights = random_data(9), [1.0, 0.5, 0.0, 2.0, 2.0, 0.0, 0.25, 1.0, 3.0]
    reference, module = make_module(kind), make_module(kind)
    problem = naive_problem(reference, inputs, targets, None, weights=weights)
    loop = naive.OVERLAPS[overlap](problem, 2, 5, reduction=reduction)
    clear_gradients(list(module.parameters()))
    tbptt = TBPTT(
        module,
        mean_loss,
        2,
        5,
        torch.optim.SGD(module.parameters(), lr=0.0),
        overlap=overlap,
        reduction=reduction,
        strategy="uniform:2",
    )
    sequence = TensorSequence(inputs, targets, weight=torch.tensor(weights))
    for result, window in zip(tbptt.windows(sequence), loop, strict=True):
        grads = gradients(list(module.parameters()))
        check_window("weights", result, grads, window, bitwise_state=kind == "cell")


def test_equal_weights_are_no_weights() -> None:
    inputs, targets = random_data(NUM_STEPS)
    expected = run(tanh_cell(), TensorSequence(inputs, targets))
    for weight in (torch.ones(NUM_STEPS), torch.ones(NUM_STEPS, LANES), torch.ones(NUM_STEPS) / 4):
        actual = run(tanh_cell(), TensorSequence(inputs, targets, weight=weight))
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one.grads, other.grads) <= 1e-12
            assert relative_error([one.loss], [other.loss]) <= 1e-12


def test_lanes_without_weight_are_not_shown_to_the_loss() -> None:
    (inputs, targets), shapes = random_data(len(LANE_WEIGHTS)), []
    targets[LANE_WEIGHTS == 0] = float("nan")

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        shapes.append(y.shape)
        return mean_loss(y, target)

    sequence = TensorSequence(inputs, targets, weight=LANE_WEIGHTS)
    for seen in run(tanh_cell(), sequence, 2, 4, loss_fn=loss_fn):
        assert seen.loss is None or torch.isfinite(seen.loss)
        assert all(torch.isfinite(weight).all() for weight in seen.weights)
    assert set(shapes) == {(1, WIDTH), (2, WIDTH)}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("lanes", [False, True])
def test_windows_without_any_weight_make_no_update(lanes: bool, overlap: str) -> None:
    inputs, targets = random_data(9)
    weight = torch.ones(9, LANES) if lanes else torch.ones(9)
    weight[3:6] = 0.0
    seen = run(tanh_cell(), TensorSequence(inputs, targets, weight=weight), 3, 5, overlap=overlap)
    assert [window.loss is None for window in seen] == [False, True, False]
    assert [window.updated for window in seen] == [True, False, True]
    assert bitwise(seen[0].weights, seen[1].weights)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_last_loss_takes_the_weights_of_its_step(reduction: str) -> None:
    inputs, targets = random_data(len(LANE_WEIGHTS))
    only_last = torch.zeros_like(LANE_WEIGHTS)
    only_last[-2] = LANE_WEIGHTS[-2]
    loss, grads = weighted_bptt(tanh_cell(), inputs[:-1], targets[:-1], only_last[:-1], reduction)
    module = tanh_cell()
    sequence = TensorSequence(inputs[:-1], targets[:-1], weight=LANE_WEIGHTS[:-1])
    tbptt = TBPTT(module, mean_loss, 6, None, loss="last", reduction=reduction)
    (window,) = tbptt.windows(sequence)
    assert relative_error([window.loss], [loss]) <= 1e-12
    assert relative_error(gradients(list(module.parameters())), grads) <= 1e-12


# (loss_sum, weight) pairs


IGNORED = -100


def summed_cross_entropy(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss_sum = F.cross_entropy(
        y.reshape(-1, WIDTH), target.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return loss_sum, (target != IGNORED).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("strategy", ["retain", "step", "uniform:2"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_ignored_positions(
    kind: str, strategy: str, overlap: str, executor: str, reduction: str
) -> None:
    """Windows end at 3, 6, 9*, 12, 13: the one with a star has ignored positions only."""
    inputs, _ = random_data(NUM_STEPS)
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(WIDTH, (NUM_STEPS, LANES), generator=generator)
    targets[1] = targets[4, 0] = targets[10, 1] = IGNORED
    targets[6:9] = IGNORED
    reference, module = make_module(kind), make_module(kind)
    problem = naive_problem(reference, inputs, targets, None, loss_fn=summed_cross_entropy)
    loop = naive.OVERLAPS[overlap](problem, 3, 7, reduction=reduction, optimizer=moving(reference))
    tbptt = TBPTT(
        module,
        summed_cross_entropy,
        3,
        7,
        moving(module),
        overlap=overlap,
        reduction=reduction,
        strategy=strategy,
        executor=executor,
    )
    for result, window in zip(tbptt.windows(TensorSequence(inputs, targets)), loop, strict=True):
        assert (result.loss is None) == (result.stop == 9)
        assert result.updated == (result.stop != 9)
        if result.stop == 9:
            assert window.loss is None
            assert relative_error(naive.tensors(result.state), naive.tensors(window.state)) <= 1e-12
            continue
        grads = gradients(list(module.parameters()))
        check_window("ignored", result, grads, window, bitwise_state=False)


def test_a_run_of_ignored_positions_has_no_loss() -> None:
    inputs, _ = random_data(6)
    targets = torch.full((6, LANES), IGNORED)
    module = tanh_cell()
    tbptt = TBPTT(module, summed_cross_entropy, 2, 4, moving(module))
    result = tbptt.train(TensorSequence(inputs, targets))
    assert result.loss is None
    assert bitwise(list(module.parameters()), list(tanh_cell().parameters()))


@pytest.mark.parametrize("weight", [2, 2.0, torch.tensor(2), torch.tensor(2.0)])
def test_the_weight_of_a_pair_may_be_any_number(weight: Any) -> None:
    def loss_fn(y: Tensor, target: Tensor) -> Any:
        return 2.0 * mean_loss(y, target), weight

    inputs, targets = random_data(NUM_STEPS)
    expected = run(tanh_cell(), TensorSequence(inputs, targets))
    actual = run(tanh_cell(), TensorSequence(inputs, targets), loss_fn=loss_fn)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one.grads, other.grads) <= 1e-12
        assert relative_error([one.loss], [other.loss]) <= 1e-12


# Memory-mapped arrays


@pytest.mark.parametrize("mode", ["r", "c"])
def test_memory_mapped_inputs(tmp_path: Path, mode: str) -> None:
    """Bytes of a file, [B, T], lane by lane; read-only maps draw no warning."""
    length = 2 * (NUM_STEPS + 1)
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(7)) * (length // 7) + bytes(range(length % 7)))
    mapped = np.memmap(path, dtype=np.uint8, mode=mode).reshape(2, NUM_STEPS + 1)

    class ByteModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(9)
            self.embedding, self.lstm = nn.Embedding(7, WIDTH_IN), nn.LSTM(WIDTH_IN, 7)
            self.double()

        def forward(self, x: Tensor, state: Any) -> Any:
            return self.lstm(self.embedding(x.long()), state)

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1), target.long().flatten())

    options = {"loss_fn": loss_fn, "per_step": False}
    sequence = TensorSequence(mapped[:, :-1], mapped[:, 1:], time_dim=1)
    assert np.shares_memory(sequence.inputs.numpy(), mapped)
    actual = run(ByteModel(), sequence, **options)
    tensor = torch.from_numpy(np.array(mapped))
    expected = run(ByteModel(), TensorSequence(tensor[:, :-1], tensor[:, 1:], 1), **options)
    check_same_windows(actual, expected)


def test_data_is_never_written_to() -> None:
    inputs, targets = random_data(NUM_STEPS)
    before = inputs.clone(), targets.clone()
    versions = inputs._version, targets._version
    run(tanh_cell(), TensorSequence(inputs, targets))
    assert bitwise((inputs, targets), before)
    assert (inputs._version, targets._version) == versions


# Segment modules and packing


@pytest.mark.parametrize("packed", [1, 2, 3, 256])
@pytest.mark.parametrize("kind", RECURRENT)
def test_packing_of_a_stream_does_not_show(
    kind: str, packed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a stream are packed some at a time; absent targets among them."""
    data = random_data(NUM_STEPS)
    steps = with_targets_at({0, 1, 2, 7, 8, 12}, *data)
    expected = run(make_module(kind), steps)
    monkeypatch.setattr(WindowReader, "PACK_STEPS", packed)
    for sequence in (steps, iter(steps)):
        tolerance = 1e-12 if kind == "lstm" else 0.0
        check_same_windows(run(make_module(kind), sequence), expected, tolerance=tolerance)
