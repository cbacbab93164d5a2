"""What Fabric and Accelerate have prepared is recognised as what it was before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import WIDTH, WIDTH_IN, bitwise, lstm_cell, random_data, relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence, Trainer
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.integrations.windowed import Windowed

pytestmark = pytest.mark.filterwarnings("default")

STEPS, K1, K2 = 11, 3, 7


def by_fabric(net: nn.Module, optimizer: Any, precision: str = "32-true") -> tuple[Any, Any]:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", precision=precision)
    return fabric.setup(net, optimizer)


def by_accelerate(net: nn.Module, optimizer: Any, precision: str = "no") -> tuple[Any, Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    return accelerator.prepare(net, optimizer)


PREPARE = (by_fabric, by_accelerate)


def cell() -> nn.Module:
    return lstm_cell().float()


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.LSTM(WIDTH_IN, WIDTH, batch_first=True)


def data_for(net: nn.Module) -> TensorSequence:
    dim = int(isinstance(net, nn.LSTM))
    inputs, targets = (t.float().transpose(0, dim) for t in random_data(STEPS))
    return TensorSequence(inputs, targets, time_dim=dim)


@pytest.mark.parametrize("make", [cell, layer])
@pytest.mark.parametrize("prepare", PREPARE)
def test_windows_are_those_of_the_module_itself(prepare: Any, make: Any) -> None:
    weights = []
    for is_prepared in (False, True):
        net = make()
        data, optimizer = data_for(net), torch.optim.Adam(net.parameters(), 0.01)
        given = prepare(net, optimizer) if is_prepared else (net, optimizer)
        tbptt = TBPTT(given[0], F.mse_loss, K1, K2, given[1], strategy="uniform:2")
        Trainer(tbptt, data, epochs=2).train()
        weights.append(list(net.parameters()))
    assert bitwise(*weights)


@pytest.mark.parametrize("prepare", PREPARE)
def test_their_mixed_precision_is_that_of_a_plain_loop(prepare: Any) -> None:
    kinds = set()

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cell()

        def forward(self, x: Tensor, state: Any) -> Any:
            y, state = self.inner(x, state)
            kinds.add(y.dtype)
            return y, state

    net = Told()
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    options: dict[str, Any] = {}
    if prepare is by_accelerate:
        module, _ = prepare(net, optimizer, "bf16")
    else:
        module, _ = prepare(net, optimizer, "bf16-mixed")
        with pytest.raises(
            ArgumentError, match=r"its \.module, with autocast_dtype=torch.bfloat16"
        ):
            TBPTT(module, F.mse_loss, STEPS, None)
        module, options = module.module, {"autocast_dtype": torch.bfloat16}
    inputs, targets = (t.float() for t in random_data(STEPS))
    state, loss = None, torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(options), cache_enabled=False):
        for x, y in zip(inputs, targets, strict=True):
            output, state = module(x, state)
            loss = loss + F.mse_loss(output, y) / STEPS
    loss.backward()
    expected = [p.grad.clone() for p in net.parameters()]
    optimizer.zero_grad()
    tbptt = TBPTT(module, F.mse_loss, STEPS, None, strategy="uniform:4", **options)
    result = tbptt.train(TensorSequence(inputs, targets))
    assert kinds == {torch.bfloat16}
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error([p.grad for p in net.parameters()], expected) < 1e-2


@pytest.mark.parametrize("order", ["wrapped, then prepared", "prepared, then wrapped"])
@pytest.mark.parametrize("precision", ["full", "bfloat16"])
@pytest.mark.parametrize("prepare", PREPARE)
def test_loops_over_chunks_train_with_them(prepare: Any, precision: str, order: str) -> None:
    names = {by_fabric: ("32-true", "bf16-mixed"), by_accelerate: ("no", "bf16")}
    is_full = precision == "full"
    found = []
    for is_prepared in (True, False):
        torch.manual_seed(0)
        net: Any = Chunked()
        sgd: Any = torch.optim.SGD(net.parameters(), 0.1)
        weights = list(net.parameters())
        if is_prepared:
            first = Windowed(net, K2, strategy="uniform:2") if order.startswith("wrap") else net
            net, sgd = prepare(first, sgd, names[prepare][not is_full])
            net = net if order.startswith("wrap") else Windowed(net, K2, strategy="uniform:2")
            assert [*net.state_dict()] == [*Chunked().state_dict()]
        inputs, targets = (t.float() for t in random_data(12))
        if is_prepared:
            state = None
            for start in range(0, 12, K1):
                outputs, state = net(inputs[start : start + K1], state)
                state = tuple(each.detach() for each in state)
                sgd.zero_grad()
                differentiated(prepare, F.mse_loss(outputs, targets[start : start + K1]))
                sgd.step()
        else:
            options: Any = {} if is_full else {"autocast_dtype": torch.bfloat16}
            tbptt = TBPTT(net, F.mse_loss, K1, K2, sgd, per_step=False, **options)
            tbptt.train(TensorSequence(inputs, targets))
        found.append(weights)
    assert relative_error(*found) < (1e-6 if is_full else 2e-3)


class Chunked(nn.Module):
    """A cell over chunks of steps, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = cell()

    def forward(self, x: Tensor, state: Any = None) -> Any:
        outputs = []
        for step in x:
            y, state = self.cell(step, state)
            outputs.append(y)
        return torch.stack(outputs), state


def differentiated(prepare: Any, loss: Tensor) -> None:
    if prepare is by_fabric:
        pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu").backward(loss)
    else:
        loss.backward()


@pytest.mark.parametrize("prepare", PREPARE)
def test_an_optimizer_of_other_weights_is_refused(prepare: Any) -> None:
    net, other = cell(), cell()
    module, _ = prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    _, optimizer = prepare(other, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(ArgumentError, match="optimizer"):
        TBPTT(module, F.mse_loss, K1, K2, optimizer)
    twin = copy.deepcopy(net)
    assert bitwise(list(twin.parameters()), list(net.parameters()))
