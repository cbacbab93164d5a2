"""What is refused where a module runs: bfloat16 LSTMs, eval mode on cuDNN, inference mode."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from broken_parts import Bench, Cell, LazyCell
from cases import EXECUTORS, lstm
from torch import Tensor, nn

from tbptt_ckpt import ArgumentError, StaleWeightsError, TbpttError
from tbptt_ckpt.module.recurrence import check_autocast, check_differentiable

# oneDNN has nn.LSTM in bfloat16 for some CPUs only.


@pytest.mark.parametrize("runs", [True, False])
def test_an_lstm_that_the_cpu_cannot_run_under_autocast_is_refused(
    monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    monkeypatch.setattr("tbptt_ckpt.module.recurrence._cpu_runs_lstm", lambda dtype: runs)
    bench = Bench()
    bench.make(module=bench.watch(lstm()), optimizer=None)
    for fits in (nn.GRU(2, 3), nn.LSTMCell(2, 3), nn.LSTM(2, 3, device="meta")):
        check_autocast(fits, torch.bfloat16)
    refused = pytest.raises(
        ArgumentError, match=r"^autocast_dtype=torch\.bfloat16 does not fit module: .*float32"
    )
    with nullcontext() if runs else refused:
        bench.make(module=bench.watch(lstm()), optimizer=None, autocast_dtype=torch.bfloat16)
    assert not bench.changes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_said_of_an_lstm_under_autocast_is_what_torch_does(dtype: torch.dtype) -> None:
    module, cannot = nn.Sequential(nn.LSTM(2, 3)), nullcontext()
    random = torch.get_rng_state()
    try:
        check_autocast(module, dtype)
    except ArgumentError:
        cannot = pytest.raises(RuntimeError)
    assert torch.equal(torch.get_rng_state(), random)
    with cannot, torch.autocast("cpu", dtype=dtype):
        module(torch.zeros(4, 1, 2))


# A cuDNN recurrent layer keeps what its backward needs in training mode only.


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_in_eval_mode_are_refused_on_cudnn_only(layer: Any) -> None:
    inner = layer(2, 3)
    owner = nn.Sequential(nn.Linear(2, 2), inner)
    with torch.backends.cudnn.flags(enabled=True):
        check_differentiable(owner, device_types={"cuda"})
        owner.eval()
        check_differentiable(owner, device_types={"cpu"})
        check_differentiable(owner)
        with pytest.raises(ArgumentError, match=rf"1 is a cuDNN nn\.{layer.__name__} in eval mode"):
            check_differentiable(owner, device_types={"cuda"})
        inner.train()
        check_differentiable(owner, device_types={"cuda"})
    inner.eval()
    with torch.backends.cudnn.flags(enabled=False):
        check_differentiable(owner, device_types={"cuda"})


def test_eval_mode_is_found_before_the_first_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the module went to eval mode after the constructor saw it."""
    bench = Bench()
    own = bench.watch(lstm())
    tbptt = bench.make(module=own, optimizer=None)
    own.eval()
    monkeypatch.setattr("tbptt_ckpt.engine.tbptt.check_differentiable", _as_on_cuda)
    with pytest.raises(ArgumentError, match="eval mode"):
        tbptt.train(bench.sequence())
    assert not bench.changes()


def _as_on_cuda(module: object) -> None:
    check_differentiable(module, device_types={"cuda"})


def test_a_lazy_module_runs_once_it_has_made_a_step() -> None:
    bench, module = Bench(), LazyCell()
    module(bench.inputs[0], None)
    bench.train(module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    assert module.readout.weight.grad.any()


# Weights that change inside a window, and inference mode.


@pytest.mark.parametrize("executor", EXECUTORS)
def test_weights_changed_by_the_module_are_noticed(executor: str) -> None:
    class Restless(Cell):
        def result(self, y: Tensor, h: Tensor) -> Any:
            with torch.no_grad():
                self.cell.readout.bias.add_(1e-3)
            return y, h

    with pytest.raises(StaleWeightsError, match="between windows"):
        Bench().train(module=Restless(), optimizer=None, executor=executor, strategy="step")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_weights_of_a_function_are_watched_through_the_optimizer(executor: str) -> None:
    bench = Bench()

    def step(x: Tensor, h: Tensor) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                bench.module.readout.bias.add_(1e-3)
        return bench.module(x, h)

    with pytest.raises(StaleWeightsError, match="between windows"):
        bench.train(module=step, executor=executor, strategy="step")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_stepping_between_windows_is_fine(executor: str) -> None:
    bench, other = Bench(), Bench()
    other.train(executor=executor)
    bench.optimizer.zero_grad()
    for _ in bench.make(optimizer=None, executor=executor).windows(bench.sequence()):
        bench.optimizer.step()
        bench.optimizer.zero_grad()
    for one, another in zip(bench.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_inference_mode_is_refused_or_makes_no_difference(executor: str) -> None:
    bench, other = Bench(), Bench()
    other.make(executor=executor).train(other.sequence())
    refusal = None
    try:
        with torch.inference_mode():
            bench.make(executor=executor).train(bench.sequence())
    except TbpttError as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(r"^[^\n]*inference_mode[^\n]*$", refusal), refusal
        assert not bench.changes()
        return
    for one, another in zip(bench.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(one, another)
