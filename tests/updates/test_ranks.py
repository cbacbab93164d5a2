"""Ranks that train together have the gradient of one process on all their lanes."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from audits_of_ranks import AUDITED, check_auto_k2
from budgets_of_ranks import (
    BUDGETS,
    check_budgets,
    check_costs_are_measured_once,
    check_costs_of_the_slowest,
)
from cases import WIDTH, gradients, mean_loss, random_state, relative_error, tanh_cell
from joined_ranks import (
    K1,
    LANES,
    LANES_OF,
    STEPS,
    STEPS_OF,
    Joined,
    Traffic,
    all_lanes,
    held,
    in_copies,
    local,
    masked_mean,
    sequence_of,
    sharded,
    sharded_inside,
)
from runs_of_ranks import BY_DEFAULT, check_broken_shards, check_goes_on
from several_ranks import free_port, on_two_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from uneven_ranks import check_resumed, check_uneven

from tbptt_ckpt import TBPTT, NonFinite, SharedState, TensorSequence, Trainer
from tbptt_ckpt.engine import Ranks
from tbptt_ckpt.errors import ArgumentError, NonFiniteError, OutOfMemoryError, RankError
from tbptt_ckpt.executor import compiled_steps
from tbptt_ckpt.trainer import TrainingStopped
from tbptt_ckpt.updates.ranks import RankGroup


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CASES: tuple[tuple[Any, dict[str, Any]], ...] = (
    (nn.Identity, {"strategy": "uniform:{}"}),  # plans need not be the same
    (nn.Identity, {"strategy": "step", "overlap": "stale", "accumulate": 2}),
    (nn.Identity, {"memory_budget": "64MiB", "clip_grad_norm": 0.05}),
    (DistributedDataParallel, {"strategy": "uniform:{}", "accumulate": 2}),
    (DistributedDataParallel, {"strategy": "uniform:2", "executor": "checkpoint"}),
    (nn.Identity, {"strategy": "uniform:{}", "reduction": "sum", "accumulate": 2}),
    (DistributedDataParallel, {"reduction": "sum", "executor": "checkpoint"}),
    (sharded, {"strategy": "uniform:{}", "reduction": "sum"}),
    (nn.Identity, {"strategy": "uniform:3", "compile": "aot_eager"}),
    (nn.Identity, {"strategy": "uniform:2", "time_batching": True}),
    (sharded, {"strategy": "uniform:{}", "deliver": "once"}),
    (sharded, {"strategy": "uniform:2", "executor": "checkpoint", "accumulate": 2}),
    (sharded_inside, {"strategy": "auto", "clip_grad_norm": 0.05, "accumulate": 2}),
    (in_copies, {"strategy": "step", "overlap": "stale"}),
)
# Times that gradients are reduced, and weights gathered, where ranks are two.
GROUPS = {sharded: (1, 1), sharded_inside: (3, 2), in_copies: (1, 0)}
GRID = [
    (wrap, {"strategy": strategy, "executor": executor, "overlap": overlap, "accumulate": windows})
    for wrap, strategy, executor, overlap, windows in itertools.product(
        (nn.Identity, DistributedDataParallel, sharded, sharded_inside, in_copies),
        ("retain", "uniform:{}", "sqrt"),
        ("replay", "checkpoint"),
        ("refresh", "stale"),
        (1, 2, 3),
    )
]


def check_masked(rank: int, count: int) -> None:
    """A window without a loss on one rank, where a group ends."""
    inputs, targets, resets, state = all_lanes()
    targets[STEPS_OF[1] :, LANES_OF[1]] = torch.nan
    lanes = LANES_OF[rank]
    data = TensorSequence(inputs[:, lanes], targets[:, lanes], resets=resets[:, lanes])
    for wrap, windows in itertools.product((nn.Identity, DistributedDataParallel, sharded), (1, 3)):
        module, how = tanh_cell(), {"accumulate": windows}
        expected = Joined(copy.deepcopy(module), 0.1, 7, how)
        module = module if wrap is nn.Identity else wrap(module)
        weights = list(module.parameters())
        how |= {"strategy": "uniform:3", "ranks": "all"}
        tbptt = TBPTT(module, masked_mean, K1, 7, SGD(weights, lr=0.1), **how)
        tbptt.train(data, state[lanes])
        assert relative_error(local(weights), held(expected.weights, weights)) <= 1e-12, how


def masked_sum(y: Tensor, target: Tensor) -> Tensor:
    """A sum of torch's over what is not NaN."""
    counts = ~target.isnan()
    return nn.functional.mse_loss(y.where(counts, 0), target.nan_to_num(), reduction="sum")


def check_gradients(
    rank: int, count: int, cases: Any = CASES, reaches: tuple[int | None, ...] = (7,)
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(patch)
        warnings.filterwarnings("ignore", "loss_fn calls mse_loss on other targets")
        patch.setattr(compiled_steps, "BLOCK_STEPS", 2)
        for (wrap, how), k2 in itertools.product(cases, reaches):
            module, kind = tanh_cell(), how.get("reduction", "mean")
            is_masked = kind == "sum" or how.get("executor") == "checkpoint"
            expected = Joined(copy.deepcopy(module), 0.1, k2, how)
            given = how | {"strategy": how.get("strategy", "auto").format(2 + rank)}
            module = traffic.watch(wrap(module) if wrap is not nn.Identity else module)
            weights = list(module.parameters())
            loss_fn, optimizer = masked_mean if is_masked else mean_loss, SGD(weights, lr=0.1)
            if kind == "sum" and wrap is nn.Identity:
                loss_fn = masked_sum
            tbptt = TBPTT(module, loss_fn, K1, k2, optimizer, ranks="all", **given)
            sequence, state = sequence_of(rank, count, is_masked=is_masked)
            before, updates = (traffic.reductions, traffic.gathers), dict(expected.updates)
            windows = tbptt.windows(sequence, state)
            for window, loss in zip(windows, expected.losses, strict=rank == 0):
                assert window.loss_value == pytest.approx(loss, rel=1e-12), (how, window)
                assert window.updated == (window.stop in updates), (how, window)
                if window.updated:
                    found, wanted = gradients(weights), held(updates[window.stop], weights)
                    assert relative_error(local(found), wanted) <= 1e-12, (rank, how)
            form = "compiled" if "compile" in how else "batched" if "time_batching" in how else None
            assert form is None or window.plan.form == form
            reduced, gathered = GROUPS.get(wrap, (1, 0))  # once an update, and once a window
            sent = traffic.reductions - before[0], traffic.gathers - before[1]
            assert sent == (reduced * len(updates), gathered * len(expected.losses)), (wrap, how)
            assert relative_error(local(weights), held(expected.weights, weights)) <= 1e-12, how


def roulette(rank: int, count: int, **how: Any) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """How far back the windows of some sequences reached, and the weights after them."""
    module, sequence = tanh_cell(), sequence_of(rank, count, is_masked=True)
    weights, how = list(module.parameters()), {"truncation": "roulette", **how}
    tbptt = TBPTT(module, masked_mean, K1, 9, SGD(weights, lr=0.1), **how)
    reached = [(each.start, each.stop) for _ in range(4) for each in tbptt.windows(*sequence)]
    return reached, [weight.detach() for weight in weights]


def check_roulette(rank: int, count: int) -> None:
    """Ranks draw alike, also where the sequence of one ends before those of others."""
    reached, weights = roulette(rank, count, strategy=f"uniform:{2 + rank}", ranks="all")
    by_one, expected = roulette(0, 1, strategy="step")
    assert reached == [each for each in by_one if each[1] <= STEPS_OF[rank]]
    assert len({stop - start for start, stop in reached}) > 1
    assert relative_error(weights, expected) <= 1e-12


def check_faults(rank: int, count: int) -> None:
    """What one rank finds, or does otherwise, all ranks know before the weights change."""
    sequence, state = sequence_of(rank, count, is_masked=True)

    def engine(module: nn.Module, **how: Any) -> TBPTT:
        optimizer = SGD(module.parameters(), lr=0.1)
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


def check_shards(rank: int, count: int) -> None:
    """What ranks hold of the same shard is compared; what one of them finds nobody uses."""
    sequence, state = sequence_of(rank, count, is_masked=True)
    module = in_copies(tanh_cell())
    weights = list(module.parameters())
    how = {"strategy": "step", "ranks": Ranks(check_every=1)}
    tbptt = TBPTT(module, masked_mean, K1, 7, SGD(weights, lr=0.1), **how)
    windows = tbptt.windows(sequence, state)
    next(windows)
    if rank == 1:
        with torch.no_grad():
            weights[1].to_local()[0] += 1e-9
    with pytest.raises(RankError, match=r"recurrence.bias on rank 1 is not .* \(1 of 4"):
        next(windows)
    module, inputs = sharded(tanh_cell()), all_lanes()[0]
    weights = list(module.parameters())
    inputs[4] = torch.nan if rank == 1 else 1.0
    targets = torch.zeros(STEPS, LANES, WIDTH, dtype=torch.float64)
    tbptt = TBPTT(module, masked_mean, K1, 7, SGD(weights, lr=0.1), strategy="step", ranks="all")
    windows = tbptt.windows(TensorSequence(inputs, targets), random_state(2, LANES))
    next(windows)
    before = [each.detach().clone() for each in local(weights)]
    with pytest.raises(NonFiniteError, match="window 1"):
        next(windows)
    assert all(map(torch.equal, local(weights), before))
    # And the next sequence is trained as if nothing had been.
    expected = Joined(tanh_cell(), 0.1, 7, {})
    module.set_requires_gradient_sync(False)  # nor if somebody has left it so
    with torch.no_grad():
        for weight, first in zip(weights, held([*tanh_cell().parameters()], weights), strict=True):
            weight.to_local().copy_(first)
    tbptt.train(*sequence_of(rank, count, is_masked=True))
    assert relative_error(local(weights), held(expected.weights, weights)) <= 1e-12
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("here", "all"))
    part = fully_shard(tanh_cell(), mesh=mesh["here"])
    with pytest.raises(ArgumentError, match=r"mesh of .* has 1 ranks of 2"):
        TBPTT(part, masked_mean, K1, 7, SGD(part.parameters(), lr=0.1), ranks="all")


def check_peaks(rank: int, count: int) -> None:
    """Every rank hears what the others held, where it was measured."""
    sequence, state = sequence_of(rank, count, is_masked=True)
    module = tanh_cell()
    how = {"measure_memory": rank == 0, "ranks": "all"}
    tbptt = TBPTT(module, masked_mean, K1, 7, SGD(module.parameters(), lr=0.1), **how)
    result = tbptt.train(sequence, state)
    first, second = result.peak_bytes_of_ranks
    assert second is None
    assert first > 0
    assert result.peak_bytes == (first if rank == 0 else None)


class Segments(nn.Module):
    """Two steps as checkpoints that differentiate within the backward."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        _, h = checkpoint(self.cell, x, h, use_reentrant=True)
        return checkpoint(self.cell, x, h, use_reentrant=True)


def wrongly_trained(rank: int, pattern: str) -> DistributedDataParallel:
    """Two steps of plain PyTorch that leave a gradient unreduced without an error."""
    is_checkpointed = pattern == "reentrant checkpoints inside"
    module = DistributedDataParallel(Segments(tanh_cell()) if is_checkpointed else tanh_cell())
    optimizer = SGD(module.parameters(), lr=0.1)
    x = torch.full((1, 2), 1.0 + rank, dtype=torch.float64)
    h = torch.zeros(1, WIDTH, dtype=torch.float64, requires_grad=is_checkpointed)
    for _ in range(2):
        with module.no_sync() if pattern == "a forward within no_sync" else nullcontext():
            y = module(x, h)[0]
        y.sum().backward(retain_graph=True)
        if pattern == "two backwards over one forward":
            (2 * y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def check_wrong_patterns(rank: int, count: int) -> None:
    for pattern in (
        "two backwards over one forward",
        "a forward within no_sync",
        "reentrant checkpoints inside",
    ):
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
    optimizer = SGD(step.parameters(), lr=0.1)
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


def check_recovery(rank: int, wrap: Any) -> None:
    expected = Joined(tanh_cell(), 0.1, 7, {})
    module = Faulty(20, missing_memory if rank == 1 else int)
    module = module if wrap is nn.Identity else wrap(module)
    weights = list(module.parameters())
    with warnings.catch_warnings(action="ignore"):
        result = trained(rank, module).train()
    assert result.num_steps == STEPS
    assert relative_error(local(weights), held(expected.weights, weights)) <= 1e-12

    targets = torch.zeros(STEPS, LANES, WIDTH, dtype=torch.float64)
    targets[4, 3] = torch.inf  # of the second rank
    module = tanh_cell() if wrap is nn.Identity else wrap(tanh_cell())
    trainer = trained(rank, module, targets, non_finite=NonFinite(policy="skip"))
    with warnings.catch_warnings(action="ignore"):
        windows = [window.index for window in trainer.windows()]
    assert windows == [0, 2, 3], windows
    assert trainer.num_updates == 3


def check_trainer(rank: int, count: int) -> None:
    """What one rank does again, leaves out, or is stopped by."""
    for wrap in (nn.Identity, sharded):
        check_recovery(rank, wrap)
    stop = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if rank == 1 else int
    trainer = trained(rank, Faulty(2, stop))
    with warnings.catch_warnings(action="ignore"), pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.num_steps == 2 * K1  # with the vote of the window after


def check_all(path: Path, rank: int, count: int) -> None:
    check_gradients(rank, count)
    check_masked(rank, count)
    check_roulette(rank, count)
    check_faults(rank, count)
    check_shards(rank, count)
    check_peaks(rank, count)
    check_wrong_patterns(rank, count)
    check_trainer(rank, count)
    check_auto_k2(path / "audits", rank, count)
    check_budgets(rank, count)
    check_costs_are_measured_once(rank, count)
    check_costs_of_the_slowest(rank, count)
    check_uneven(path / "uneven", rank, count)
    check_goes_on(path, BY_DEFAULT, rank, count)
    check_broken_shards(path / "shards", rank, count)


def check_grid(rank: int, count: int) -> None:
    check_gradients(rank, count, GRID, (3, 7, None))


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    on_two_ranks(partial(check_all, tmp_path))


def test_gradients_are_reduced_in_bytes_that_are_free_before_the_update(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Tensor] = []  # held on to, as a thread of gloo does for a while

    def reduce(tensor: Tensor, **how: Any) -> None:
        sent.append(tensor)
        all_reduce(tensor, **how)

    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", reduce)
    grads = [torch.randn(size, 2, dtype=kind) for size in (3, 5) for kind in (torch.half, None)]
    grads.append(torch.randn(2, 3).t())
    expected = [grad.clone() for grad in grads]
    RankGroup(Ranks(), {}, {}).average(grads)
    assert all(map(torch.equal, grads, expected))
    assert [(tensor.dtype, tensor.untyped_storage().nbytes()) for tensor in sent] == [
        (torch.float32, 0)  # one for all, in the type that holds both
    ]


@pytest.mark.exhaustive
def test_trainers_of_uneven_ranks_that_stop_anywhere(tmp_path: Path) -> None:
    on_two_ranks(partial(check_resumed, tmp_path))


def test_memory_that_is_missing_in_an_agreed_update_ends_the_run(alone: None) -> None:
    module = tanh_cell()
    optimizer = SGD(module.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: missing_memory())
    tbptt = TBPTT(module, masked_mean, K1, 7, optimizer, strategy="uniform:3", ranks="all")
    sequence, state = sequence_of(0, 1, is_masked=True)
    words = "window 0 has run, and its update, which all ranks had agreed on, does not fit"
    with pytest.raises(OutOfMemoryError, match=words):
        Trainer(tbptt, sequence, init_state=state).train()


@pytest.mark.exhaustive
def test_audits_of_two_ranks_under_every_plan(tmp_path: Path) -> None:
    on_two_ranks(partial(check_auto_k2, tmp_path, cases=AUDITED))


@pytest.mark.exhaustive
def test_who_measures_among_ranks() -> None:
    on_two_ranks(partial(check_costs_are_measured_once, all_of_it=True))


@pytest.mark.exhaustive
def test_budgets_under_every_wrapper_and_optimizer() -> None:
    on_two_ranks(partial(check_budgets, cases=BUDGETS))


@pytest.mark.exhaustive
def test_every_executor_and_overlap_on_two_ranks() -> None:
    on_two_ranks(check_grid)


def test_one_rank_is_one_process(alone: None) -> None:
    check_gradients(0, 1, [(wrap, how) for wrap, how in CASES if wrap not in GROUPS])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"optimizer": None}, "needs an optimizer"),
    ],
)
def test_what_ranks_cannot_agree_on_is_refused(
    alone: None, how: dict[str, Any], words: str
) -> None:
    module = tanh_cell()
    known = {"k2": 7, "optimizer": SGD(module.parameters(), lr=0.1)}
    with pytest.raises(ArgumentError, match=f"ranks='all' .*{words}"):
        TBPTT(module, mean_loss, K1, **known | how, ranks="all")


@pytest.mark.parametrize(
    ("how", "sharding", "words"),
    [
        ({}, {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}, "mp_policy"),
    ],
)
def test_what_sharded_weights_cannot_have_is_refused(
    alone: None, how: dict[str, Any], sharding: dict[str, Any], words: str
) -> None:
    module = fully_shard(tanh_cell(), mesh=init_device_mesh("cpu", (1,)), **sharding)
    optimizer = SGD(module.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=words):
        TBPTT(module, mean_loss, K1, 7, optimizer, ranks="all", **how)


def test_without_a_process_group_it_is_refused() -> None:
    module = tanh_cell()
    with pytest.raises(ArgumentError, match="init_process_group"):
        TBPTT(module, mean_loss, K1, 7, SGD(module.parameters()), ranks="all")


def test_sums_among_means_and_states_of_lanes_that_learn_are_refused(alone: None) -> None:
    sequence, state = sequence_of(0, 1, is_masked=False)

    def train(state: Any, loss_fn: Any = mean_loss, data: Any = sequence, **how: Any) -> None:
        module = tanh_cell()
        optimizer = SGD(module.parameters(), lr=0.1)
        TBPTT(module, loss_fn, K1, 7, optimizer, ranks="all", **how).train(data, state)

    with pytest.raises(ArgumentError, match="loss_fn calls mse_loss with reduction='sum'"):
        train(state, nn.MSELoss(reduction="sum"))
    plain = TensorSequence(*(each.nan_to_num() for each in all_lanes()[:2]))
    for no_sum in (mean_loss, lambda y, target: (y - target).abs().mean()):
        with pytest.raises(ArgumentError, match="no sum over lanes"):
            train(state, no_sum, plain, reduction="sum")
    train(state, nn.MSELoss(reduction="sum"), plain, reduction="sum")
    with pytest.raises(ArgumentError, match="without weights of lanes"):
        train(state, nn.MSELoss(reduction="sum"), reduction="sum")
    with pytest.raises(ArgumentError, match="init_state holds tensors that learn"):
        train(state.requires_grad_())
    train(SharedState(torch.zeros(1, WIDTH, dtype=torch.float64, requires_grad=True), LANES))
