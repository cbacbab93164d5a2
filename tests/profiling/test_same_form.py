"""What is measured is run as it is run otherwise: the same operations, the same bits."""

from __future__ import annotations

import pytest
import torch
from grids import covering, later
from torch import nn

from tbptt_ckpt import TBPTT, Recurrent, TensorSequence, Workload
from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.peaks import metered

MSE = nn.functional.mse_loss


class Gated(nn.Module):
    """A cell of one's own, whose products are made over all steps."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4 + 4, 4)

    def forward(self, x, state):
        state = torch.tanh(self.mix(torch.cat([x, state], 1)))
        return state, state


KINDS = {
    "LSTMCell": lambda: nn.LSTMCell(4, 4),
    "in parts": lambda: Recurrent(nn.GRUCell(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
    "parts of a cell": lambda: Recurrent(nn.LSTMCell(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
    "own": Gated,
    "nn.LSTM": lambda: nn.LSTM(4, 4),
}
x, y = torch.randn(2, 24, 3, 4)


def first_state(kind):
    return torch.zeros(3, 4) if kind == "own" else None


def plainly(tbptt, _, state):
    tbptt.train(TensorSequence(x, y), state)


def window_by_window(tbptt, module, state):
    work = Workload(module=module, loss_fn=MSE, inputs=x, targets=y)
    windows = tbptt.windows(TensorSequence(x, y), state)
    while metered(work, lambda: next(windows, None))[0] is not None:
        pass


def run(kind, how, **options):
    """Tallies and the last window's gradients."""
    torch.manual_seed(0)
    module = KINDS[kind]()
    tbptt = TBPTT(module, MSE, 8, 20, strategy="uniform:6", **options)
    how(tbptt, module, first_state(kind))
    return tbptt.batched_operations, [p.grad for p in module.parameters()]


@covering(
    together=1,
    kind=list(KINDS),
    time_batching=[True, "auto"],
    executor=["replay", "checkpoint"],
)
def test_windows_under_a_meter_are_those_without_one(kind, time_batching, executor):
    options = {"time_batching": time_batching, "executor": executor}
    found, grads = run(kind, plainly, **options)
    for how, measuring in (plainly, {"measure_memory": True}), (window_by_window, {}):
        again, measured = run(kind, how, **options, **measuring)
        assert again == found
        assert all(map(torch.equal, measured, grads))


@pytest.mark.parametrize("kind", [*list(KINDS)[:2], *map(later, list(KINDS)[2:])])
def test_a_profile_measures_the_windows_that_it_times(kind):
    torch.manual_seed(0)
    state = first_state(kind)
    work = Workload(module=KINDS[kind](), loss_fn=MSE, inputs=x, targets=y, init_state=state)
    found = []
    for measure in WindowBench.time_window, WindowBench.measure:
        bench = WindowBench(work, Configuration(strategy="uniform:6", k1=8, k2=16))
        measure(bench)
        found.append(
            {each.operation for each in bench._engine.batched_operations if not each.reason}
        )
    assert found[0] == found[1]
    if kind in ("LSTMCell", "parts of a cell"):
        assert "LSTMCell of all steps" in found[0]
