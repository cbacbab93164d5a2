"""What a `Workload` takes, and that it trains and costs what the same arguments of `TBPTT` do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, ArgumentError, LaneSource, TensorSequence, Workload
from tbptt_ckpt.profiling.workload import EndlessSource

MSE = nn.functional.mse_loss


def test_it_trains_as_tbptt_does_with_the_same_arguments() -> None:
    x, y = torch.randn(2, 3, 12, 4, dtype=torch.float64)  # lanes first
    gradients = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        module = nn.GRU(4, 4, batch_first=True).double()
        if by_hand:
            tbptt = TBPTT(module, MSE, 4, 8, reduction="sum", strategy="uniform:3")
            tbptt.train(TensorSequence(x, y, time_dim=1))
        else:
            work = Workload(module=module, loss_fn=MSE, inputs=x, targets=y, reduction="sum")
            work.engine(4, 8, strategy="uniform:3").train(work.source, work.init_state)
        gradients.append(module.weight_hh_l0.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "targets=None leaves nothing to differentiate"),
        ({"inputs": torch.zeros(2, 1, 3)}, "targets=None leaves nothing to differentiate"),
        (
            {"source": TensorSequence(torch.zeros(2, 1, 3)), "inputs": torch.zeros(2, 1, 3)},
            "inputs and source are two ways",
        ),
        ({"source": iter(())}, "must have read"),
        ({"source": torch.zeros(2, 1, 3)}, "must have read"),
    ],
)
def test_data_that_cannot_work_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Workload(module=nn.GRUCell(3, 3), loss_fn=MSE, **given)


def test_an_endless_source_repeats_weights_and_resets_with_the_steps() -> None:
    episodes = [TensorSequence(*torch.randn(2, n, 3)) for n in (2, 5, 3)]
    source = LaneSource(episodes, 2)
    endless, length = EndlessSource(source, 4), len(source)
    assert endless.weights(0, 4) is None
    for method in ("weights", "resets"):
        once = getattr(source, method)(0, length)
        twice = getattr(endless, method)(length, 3 * length)
        assert torch.equal(twice, torch.cat([once, once]))
