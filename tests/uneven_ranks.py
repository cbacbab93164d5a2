"""Trainers on two ranks of which one has fewer steps, or fewer sequences, than the other."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import random_data, relative_error, tanh_cell
from joined_ranks import (
    K1,
    LANES_OF,
    STEPS,
    Joined,
    held,
    local,
    masked_mean,
    sequence_of,
    sharded,
)
from torch import Tensor, nn
from torch.optim import SGD

from tbptt_ckpt import (
    TBPTT,
    Batches,
    NonFinite,
    Snapshots,
    TensorSequence,
    Trainer,
    Validation,
)
from tbptt_ckpt.trainer import EventSink

# Steps of the batches of each rank, of which the second one has fewer, and other ones.
BATCHES = ((5, 9, 4, 2), (8, 3))


class Told(EventSink):
    """What is told of windows, updates and faults."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int | None]] = []
        self.losses: list[float | None] = []
        self.updates, self.notices = 0, list[tuple[str, str]]()

    def on_window(self, event: Any) -> None:
        self.steps.append((event.steps, event.total_steps))
        self.losses.append(event.loss)

    def on_update(self, event: Any) -> None:
        self.updates = event.updates

    def on_notice(self, event: Any) -> None:
        self.notices.append((event.kind, event.message))


def engine(module: nn.Module, ranks: str | None = "all", **how: Any) -> TBPTT:
    given = {"strategy": "uniform:3", "ranks": ranks, **how}
    return TBPTT(module, masked_mean, K1, 7, SGD(module.parameters(), lr=0.1), **given)


def of_one_sequence(rank: int, how: dict[str, Any], **options: Any) -> Trainer:
    """Rank 0 has 11 steps, rank 1 has 6."""
    sequence, state = sequence_of(rank, 2, is_masked=True)
    return Trainer(engine(tanh_cell(), **how), sequence, init_state=state, **options)


def check_lengths(rank: int) -> None:
    """Weights are those of one process, and all ranks count and tell the same."""
    for wrap, how in ((nn.Identity(), {}), (sharded, {"accumulate": 3, "clip_grad_norm": 0.05})):
        module, told = wrap(tanh_cell()), Told()
        weights = list(module.parameters())
        expected = Joined(tanh_cell(), 0.1, 7, how)
        sequence, state = sequence_of(rank, 2, is_masked=True)
        trainer = Trainer(engine(module, **how), sequence, init_state=state, events=[told])
        windows = list(trainer.windows())
        assert relative_error(local(weights), held(expected.weights, weights)) <= 1e-12, how
        assert [each.loss_value for each in windows] == pytest.approx(expected.losses, rel=1e-12)
        assert told.losses == [each.loss_value for each in windows]
        assert told.steps == [(step, STEPS) for step in (3, 6, 9, 11)]
        result = trainer.result()
        counted = result.num_steps, result.num_windows, result.num_updates, told.updates
        updates = len(expected.updates)
        assert counted == (STEPS, 4, updates, updates)
        own = [each.num_new_steps for each in windows]
        assert own == ([3, 3, 3, 2] if rank == 0 else [3, 3, 0, 0])


def batch(rank: int, number: int, steps: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a rank's lanes."""
    lanes = LANES_OF[rank].stop - LANES_OF[rank].start
    inputs, targets = random_data(steps, seed=10 * rank + number, lanes=lanes)
    targets[1, 0] = torch.nan
    return inputs, targets


def batches(rank: int) -> Batches:
    each = enumerate(BATCHES[rank])
    return Batches([batch(rank, number, steps) for number, steps in each], time_dim=0)


def joined_batches() -> Batches:
    """Of both ranks in one process: what a rank has not is NaN."""
    joined = []
    for number, sizes in enumerate(itertools.zip_longest(*BATCHES, fillvalue=0)):
        parts = []
        for rank, steps in enumerate(sizes):
            inputs, targets = batch(rank, number, max(steps, 2))
            padded = [
                inputs.new_zeros(max(sizes), *inputs.shape[1:]),
                inputs.new_full((max(sizes), *targets.shape[1:]), torch.nan),
            ]
            padded[0][:steps], padded[1][:steps] = inputs[:steps], targets[:steps]
            parts.append(padded)
        joined.append(tuple(torch.cat(each, 1) for each in zip(*parts, strict=True)))
    return Batches(joined, time_dim=0)


def of_batches(rank: int, how: dict[str, Any], **options: Any) -> Trainer:
    return Trainer(engine(tanh_cell(), **how), batches(rank), **options)


def check_batches(rank: int) -> None:
    """A rank without a batch, or with a shorter one, takes part in those of the other."""
    for how in ({}, {"accumulate": 2, "overlap": "stale"}):
        trainer = of_batches(rank, how, epochs=2)
        whole = Trainer(engine(tanh_cell(), None, **how), joined_batches(), epochs=2)
        losses, expected = ([each.loss_value for each in run.windows()] for run in (trainer, whole))
        assert losses == pytest.approx(expected, rel=1e-12), how
        assert relative_error(weights_of(trainer), weights_of(whole)) <= 1e-12, how
        results = [each.result() for each in (trainer, whole)]
        for name in ("num_steps", "num_windows", "num_updates", "num_epochs"):
            assert len({getattr(result, name) for result in results}) == 1, (name, how)


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [each.detach().clone() for each in trainer.tbptt.parts.parameters]


def check_resumed(path: Path, rank: int, count: int, *, every: int = 1) -> None:
    """Stopped after any window, a run ends bit by bit as one that was not."""
    for make, how in ((of_one_sequence, {}), (of_batches, {"accumulate": 2})):
        for most in (14, 24)[::-every]:  # in a second pass, off and on the points of updates
            options = {"epochs": None, "max_steps": most}
            whole = make(rank, how, **options)
            num_windows = len(list(whole.windows()))
            assert whole.num_steps == most
            folder = path / f"{make.__name__}-{most}"
            for cut in range(1, num_windows, every):
                saves = Snapshots(directory=folder / str(cut))
                begun = make(rank, how, **options, snapshots=saves)
                windows = begun.windows()
                for _ in range(cut):
                    next(windows)
                begun.save()
                windows.close()
                dist.barrier()
                again = make(rank, how, **options, snapshots=saves)
                assert again.resume()
                assert again.num_steps == begun.num_steps
                assert len(list(again.windows())) == num_windows - cut, (make, most, cut)
                assert all(map(torch.equal, weights_of(again), weights_of(whole))), (most, cut)
                dist.barrier()


def check_longer(path: Path, rank: int) -> None:
    """A run that has ended goes on to more steps, also where the sequence of one rank has ended."""
    saves, ends = Snapshots(directory=path / "longer"), (9, 20)
    for most in ends:
        trainer = of_one_sequence(rank, {}, epochs=None, max_steps=most, snapshots=saves)
        assert trainer.resume() == (most == 20)
        trainer.train()
        dist.barrier()
    whole = of_one_sequence(rank, {}, epochs=None, max_steps=20)
    whole.train()
    assert trainer.num_steps == whole.num_steps == 20
    assert trainer.result().num_windows == whole.result().num_windows
    assert all(map(torch.equal, weights_of(trainer), weights_of(whole)))


def check_faults_beside(rank: int) -> None:
    """What is not finite is left out, and a validation looks, where one rank has ended."""
    sequence, state = sequence_of(rank, 2, is_masked=True)
    if rank == 0:
        sequence.inputs[7] = torch.inf  # in the third window, of which the second rank has none
    seen, told = TensorSequence(*random_data(5, lanes=1)), Told()
    trainer = Trainer(
        engine(tanh_cell()),
        sequence,
        init_state=state,
        non_finite=NonFinite(policy="skip"),
        validation=Validation(source=seen, every_windows=1),
        events=[told],
    )
    with warnings.catch_warnings(action="ignore"):
        assert [each.index for each in trainer.windows()] == [0, 1, 3]
    kinds = [kind for kind, _ in told.notices]
    assert (kinds.count("validated"), kinds.count("non_finite")) == (
        3,
        1,
    )  # it looks after windows that have run
    assert (trainer.num_steps, trainer.num_updates) == (STEPS, 3)


class Once(nn.Module):
    """A cell that misses memory in one of its calls."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.cell, self.calls, self.call = tanh_cell(), [], call

    def forward(self, x: Tensor, h: Tensor) -> Any:
        self.calls.append(1)
        if len(self.calls) == self.call:
            raise torch.OutOfMemoryError("no memory, as if")
        return self.cell(x, h)


def check_voted_again(rank: int) -> None:
    """A rank that misses memory says so before it runs a window again, and others tell of it."""
    expected, told = Joined(tanh_cell(), 0.1, 7, {}), Told()
    module = Once(20 if rank else 10**9)
    sequence, state = sequence_of(rank, 2, is_masked=True)
    trainer = Trainer(engine(module), sequence, init_state=state, events=[told])
    with warnings.catch_warnings(action="ignore"):
        trainer.train()
    assert relative_error(weights_of(trainer), expected.weights) <= 1e-12
    (words,) = (message for kind, message in told.notices if kind == "out_of_memory")
    assert ("window 1 did not fit on rank 1" in words) == (rank == 0), words


def check_uneven(path: Path, rank: int, count: int) -> None:
    check_lengths(rank)
    check_batches(rank)
    check_resumed(path, rank, count, every=3)
    check_longer(path, rank)
    check_faults_beside(rank)
    check_voted_again(rank)
