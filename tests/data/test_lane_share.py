"""The lanes of all ranks, joined, are those of the source."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sources import SOURCES, leaves, read
from torch import nn

from tbptt_ckpt import TBPTT, ArgumentError, Batches, LaneSource, TensorSequence, Trainer
from tbptt_ckpt.data import lane_range, own_lanes
from tbptt_ckpt.data.steps import reader_for
from tbptt_ckpt.module.recurrence import recognise

LANES = {name: make for name, make in SOURCES.items() if "lanes" in name}
LANES["weighted_sequence"] = SOURCES["weighted_sequence"]


@pytest.mark.parametrize("make", LANES.values(), ids=LANES)
def test_reads_of_all_ranks_joined_are_those_of_the_source(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    whole, dim = make(tmp_path), 1
    lanes = leaves(whole.read(0, 1)[0])[0].shape[dim]
    for ranks in (2, lanes):
        shares = [own_lanes(make(tmp_path), rank=rank, ranks=ranks) for rank in range(ranks)]
        for start, stop in itertools.combinations(range(len(whole) + 1), 2):
            expected = read(whole, start, stop)
            found = [read(share, start, stop) for share in shares]
            for name in ("inputs", "targets"):
                columns = zip(*(getattr(rows, name) for rows in found), strict=True)
                for parts, every in zip(columns, getattr(expected, name), strict=True):
                    assert torch.equal(torch.cat(parts, dim), every), (ranks, start, stop)
            for name in ("weights", "resets"):
                every = getattr(expected, name)
                parts = [getattr(rows, name) for rows in found]
                if every is None or every.dim() == 1:
                    assert all(part is every or torch.equal(part, every) for part in parts)
                else:
                    assert torch.equal(torch.cat(parts, 1), every), (ranks, start, stop)
        assert all(len(share) == len(whole) for share in shares)
        assert all(share.state_dict() == whole.state_dict() for share in shares)
        if hasattr(whole, "lanes"):
            assert sum(share.lanes for share in shares) == whole.lanes


def test_ranges_are_as_equal_as_can_be_and_in_order() -> None:
    for lanes in range(1, 9):
        for ranks in range(1, lanes + 1):
            found = [lane_range(lanes, rank=rank, ranks=ranks) for rank in range(ranks)]
            assert [n for each in found for n in range(lanes)[each]] == list(range(lanes))
            sizes = [each.stop - each.start for each in found]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] - sizes[-1] <= 1
    assert lane_range(3) == slice(0, 3)  # without a process group


class Stream:
    """A source without a length or a time_dim, batch first."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def read(self, start: int, stop: int) -> Any:
        return self.inputs[:, start:stop], None


def test_streams_lists_and_batches() -> None:
    inputs = torch.arange(3 * 5 * 2.0).reshape(3, 5, 2)
    layer = recognise(nn.GRU(2, 2, batch_first=True), None, None, None)
    block = reader_for(own_lanes(Stream(inputs), rank=1, ranks=2), layer).read_block(1, 3)
    assert block is not None
    assert torch.equal(block.inputs, inputs[2:, 1:3])
    steps = own_lanes([(each, None) for each in inputs.unbind(1)], rank=0, ranks=2)
    assert len(steps) == 5
    assert all(
        torch.equal(x, each[:2]) for (x, _), each in zip(steps, inputs.unbind(1), strict=True)
    )
    batches = Batches([(inputs, inputs + 1), (inputs[:2], inputs[:2])], time_dim=1)
    first, second = own_lanes(batches, rank=1, ranks=2)
    assert torch.equal(first.read(1, 2)[1], inputs[2:, 1:2] + 1)
    assert torch.equal(second.read(0, 5)[0], inputs[1:2])
    assert len(next(iter(batches)).read(0, 1)[0]) == 3, "it has changed"


def test_a_trainer_takes_them() -> None:
    inputs, module = torch.ones(3, 5, 2), nn.GRU(2, 2, batch_first=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, lambda y, _: y.square().mean(), 2, 4, optimizer, strategy="sqrt")
    for source in (TensorSequence(inputs, inputs), Batches([(inputs, inputs)], time_dim=1)):
        trainer = Trainer(tbptt, own_lanes(source, rank=1, ranks=2), epochs=2)
        assert [window.num_tokens for window in trainer.windows()] == [2, 2, 1] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lane_range(2, rank=0, ranks=3), "lanes=2 are too few for 3 ranks"),
        (lambda: lane_range(2, rank=2, ranks=2), "rank=2 must be below ranks=2"),
        (lambda: own_lanes(torch.ones(3, 2)), "sequence is a Tensor"),
        (
            lambda: own_lanes(TensorSequence(torch.ones(3)), rank=0, ranks=2).read(0, 1),
            r"shape \(1,\) has no dimension 1 with lanes",
        ),
        (
            lambda: own_lanes(LaneSource(TensorSequence(torch.ones(4)), 2), rank=0, ranks=4).lanes,
            "lanes=2 are too few for 4 ranks",
        ),
    ],
)
def test_what_has_no_lanes_for_a_rank_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()
