"""Lanes of bytes, where the bytes come from, and the bigram table they are compared with."""

from __future__ import annotations

import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from tbptt_ckpt.cli.bytes.corpus import (
    load_corpus,
    map_bytes,
    standard_library_files,
    standard_library_text,
)
from tbptt_ckpt.cli.bytes.score import bigram_bits, pair_counts
from tbptt_ckpt.cli.lanes import EqualLanes
from tbptt_ckpt.errors import ArgumentError


def as_bytes(numbers):
    return np.asarray(list(numbers), dtype=np.uint8)


@pytest.mark.parametrize("num_bytes", [5, 9, 10, 11, 100, 255])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_lanes_are_contiguous_stretches_and_targets_the_next_bytes(num_bytes, lanes):
    data = as_bytes(range(num_bytes))
    source = EqualLanes(data, lanes)
    inputs, targets = source.read(0, len(source))
    assert len(source) == (num_bytes - 1) // lanes
    assert inputs.shape == targets.shape == (len(source), lanes)
    assert inputs.dtype == targets.dtype == torch.int64
    for lane in range(lanes):
        first = lane * len(source)
        assert inputs[:, lane].tolist() == list(range(first, first + len(source)))
        assert targets[:, lane].tolist() == list(range(first + 1, first + len(source) + 1))


def test_lanes_leave_out_fewer_bytes_than_there_are_lanes():
    for num_bytes in range(9, 60):
        used = 8 * len(EqualLanes(as_bytes(range(num_bytes)), 8)) + 1
        assert num_bytes - 8 < used <= num_bytes


def test_reads_are_slices_of_the_whole():
    source = EqualLanes(as_bytes(range(100)), 3)
    whole = source.read(0, len(source))
    for start in range(len(source)):
        for stop in range(start + 1, len(source) + 1):
            for part, full in zip(source.read(start, stop), whole, strict=True):
                assert torch.equal(part, full[start:stop])


def test_max_steps_shortens_lanes_without_moving_them():
    data = as_bytes(range(100))
    short, whole = EqualLanes(data, 4, max_steps=5), EqualLanes(data, 4)
    assert len(short) == 5
    assert torch.equal(short.read(0, 5)[0], whole.read(0, 5)[0])
    assert len(EqualLanes(data, 4, max_steps=1000)) == len(whole)


def test_time_is_the_first_dimension():
    assert EqualLanes(as_bytes(range(10)), 2).time_dim == 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 0), (3, 2), (0, 25), (24, 30)])
def test_reads_outside_the_lanes_are_refused(start, stop):
    with pytest.raises(ArgumentError, match=r"are not in \[0, 24\)"):
        EqualLanes(as_bytes(range(97)), 4).read(start, stop)


def test_lanes_that_the_bytes_do_not_fill_are_refused():
    with pytest.raises(ArgumentError, match="4 steps are too short for lanes=4, which need 5"):
        EqualLanes(as_bytes(range(4)), 4)
    with pytest.raises(ArgumentError, match="lanes=0"):
        EqualLanes(as_bytes(range(4)), 0)
    with pytest.raises(ArgumentError, match="max_steps=0"):
        EqualLanes(as_bytes(range(40)), 4, max_steps=0)


def test_state_is_accepted_by_equal_lanes_alone():
    data = as_bytes(range(100))
    state = EqualLanes(data, 4).state_dict()
    EqualLanes(data, 4).load_state_dict(state)
    for other in (EqualLanes(data, 5), EqualLanes(data[:-4], 4), EqualLanes(data, 4, max_steps=3)):
        with pytest.raises(ArgumentError, match="the saved source was"):
            other.load_state_dict(state)


def test_a_file_is_mapped_and_its_last_twentieth_held_out(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)) * 5)
    corpus = load_corpus(path, lanes=4)
    assert isinstance(corpus.train, np.memmap)
    assert isinstance(corpus.held_out, np.memmap)
    assert (len(corpus.train), len(corpus.held_out)) == (950, 50)
    whole = np.concatenate([corpus.train, corpus.held_out])
    assert whole.tobytes() == path.read_bytes()


def test_the_smallest_file_is_the_one_the_error_names(tmp_path):
    path = tmp_path / "text"
    for lanes in (1, 3, 32):
        path.write_bytes(b"x")
        with pytest.raises(ArgumentError) as caught:
            load_corpus(path, lanes)
        needed = int(str(caught.value).split("which needs ")[1].split(";")[0])
        path.write_bytes(b"x" * (needed - 1))
        with pytest.raises(ArgumentError, match="too short for --lanes"):
            load_corpus(path, lanes)
        path.write_bytes(b"x" * needed)
        corpus = load_corpus(path, lanes)
        assert len(EqualLanes(corpus.held_out, lanes)) == 1


def test_files_that_cannot_be_mapped_are_named(tmp_path):
    empty, fifo = tmp_path / "empty", tmp_path / "fifo"
    empty.touch()
    os.mkfifo(fifo)
    for path, reason in [
        (tmp_path / "absent", "does not exist"),
        (tmp_path, "is not a regular file"),
        (fifo, "is not a regular file"),
        (empty, "is empty"),
    ]:
        with pytest.raises(ArgumentError, match=f"--data {path} {reason}"):
            map_bytes(path)


@pytest.fixture
def library(tmp_path):
    """A standard library with packages, tests and installed packages."""
    contents = {
        "zlib.py": b"z",
        "abc.py": b"a",
        "json/decoder.py": b"d",
        "json/__init__.py": b"j",
        "json/tests/test_it.py": b"T",
        "asyncio/base.py": b"y",
        "asyncio/deep/er.py": b"e",
        "test/support.py": b"S",
        "site-packages/numpy/core.py": b"N",
        "dist-packages/more.py": b"M",
        "__pycache__/abc.py": b"C",
        "lib-dynload/zlib.so": b"\0",
        "notes.txt": b"t",
    }
    for name, text in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return tmp_path


def test_standard_library_text_is_modules_then_packages_in_order(library):
    names = [str(p.relative_to(library)) for p in standard_library_files(library)]
    assert names == [
        "abc.py",
        "zlib.py",
        "asyncio/base.py",
        "asyncio/deep/er.py",
        "json/__init__.py",
        "json/decoder.py",
    ]


def test_standard_library_text_stops_at_the_bytes_it_was_asked_for(library):
    for num_bytes in range(1, 7):
        text = standard_library_text(num_bytes, library)
        assert text.tobytes() == b"azyejd"[:num_bytes]


def test_a_stripped_standard_library_is_one_clear_error(library):
    with pytest.raises(ArgumentError, match=r"has only 6 bytes.*--data FILE"):
        standard_library_text(7, library)


def test_this_python_has_the_default_text():
    corpus = load_corpus(None, lanes=32)
    assert len(corpus.train) == 3_800_000
    assert len(corpus.held_out) == 200_000
    assert np.array_equal(corpus.train, load_corpus(None, lanes=32).train)


def test_pair_counts_do_not_depend_on_chunks(monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    expected = np.zeros((256, 256))
    for first, second in pairwise(data):
        expected[first, second] += 1
    for chunk in (1, 7, 999, 1000, 10_000):
        monkeypatch.setattr("tbptt_ckpt.cli.bytes.score._CHUNK_BYTES", chunk)
        assert np.array_equal(pair_counts(data), expected)


def test_bigram_bits_against_the_definition(monkeypatch):
    train = np.random.default_rng(1).integers(0, 4, 500).astype(np.uint8)
    held_out = EqualLanes(np.random.default_rng(2).integers(0, 5, 60).astype(np.uint8), 3)
    counts = [[0.1] * 256 for _ in range(256)]
    for first, second in pairwise(train.tolist()):
        counts[first][second] += 1
    inputs, targets = held_out.read(0, len(held_out))
    bits = [
        -math.log2(counts[a][b] / sum(counts[a]))
        for a, b in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    expected = sum(bits) / len(bits)
    assert bigram_bits(train, held_out) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("tbptt_ckpt.cli.bytes.score._CHUNK_BYTES", 8)
    assert bigram_bits(train, held_out) == pytest.approx(expected, rel=1e-12)


def test_bigram_of_bytes_that_follow_surely_is_nearly_free():
    cycle = as_bytes(range(4))
    train = np.tile(cycle, 25_000)
    assert bigram_bits(train, EqualLanes(train[:100], 3)) < 0.01
