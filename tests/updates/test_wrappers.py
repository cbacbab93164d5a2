"""Modules that several processes train see one pass for each window, with its whole gradient."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import torch.distributed as dist
from cases import (
    WIDTH,
    WIDTH_IN,
    gradients,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tbptt_ckpt import TBPTT, Snapshots, TensorSequence, Trainer, run_window
from tbptt_ckpt.errors import ArgumentError

STEPS, K1, K2 = 11, 3, 7


class Cell(nn.Module):
    """A step with a statistic that processes share, and a weight that may not be used."""

    def __init__(self, *, has_unused: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH_IN + WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH_IN))
        self.unused = nn.Linear(2, 2) if has_unused else None

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = self.seen + x.detach().mean(0)
        h = torch.tanh(self.linear(torch.cat([x, h], 1)))
        return h, h


def cell(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Cell(**options).double()


class _FabricModule(nn.Module):
    """Lightning Fabric's, as far as its forward and its attributes go."""

    def __init__(self, forward_module: nn.Module, original_module: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = forward_module, original_module

    @property
    def module(self) -> nn.Module:
        return self._original_module

    def forward(self, *args: Any) -> Any:
        return self._forward_module(*args)


_FabricModule.__module__ = "lightning.fabric.wrappers"


def prepared_by_accelerate(module: nn.Module) -> nn.Module:
    """`DistributedDataParallel` whose forward is wrapped on the object, as `prepare` does it."""
    wrapped = DistributedDataParallel(module)
    original = wrapped.forward
    wrapped._original_forward = original
    wrapped.forward = lambda *args: original(*args)
    return wrapped


def by_fabric(module: nn.Module) -> nn.Module:
    return _FabricModule(DistributedDataParallel(module), module)


class Holding(nn.Module):
    """A module of the user's own with a parallel one inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = DistributedDataParallel(module)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.inner(x, h)


WRAPPERS = (DistributedDataParallel, prepared_by_accelerate, by_fabric, Holding)


@pytest.fixture
def alone() -> Any:
    """A group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def data_of(rank: int) -> tuple[Tensor, Tensor]:
    inputs, targets = random_data(STEPS)
    return inputs + rank, targets * (1 + rank)


def mean_of_plain(count: int) -> list[list[Tensor]]:
    """The mean over processes of what plain BPTT finds in each, for every window."""
    found = [
        naive.refresh(naive_problem(cell(), *data_of(r), random_state()), K1, K2)
        for r in range(count)
    ]
    return [
        [sum(grads) / count for grads in zip(*(each.grads for each in windows), strict=True)]
        for windows in zip(*found, strict=True)
    ]


def reducer_in(module: nn.Module) -> DistributedDataParallel:
    return next(each for each in module.modules() if isinstance(each, DistributedDataParallel))


def reductions_of(module: nn.Module) -> list[int]:
    """The buckets that processes have reduced so far; grows."""
    found: list[int] = []

    def reduce(found, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations
        found.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    reducer_in(module).register_comm_hook(found, reduce)
    return found


CASES = (
    (DistributedDataParallel, {"strategy": "uniform:{}"}),  # plans need not be the same
    (prepared_by_accelerate, {"strategy": "retain"}),
    (by_fabric, {"strategy": "step", "overlap": "stale"}),
    (Holding, {"strategy": "uniform:3", "executor": "checkpoint"}),
    (DistributedDataParallel, {"strategy": "uniform:2", "accumulate": 2}),
    (DistributedDataParallel, {"memory_budget": "64MiB", "deliver": "once"}),
)


def check_gradients(rank: int, count: int) -> None:
    expected = mean_of_plain(count)
    for wrap, how in CASES:
        how = how | {"strategy": how.get("strategy", "auto").format(2 + rank)}
        module = wrap(cell())
        reduced = reductions_of(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, **how)
        assert tbptt.parts.recurrence.per_step
        group = []
        windows = tbptt.windows(TensorSequence(*data_of(rank)), random_state())
        for number, (window, wanted) in enumerate(zip(windows, expected, strict=True), 1):
            group.append(wanted)
            divisor = len(group) if window.updated else 1
            total = [sum(grads) / divisor for grads in zip(*group, strict=True)]
            found = gradients(list(module.parameters()))
            assert relative_error(found, total) <= 1e-12, (rank, how, number)
            assert len(reduced) == number, how  # once, whatever the plan
            if window.updated:
                group = []
        last = (STEPS - 1) // K1 * K1  # what the first process had seen is sent when it begins
        seen = data_of(0)[0][:last].mean(1).sum(0) + data_of(rank)[0][last:].mean(1).sum(0)
        assert relative_error([reducer_in(module).module.seen], [seen]) <= 1e-12, how


def test_one_process_has_the_gradient_of_plain_bptt(alone: None) -> None:
    check_gradients(0, 1)


@pytest.mark.parametrize("wrap", WRAPPERS[:3])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.LSTM, nn.GRU])
def test_a_wrapped_module_is_what_it_was(alone: None, kind: Any, wrap: Any) -> None:
    options = {"batch_first": True} if issubclass(kind, nn.RNNBase) else {}
    inner = kind(WIDTH_IN, WIDTH, **options).double()
    module, plain = wrap(inner), kind(WIDTH_IN, WIDTH, **options).double()
    plain.load_state_dict(inner.state_dict())
    inputs, targets = (each.transpose(0, 1) if options else each for each in random_data(STEPS))
    losses = []
    for each, owner in ((module, inner), (plain, plain)):  # the optimizer's may be the inner one's
        optimizer = torch.optim.SGD(owner.parameters(), lr=0.5)
        tbptt = TBPTT(each, mean_loss, K1, K2, optimizer, strategy="uniform:2")
        windows = tbptt.windows(TensorSequence(inputs, targets))
        losses.append([float(window.loss) for window in windows])
        assert tbptt.parts.recurrence.per_step == (not options)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_run_of_a_wrapped_module_resumes(alone: None, tmp_path: Path) -> None:
    def trained(name: str, *, max_steps: int | None = None) -> dict[str, Tensor]:
        module = DistributedDataParallel(cell())
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, strategy="uniform:2")
        snapshots = Snapshots(directory=tmp_path / name, every_steps=K1)
        source = TensorSequence(*random_data(STEPS))
        trainer = Trainer(
            tbptt,
            source,
            init_state=random_state(),
            epochs=2,
            snapshots=snapshots,
            max_steps=max_steps,
        )
        trainer.resume()
        trainer.train()
        return module.state_dict()

    expected = trained("whole")
    trained("cut", max_steps=2 * K1)
    found = trained("cut")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def check_unused(rank: int, count: int) -> None:
    expected = mean_of_plain(count)
    module = DistributedDataParallel(cell(has_unused=True), find_unused_parameters=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, strategy="uniform:2")
    windows = tbptt.windows(TensorSequence(*data_of(rank)), random_state())
    for _, wanted in zip(windows, expected, strict=True):
        *found, weight, bias = gradients(list(module.parameters()))
        assert relative_error(found, wanted) <= 1e-12
        assert weight is None
        assert bias is None


def test_unused_weights(alone: None) -> None:
    check_unused(0, 1)
    module = DistributedDataParallel(cell(has_unused=True))
    with pytest.raises(ArgumentError, match=r"unused.weight got no gradient.*find_unused"):
        run_window(module, mean_loss, *data_of(0), random_state(), strategy="uniform:2")


def test_hooks_see_a_windows_gradient_before_it_is_reduced(alone: None) -> None:
    def hooked(module: nn.Module) -> nn.Module:
        for weight in module.parameters():
            weight.register_hook(lambda grad: grad.clamp(-1e-2, 1e-2))
        return module

    plain, module = hooked(cell()), DistributedDataParallel(hooked(cell()))
    run_window(plain, mean_loss, *data_of(0), random_state(), strategy="retain")
    run_window(module, mean_loss, *data_of(0), random_state(), strategy="uniform:2")
    expected = gradients(list(plain.parameters()))
    assert max(float(grad.abs().max()) for grad in expected) == 1e-2
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12


def test_gradients_of_several_windows_are_kept_apart_by_no_sync(alone: None) -> None:
    """As in plain PyTorch: within `no_sync` nothing is reduced, afterwards all of it."""
    module = DistributedDataParallel(cell())
    reduced = reductions_of(module)
    with module.no_sync():
        run_window(module, mean_loss, *data_of(0), random_state(), strategy="uniform:2")
    assert not reduced
    run_window(module, mean_loss, *data_of(1), random_state(), strategy="uniform:2")
    assert reduced == [0]
    plain = cell()
    for rank in (0, 1):
        run_window(plain, mean_loss, *data_of(rank), random_state(), strategy="retain")
    expected = gradients(list(plain.parameters()))
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12


def test_a_budget_counts_what_gradients_are_gathered_in(alone: None) -> None:
    x, y = random_data(40)
    found = []
    for wrap in (lambda module: module, DistributedDataParallel):
        module = wrap(tanh_cell())
        how = {"strategy": "uniform:8", "memory_budget": "1MiB", "measure_memory": True}
        tbptt = TBPTT(module, mean_loss, 40, None, **how)
        for _ in range(2):  # gradients accumulate
            (window,) = tbptt.windows(TensorSequence(x, y), random_state())
        found.append((tbptt.parts.budget._present._last[1].fixed.total(40), window.peak_bytes))
    (fixed, peak), (more_fixed, more_peak) = found
    gathered = sum(weight.nbytes for weight in module.parameters())
    assert more_fixed - fixed == 2 * gathered  # and what accumulates is set aside
    assert gathered <= more_peak - peak <= 3 * gathered


@pytest.mark.parametrize("option", [{"static_graph": True}, {"mixed_precision": True}])
def test_what_counts_backwards_is_refused(alone: None, option: dict[str, Any]) -> None:
    if "mixed_precision" in option:
        module = DistributedDataParallel(cell())
        module.mixed_precision = object()
    else:
        module = DistributedDataParallel(cell(), **option)
    with pytest.raises(ArgumentError, match=f"module contains.*{next(iter(option))}"):
        TBPTT(module, mean_loss, K1, K2)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("FullyShardedDataParallel", "torch.distributed.fsdp"),
        ("DeepSpeedEngine", "deepspeed.runtime"),
    ],
)
def test_wrappers_with_a_backward_of_their_own_are_refused(name: str, package: str) -> None:
    kind = type(name, (Holding,), {"__module__": package, "__init__": nn.Module.__init__})
    module = kind()
    module.inner = cell()
    with pytest.raises(ArgumentError, match=f"module contains a {name}"):
        TBPTT(module, mean_loss, K1, K2)


def check_sharded(rank: int, count: int) -> None:
    expected = mean_of_plain(count)
    mesh = init_device_mesh("cpu", (count,))
    for how in (
        {"strategy": "retain"},
        {"strategy": "uniform:2", "accumulate": 2},
        {"strategy": "step", "overlap": "stale"},
        {"strategy": "uniform:3", "executor": "checkpoint"},
    ):
        module, calls = cell(), []
        fully_shard(module, mesh=mesh)
        for weight in module.parameters():
            weight.register_post_accumulate_grad_hook(calls.append)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, **how)
        windows, group = tbptt.windows(TensorSequence(*data_of(rank)), random_state()), []
        for number, (window, wanted) in enumerate(zip(windows, expected, strict=True), 1):
            group.append(wanted)
            divisor = len(group) if window.updated else 1
            total = [sum(grads) / divisor for grads in zip(*group, strict=True)]
            found = [weight.grad.full_tensor() for weight in module.parameters()]
            assert relative_error(found, total) <= 1e-12, (rank, how, number)
            assert len(calls) == number * len(found)
            if window.updated:
                group = []
    for wrong in ({"strategy": "auto"}, {"strategy": "sqrt", "memory_budget": "1GiB"}):
        with pytest.raises(ArgumentError, match="fully_shard"):
            TBPTT(module, mean_loss, K1, K2, **wrong)
    with pytest.raises(ArgumentError, match="deliver='once' does not fit module"):
        TBPTT(module, mean_loss, K1, K2, strategy="sqrt", deliver="once")


def test_sharded_weights(alone: None) -> None:
    check_sharded(0, 1)


def check_all(rank: int, count: int) -> None:
    check_gradients(rank, count)
    check_unused(rank, count)
    check_sharded(rank, count)


@pytest.mark.exhaustive
def test_processes_have_the_mean_of_their_gradients() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_joined, (2, port), nprocs=2)


def _joined(rank: int, count: int, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    check_all(rank, count)
    dist.destroy_process_group()
