"""States in the host's pinned memory: on a device that is simulated, and on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import bitwise, gradients, lstm_cell, mean_loss, random_data, random_state, tanh_cell
from models_for_tests import Grid
from simulated_device import DEVICE, OnDevice, SimulatedWaits, on_device, on_host
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence, run_window
from tbptt_ckpt.budget.stored_states import with_stored_states
from tbptt_ckpt.errors import ArgumentError, TbpttError
from tbptt_ckpt.executor import ReplayExecutor
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.pinned_states import HostMemory, PinnedStates, pinned_like
from tbptt_ckpt.executor.storage import Storage
from tbptt_ckpt.memory.exhausted import is_out_of_memory
from tbptt_ckpt.schedule import Costs

NUM_STEPS, K1, K2 = 10, 2, 4
CPU = torch.device("cpu")


class Mixed(nn.Module):
    """A state of two dtypes, a count that is the host's, and a part that is handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3).double()

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, number, count, given = state
        hidden = torch.tanh(self.inner(torch.cat([x, given], 1)) + hidden)
        return hidden, (hidden, number + 1, count + 1, given)


def mixed_state(put: Any) -> Any:
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    device = (zeros, torch.zeros(2, dtype=torch.int64))
    return (*put(device), torch.zeros((), dtype=torch.int64), put(zeros[:, :1] + 0.5))


MODULES: dict[str, tuple[Any, Any]] = {
    "lstm_cell": (lstm_cell, lambda _: None),
    "tanh": (tanh_cell, lambda put: put(random_state())),
    "mixed": (Mixed, mixed_state),
}


def trained(put: Any, name: str, waits: SimulatedWaits, offload: str | None, **how: Any) -> Any:
    """What every window gave, the weights at last, and waits for each window."""
    make, first = MODULES[name]
    torch.manual_seed(3)
    module, inputs = put(make()), random_data(NUM_STEPS)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    how = {"time_batching": False, "executor": ReplayExecutor(offload), **how}
    tbptt = TBPTT(module, mean_loss, K1, K2, optimizer, **how)
    data, counts, found, before = TensorSequence(*map(put, inputs)), [], [], 0
    for window in tbptt.windows(data, first(put)):
        counts.append(waits.total - before)
        found.append((window.loss, window.state, gradients([*module.parameters()])))
        before = waits.total
    return counts, on_host((found, [p.detach() for p in module.parameters()]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("strategy", ["step", "revolve:2"])
def test_every_way_to_keep_states(name: str, strategy: str) -> None:
    check(name, strategy)


def test_every_bit_is_as_in_memory_and_nothing_is_waited_for() -> None:
    check("mixed", "step")


def check(name: str, strategy: str) -> None:
    _, expected = trained(lambda tree: tree, name, SimulatedWaits(), None, strategy=strategy)
    with SimulatedWaits() as waits:
        counts, found = trained(on_device, name, waits, "host", strategy=strategy)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert waits.pinned > 0
    assert set(counts[3:]) == {1}, waits.found


def test_nothing_of_a_device_is_kept_there_and_places_are_used_again() -> None:
    with SimulatedWaits() as waits:
        kept, ambient = PinnedStates(), None
        for step in range(5):
            state = OnDevice(torch.full((3,), float(step)))
            kept.keep(Boundary(step, (state,), ambient), {})  # type: ignore[arg-type]
            if step >= 2:
                kept.drop(step - 2)
        assert waits.pinned == 3
        assert all(DEVICE in fits for fits in kept._free)  # those of another are not its
        assert [step in kept for step in range(5)] == [False, False, False, True, True]
        found = kept.find(3).state[0]
        assert (found.device, found.values.tolist()) == (DEVICE, [3.0] * 3)
        (frame, _) = kept._frames[4]
        assert frame[0].values.device == CPU
        assert waits.total == 0
        kept.close()
        assert 3 not in kept


@pytest.mark.parametrize("strategy", ["step", "revolve:2"])
def test_on_a_cpu_states_are_in_its_memory_already(strategy: str) -> None:
    none = SimulatedWaits()
    runs = [
        trained(lambda tree: tree, "mixed", none, at, strategy=strategy) for at in (None, "host")
    ]
    assert bitwise(*(torch.utils._pytree.tree_leaves(run) for run in runs))
    costs = Costs.linear(state_bytes=100, step_bytes=10)
    assert with_stored_states(Storage(HostMemory()), costs, CPU) == costs
    rounded = with_stored_states(Storage(HostMemory(), torch.bfloat16), costs, CPU, 50)
    assert (rounded.kept_bytes, rounded.leaf_seconds) == (50, costs.leaf_seconds)


def test_a_plan_counts_the_time_and_the_hosts_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "seconds", lambda _, size, device: size * 1e-3)
    costs = Costs.linear(state_bytes=100, step_bytes=10, step_seconds=1.0)
    stored = with_stored_states(Storage(HostMemory()), costs, DEVICE)
    assert stored.kept_bytes == 0
    assert stored.leaf_seconds(5) == pytest.approx(costs.leaf_seconds(5) + 0.1)
    assert stored.leaf_bytes(5) == costs.leaf_bytes(5) + 100
    assert 100 < stored.host_state_bytes < 1000


class NothingToPin(SimulatedWaits):
    """Refuses the fourth tensor, as a driver does."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pin_memory") and self.pinned == 3:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return super().run(func, args, kwargs)


def test_memory_that_cannot_be_pinned_is_one_error() -> None:
    module, data = on_device(lstm_cell()), [*map(on_device, random_data(6))]
    before = on_host([p.detach() for p in module.parameters()])
    how: Any = {"strategy": "step", "executor": ReplayExecutor("host"), "time_batching": False}
    with (
        NothingToPin(),
        pytest.raises(TbpttError, match=r"another .* could not be pinned there: this window") as it,
    ):
        run_window(module, mean_loss, *data, **how)
    assert not is_out_of_memory(it.value)  # a smaller budget of the device would not help
    assert bitwise(on_host([p.detach() for p in module.parameters()]), before)
    assert all(p.grad is None for p in module.parameters())


def test_what_is_not_dense_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"torch.sparse_coo, and only dense ones are kept"):
        pinned_like(torch.eye(3).to_sparse())


def test_a_folder_of_that_name_is_named_by_its_path(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host").mkdir()
    assert str(ReplayExecutor("host").storage) == " in the host's memory"
    assert str(ReplayExecutor("./host").storage) == f" in {tmp_path / 'host'}"
    assert repr(ReplayExecutor("host")) == "replay, with states in the host's memory"


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.cuda
@needs_cuda
def test_on_cuda_bits_are_the_same_and_states_take_nothing_of_a_budget() -> None:
    module, state = Grid().cuda(), torch.randn(4, 1 << 20, device="cuda")
    data = TensorSequence(*torch.randn(2, 64, 4, 1, device="cuda"))
    budget, found = 14 * state.nbytes, []
    for offload in (None, "host"):
        module.zero_grad()
        how = {"memory_budget": budget, "measure_memory": True, "executor": ReplayExecutor(offload)}
        (window,) = TBPTT(module, mean_loss, 64, None, **how).windows(data, state)
        assert window.peak_bytes is not None
        assert window.peak_bytes <= budget
        found.append(window.plan.executed_steps)
    assert found[1] <= 2 * 64 < found[0]
    grads = []
    for offload in (None, "host"):
        module.zero_grad()
        executor = ReplayExecutor(offload)
        run_window(
            *(module, mean_loss, data.inputs, data.targets, state),
            **{"strategy": "step", "executor": executor},
        )
        grads.append(module.speed.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.cuda
@needs_cuda
def test_on_cuda_windows_train_alike() -> None:
    runs = []
    for offload in (None, "host"):
        torch.manual_seed(0)
        cell = lstm_cell().cuda()
        sgd = torch.optim.SGD(cell.parameters(), 0.1)
        data = TensorSequence(*(t.cuda() for t in random_data(NUM_STEPS)))
        how: Any = {"strategy": "revolve:2", "executor": ReplayExecutor(offload)}
        TBPTT(cell, mean_loss, K1, K2, sgd, **how).train(data)
        runs.append([p.detach() for p in cell.parameters()])
    assert bitwise(*runs)
