"""Steps in three parts, run by their parts, equal the same steps one by one."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import (
    LANES,
    OVERLAPS,
    STRATEGIES,
    WIDTH,
    WIDTH_IN,
    check_window,
    engine_sequence,
    gradients,
    masked_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    twin,
)
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, Recurrent, TensorSequence, run_window, unroll
from tbptt_ckpt.errors import TbpttWarning

T = 9
WEIGHTS = (1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.0, 1.0)


class OwnTransition(nn.Module):
    """A state in a dict, features of two tensors, one of them of the state before."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        h = state["h"]
        both = torch.cat([x, h], 1)
        z = torch.sigmoid(self.gate(both))
        new = z * h + (1 - z) * torch.tanh(self.new(both))
        return {"now": new, "before": h}, {"h": new}


class OfBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.out(features["now"]) - features["before"]


def normed_readout() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH_IN, WIDTH), nn.Tanh())


KINDS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTMCell(WIDTH, WIDTH), encoder(), normed_readout()),
    "lstm without bias": lambda: Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH, bias=False)),
    "lstm readout": lambda: Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH), readout=normed_readout()),
    "gru": lambda: Recurrent(nn.GRUCell(WIDTH, WIDTH), encoder(), normed_readout()),
    "rnn": lambda: Recurrent(nn.RNNCell(WIDTH, WIDTH), encoder()),
    "own": lambda: Recurrent(OwnTransition(), encoder(), OfBoth()),
    "cell": lambda: nn.LSTMCell(WIDTH_IN, WIDTH),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mean": F.mse_loss,
    "sum": nn.MSELoss(reduction="sum"),
    "pair": masked_loss,
    "own": lambda y, target: (y - target).abs().mean(),
    "of lanes together": lambda y, target: F.mse_loss(y - y.mean(0), target),
}


def made(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = KINDS[kind]().double()
    one = random_state(2)
    if "lstm" in kind or kind == "cell":
        return module, (one, random_state(3))
    return module, {"h": one} if kind == "own" else one


class Stepped:
    """How a naive loop calls it: a cell returns its state only."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor, state: Any) -> Any:
        result = self.module(x, state)
        return (result[0], result) if isinstance(self.module, nn.LSTMCell) else result


def check(kind: str, loss: str, overlap: str, weights: Any, **how: Any) -> TBPTT:
    (module, init), (inputs, targets) = made(kind), random_data(T)
    problem = naive_problem(module, inputs, targets, init, loss_fn=LOSSES[loss], weights=weights)
    problem.step = Stepped(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    expected = list(naive.OVERLAPS[overlap](problem, how["k1"], how["k2"], optimizer=optimizer))
    module, init = made(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, LOSSES[loss], optimizer=optimizer, overlap=overlap, **how)
    sequence = engine_sequence(inputs, targets, weights=weights)
    for result, window in zip(tbptt.windows(sequence, init), expected, strict=True):
        grads = gradients(list(module.parameters()))
        check_window((kind, loss, how), result, grads, window, bitwise_state=False)
    return tbptt


@pytest.mark.parametrize("kind", KINDS)
def test_windows_equal_plain_loops(kind: str) -> None:
    rotated = itertools.product(((3, 7), (4, 4), (2, None), (9, 9)), STRATEGIES, (None, WEIGHTS))
    others = itertools.product((True, "auto"), ("replay", "checkpoint", "replay"))
    for (loss, overlap), ((k1, k2), strategy, weights), (batching, executor) in zip(
        itertools.product(LOSSES, OVERLAPS),
        itertools.cycle(list(rotated)[:: 5 + len(kind)]),
        itertools.cycle(others),
        strict=False,
    ):
        how = {"k1": k1, "k2": k2, "strategy": strategy, "time_batching": batching}
        check(kind, loss, overlap, weights, executor=executor, **how)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_every_window_equals_plain_loops(kind: str) -> None:
    for loss, overlap, weights, (k1, k2), strategy, batching, executor in itertools.product(
        LOSSES,
        OVERLAPS,
        (None, WEIGHTS),
        ((1, 4), (3, 7), (4, 4), (2, None), (9, 9), (5, 2)),
        STRATEGIES,
        (True, "auto"),
        ("replay", "checkpoint"),
    ):
        how = {"k1": k1, "k2": k2, "strategy": strategy, "time_batching": batching}
        check(kind, loss, overlap, weights, executor=executor, **how)


class Calls:
    """Counts the calls of a part, and the rows of each."""

    def __init__(self, part: Any) -> None:
        self.part, self.rows = part, []

    def __call__(self, value: Tensor) -> Tensor:
        self.rows.append(len(value))
        return self.part(value)


def test_encoder_readout_and_loss_run_once_a_segment() -> None:
    inputs, targets = random_data(8)
    readout, losses = Calls(nn.Linear(WIDTH, WIDTH).double()), Calls(lambda y: y)
    module = Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH).double(), readout=readout)
    init = (random_state(2), random_state(3))
    tbptt = TBPTT(
        module,
        lambda y, t: F.mse_loss(losses(y), t),
        8,
        8,
        strategy="uniform:4",
        check_replays=False,
    )
    sequence = TensorSequence(inputs, targets)
    tbptt.train(sequence, init)
    readout.rows.clear()
    losses.rows.clear()
    tbptt.train(sequence, init)
    assert readout.rows == [4 * LANES, 4 * LANES]  # not in the advance
    assert losses.rows == [4 * LANES, 4 * LANES]


def trained(module: Any, batching: Any, loss: Any = F.mse_loss, **how: Any) -> list[Any]:
    inputs, targets = random_data(6)
    init = (random_state(2), random_state(3))
    tbptt = TBPTT(module, loss, 3, 3, strategy="uniform:2", time_batching=batching, **how)
    tbptt.train(TensorSequence(inputs, targets), init)
    owner = getattr(module, "module", getattr(module, "__self__", module))
    return gradients(list(owner.parameters()))


def test_who_stands_between_is_called() -> None:
    """A method of the module, a wrapper that does more, a hook: none is passed by."""

    class Doubling(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor, state: Any) -> Any:
            y, state = self.module(2 * x, state)
            return 2 * y, state

    class WithMethod(Recurrent):
        def other(self, x: Tensor, state: Any) -> Any:
            y, state = self(3 * x, state)
            return 3 * y, state

    def hooked(module: nn.Module) -> nn.Module:
        module.register_forward_hook(lambda _, __, result: (2 * result[0], result[1]))
        return module

    def hooked_inside(module: nn.Module) -> nn.Module:
        module.readout.register_forward_hook(lambda _, __, result: result + len(result))
        return module

    for wrap in (Doubling, hooked, hooked_inside, lambda module: module.other):
        results = []
        for batching in ("auto", False):
            torch.manual_seed(0)
            cell, readout = nn.LSTMCell(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
            module = WithMethod(cell, readout=readout).double()
            results.append(trained(wrap(module), batching))
        assert relative_error(*results) <= 1e-12


def test_a_module_whose_mode_changes_is_held_again() -> None:
    """Lanes of batch norm know nothing of each other as long as it is not trained."""
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        readout = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
        module = Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH), readout=readout).double().eval()
        inputs, targets = random_data(8)
        tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2", time_batching=batching)
        windows = tbptt.windows(TensorSequence(inputs, targets), None)
        next(windows)
        module.train()
        next(windows)
        results.append([*gradients(list(module.parameters())), *module.buffers()])
    assert relative_error(*results) <= 1e-12


def test_a_loss_that_mixes_lanes_is_not_folded_though_all_outputs_are_zero() -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        readout = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(readout.weight), nn.init.zeros_(readout.bias)
        module = Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH), readout=readout).double()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        results.append(trained(module, batching, LOSSES["of lanes together"], optimizer=optimizer))
    assert relative_error(*results) <= 1e-12


def test_outputs_and_targets_of_a_first_segment_are_compared() -> None:
    inputs, targets = random_data(4)
    module = Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH)).double()
    tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2")
    sequence = TensorSequence(inputs, targets[:, :1])
    with pytest.raises(ArgumentError, match="would broadcast one over the lanes"):
        tbptt.train(sequence, (random_state(2), random_state(3)))


def test_a_transition_that_cannot_begin_from_none_is_told() -> None:
    module = Recurrent(OwnTransition(), encoder(), OfBoth()).double()
    inputs, targets = random_data(4)
    tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2")
    for state in (None, {"h": random_state(2)}, None):  # after windows that began from one, too
        if state is not None:
            tbptt.train(TensorSequence(inputs, targets), state)
            continue
        with pytest.raises(ArgumentError, match="init_state=None, and module=Recurrent cannot"):
            tbptt.train(TensorSequence(inputs, targets))


def test_a_part_that_mixes_lanes_or_draws_is_run_step_by_step() -> None:
    class Mixing(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h - h.mean(0)

    inputs, targets = random_data(6)
    for readout in (Mixing(), nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)):
        torch.manual_seed(0)
        module = Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH), readout=readout).double()
        other, _ = twin(module, None)
        results = []
        for each, batching in ((module, "auto"), (other, False)):
            torch.manual_seed(1)
            tbptt = TBPTT(each, F.mse_loss, 6, 6, strategy="uniform:2", time_batching=batching)
            tbptt.train(TensorSequence(inputs, targets), None)
            results.append(gradients(list(each.parameters())))
            if batching:
                assert any(o.operation == "step in parts" for o in tbptt.batched_operations)
        assert relative_error(*results) <= 1e-12


@pytest.mark.parametrize("strategy", ["retain", "uniform:2", "step"])
@pytest.mark.parametrize("batching", ["auto", False])
def test_a_readout_that_draws_or_counts_is_not_left_out(strategy: str, batching: Any) -> None:
    inputs, targets = random_data(6)
    for readout in (nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)):
        torch.manual_seed(0)
        module = Recurrent(nn.GRUCell(WIDTH_IN, WIDTH), nn.Dropout(0.3), readout).double()
        other, _ = twin(module, None)
        torch.manual_seed(1)
        state: Any = torch.zeros(LANES, WIDTH, dtype=torch.float64)
        outputs = []
        for x in inputs:
            state = other.transition(other.encode(x), state)
            outputs.append(other.readout(state))
        F.mse_loss(torch.stack(outputs), targets).backward()
        torch.manual_seed(1)
        tbptt = TBPTT(module, F.mse_loss, 6, 6, strategy=strategy, time_batching=batching)
        tbptt.train(TensorSequence(inputs, targets), torch.zeros(LANES, WIDTH).double())
        expected = gradients(list(other.parameters()))
        assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12
        for mine, its in zip(module.buffers(), other.buffers(), strict=True):
            assert relative_error([mine.double()], [its.double()]) <= 1e-12


def test_nothing_is_folded_where_time_batching_is_off() -> None:
    inputs, targets = random_data(6)
    readout = Calls(nn.Linear(WIDTH, WIDTH).double())
    module = Recurrent(nn.LSTMCell(WIDTH_IN, WIDTH).double(), readout=readout)
    tbptt = TBPTT(module, F.mse_loss, 6, 6, strategy="uniform:3", time_batching=False)
    tbptt.train(TensorSequence(inputs, targets), None)
    assert set(readout.rows) == {LANES}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("strategy", ["retain", "uniform:2", "revolve:2"])
def test_a_layer_as_transition_takes_segments(strategy: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(WIDTH, WIDTH, batch_first=batch_first)
    module = Recurrent(layer, encoder(), normed_readout()).double()
    assert not module.per_step
    inputs, targets = random_data(7)
    if batch_first:
        inputs, targets = inputs.transpose(0, 1), targets.transpose(0, 1)
    other, _ = twin(module, None)
    flat = other.encode(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
    hidden, _ = other.transition(flat, None)
    F.mse_loss(other.readout(hidden), targets).backward()
    sequence = TensorSequence(inputs, targets, time_dim=int(batch_first))
    TBPTT(module, F.mse_loss, 7, 7, strategy=strategy).train(sequence, None)
    expected = gradients(list(other.parameters()))
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12


class MixesLanes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows - rows.mean(0, keepdim=True))


MIXED = {  # an encoder, and a readout, of which one knows of other lanes
    "encode": lambda: (MixesLanes(WIDTH_IN), normed_readout()),
    "readout": lambda: (encoder(), MixesLanes(WIDTH)),
    "batch norm": lambda: (encoder(), nn.BatchNorm1d(WIDTH)),
    "softmax": lambda: (encoder(), nn.Softmax(0)),
}


@pytest.mark.filterwarnings("ignore:.*every lane")
@covering(
    together=1,
    name=MIXED,
    layer=[nn.LSTM, nn.GRU],
    strategy=["retain", "uniform:2", "step", "revolve:2"],
    batch_first=[False, True],
    dtype=[torch.float64, torch.float32],
    executor=["replay", "checkpoint"],
)
def test_a_part_that_mixes_lanes_runs_step_by_step_around_a_layer_too(
    name: str, layer: Any, strategy: str, batch_first: bool, dtype: Any, executor: str
) -> None:
    torch.manual_seed(0)
    encode, readout = MIXED[name]()
    module = Recurrent(layer(WIDTH, WIDTH, batch_first=batch_first), encode, readout).to(dtype)
    inputs, targets = (t.to(dtype) for t in random_data(7))
    other, _ = twin(module, None)
    encoded = torch.stack([other.encode(step) for step in inputs])
    hidden, _ = other.transition(encoded.transpose(0, 1) if batch_first else encoded, None)
    hidden = hidden.transpose(0, 1) if batch_first else hidden
    F.mse_loss(torch.stack([other.readout(step) for step in hidden]), targets).backward()
    if batch_first:
        inputs, targets = inputs.transpose(0, 1), targets.transpose(0, 1)
    sequence = TensorSequence(inputs, targets, time_dim=int(batch_first))
    tbptt = TBPTT(module, F.mse_loss, 7, 7, strategy=strategy, executor=executor)
    with pytest.warns(TbpttWarning, match="every lane") if strategy == "retain" else nullcontext():
        tbptt.train(sequence, None)
    expected = gradients(list(other.parameters()))
    bound = 1e-12 if dtype is torch.float64 else 1e-5
    assert relative_error(gradients(list(module.parameters())), expected) <= bound


def test_single_windows_and_unrolling_take_it() -> None:
    (module, init), (inputs, targets) = made("lstm"), random_data(6)
    other, _ = twin(module, None)
    outputs, _ = unroll(other, inputs, init, strategy="uniform:2")
    torch.stack([F.mse_loss(y, t) for y, t in zip(outputs, targets, strict=True)]).mean().backward()
    run_window(module, F.mse_loss, inputs, targets, init, strategy="uniform:2", time_batching=True)
    expected = gradients(list(other.parameters()))
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recurrent(nn.LSTM(2, 2), per_step=True), "which runs whole segments"),
        (lambda: Recurrent(nn.Sequential(nn.LSTM(2, 2))), "so per_step must be said"),
        (lambda: Recurrent(3), "transition"),
        (
            lambda: TBPTT(Recurrent(nn.LSTMCell(2, 2)), F.mse_loss, 2, 2, per_step=False),
            "per_step=False contradicts module=Recurrent",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("time_batching", [True, "auto"])
@pytest.mark.parametrize("width", [4, 256])  # the larger one's weights open a region by the rule
def test_a_cell_runs_as_a_kernel_where_steps_are_batched_too(
    width: int, time_batching: bool | str
) -> None:
    inputs, targets = torch.randn(2, 8, 2, width)
    for module in (
        nn.LSTMCell(width, width),
        Recurrent(nn.LSTMCell(width, width), nn.Linear(width, width), nn.Linear(width, width)),
    ):
        tbptt = TBPTT(module, F.mse_loss, 8, 8, strategy="uniform:4", time_batching=time_batching)
        tbptt.train(TensorSequence(inputs, targets))
        assert [o.operation for o in tbptt.batched_operations] == ["LSTMCell of all steps"]
