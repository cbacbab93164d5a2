"""Lists, streams, files and arrays with time anywhere: the same run from each of them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    gradients,
    lstm,
    mean_loss,
    naive_problem,
    random_data,
    tanh_cell,
)
from grids import covering, later
from models_for_tests import CountedCalls, check_same_windows, moving, observe
from runs_of_data import (
    NUM_STEPS,
    REACHES,
    RECURRENT,
    OpenSource,
    Source,
    batch_first_lstm,
    make_module,
    run,
    steps_of,
    with_targets_at,
)
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.data.packing import pack_steps
from tbptt_ckpt.data.window_reader import WindowReader

# Sources


class Steps:
    """An iterable of steps with a length that can be read more than once."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.steps = steps_of(inputs, targets)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.steps)


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


@covering(reach=REACHES, kind=RECURRENT, overlap=OVERLAPS)
def test_every_source_gives_the_same_run(
    reach: tuple[int, int | None], kind: str, overlap: str
) -> None:
    k1, k2 = reach
    # Under stale overlap an unknown length may move the start of a short last window.
    num_steps = 12 if overlap == "stale" else NUM_STEPS
    data = random_data(num_steps)
    expected = run(make_module(kind), TensorSequence(*data), k1, k2, overlap=overlap)
    for make_source in SOURCES.values():
        actual = run(make_module(kind), make_source(*data), k1, k2, overlap=overlap)
        check_same_windows(actual, expected, tolerance=1e-12 if kind == "lstm" else 0.0)


@pytest.mark.parametrize("num_steps", [*(later(t) for t in range(1, 10) if t != 7), 7, 10])
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
    ("num_steps", "name"),
    [*(later(t, "generator") for t in range(1, 11)), (11, "generator"), later(11, "open_source")],
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
    expected = run(
        ByteModel(), TensorSequence(tensor[:, :-1], tensor[:, 1:], time_dim=1), **options
    )
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


def test_a_step_without_a_target_takes_as_much_as_one_beside_others() -> None:
    targets = [None, torch.ones(2, 5), None, None]
    steps = [(torch.zeros(2, 3), target) for target in targets]
    assert pack_steps(steps[:1], 0).targets is None
    block = pack_steps(steps, 0)
    assert block.targets.untyped_storage().nbytes() == len(steps) * 2 * 5 * 4
    assert block.weight.tolist() == [0, 1, 0, 0]
