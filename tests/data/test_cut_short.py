"""A file that is cut short while it is mapped ends in one error, not in a bus error."""

import mmap
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_lines import refusal_of
from torch import nn

from tbptt_ckpt import TBPTT, ArgumentError, ArraySequence, LaneSource, TensorSequence
from tbptt_ckpt.cli.bytes.corpus import load_corpus
from tbptt_ckpt.cli.bytes.score import pair_counts
from tbptt_ckpt.cli.lanes import EqualLanes
from tbptt_ckpt.data import map_file

ROWS, WIDTH = 8192, 2  # of 4 bytes: whole pages of the file are gone where it is cut

MAPPED = {
    "npy": lambda path: map_file(path.with_suffix(".npy")),
    "raw": lambda path: map_file(path, "f4", step_shape=(WIDTH,)),
    "other byte order": lambda path: map_file(path, ">f4", step_shape=(WIDTH,)),
    "part": lambda path: map_file(path, "f4", step_shape=(WIDTH,))[16:],
    "transposed": lambda path: map_file(path, "f4").reshape(WIDTH, ROWS).T,
    "memmap with an offset": lambda path: np.memmap(
        path, "f4", mode="r", offset=8, shape=(ROWS - 1, WIDTH)
    ),
}


class Reading:
    """A user's source that hands out parts of its map."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def read(self, start, stop):
        return self.rows[start:stop], None


SOURCES = {
    "ArraySequence": lambda rows: ArraySequence(rows, dtype=torch.float32),
    "next step": lambda rows: ArraySequence(rows, next_step=True),
    "TensorSequence": lambda rows: TensorSequence(rows, {"a": rows}),
    "TensorSequence inside lanes": lambda rows: LaneSource(TensorSequence(rows), 2),
    "LaneSource": lambda rows: LaneSource([ArraySequence(rows), ArraySequence(rows)], 2),
}


@pytest.fixture
def path(tmp_path):
    rows = np.zeros((ROWS, WIDTH), "f4")
    np.save(tmp_path / "rows.npy", rows)
    rows.tofile(tmp_path / "rows")
    return tmp_path / "rows"


def cut(path):
    for file in (path, path.with_suffix(".npy")):
        os.truncate(file, 4096 + 100)


@pytest.mark.parametrize("name", MAPPED)
def test_it_is_named_whatever_is_mapped_of_it(name, path):
    source = ArraySequence(MAPPED[name](path))
    source.read(len(source) - 2, len(source))
    cut(path)
    with pytest.raises(ArgumentError, match=r"rows.* was cut short .*: \d+ bytes .* has 4196;"):
        source.read(len(source) - 2, len(source))


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_that_reads_it_says_so(name, path):
    source = SOURCES[name](map_file(path, "f4", step_shape=(WIDTH,)))
    source.read(len(source) - 2, len(source))
    cut(path)
    with pytest.raises(ArgumentError, match="was cut short"):
        source.read(len(source) - 2, len(source))


def test_bytes_of_a_text_are_looked_at_too(path):
    data = map_file(path, np.uint8)
    lanes = EqualLanes(data[:-100], 3)
    cut(path)
    for read in (lambda: lanes.read(0, 2), lambda: pair_counts(data[:5000])):
        with pytest.raises(ArgumentError, match="was cut short"):
            read()


@pytest.mark.parametrize("batch_first", [False, True])
def test_training_ends_before_the_update_of_a_window_that_is_gone(batch_first, path):
    module = nn.RNN(1, 1, batch_first=batch_first)
    shape = (2, ROWS, 1) if batch_first else (ROWS, 2, 1)
    rows = map_file(path, "f4").reshape(shape)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    engine = TBPTT(module, F.mse_loss, 4, 4, optimizer, strategy="sqrt")
    windows = engine.windows(TensorSequence(rows, rows))
    next(windows)
    before = [p.clone() for p in module.parameters()]
    cut(path)
    with pytest.raises(ArgumentError, match="was cut short"):
        list(windows)
    assert all(map(torch.equal, module.parameters(), before))


def test_a_file_that_was_replaced_is_still_what_was_mapped(path):
    source = ArraySequence(map_file(path, "f4", step_shape=(WIDTH,)))
    path.with_name("other").write_bytes(b"short")
    path.with_name("other").replace(path)
    source.read(0, ROWS)


def test_arrays_in_memory_and_views_of_anonymous_maps_are_read():
    anonymous = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
    for rows in (np.zeros((4, 2)), np.zeros((4, 4))[1:, ::2], anonymous):
        ArraySequence(rows).read(0, 2)


def test_the_command_ends_in_one_line(path, monkeypatch, capsys):
    def load_and_cut(*given):
        corpus = load_corpus(*given)
        os.truncate(path, 5000)
        return corpus

    monkeypatch.setattr("tbptt_ckpt.cli.bytes.score.load_corpus", load_and_cut)
    words = f"train --data {path} --hidden 4 --lanes 2 --k1 4 --k2 4 --max-steps 8"
    assert "was cut short while it was read" in refusal_of(capsys, words.split())
