"""Resets one by one: which state a lane begins from, and what its gradient reaches.

`test_lanes.py` holds whole runs against naive loops; here are the cases that lanes of
sequences do not bring about.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    OVERLAPS,
    STRATEGIES,
    WIDTH,
    WIDTH_IN,
    bitwise,
    gradients,
    lstm,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, SharedState, TensorSequence, run_window

NUM_STEPS = 7
# Lane 1 at the step that is a window's, a segment's and a block's first for some plan, and so on.
RESETS = torch.zeros(NUM_STEPS, 2, dtype=torch.bool)
RESETS[2, 0] = RESETS[3, 1] = RESETS[4, 1] = RESETS[6, 0] = RESETS[6, 1] = True


def retained_loop(module: Any, inputs: Tensor, targets: Tensor, init: Tensor) -> Tensor:
    """Mean loss of the whole sequence; lanes restart where `RESETS` says so."""
    state, losses = init, []
    for t in range(NUM_STEPS):
        rows = [init[b] if RESETS[t, b] else state[b] for b in range(2)]
        y, state = module(inputs[t], torch.stack(rows))
        losses.append(F.mse_loss(y, targets[t]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_initial_state_with_a_graph_gets_one_backward(strategy: str, executor: str) -> None:
    inputs, targets = random_data(NUM_STEPS)
    module, source = tanh_cell(), random_state().requires_grad_()
    retained_loop(module, inputs, targets, torch.tanh(source * 2)).backward()
    expected = gradients([*module.parameters(), source])
    module.zero_grad()
    source.grad = None
    tbptt = TBPTT(module, F.mse_loss, 3, None, strategy=strategy, executor=executor)
    calls = []
    init = torch.tanh(source * 2)
    init.register_hook(lambda grad: calls.append(grad))
    data = TensorSequence(inputs, targets, resets=RESETS)
    tbptt.train(data, init)
    assert len(calls) == 1  # after three windows that all begin from it
    module.zero_grad()
    source.grad = None
    whole = TBPTT(module, F.mse_loss, NUM_STEPS, None, strategy=strategy, executor=executor)
    whole.train(data, torch.tanh(source * 2))
    assert relative_error(gradients([*module.parameters(), source]), expected) <= 1e-12


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("lr", [0.0, 0.2])
def test_plans_change_nothing_where_lanes_reset(overlap: str, lr: float) -> None:
    inputs, targets = random_data(NUM_STEPS)
    seen = []
    for strategy in STRATEGIES:
        for executor in EXECUTORS:
            module, init = tanh_cell(), random_state().requires_grad_()
            tbptt = TBPTT(
                module,
                F.mse_loss,
                2,
                4,
                torch.optim.SGD([*module.parameters(), init], lr=lr),
                overlap=overlap,
                strategy=strategy,
                executor=executor,
            )
            data = TensorSequence(inputs, targets, resets=RESETS)
            seen.append([(w.state, w.drift, w.loss) for w in tbptt.windows(data, init)])
    for run in seen[1:]:
        for (state, drift, loss), (state_0, drift_0, loss_0) in zip(run, seen[0], strict=True):
            if lr == 0.0:  # otherwise weights differ by rounding after the first window
                assert bitwise(state, state_0)
                assert drift == drift_0 == 0.0
            assert relative_error([state], [state_0]) <= 1e-12
            assert abs(drift - drift_0) <= 1e-12
            assert relative_error([loss], [loss_0]) <= 1e-12


def test_no_gradient_crosses_a_reset() -> None:
    inputs, targets = random_data(NUM_STEPS)
    resets = torch.zeros(NUM_STEPS, 2, dtype=torch.bool)
    resets[4, 0] = resets[4, 1] = True
    weight = torch.tensor([0.0] * 4 + [1.0] * 3)
    found = []
    for scale in (1.0, 50.0):  # what happened before the reset must not matter in any bit
        before = torch.cat([inputs[:4] * scale, inputs[4:]])
        module = tanh_cell()
        tbptt = TBPTT(module, F.mse_loss, NUM_STEPS, None, strategy="uniform:3")
        tbptt.train(TensorSequence(before, targets, weight=weight, resets=resets), random_state())
        found.append(gradients(list(module.parameters())))
    assert bitwise(found[0], found[1])


def test_what_is_not_finite_ends_at_a_reset() -> None:
    inputs, targets = random_data(4, lanes=2)
    inputs[1, 0] = float("nan")
    resets = torch.zeros(4, 2, dtype=torch.bool)
    resets[2, 0] = True
    weight = torch.tensor([[0.0, 1.0]] * 2 + [[1.0, 1.0]] * 2)
    module = tanh_cell()
    tbptt = TBPTT(module, F.mse_loss, 2, 2)
    windows = list(
        tbptt.windows(
            TensorSequence(inputs, targets, time_dim=0, weight=weight, resets=resets),
            random_state(),
        )
    )
    assert torch.isfinite(windows[-1].state).all()
    assert torch.isfinite(windows[-1].loss)


class Counter(nn.Module):
    """Integer and floating states; counts the steps of each lane since it began."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = {"age": state["age"] + 1, "sum": state["sum"] + x[:, 0]}
        return state["sum"], state


def test_states_of_any_dtype_and_nesting_are_reset() -> None:
    inputs = torch.ones(NUM_STEPS, 2, 1)
    init = {"age": torch.tensor([10, 20]), "sum": torch.tensor([0.5, 1.5])}
    data = TensorSequence(inputs, resets=RESETS)
    final = TBPTT(Counter(), F.mse_loss, 3, 5).train(data, init).state
    assert final["age"].tolist() == [11, 21]
    assert final["sum"].tolist() == [1.5, 2.5]
    states = [
        w.state["age"].tolist() for w in TBPTT(Counter(), F.mse_loss, 1, 1).windows(data, init)
    ]
    assert states == [[11, 21], [12, 22], [11, 23], [12, 21], [13, 21], [14, 22], [11, 21]]


def test_a_reset_of_every_lane_needs_no_lane_dimension() -> None:
    inputs, targets = random_data(NUM_STEPS, lanes=1)
    every = torch.tensor([False, False, True, False, True, False, False])
    module = lstm()
    tbptt = TBPTT(module, F.mse_loss, NUM_STEPS, None)
    unbatched = tbptt.train(TensorSequence(inputs[:, 0], targets[:, 0], resets=every))
    expected = gradients(list(module.parameters()))
    module.zero_grad()
    lanes = tbptt.train(TensorSequence(inputs, targets, resets=every[:, None]))
    assert relative_error(gradients(list(module.parameters())), expected) <= 1e-12
    rows = [s[:, 0] for s in lanes.state]
    assert relative_error(list(unbatched.state), rows) <= 1e-12


def test_one_row_may_begin_all_lanes() -> None:
    inputs, targets = random_data(NUM_STEPS)
    found = []
    for rows in (1, 2):
        module, row = tanh_cell(), random_state(lanes=1).requires_grad_()

        def step(x: Tensor, h: Tensor, module: nn.Module = module) -> Any:
            return module(x, h.expand(len(x), WIDTH))

        init = row if rows == 1 else row.detach().repeat(2, 1).requires_grad_()
        tbptt = TBPTT(step, F.mse_loss, 3, None, strategy="uniform:2")
        tbptt.train(TensorSequence(inputs, targets, resets=RESETS), init)
        found.append([*gradients(list(module.parameters())), init.grad.sum(0)])
    assert relative_error(found[0], found[1]) <= 1e-12


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_shared_row_of_an_lstm_is_learned(executor: str) -> None:
    inputs, targets = random_data(NUM_STEPS)
    data = TensorSequence(inputs, targets)  # no resets: lanes are known from the state alone
    found = []
    for shared in (True, False):
        module = lstm()
        rows = [random_state(s, lanes=1)[None].requires_grad_() for s in (5, 6)]
        lanes = [row.detach().repeat(1, 2, 1).requires_grad_() for row in rows]
        init = SharedState(tuple(rows), 2) if shared else tuple(lanes)
        tensors = rows if shared else lanes
        tbptt = TBPTT(module, F.mse_loss, NUM_STEPS, None, executor=executor, strategy="uniform:2")
        tbptt.train(data, init)
        found.append([*gradients(list(module.parameters())), *[t.grad.sum(1) for t in tensors]])
        assert tbptt.evaluate(data, init).loss is not None
    assert relative_error(found[0], found[1]) <= 1e-12
    window = run_window(lstm(), F.mse_loss, inputs, targets, SharedState(tuple(rows), 2))
    assert [g.shape for g in window.init_state_grad.state] == [(1, 1, WIDTH)] * 2


class Wrapped(nn.Module):
    """An LSTM inside another module; layers, lanes and width are all 2."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH_IN, 2, num_layers=2)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.lstm(x, state)


@pytest.mark.parametrize("lane_dim", [None, 1])
def test_lanes_of_a_wrapped_lstm_are_found(lane_dim: int | None) -> None:
    torch.manual_seed(0)
    module = Wrapped().double()
    inputs = random_data(3)[0]
    resets = torch.zeros(3, 2, dtype=torch.bool)
    resets[2, 1] = True
    tbptt = TBPTT(module, F.mse_loss, 2, 3, per_step=False, lane_dim=lane_dim)
    state = tbptt.train(TensorSequence(inputs, resets=resets)).state
    kept, begun = module(inputs[:, :1], None)[1], module(inputs[2:, 1:], None)[1]
    for found, lane_0, lane_1 in zip(state, kept, begun, strict=True):
        assert relative_error([found], [torch.cat([lane_0, lane_1], 1)]) <= 1e-12


def bad_lane_dim() -> None:
    TBPTT(tanh_cell(), F.mse_loss, 1, 1, lane_dim=-1)


def too_few_lanes() -> None:
    inputs, targets = random_data(3, lanes=4)
    data = TensorSequence(inputs, targets, resets=torch.ones(3, 2, dtype=torch.bool))
    TBPTT(tanh_cell(), F.mse_loss, 3, 3).train(data)


def no_lane_dimension() -> None:
    def step(x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return total + x.sum(), total + x.sum()

    data = TensorSequence(*random_data(3), resets=torch.ones(3, 2, dtype=torch.bool))
    TBPTT(step, lambda y, _: y, 3, 3).train(data, torch.tensor(0.0, dtype=torch.float64))


def other_structure() -> None:
    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return x, {"h": x}

    data = TensorSequence(*random_data(3), resets=torch.ones(3, 2, dtype=torch.bool))
    TBPTT(step, lambda y, _: y.sum(), 3, 3).train(data, (random_state(),))


def shared_state_of_two_rows() -> None:
    data = TensorSequence(*random_data(3))
    TBPTT(tanh_cell(), F.mse_loss, 3, 3).train(data, SharedState(random_state(), 2))


def shared_state_of_no_lanes() -> None:
    data = TensorSequence(*random_data(3))
    TBPTT(tanh_cell(), F.mse_loss, 3, 3).train(data, SharedState(random_state(lanes=1), 0))


def reset_of_other_dtype() -> None:
    class Source:
        def __len__(self) -> int:
            return 2

        def read(self, start: int, stop: int) -> tuple[Tensor, None]:
            return torch.ones(stop - start, 2, WIDTH_IN), None

        def resets(self, start: int, stop: int) -> Tensor:
            return torch.ones(stop - start, 2)

    TBPTT(tanh_cell(), F.mse_loss, 1, 1).train(Source())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (bad_lane_dim, "lane_dim=-1"),
        (too_few_lanes, r"resets are for 2 lanes, .* shape \(4, 3\) .* lane_dim=0"),
        (no_lane_dimension, r"shape \(\) .* pass lane_dim"),
        (other_structure, "lanes can only be reset to a state nested like it"),
        (shared_state_of_two_rows, r"shape \(2, 3\), which must be of size 1 on lane_dim=0"),
        (shared_state_of_no_lanes, "lanes=0"),
        (reset_of_other_dtype, "must be torch.bool"),
    ],
)
def test_resets_that_cannot_work_are_named(act: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        act()
