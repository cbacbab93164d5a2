"""Ranks that train together have the gradient of one process on all their lanes."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import torch.distributed as dist
from cases import WIDTH, gradients, mean_loss, random_data, random_state, relative_error, tanh_cell
from runs_of_ranks import BY_DEFAULT, check_goes_on
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tbptt_ckpt import TBPTT, NonFinite, SharedState, TensorSequence, Trainer, Validation
from tbptt_ckpt.engine import Ranks
from tbptt_ckpt.errors import ArgumentError, NonFiniteError, RankError
from tbptt_ckpt.trainer import TrainingStopped
from tbptt_ckpt.updates.ranks import RankGroup

STEPS, K1, LANES = 11, 3, 4
LANES_OF = (slice(0, 3), slice(3, 4))  # by rank
STEPS_OF = (STEPS, 6)  # lanes of the second rank end earlier


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def masked_mean(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of what is not NaN."""
    counts = ~target.isnan()
    return (y - target)[counts].square().sum(), counts.sum()


def all_lanes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, NaN where there are none, resets and the first state of all ranks."""
    inputs, targets = random_data(STEPS, lanes=LANES)
    resets = torch.zeros(STEPS, LANES, dtype=torch.bool)
    resets[4, 1] = resets[7, 0] = resets[5, 3] = True
    targets[8:, 2] = torch.nan
    return inputs, targets, resets, random_state(lanes=LANES)


def sequence_of(rank: int, count: int, *, is_masked: bool) -> tuple[TensorSequence, Tensor]:
    """The lanes of a rank; masked by NaN for a loss that knows it, otherwise by weights."""
    inputs, targets, resets, state = all_lanes()
    lanes = LANES_OF[rank] if count == 2 else slice(None)
    steps = STEPS_OF[rank] if count == 2 else STEPS
    inputs, targets, resets = (each[:steps, lanes] for each in (inputs, targets, resets))
    if count == 1:
        targets[STEPS_OF[1] :, LANES_OF[1]] = torch.nan
    weight = None if is_masked else (~targets.isnan()).all(-1).double()
    targets = targets if is_masked else targets.nan_to_num()
    return TensorSequence(inputs, targets, weight=weight, resets=resets), state[lanes]


class Joined:
    """Plain BPTT in one process over the lanes of both ranks, with its updates."""

    def __init__(self, module: nn.Module, lr: float, k2: int | None, how: dict[str, Any]) -> None:
        inputs, targets, resets, state = all_lanes()
        targets[STEPS_OF[1] :, LANES_OF[1]] = torch.nan

        def step(given: Any, h: Tensor) -> Any:
            x, begins = given
            return module(x, torch.where(begins[:, None], state, h))

        weights = list(module.parameters())
        problem = naive.Problem(
            step=step,
            loss_fn=masked_mean,
            inputs=list(zip(inputs, resets, strict=True)),
            targets=list(targets),
            init_state=state,
            parameters=weights,
        )
        self.losses, self.updates, group = [], [], []
        optimizer = torch.optim.SGD(weights, lr=lr)
        overlap = naive.OVERLAPS[how.get("overlap", "refresh")]
        for window in overlap(problem, K1, k2):
            self.losses.append(float(window.loss))
            group.append(window.grads)
            if len(group) == how.get("accumulate", 1) or window.stop == STEPS:
                for weight, *grads in zip(weights, *group, strict=True):
                    weight.grad = sum(grads) / len(group)
                if "clip_grad_norm" in how:
                    nn.utils.clip_grad_norm_(weights, how["clip_grad_norm"])
                self.updates.append((window.stop, gradients(weights)))
                optimizer.step()
                group = []
        self.weights = weights


class Reductions:
    """Counts those of gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, reduce = 0, dist.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return reduce(*args, **kwargs)

        monkeypatch.setattr(dist, "all_reduce", counted)

    @staticmethod
    def watch(module: nn.Module) -> nn.Module:
        if not isinstance(module, DistributedDataParallel):
            return module

        module.register_comm_hook(None, default_hooks.allreduce_hook)  # torch's own is in C++
        return module


CASES: tuple[tuple[Any, dict[str, Any]], ...] = (
    (nn.Identity, {"strategy": "uniform:{}"}),  # plans need not be the same
    (nn.Identity, {"strategy": "step", "overlap": "stale", "accumulate": 2}),
    (nn.Identity, {"memory_budget": "64MiB", "clip_grad_norm": 0.05}),
    (DistributedDataParallel, {"strategy": "uniform:{}", "accumulate": 2}),
    (DistributedDataParallel, {"strategy": "uniform:2", "executor": "checkpoint"}),
)
GRID = [
    (wrap, {"strategy": strategy, "executor": executor, "overlap": overlap, "accumulate": windows})
    for wrap, strategy, executor, overlap, windows in itertools.product(
        (nn.Identity, DistributedDataParallel),
        ("retain", "uniform:{}", "sqrt"),
        ("replay", "checkpoint"),
        ("refresh", "stale"),
        (1, 2, 3),
    )
]


def check_gradients(
    rank: int, count: int, cases: Any = CASES, reaches: tuple[int | None, ...] = (7,)
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reductions = Reductions(patch)
        for (wrap, how), k2 in itertools.product(cases, reaches):
            module, is_masked = tanh_cell(), how.get("executor") == "checkpoint"
            expected = Joined(copy.deepcopy(module), 0.1, k2, how)
            given = how | {"strategy": how.get("strategy", "auto").format(2 + rank)}
            module = reductions.watch(wrap(module) if wrap is not nn.Identity else module)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            loss_fn = masked_mean if is_masked else mean_loss
            tbptt = TBPTT(module, loss_fn, K1, k2, optimizer, ranks="all", **given)
            sequence, state = sequence_of(rank, count, is_masked=is_masked)
            before, updates = reductions.count, dict(expected.updates)
            windows = tbptt.windows(sequence, state)
            for window, loss in zip(windows, expected.losses, strict=rank == 0):
                assert window.loss_value == pytest.approx(loss, rel=1e-12), (how, window)
                assert window.updated == (window.stop in updates), (how, window)
                if window.updated:
                    found = gradients(list(module.parameters()))
                    assert relative_error(found, updates[window.stop]) <= 1e-12, (rank, how)
            assert reductions.count - before == len(updates), how  # once an update
            assert relative_error(list(module.parameters()), expected.weights) <= 1e-12, how


def check_faults(rank: int, count: int) -> None:
    """What one rank finds, or does otherwise, all ranks know before the weights change."""
    sequence, state = sequence_of(rank, count, is_masked=True)

    def engine(module: nn.Module, **how: Any) -> TBPTT:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return TBPTT(module, masked_mean, K1, 7, optimizer, **{"strategy": "step"} | how)

    with pytest.raises(RankError, match=r"module.recurrence.weight on rank 1 is not .* on rank 0"):
        engine(tanh_cell(seed=rank), ranks="all").train(sequence, state)
    with pytest.raises(RankError, match="accumulate is 1 on rank 0 and 2 on rank 1"):
        engine(tanh_cell(), ranks="all", accumulate=1 + rank)
    module = tanh_cell()
    windows = engine(module, ranks=Ranks(check_every=1)).windows(sequence, state)
    next(windows)
    if rank == 1:
        with torch.no_grad():
            module.readout.bias[0] += 1e-9
    with pytest.raises(RankError, match=r"readout.bias on rank 1 .* after 1 updates \(1 of 4"):
        next(windows)
    module, inputs = tanh_cell(), all_lanes()[0]
    inputs[4] = torch.nan if rank == 1 else 1.0
    targets = torch.zeros(STEPS, LANES, WIDTH, dtype=torch.float64)
    windows = engine(module, ranks="all").windows(
        TensorSequence(inputs, targets), random_state(2, LANES)
    )
    next(windows)
    before = gradients([*module.parameters()]), copy.deepcopy(module.state_dict())
    with pytest.raises(NonFiniteError, match="window 1"):
        next(windows)
    assert all(torch.equal(before[1][name], each) for name, each in module.state_dict().items())


def wrongly_trained(rank: int, pattern: str) -> DistributedDataParallel:
    """Two steps of plain PyTorch that leave a gradient unreduced without an error."""
    module = DistributedDataParallel(tanh_cell())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.full((1, 2), 1.0 + rank, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(1, WIDTH, dtype=torch.float64)
    for _ in range(2):
        if pattern == "two backwards over one forward":
            y = module(x, h)[0]
            y.sum().backward(retain_graph=True)
            (2 * y).sum().backward()
        elif pattern == "a forward within no_sync":
            with module.no_sync():
                y = module(x, h)[0]
            y.sum().backward()
        else:
            y = module(x, h)[0] + checkpoint(lambda x: module(x, h)[0], x, use_reentrant=True)
            with module.no_sync():
                y.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def check_wrong_patterns(rank: int, count: int) -> None:
    for pattern in ("two backwards over one forward", "a forward within no_sync", "checkpoint"):
        module = wrongly_trained(rank, pattern)
        group = RankGroup(Ranks(), dict(module.module.named_parameters()), {})
        with pytest.raises(RankError, match="on rank 1 is not what it is on rank 0"):
            group.compare()


def trained(rank: int, step: Any, targets: Tensor | None = None, **how: Any) -> Trainer:
    """A trainer over this rank's lanes, as many steps on every rank; it has not begun."""
    inputs, own, resets, state = all_lanes()
    own[STEPS_OF[1] :, LANES_OF[1]] = torch.nan
    lanes = LANES_OF[rank]
    own = (own if targets is None else targets)[:, lanes]
    source = TensorSequence(inputs[:, lanes], own, resets=resets[:, lanes])
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    tbptt = TBPTT(step, masked_mean, K1, 7, optimizer, strategy="uniform:3", ranks="all")
    return Trainer(tbptt, source, init_state=state[lanes], **how)


class Faulty(nn.Module):
    """A cell that does something else, once."""

    def __init__(self, call: int, fault: Any) -> None:
        super().__init__()
        self.cell, self.calls, self.call, self.fault = tanh_cell(), [], call, fault

    def forward(self, x: Tensor, h: Tensor) -> Any:
        self.calls.append(1)
        if len(self.calls) == self.call:
            self.fault()
        return self.cell(x, h)


def missing_memory() -> None:
    raise torch.OutOfMemoryError("no memory, as if")


def check_trainer(rank: int, count: int) -> None:
    """What one rank does again, leaves out, or is stopped by."""
    expected = Joined(tanh_cell(), 0.1, 7, {})
    module = Faulty(20, missing_memory if rank == 1 else int)
    with warnings.catch_warnings(action="ignore"):
        result = trained(rank, module).train()
    assert result.num_steps == STEPS
    assert relative_error(list(module.parameters()), expected.weights) <= 1e-12

    targets = torch.zeros(STEPS, LANES, WIDTH, dtype=torch.float64)
    targets[4, 3] = torch.inf  # of the second rank
    trainer = trained(rank, tanh_cell(), targets, non_finite=NonFinite(policy="skip"))
    with warnings.catch_warnings(action="ignore"):
        windows = [window.index for window in trainer.windows()]
    assert windows == [0, 2, 3], windows
    assert trainer.num_updates == 3

    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 1 else int
    trainer = trained(rank, Faulty(2, stop))
    with warnings.catch_warnings(action="ignore"), pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.num_steps == 2 * K1  # with the vote of the window after
    with pytest.raises(ArgumentError, match="validation"):
        trained(
            rank, tanh_cell(), validation=Validation(source=sequence_of(0, 1, is_masked=True)[0])
        )


def check_all(path: Path, rank: int, count: int) -> None:
    check_gradients(rank, count)
    check_faults(rank, count)
    check_wrong_patterns(rank, count)
    check_trainer(rank, count)
    check_goes_on(path, BY_DEFAULT, rank, count)


def check_grid(rank: int, count: int) -> None:
    check_gradients(rank, count, GRID, (3, 7, None))


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_joined, (2, free_port(), partial(check_all, tmp_path)), nprocs=2)


@pytest.mark.exhaustive
def test_every_executor_and_overlap_on_two_ranks() -> None:
    torch.multiprocessing.spawn(_joined, (2, free_port(), check_grid), nprocs=2)


def _joined(rank: int, count: int, port: int, check: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    check(rank, count)
    dist.destroy_process_group()


def test_one_rank_is_one_process(alone: None) -> None:
    check_gradients(0, 1)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"k2": "auto", "max_k2": 12}, "k2='auto'"),
        ({"reduction": "sum"}, "reduction='sum'"),
        ({"optimizer": None}, "needs an optimizer"),
    ],
)
def test_what_ranks_cannot_agree_on_is_refused(
    alone: None, how: dict[str, Any], words: str
) -> None:
    module = tanh_cell()
    known = {"k2": 7, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1)}
    with pytest.raises(ArgumentError, match=f"ranks='all' .*{words}"):
        TBPTT(module, mean_loss, K1, **known | how, ranks="all")


def test_sharded_weights_are_refused(alone: None) -> None:
    module = tanh_cell()
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="ranks='all' does not fit module: fully_shard"):
        TBPTT(module, mean_loss, K1, 7, optimizer, strategy="sqrt", ranks="all")


def test_without_a_process_group_it_is_refused() -> None:
    module = tanh_cell()
    with pytest.raises(ArgumentError, match="init_process_group"):
        TBPTT(module, mean_loss, K1, 7, torch.optim.SGD(module.parameters()), ranks="all")


def test_sums_and_states_of_lanes_that_learn_are_refused(alone: None) -> None:
    sequence, state = sequence_of(0, 1, is_masked=False)

    def train(state: Any, loss_fn: Any = mean_loss) -> None:
        module = tanh_cell()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        TBPTT(module, loss_fn, K1, 7, optimizer, ranks="all").train(sequence, state)

    with pytest.raises(ArgumentError, match="loss_fn calls mse_loss with reduction='sum'"):
        train(state, nn.MSELoss(reduction="sum"))
    with pytest.raises(ArgumentError, match="init_state holds tensors that learn"):
        train(state.requires_grad_())
    train(SharedState(torch.zeros(1, WIDTH, dtype=torch.float64, requires_grad=True), LANES))
