"""Autocast around a run and inside it leaves results alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    WIDTH,
    clear_gradients,
    gradients,
    lstm_cell,
    mean_loss,
    random_data,
    relative_error,
    tanh_cell,
)
from devices import here
from grids import covering
from models_for_tests import check_same_windows, moving, observe
from small_runs import K1, K2, NUM_STEPS, STRATEGIES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.executor.runner import make_runner
from tbptt_ckpt.executor.sinks import Sink
from tbptt_ckpt.executor.window_pass import WindowPass
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.recurrence import recognise

# Autocast


def single_precision(module: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    inputs, targets = random_data(NUM_STEPS)
    return module.float(), inputs.float(), targets.float()


def autocast_loop(
    module: nn.Module, inputs: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """Overlapping windows from detached states with moving weights, all of each under autocast."""
    optimizer, states = moving(module), {0: None}
    for start, new_start, stop in naive.windows(NUM_STEPS, K1, K2):
        optimizer.zero_grad()
        state, losses = states[start], []
        with torch.autocast(here().type, dtype=torch.bfloat16):
            for t in range(start, stop):
                y, state = module(inputs[t], state)
                states[t + 1] = naive.mapped(Tensor.detach, state)
                if t >= new_start:
                    losses.append(mean_loss(y, targets[t]))
            loss = torch.stack(losses).mean()
        loss.backward()
        yield loss.detach(), gradients(list(module.parameters()))
        optimizer.step()


@pytest.mark.parametrize("make", [tanh_cell, lstm_cell])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.usefixtures("device")
def test_autocast_equals_a_naive_loop_under_autocast(
    executor: str, strategy: str, make: Any
) -> None:
    module, inputs, targets = single_precision(make())
    tbptt = TBPTT(
        module,
        mean_loss,
        K1,
        K2,
        moving(module),
        autocast_dtype=torch.bfloat16,
        executor=executor,
        strategy=strategy,
    )
    seen = observe(tbptt, TensorSequence(inputs, targets), parameters=module.parameters())
    reference, _, _ = single_precision(make())
    for window, (loss, grads) in zip(seen, autocast_loop(reference, inputs, targets), strict=True):
        assert relative_error([window.loss], [loss]) <= 5e-3
        assert relative_error(window.grads, grads) <= 2e-2  # bfloat16 has 8 bits
    loss, grads = next(autocast_loop(single_precision(make())[0], inputs, targets))
    assert relative_error([seen[0].loss], [loss]) <= 1e-6  # before rounding has moved weights


@pytest.mark.usefixtures("device")
def test_autocast_reaches_module_and_loss() -> None:
    module, inputs, targets = single_precision(tanh_cell())
    seen = []

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        seen.append((y.dtype, torch.is_autocast_enabled(here().type)))
        return mean_loss(y, target)

    tbptt = TBPTT(module, loss_fn, K1, K2, autocast_dtype=torch.bfloat16)
    tbptt.train(TensorSequence(inputs, targets))
    assert set(seen) == {(torch.bfloat16, True)}
    assert not torch.is_autocast_enabled(here().type)
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(("state", "inputs"), [("xpu", "cpu"), (None, "xpu"), (None, "cpu")])
def test_a_function_runs_under_the_autocast_of_what_it_is_given(
    state: str | None, inputs: str
) -> None:
    """A device's autocast can be entered without one, and fake tensors stand for its own."""
    device, other = ("cpu", "xpu") if "xpu" not in (state, inputs) else ("xpu", "cpu")
    seen = []

    def step(x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
        seen.append((torch.is_autocast_enabled(device), torch.is_autocast_enabled(other)))
        return x, h

    with FakeTensorMode():
        x = torch.empty(4, LANES, WIDTH, device=inputs)
        h = None if state is None else torch.empty(LANES, WIDTH, device=state)
        runner = make_runner(recognise(step, None), torch.bfloat16)
        whole = WindowPass([StepBlock(0, 4, x, x, None, 0)], 0, 0, 4, 0, Ambient([], []), runner)
        whole.run(0, 4, h, Sink())
    assert seen == [(True, False)] * 4


@covering(executor=EXECUTORS, overlap=OVERLAPS, strategy=STRATEGIES, dtype=[None, torch.bfloat16])
@pytest.mark.usefixtures("device")
def test_inside_the_callers_autocast_every_weight_has_a_gradient(
    executor: str, overlap: str, strategy: str, dtype: torch.dtype | None
) -> None:
    """Autocast caches cast weights; one cached without a graph would have no gradient."""
    module, inputs, targets = single_precision(lstm_cell())
    tbptt = TBPTT(
        module,
        mean_loss,
        K1,
        K2,
        moving(module),
        overlap=overlap,
        executor=executor,
        strategy=strategy,
        autocast_dtype=dtype,
    )
    sequence = TensorSequence(inputs, targets)
    with torch.autocast(here().type, dtype=torch.bfloat16):
        with torch.no_grad():
            module(inputs[0], None)  # fills the cache
        inside = observe(tbptt, sequence, parameters=module.parameters())
    other, _, _ = single_precision(lstm_cell())
    tbptt = TBPTT(
        other,
        mean_loss,
        K1,
        K2,
        moving(other),
        overlap=overlap,
        executor=executor,
        strategy=strategy,
        autocast_dtype=torch.bfloat16,
    )
    assert all(grad is not None and grad.any() for window in inside for grad in window.grads)
    check_same_windows(inside, observe(tbptt, sequence, parameters=other.parameters()))


@pytest.mark.usefixtures("device")
def test_autocast_after_the_run_still_trains_the_callers_own_steps() -> None:
    """Nothing of the run stays in the cache of the autocast around it."""
    module, inputs, targets = single_precision(tanh_cell())
    with torch.autocast(here().type, dtype=torch.bfloat16):
        TBPTT(module, mean_loss, K1, K2).train(TensorSequence(inputs, targets))
        clear_gradients(list(module.parameters()))
        y, _ = module(inputs[0], None)
        loss = mean_loss(y, targets[0])
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
