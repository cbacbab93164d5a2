"""Windows of an engine without an optimizer, whose gradients a user clears, or does not."""

import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TensorSequence, Trainer
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module import Recurrent

LANES, WIDTH, STEPS = 2, 96, 80


class Step(nn.Module):
    """Weights that take far more than a state."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.inputs(x) + self.state(h))
        return h, h


def sequence(num_steps: int) -> TensorSequence:
    torch.manual_seed(0)
    return TensorSequence(torch.randn(num_steps, LANES, 4), torch.randn(num_steps, LANES, WIDTH))


def least(module: nn.Module, k1: int, data: TensorSequence) -> int:
    with pytest.raises(InfeasibleBudgetError) as raised:
        TBPTT(module, nn.functional.mse_loss, k1, k1, memory_budget=1).train(data, FIRST)
    assert raised.value.smallest_budget_bytes is not None
    return raised.value.smallest_budget_bytes


FIRST = torch.zeros(LANES, WIDTH)


@pytest.mark.parametrize("clears", [True, False])
def test_peaks_are_predicted_whether_they_were_cleared_or_not(clears: bool) -> None:
    module, data = Step(), sequence(STEPS)
    TBPTT(module, nn.functional.mse_loss, STEPS, STEPS).train(data, FIRST)
    if clears:
        module.zero_grad()
    smallest = least(module, STEPS, data)
    options = {"memory_budget": smallest + 20_000, "measure_memory": True}
    tbptt = TBPTT(module, nn.functional.mse_loss, STEPS, STEPS, **options)
    there = tensor_bytes(module, data.inputs, data.targets, FIRST)
    for _ in range(4):
        if clears:
            module.zero_grad()
        held = tensor_bytes([p.grad for p in module.parameters() if p.grad is not None])
        with peak_memory(rss=False) as meter:
            (window,) = tbptt.windows(data, FIRST)
        assert window.peak_bytes == pytest.approx(there + held + meter.peak_bytes, rel=0.02)
        assert there + held + meter.peak_bytes <= smallest + 20_000
    assert window.plan.predicted_peak_bytes == pytest.approx(window.peak_bytes, rel=0.03)


def refused(module: nn.Module, k1: int, data: TensorSequence, budget: int) -> str:
    with pytest.raises(InfeasibleBudgetError) as raised:
        TBPTT(module, nn.functional.mse_loss, k1, k1, memory_budget=budget).train(data, FIRST)
    return str(raised.value)


def test_cleared_ones_need_less_since_none_are_kept_until_a_window_is_checked() -> None:
    """A refusal names what is enough in any case, and beside it what is where they are cleared."""
    module, data = Step(), sequence(STEPS)
    named, words = least(module, STEPS, data), refused(module, STEPS, data, 1)
    cleared = int(words.rpartition(": ")[2].split()[0])
    assert words.endswith(f"{cleared} bytes are enough where they are cleared before each sequence")
    assert refused(module, STEPS, data, cleared - 1)
    TBPTT(module, nn.functional.mse_loss, STEPS, STEPS, memory_budget=cleared).train(data, FIRST)
    gradients = tensor_bytes([parameter.grad for parameter in module.parameters()])
    assert named - cleared == pytest.approx(gradients, rel=0.1)
    assert least(module, STEPS, data) == pytest.approx(named, rel=0.001)
    assert "this budget is enough where they" in refused(module, STEPS, data, cleared + 2_000)


@pytest.mark.parametrize(
    ("first", "factor"),
    [
        ("none", 1.2),
        ("learned", 1.0),
        *(pytest.param(f, 1.0, marks=pytest.mark.exhaustive) for f in ("none", "given")),
    ],
)
def test_the_budget_that_a_refusal_names_is_enough_for_later_sequences(
    first: str, factor: float
) -> None:
    """Which find the gradients of those before: 1.2 times what was named was not enough."""
    module = Recurrent(nn.LSTMCell(WIDTH, WIDTH), readout=nn.Linear(WIDTH, 8))
    data = TensorSequence(torch.randn(24, 4, WIDTH), torch.randn(24, 4, 8))
    state = None
    if first != "none":
        state = tuple(torch.zeros(4, WIDTH, requires_grad=first == "learned") for _ in range(2))
    options = {"measure_memory": True, "time_batching": False}
    tight = TBPTT(module, nn.functional.mse_loss, 24, 24, memory_budget=1, **options)
    with pytest.raises(InfeasibleBudgetError) as raised:
        tight.train(data, state)
    budget = int(factor * raised.value.smallest_budget_bytes)
    tbptt = TBPTT(module, nn.functional.mse_loss, 24, 24, memory_budget=budget, **options)
    for _ in range(2):
        (window,) = tbptt.windows(data, state)
        assert window.peak_bytes <= budget


def test_a_budget_is_for_later_windows_too_which_find_gradients() -> None:
    module, data = Step(), sequence(STEPS)
    budget = least(module, 20, data)
    module.zero_grad()
    tbptt = TBPTT(module, nn.functional.mse_loss, 20, 20, memory_budget=budget, measure_memory=True)
    for window in tbptt.windows(data, FIRST):
        assert window.peak_bytes <= budget


def test_gradients_that_accumulate_are_kept_once_by_a_trainer_too() -> None:
    """It marks where a window begins, and what runs the window keeps them as well."""
    held = []
    for recovers in (False, True):
        module, data = Step(), sequence(STEPS)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        tbptt = TBPTT(module, nn.functional.mse_loss, 20, 20, optimizer, accumulate=4)
        with peak_memory(rss=False) as meter:
            if recovers:
                Trainer(tbptt, data, init_state=FIRST).train()
            else:
                tbptt.train(data, FIRST)
        held.append(meter.peak_bytes)
    gradients = tensor_bytes(list(module.parameters()))
    assert held[1] - held[0] < 0.5 * gradients
