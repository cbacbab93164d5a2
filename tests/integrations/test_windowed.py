"""A module wrapped for a loop over chunks trains as in a loop that keeps all graphs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LANES, WIDTH, WIDTH_IN, bitwise, random_data, relative_error
from several_ranks import on_two_ranks
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence, peak_memory
from tbptt_ckpt.errors import ArgumentError, StaleWeightsError, TbpttError
from tbptt_ckpt.integrations.windowed import Windowed

STRATEGIES = ("auto", "retain", "sqrt", "uniform:2", "revolve:2")


class Own(nn.Module):
    """Chunks of steps, time first, in a loop; dropout and a counted step where it is asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encode, self.cell = nn.Linear(WIDTH_IN, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor, state: Any = None) -> Any:
        outputs = []
        for step in x:
            state = self.cell(self.drop(torch.tanh(self.encode(step))), state)
            if self.training:
                self.mean.mul_(0.9).add_(state[0].detach().mean(0))
            outputs.append(state[0] + self.mean)
        return torch.stack(outputs), state


def lstm() -> nn.Module:
    return nn.LSTM(WIDTH_IN, WIDTH, num_layers=2)


def gru() -> nn.Module:
    return nn.GRU(WIDTH_IN, WIDTH, batch_first=True)


def made(make: Any) -> Any:
    torch.manual_seed(0)
    return make().double()


def data_for(net: Any, steps: int) -> tuple[int, Tensor, Tensor]:
    """Where time is, inputs and targets."""
    dim = int(getattr(net, "batch_first", False))
    x, y = (each.transpose(0, dim) for each in random_data(steps))
    return dim, x, y


def chunks(data: tuple[int, Tensor, Tensor], k1: int) -> Iterator[tuple[Tensor, Tensor]]:
    dim, x, y = data
    for start in range(0, x.shape[dim], k1):
        count = min(k1, x.shape[dim] - start)
        yield x.narrow(dim, start, count), y.narrow(dim, start, count)


def detached(state: Any) -> Any:
    return tuple(each.detach() for each in state) if isinstance(state, tuple) else state.detach()


def trained(net: Any, data: Any, k1: int, sgd: Any) -> list[float]:
    """A loop of a user's, whatever `net` is."""
    state, losses = None, []
    for x, y in chunks(data, k1):
        outputs, state = net(x, state)
        state = detached(state)
        loss = F.mse_loss(outputs, y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses


def plain(net: Any, data: Any, k1: int, k2: int, sgd: Any, *, is_known: bool) -> list[float]:
    """Windows one step at a time; each begins at a state that the one before has passed."""
    (dim, x, y), losses, states = data, [], {0: None}
    steps = x.shape[dim]
    for new in range(0, steps, k1):
        stop = min(new + k1, steps)
        start = max(0, (stop if is_known else new + k1) - k2)
        state, outputs = states[start], []
        for n in range(start, stop):
            output, state = net(x.narrow(dim, n, 1), state)
            states[n + 1] = detached(state)
            outputs.append(output)
        found = torch.cat(outputs[new - start :], dim)
        loss = F.mse_loss(found, y.narrow(dim, new, stop - new))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses


def optimizer(net: nn.Module) -> Any:
    return torch.optim.SGD(net.parameters(), 0.5, momentum=0.5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("steps", "k1", "k2"), [(12, 4, 8), (12, 4, 4), (13, 3, 7), (11, 5, 20)])
@pytest.mark.parametrize("make", [lstm, gru])
def test_it_trains_as_a_loop_that_keeps_all_graphs(
    make: Any, steps: int, k1: int, k2: int, strategy: str
) -> None:
    for is_known in (True, False):
        net, twin = made(make), made(make)
        data = data_for(net, steps)
        expected = plain(twin, data, k1, k2, optimizer(twin), is_known=is_known)
        wrapped = Windowed(net, k2, strategy=strategy)
        if is_known:
            wrapped.begin(steps)
        found = trained(wrapped, data, k1, optimizer(net))
        assert found == pytest.approx(expected, rel=1e-12)
        assert relative_error(list(net.parameters()), list(twin.parameters())) < 1e-12


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_windows_are_those_of_tbptt_with_dropout_and_buffers(strategy: str) -> None:
    steps, k1, k2 = 14, 4, 10
    found = []
    for is_wrapped in (True, False):
        net = made(lambda: Own(0.3))
        dim, x, y = data = data_for(net, steps)
        sgd, losses = optimizer(net), list[float]()
        for _ in range(2):  # the second sequence begins with None
            if is_wrapped:
                wrapped = Windowed(net, k2, strategy=strategy)
                wrapped.begin(steps)
                losses += trained(wrapped, data, k1, sgd)
            else:
                given = (net, nn.MSELoss(), k1, k2, sgd)
                tbptt = TBPTT(*given, strategy=strategy, per_step=False)
                windows = tbptt.windows(TensorSequence(x, y, time_dim=dim))
                losses += [window.loss_value for window in windows]
        drawn = torch.rand(1)  # the generator stands where it would
        found.append((losses, [*net.parameters(), net.mean, drawn]))
    (losses, tensors), (expected, theirs) = found
    assert losses == pytest.approx(expected, rel=1e-12)
    assert relative_error(tensors, theirs) < 1e-12


def test_a_first_state_that_is_learned_has_its_gradient_where_windows_begin_there() -> None:
    net, k1, k2 = made(gru), 3, 7
    data = data_for(net, 12)
    first = torch.zeros(1, LANES, WIDTH, dtype=torch.float64, requires_grad=True)
    wrapped, state, found = Windowed(net, k2), first, []
    for x, y in chunks(data, k1):
        outputs, state = wrapped(x, state)
        state = detached(state)
        (grad,) = torch.autograd.grad(F.mse_loss(outputs, y), first, allow_unused=True)
        found.append(grad)
    for n, (stop, grad) in enumerate(zip((3, 6, 9, 12), found, strict=True)):
        if n > 1:  # begins at step 2, and at step 5
            assert grad is None
            continue
        _, x, y = data
        outputs, _ = net(x[:, :stop], first)
        loss = F.mse_loss(outputs[:, stop - k1 :], y[:, stop - k1 : stop])
        assert relative_error([grad], torch.autograd.grad(loss, first)) < 1e-12


def test_a_state_of_none_or_another_begins_a_sequence() -> None:
    wrapped, (_, x, _) = Windowed(made(lstm), 8), data_for(None, 12)
    first, state = wrapped(x[:4], None)
    for begins in (None, tuple(torch.zeros_like(each) for each in state)):
        wrapped(x[4:8], state)
        again, state = wrapped(x[:4], begins)
        assert relative_error([again], [first]) < 1e-12


@pytest.mark.parametrize("turned", [torch.clone, Tensor.double, lambda state: state * 1.0])
def test_the_last_state_in_other_memory_or_another_dtype_goes_on(turned: Any) -> None:
    net, (_, x, _) = made(lstm).float(), data_for(None, 8)
    x, whole = x.float(), net(x.float())[0]
    wrapped = Windowed(net, 8)
    _, state = wrapped(x[:4], None)
    outputs, _ = wrapped(x[4:], tuple(turned(each.detach()) for each in state))
    grads, expected = (
        torch.autograd.grad(each.sum(), list(net.parameters())) for each in (outputs, whole[4:])
    )
    assert relative_error(grads, expected) < 1e-5


def test_lanes_that_begin_one_by_one_are_refused() -> None:
    wrapped, (_, x, _) = Windowed(made(lstm), 8), data_for(None, 8)
    _, (h, c) = wrapped(x[:4], None)
    keep = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:LANES, None]
    with pytest.raises(ArgumentError, match=r"returned in \d of \d lanes: it must be so in all"):
        wrapped(x[4:8], (h.detach() * keep, c.detach() * keep))


def test_sequences_that_take_turns_are_refused() -> None:
    wrapped, (_, x, _) = Windowed(made(lstm), 8), data_for(None, 8)
    _, one = wrapped(x[:4], None)
    _, other = wrapped(x[:4].flip(1), None)
    with pytest.raises(ArgumentError, match=r"take turns, .* need a Windowed\(net, k2\) each"):
        wrapped(x[4:], detached(one))
    wrapped(x[4:], detached(other))


def test_a_chunk_that_is_run_twice_is_refused_and_not_taken_for_the_first_of_a_sequence() -> None:
    wrapped, (_, x, _) = Windowed(made(lstm), 8), data_for(None, 8)
    _, state = wrapped(x[:4])
    outputs, _ = wrapped(x[4:], detached(state))
    with torch.no_grad():  # to look at
        again, _ = wrapped(x[4:], detached(state))
    assert torch.equal(again, outputs)
    with pytest.raises(ArgumentError, match="state is what the chunk before began with: a chunk"):
        wrapped(x[4:], detached(state))
    wrapped.begin()
    wrapped(x[4:], detached(state))


def test_what_cannot_be_the_next_chunk_is_one_error() -> None:
    net, (_, x, _) = made(lstm), data_for(None, 20)
    with pytest.raises(ArgumentError, match="runs one step"):
        Windowed(nn.LSTMCell(WIDTH_IN, WIDTH), 8)
    with pytest.raises(ArgumentError, match="k2=3 must be at least the steps of a chunk"):
        Windowed(net, 3)(x[:4])
    wrapped = Windowed(net, 8)
    _, state = wrapped(x[:4])
    with pytest.raises(ArgumentError, match="inputs have 5 steps after a chunk of 4"):
        wrapped(x[4:9], state)
    _, state = wrapped(x[4:6], state)
    with pytest.raises(ArgumentError, match="inputs have 4 steps after a chunk of 2"):
        wrapped(x[6:10], state)
    wrapped.begin(6)
    _, state = wrapped(x[:4])
    with pytest.raises(ArgumentError, match=r"up to step 8 of a sequence .* num_steps=6"):
        wrapped(x[4:8], state)
    given = x[:4].clone()
    _, state = wrapped(given)
    given.zero_()
    with pytest.raises(ArgumentError, match="have been written into"):
        wrapped(x[4:8], state)
    wrapped = Windowed(nn.GRU(WIDTH_IN, WIDTH).double(), 8)
    _, state = wrapped(x[:4])
    state.detach().zero_()
    with pytest.raises(TbpttError, match="modified in place"):
        wrapped(x[4:8], state)


def test_an_update_before_the_backward_is_an_error() -> None:
    net, (_, x, y) = made(lstm), data_for(None, 8)
    wrapped, sgd = Windowed(net, 8, strategy="uniform:2"), optimizer(net)
    outputs, _ = wrapped(x[:4])
    loss = F.mse_loss(outputs, y[:4])
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    with pytest.raises((StaleWeightsError, RuntimeError)):
        loss.backward()
    sgd.zero_grad()


def test_validation_in_between_leaves_a_sequence_alone() -> None:
    net, twin = made(lstm), made(lstm)
    wrapped, (_, x, _) = Windowed(net, 8), data_for(None, 12)
    _, state = wrapped(x[:4])
    with torch.no_grad():
        outputs, _ = wrapped.eval()(x, None)
        assert bitwise([outputs], [twin.eval()(x)[0]])
    wrapped.train()
    found, _ = wrapped(x[4:8], detached(state))
    whole, _ = twin(x[:8])
    grads, expected = (
        torch.autograd.grad(each.sum(), list(owner.parameters()))
        for each, owner in ((found, net), (whole[4:], twin))
    )
    assert relative_error(grads, expected) < 1e-12


def test_it_is_saved_and_loaded_under_the_modules_own_names() -> None:
    def around(net: nn.Module) -> nn.Module:
        return nn.ModuleDict({"before": nn.Linear(2, 2), "net": net, "after": nn.Linear(2, 2)})

    net = made(lstm)
    bare, wrapped = around(net), around(Windowed(copy.deepcopy(net), 8))
    assert list(wrapped.state_dict()) == list(bare.state_dict())
    with torch.no_grad():
        net.weight_hh_l0.zero_()
    wrapped.load_state_dict(bare.state_dict())
    assert bitwise(list(wrapped.state_dict().values()), list(bare.state_dict().values()))
    bare.load_state_dict(wrapped.state_dict())
    alone = Windowed(net, 8)
    assert list(alone.state_dict()) == list(net.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        alone.load_state_dict({**net.state_dict(), "more": torch.zeros(1)})


def test_copies_begin_anew_and_attributes_are_the_modules() -> None:
    wrapped, (_, x, _) = Windowed(made(lstm), 8, strategy="uniform:2"), data_for(None, 8)
    first, state = wrapped(x[:4])
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        outputs, _ = twin(x[:4])
        assert bitwise([outputs], [first])
        assert (twin.hidden_size, twin.num_layers) == (WIDTH, 2)
    wrapped(x[4:8], state)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = wrapped.nothing_like_it


def on_lanes(rank: int, count: int) -> None:
    """Lanes of one rank: with as many on each, the mean of gradients is that of all lanes."""
    nets = []
    for share, ranks in ((rank, count), (0, 1)):
        net = made(lstm)
        x, y = (each[:, share::ranks] for each in random_data(14, lanes=4))
        wrapped: Any = Windowed(net, 8, strategy="uniform:2")
        if ranks > 1:
            wrapped = nn.parallel.DistributedDataParallel(wrapped)
        trained(wrapped, (0, x, y), 4, optimizer(net))
        nets.append(net)
    assert relative_error(*(list(net.parameters()) for net in nets)) < 1e-12


@pytest.mark.exhaustive
def test_ranks_train_as_one_process_with_all_lanes() -> None:
    on_two_ranks(on_lanes)


def test_memory_is_that_of_the_strategy() -> None:
    peaks = []
    x = torch.randn(200, 8, WIDTH_IN, dtype=torch.float64)
    for strategy in ("retain", "uniform:20"):
        wrapped, state = Windowed(made(Own), 200, strategy=strategy), None
        with peak_memory(rss=False) as peak:
            for start in (0, 50, 100, 150):
                outputs, state = wrapped(x[start : start + 50], state)
                outputs.square().mean().backward()
        peaks.append(peak.peak_bytes)
    assert peaks[1] < 0.5 * peaks[0]
