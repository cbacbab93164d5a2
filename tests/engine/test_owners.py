"""Who is updated, and what is no module, no state and no sequence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers_inside import B, F, H, T, data, inside
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from tbptt_ckpt import TBPTT, ArgumentError, LaneSource, TbpttWarning, TensorSequence, verify

# Who is updated.


def test_an_optimizer_of_other_weights_is_refused() -> None:
    module, other = nn.LSTM(F, H), nn.LSTM(F, H)
    with pytest.raises(ArgumentError, match=r"optimizer=Adam holds none .*module\.weight_ih_l0"):
        TBPTT(module, mse_loss, 3, 6, torch.optim.Adam(other.parameters()))
    learned = torch.zeros(1, B, H, requires_grad=True)
    frozen = nn.GRU(F, H).requires_grad_(False)
    TBPTT(frozen, mse_loss, 3, 6, torch.optim.SGD([learned], lr=0.1))
    TBPTT(lambda x, state: (x, state), mse_loss, 3, 6, torch.optim.SGD([learned], lr=0.1))


def test_an_optimizer_that_misses_some_weights_is_warned_of() -> None:
    module = inside()
    with pytest.warns(
        TbpttWarning, match=r"misses parameters .*: module\.readout\.weight, module\.r"
    ):
        TBPTT(
            module,
            mse_loss,
            3,
            6,
            torch.optim.SGD(module.layer.parameters(), lr=0.1),
            per_step=False,
        )
    module.readout.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for held in (module.layer.parameters(), module.parameters()):
            TBPTT(module, mse_loss, 3, 6, torch.optim.SGD(held, lr=0.1), per_step=False)


# What is no module, no state and no source.


class NeedsState(nn.Module):
    """Fails on None in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.cell, self.how = nn.LSTMCell(F, H).double(), how

    def forward(self, x: Tensor, state: Any) -> Any:
        if self.how == "unpack":
            h, c = state
        elif self.how == "index":
            h, c = state[0], state[1]
        elif self.how == "attribute":
            h, c = state.unbind()
        else:
            h = c = x[:, :1] * 0 + state
        h, c = self.cell(x, (h, c))
        return h, (h, c)


@pytest.mark.parametrize("how", ["unpack", "index", "attribute", "add"])
@pytest.mark.parametrize("strategy", ["auto", "retain"])
def test_a_module_that_cannot_begin_from_none_is_told_apart(how: str, strategy: str) -> None:
    x, y = data()
    tbptt = TBPTT(NeedsState(how), mse_loss, 4, 8, strategy=strategy)
    for run in (tbptt.train, tbptt.evaluate):
        with pytest.raises(
            ArgumentError, match=r"^init_state=None, and module=NeedsState"
        ) as found:
            run(TensorSequence(x, y))
        assert isinstance(found.value.__cause__, TypeError | AttributeError)
    with pytest.raises(ArgumentError, match=r"^init_state=None"):
        verify(NeedsState(how), mse_loss, x, y)


def test_errors_of_the_module_itself_are_its_own() -> None:
    def step(x: Tensor, state: Any) -> Any:
        raise RuntimeError("mine")

    x, y = data()
    with pytest.raises(RuntimeError) as caught:
        TBPTT(step, mse_loss, 4, 8).train(TensorSequence(x, y))
    assert str(caught.value) == "mine"


@pytest.mark.parametrize("module", [nn.Linear(F, H), nn.Sequential(nn.GRU(F, H)), lambda x: x])
def test_a_module_without_a_state_is_refused_at_once(module: Any) -> None:
    with pytest.raises(ArgumentError, match=r"is called as module\(input, state\).*lifted\("):
        TBPTT(module, mse_loss, 3, 6, per_step=True)
    with pytest.raises(ArgumentError, match=r"module=.* must be callable: .* no class"):
        TBPTT(nn.LSTM, mse_loss, 3, 6)


def test_ragged_data_is_sent_to_lanes() -> None:
    parts = [torch.randn(n, F).double() for n in (5, 3, 2)]
    packed = pack_sequence(parts)
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    module = nn.LSTM(F, F).double()
    makes: list[Callable[[], object]] = [
        lambda: TensorSequence(packed, None),
        lambda: TensorSequence(nested, None),
        lambda: TensorSequence(parts, None),
        lambda: TBPTT(module, mse_loss, 3, 6).train([(packed, packed)]),
    ]
    for make in makes:
        with pytest.raises(ArgumentError, match=r"LaneSource\(\[TensorSequence"):
            make()
    source = LaneSource([TensorSequence(part, part) for part in parts], 2)
    assert TBPTT(module, mse_loss, 3, 6).train(source).num_steps == 5


def test_a_loader_of_batches_is_no_sequence() -> None:
    x, y = data(time_dim=1)
    dataset = TensorDataset(x, y)
    module = nn.LSTM(F, H, batch_first=True).double()
    tbptt = TBPTT(module, mse_loss, 4, 8, torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match=r"DataLoader of batches.*Batches\(loader"):
        tbptt.train(DataLoader(dataset, batch_size=2, shuffle=True))
    losses = [
        tbptt.train(TensorSequence(*batch, time_dim=1)).loss
        for batch in DataLoader(dataset, batch_size=2)
    ]
    assert len(losses) == 2
    steps = DataLoader(TensorDataset(*data()), batch_size=None)
    cell = nn.GRUCell(F, H).double()
    assert TBPTT(cell, mse_loss, 4, 8).train(steps).num_steps == T
