"""One contract for all sources, and what each of them adds to it.

A source is held against its own whole, read at once by a fresh one: every range, in any order,
and after its state was saved and loaded at every position.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numbered_data import LENGTHS, numbers, several
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    ArraySequence,
    BurnIn,
    LaneSource,
    TbpttError,
    TensorSequence,
)
from tbptt_ckpt.cli.lanes import EqualLanes
from tbptt_ckpt.data import map_file
from tbptt_ckpt.data.window_reader import WindowReader
from tbptt_ckpt.module.recurrence import recognise

# Sources of the contract


def tensor_sequence(_: Path) -> TensorSequence:
    return TensorSequence(numbers(7), {"a": numbers(7) + 1, "b": [numbers(7) + 2]})


def weighted_sequence(_: Path) -> TensorSequence:
    rows = torch.from_numpy(numbers(6)).reshape(6, 2, 1)
    weight = torch.arange(12.0).reshape(6, 2)
    return TensorSequence(rows, rows + 1, weight=weight, resets=weight % 5 == 3)


def time_in_the_middle(_: Path) -> TensorSequence:
    rows = torch.arange(24).reshape(3, 8)
    return TensorSequence(rows, rows + 1, time_dim=1)


def npy_file(folder: Path) -> ArraySequence:
    np.save(folder / "x.npy", numbers(8))
    np.save(folder / "y.npy", np.asfortranarray(numbers(8) + 1))
    return ArraySequence(map_file(folder / "x.npy"), map_file(folder / "y.npy"))


def raw_file(folder: Path) -> ArraySequence:
    numbers(9).astype(">f4").tofile(folder / "x.bin")
    return ArraySequence(map_file(folder / "x.bin", ">f4", step_shape=(2,)), next_step=True)


def token_file(folder: Path) -> ArraySequence:
    np.arange(65_000, 65_010, dtype=np.uint16).tofile(folder / "tokens.bin")
    return ArraySequence(
        map_file(folder / "tokens.bin", "uint16"), next_step=True, dtype=torch.int64
    )


def lanes_of_several(_: Path) -> LaneSource:
    return LaneSource(several(), 3)


def shuffled_lanes(_: Path) -> LaneSource:
    return LaneSource(several(), 2, seed=5)


def lanes_of_one(folder: Path) -> LaneSource:
    return LaneSource(token_file(folder), 4)


def lanes_of_parts(_: Path) -> LaneSource:
    return LaneSource(ArraySequence(numbers(16)), 3, lengths=LENGTHS, seed=1)


def lanes_some_of_them_fresh(_: Path) -> LaneSource:
    return LaneSource(several(), 4, seed=3, fresh_lanes=2, fresh_steps=2)


def lanes_with_weights_and_resets(_: Path) -> LaneSource:
    rows = torch.from_numpy(numbers(11))
    resets = torch.arange(11) % 4 == 2
    return LaneSource(
        TensorSequence(rows, rows, time_dim=0, weight=torch.arange(11.0), resets=resets), 2
    )


def burnt_in_sequence(_: Path) -> BurnIn:
    return BurnIn(tensor_sequence(_), 3)


def burnt_in_lanes(_: Path) -> BurnIn:
    return BurnIn(shuffled_lanes(_), 2)


def byte_lanes(_: Path) -> EqualLanes:
    return EqualLanes(np.arange(40, dtype=np.uint8), 3, max_steps=9)


SOURCES: dict[str, Callable[[Path], Any]] = {
    make.__name__: make
    for make in (
        tensor_sequence,
        weighted_sequence,
        time_in_the_middle,
        npy_file,
        raw_file,
        token_file,
        lanes_of_several,
        shuffled_lanes,
        lanes_of_one,
        lanes_of_parts,
        lanes_some_of_them_fresh,
        lanes_with_weights_and_resets,
        burnt_in_sequence,
        burnt_in_lanes,
        byte_lanes,
    )
}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)


@dataclass
class Rows:
    """Everything a source says about some steps."""

    inputs: list[Tensor]
    targets: list[Tensor]
    weights: Tensor | None
    resets: Tensor | None


def read(source: Any, start: int, stop: int) -> Rows:
    inputs, targets = source.read(start, stop)
    rows = [
        getattr(source, name)(start, stop) if hasattr(source, name) else None
        for name in ("weights", "resets")
    ]
    return Rows(leaves(inputs), leaves(targets), *rows)


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for item in tree or () for leaf in leaves(item)]


def check_same(found: Rows, whole: Rows, start: int, stop: int, time_dim: int) -> None:
    for name in ("inputs", "targets"):
        pairs = zip(getattr(found, name), getattr(whole, name), strict=True)
        for part, everything in pairs:
            expected = everything.narrow(time_dim, start, stop - start)
            assert part.dtype == expected.dtype, name
            assert torch.equal(part, expected), (name, start, stop)
    for name in ("weights", "resets"):
        part, everything = getattr(found, name), getattr(whole, name)
        assert (part is None) == (everything is None), name
        if part is not None:
            assert torch.equal(part, everything[start:stop]), (name, start, stop)


def ranges(num_steps: int) -> Iterator[tuple[int, int]]:
    return itertools.combinations(range(num_steps + 1), 2)


def through_a_file(state: object) -> Any:
    """What a snapshot gives back."""
    stored = io.BytesIO()
    torch.save(state, stored)
    return torch.load(io.BytesIO(stored.getvalue()), weights_only=True)


@every_source
def test_every_range_equals_the_whole_read_at_once(make: Any, tmp_path: Path) -> None:
    source, num_steps = make(tmp_path), len(make(tmp_path))
    whole = read(make(tmp_path), 0, num_steps)
    time_dim = source.time_dim
    assert {t.shape[time_dim] for t in whole.inputs + whole.targets} == {num_steps}
    for start, stop in ranges(num_steps):
        check_same(read(source, start, stop), whole, start, stop, time_dim)


@every_source
@pytest.mark.parametrize("epoch", [0, 3])
def test_reading_goes_on_after_a_restore_at_every_position(
    make: Any, epoch: int, tmp_path: Path
) -> None:
    def at_epoch() -> Any:
        source = make(tmp_path)
        if epoch and hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        return source

    num_steps = len(at_epoch())
    whole = read(at_epoch(), 0, num_steps)
    for position in range(num_steps + 1):
        before = at_epoch()
        for t in range(position):
            before.read(t, t + 1)
        after = make(tmp_path)
        after.load_state_dict(through_a_file(before.state_dict()))
        assert len(after) == num_steps
        for start in range(position, num_steps, 2):
            stop = min(start + 2, num_steps)
            check_same(read(after, start, stop), whole, start, stop, after.time_dim)


@every_source
def test_another_source_is_not_restored(make: Any, tmp_path: Path) -> None:
    saved = make(tmp_path).state_dict()
    others = [
        TensorSequence(numbers(5)),
        ArraySequence(numbers(5)),
        LaneSource(several((2, 2)), 2),
        LaneSource(several(), 2, seed=6),
        BurnIn(TensorSequence(numbers(5), numbers(5)), 3),
        BurnIn(TensorSequence(numbers(7), numbers(7)), 4),
        EqualLanes(np.arange(41, dtype=np.uint8), 3),
    ]
    same_kind = [other for other in others if type(other) is type(make(tmp_path))]
    assert same_kind
    for other in same_kind:
        with pytest.raises(ArgumentError, match="the saved source was"):
            other.load_state_dict(saved)


@every_source
def test_ranges_outside_the_source_are_refused(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path)
    for start, stop in ((0, len(source) + 1), (-1, 2), (2, 2), (3, 1)):
        with pytest.raises(ArgumentError, match=r"are not in \[0, "):
            source.read(start, stop)


# Readers: where a run stands in a source


class Stream:
    """A source without a length, read once and in order, that can be saved."""

    def __init__(self, num_steps: int) -> None:
        self.rows, self.position = numbers(num_steps), 0

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert start == self.position, "streams are read in order"
        rows = torch.from_numpy(self.rows[start:stop])
        self.position += len(rows)
        return rows, rows + 1

    def weights(self, start: int, stop: int) -> Tensor:
        return torch.arange(float(start), float(stop))

    def resets(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop) % 3 == 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


SEQUENCES: dict[str, Callable[[int], Any]] = {
    "stream": Stream,
    "list": lambda n: [(x, None if t % 4 == 1 else x) for t, x in enumerate(torch.arange(n))],
    "iterator": lambda n: iter([(x, {"y": x}) for x in torch.arange(n)]),
    "shapes that differ": lambda n: [(torch.ones(t + 1), t) for t in range(n)],
    "source": lambda n: TensorSequence(numbers(n), numbers(n)),
}


def steps_of(reader: WindowReader, windows: Iterable[tuple[int, int]], k1: int) -> Iterator[Any]:
    """What every window shows, step by step, and the reader's state before it."""
    for first, stop in windows:
        reader.look_ahead(stop)
        reader.drop_before(first)
        reader.look_ahead(stop + k1)
        state = through_a_file(reader.state_dict())
        shown = []
        for block in reader.window(first, stop):
            columns = zip(
                block.step_inputs(),
                block.step_targets(),
                block.step_weights() or [1.0] * (block.stop - block.start),
                (block.resets if block.resets is not None else torch.zeros(99)).tolist(),
                strict=False,
            )
            columns = ((x, y if weight else None, weight, r) for x, y, weight, r in columns)
            shown += zip(range(block.start, block.stop), columns, strict=True)
        yield state, [repr(step) for step in shown if first <= step[0] < stop]


def window_reader(sequence: object, k1: int, k2: int | None) -> WindowReader:
    return WindowReader(sequence, k1, k2, recognise(lambda inputs, state: (inputs, state), None))


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize(("k1", "k2"), [(2, 3), (3, 1), (2, 4), (4, None)])
def test_a_run_goes_on_after_a_restore_at_every_window(kind: str, k1: int, k2: int | None) -> None:
    num_steps = 9
    stops = [min(t + k1, num_steps) for t in range(0, num_steps, k1)]
    windows = [(0 if k2 is None else max(0, min(stop - k2, stop - k1)), stop) for stop in stops]
    everything = list(steps_of(window_reader(SEQUENCES[kind](num_steps), k1, k2), windows, k1))
    for at, (state, _) in enumerate(everything):
        reader = window_reader(SEQUENCES[kind](num_steps), k1, k2)
        reader.load_state_dict(state)
        rest = [shown for _, shown in steps_of(reader, windows[at:], k1)]
        assert rest == [shown for _, shown in everything[at:]], at
        assert reader.num_steps == num_steps


def test_a_stream_without_a_state_cannot_be_saved() -> None:
    class Bare:
        def read(self, start: int, stop: int) -> tuple[Tensor, None]:
            return torch.zeros(stop - start, 1), None

    with pytest.raises(ArgumentError, match="neither a length nor state_dict"):
        window_reader(Bare(), 1, 1).state_dict()


def test_an_iterator_that_is_not_iterated_anew_is_found_out() -> None:
    reader = window_reader(iter([(torch.zeros(1), None)] * 3), 1, 1)
    with pytest.raises(ArgumentError, match="ended after 3 steps, but it had 5"):
        reader.load_state_dict({"first": 5})


def test_steps_that_cannot_be_stored_are_named() -> None:
    class OddStream(Stream):
        def read(self, start: int, stop: int) -> tuple[Any, Tensor]:
            rows, targets = super().read(start, stop)
            return {"x": rows, "path": Path("x")}, targets

    reader = window_reader(OddStream(9), 2, 2)
    reader.look_ahead(2)
    with pytest.raises(ArgumentError, match="hold a PosixPath"):
        reader.state_dict()


class Watched(np.ndarray):
    """An array that remembers which rows it was asked for."""

    def __getitem__(self, rows: Any) -> Any:
        asked.append(rows)
        return super().__getitem__(rows)


asked: list[Any] = []


@pytest.mark.parametrize("next_step", [False, True])
def test_a_mapped_file_is_read_window_by_window(next_step: bool, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbers(200))
    rows = map_file(tmp_path / "x.npy").view(Watched)
    source = LaneSource(ArraySequence(rows, next_step=next_step), 3)
    tbptt = TBPTT(lambda x, h: (x + h, x + h), lambda y, _: y.sum(), 4, 6)
    asked.clear()
    tbptt.train(source, torch.zeros(3, 2))
    assert asked
    assert all(part.stop - part.start <= 6 + next_step for part in asked)


# What cannot work


def bad(name: str) -> Any:
    return pytest.param(name, id=name)


BAD_INPUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "lanes": (lambda _: LaneSource(several(), 0), "lanes=0"),
    "seed": (lambda _: LaneSource(several(), 1, seed=1.5), "seed=1.5"),
    "none": (lambda _: LaneSource([], 1), "at least one is needed"),
    "no source": (lambda _: LaneSource([numbers(3)], 1), "sequence 0 is a ndarray"),
    "not a list": (lambda _: LaneSource(numbers(3), 1), "must be a source, or a list"),
    "no length": (lambda _: LaneSource([Stream(3)], 1), "sequence 0 has no length"),
    "one without length": (lambda _: LaneSource(Stream(3), 1), "sequences has no length"),
    "too few steps": (lambda _: LaneSource(several((2,))[0], 3), "2 steps are too few for lanes=3"),
    "lengths of several": (lambda _: LaneSource(several(), 1, lengths=[1]), "lengths cut one"),
    "wrong lengths": (
        lambda _: LaneSource(several((5,))[0], 1, lengths=[2, 2]),
        "lengths sum to 4, but the sequence has 5",
    ),
    "empty part": (
        lambda _: LaneSource(several((5,))[0], 1, lengths=[2, 0, 3]),
        "sequence 1 is empty",
    ),
    "fractional lengths": (
        lambda _: LaneSource(several((5,))[0], 1, lengths=[2.5, 2.5]),
        "must be a list of integers",
    ),
    "other shapes": (
        lambda _: LaneSource([TensorSequence(torch.ones(2, k)) for k in (1, 2)], 2).read(0, 2),
        r"inputs of sequence 1 have steps of shape \(2,\)",
    ),
    "other dtypes": (
        lambda _: LaneSource(
            [TensorSequence(torch.ones(2, dtype=d)) for d in (torch.int64, torch.int32)], 2
        ).read(0, 2),
        "dtype torch.int32",
    ),
    "targets of some": (
        lambda _: LaneSource([*several((2,)), TensorSequence(numbers(2))], 2).read(0, 2),
        "give them weight zero",
    ),
    "lanes in lanes": (
        lambda _: LaneSource([LaneSource(several(), 2)], 2).weights(0, 2),
        "has no lanes of its own",
    ),
    "burn-in": (lambda _: BurnIn(several()[0], 0), "num_steps=0"),
    "burn-in of a stream": (lambda _: BurnIn(Stream(4), 1), "must be a source with a length"),
    "resets dtype": (
        lambda _: TensorSequence(numbers(3), resets=torch.zeros(3)),
        "must be torch.bool",
    ),
    "resets shape": (
        lambda _: TensorSequence(numbers(3), resets=torch.zeros(2, dtype=torch.bool)),
        r"resets of shape \(2,\) must be \[3\]",
    ),
    "missing file": (lambda folder: map_file(folder / "no.npy"), "does not exist"),
    "folder": (lambda folder: map_file(folder), "not a regular file"),
    "empty file": (lambda folder: map_file(written(folder, b"")), "is empty"),
    "no npy": (lambda folder: map_file(written(folder, b"abc")), "pass dtype"),
    "part of a step": (
        lambda folder: map_file(written(folder, b"12345"), "uint16", step_shape=(2,)),
        "5 bytes, of which those from offset=0 on are no multiple of the 4 bytes",
    ),
    "objects": (
        lambda folder: map_file(written(folder, b"12345678"), object),
        "do not describe numbers",
    ),
    "array of strings": (lambda _: ArraySequence(np.array(["a"])), "array of numbers"),
    "no array": (lambda _: ArraySequence([1, 2]), "inputs is a list"),
    "too short": (lambda _: ArraySequence(numbers(1), next_step=True), "too short"),
    "targets twice": (
        lambda _: ArraySequence(numbers(2), numbers(2), next_step=True),
        "omit targets",
    ),
    "lengths differ": (lambda _: ArraySequence(numbers(2), numbers(3)), "targets have 3 steps"),
}


def written(folder: Path, data: bytes) -> Path:
    path = folder / "data"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named(name: str, tmp_path: Path) -> None:
    act, message = BAD_INPUTS[name]
    with pytest.raises(ArgumentError, match=message):
        act(tmp_path)


class Exhausted(nn.Module):
    """A cell that runs out of something after a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.left = nn.RNNCell(3, 4), 9

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if not self.left:
            raise StopIteration
        h = self.cell(x, h)
        return h, h


@pytest.mark.parametrize("shape", [(1, 3), (2, 5)])
@pytest.mark.parametrize("executor", ["replay", "checkpoint"])
def test_steps_that_do_not_fit_are_named(executor: str, shape: tuple[int, int]) -> None:
    """In a note to the error, which is torch's own and names none."""
    steps = [(torch.zeros(2, 3), torch.zeros(2, 4)) for _ in range(12)]
    steps[9] = (torch.zeros(shape), steps[9][1])
    module = nn.RNNCell(3, 4)
    tbptt = TBPTT(module, F.mse_loss, 4, 8, None, strategy="uniform:2", executor=executor)
    with pytest.raises(RuntimeError) as caught:
        tbptt.train(iter(steps))
    (note, *_) = caught.value.__notes__
    assert note.startswith("steps [8, ")
    assert str(list(shape)) in note


@pytest.mark.parametrize("executor", ["replay", "checkpoint"])
def test_stop_iteration_of_a_module_ends_no_loop(executor: str) -> None:
    """Whoever iterates over windows would take it for their end."""
    steps = [(torch.zeros(2, 3), torch.zeros(2, 4)) for _ in range(12)]
    tbptt = TBPTT(Exhausted(), F.mse_loss, 4, 8, None, executor=executor)
    with pytest.raises(TbpttError, match="StopIteration"):
        list(tbptt.windows(steps))
