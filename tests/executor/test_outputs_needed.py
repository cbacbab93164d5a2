"""A module that asks `outputs_needed` leaves out its readout where nobody looks at outputs."""

from __future__ import annotations

import threading
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    OVERLAPS,
    STRATEGIES,
    WIDTH,
    WIDTH_IN,
    TanhCell,
    bitwise,
    check_window,
    engine_sequence,
    gradients,
    masked_loss,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
)
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    TensorSequence,
    evaluate,
    unroll,
    verify,
)
from tbptt_ckpt.module.outputs import OutputsNeeded, outputs_needed

NUM_STEPS, K1, K2 = 9, 3, 5


class AskingCell(TanhCell):
    """Counts the steps it read out, and those it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.read_out = self.ran = 0

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Any, Tensor]:
        h = x.new_zeros(x.shape[0], WIDTH) if h is None else h
        h = torch.tanh(self.recurrence(torch.cat([x, h], 1)))
        self.ran += 1
        if not outputs_needed():
            return None, h
        self.read_out += 1
        return self.readout(h), h


class AskingSegments(nn.Module):
    """The same over segments, with another recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.readout = nn.LSTM(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.read_out = self.ran = 0

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        h, state = self.lstm(x, state)
        self.ran += len(x)
        if not outputs_needed():
            return None, state
        self.read_out += len(x)
        return self.readout(h), state


def asking_cell() -> AskingCell:
    torch.manual_seed(0)
    return AskingCell().double()


def asking_segments() -> AskingSegments:
    torch.manual_seed(0)
    return AskingSegments().double()


@covering(
    k2=[2, 5, None],
    overlap=OVERLAPS,
    loss=["new", "last"],
    strategy=STRATEGIES,
    executor=EXECUTORS,
)
def test_a_cell_that_asks_has_the_gradient_of_the_naive_loop(
    k2: int | None, overlap: str, loss: str, strategy: str, executor: str
) -> None:
    module = asking_cell()
    inputs, targets = random_data(NUM_STEPS)
    state = random_state()
    for loss_fn in (mean_loss, masked_loss):
        problem = naive_problem(module, inputs, targets, state, loss_fn=loss_fn)
        expected = list(getattr(naive, overlap)(problem, K1, k2, loss=loss))
        module.zero_grad(set_to_none=True)
        tbptt = TBPTT(
            module, loss_fn, K1, k2, None, loss=loss, overlap=overlap, strategy=strategy,
            executor=executor, time_batching=False,
        )  # fmt: skip
        found = tbptt.windows(engine_sequence(inputs, targets), state)
        for window, reference in zip(found, expected, strict=True):
            grads = gradients(list(module.parameters()))
            check_window(strategy, window, grads, reference, bitwise_state=True)
            module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_segment_module_that_asks_verifies(strategy: str, executor: str) -> None:
    module = asking_segments()
    for loss_fn in (mean_loss, masked_loss):
        found = verify(
            module, loss_fn, *random_data(NUM_STEPS), strategy=strategy, executor=executor,
            per_step=False, tolerance=1e-12,
        )  # fmt: skip
        assert found.ok, str(found)


@pytest.mark.parametrize("make", [asking_cell, asking_segments])
def test_an_advance_reads_nothing_out(make: Any) -> None:
    module = make()
    inputs, targets = random_data(NUM_STEPS)
    tbptt = TBPTT(
        module, mean_loss, NUM_STEPS, NUM_STEPS, None, strategy="uniform:3",
        per_step=isinstance(module, AskingCell),
    )  # fmt: skip
    tbptt.train(TensorSequence(inputs, targets))  # whether losses are pairs is known after it
    module.read_out = module.ran = 0
    tbptt.train(TensorSequence(inputs, targets))
    assert (module.read_out, module.ran) == (NUM_STEPS, NUM_STEPS + 6)


def test_steps_without_a_loss_are_not_read_out() -> None:
    module = asking_cell()
    tbptt = TBPTT(module, mean_loss, K1, K2, None, loss="last", strategy="retain")
    tbptt.train(TensorSequence(*random_data(NUM_STEPS)))
    assert module.read_out == NUM_STEPS // K1


def test_whoever_wants_outputs_gets_them() -> None:
    module = asking_cell()
    inputs, targets = random_data(NUM_STEPS)
    assert outputs_needed()
    outputs, _ = unroll(module, inputs, random_state(), strategy="uniform:3")
    expected, state = [], random_state()
    for x in inputs:
        y, state = module(x, state)
        expected.append(y.detach())
    assert bitwise(list(outputs.detach()), expected)
    evaluation = evaluate(module, mean_loss, TensorSequence(inputs, targets), random_state())
    losses = [float(mean_loss(y, t)) for y, t in zip(expected, targets, strict=True)]
    assert evaluation.loss == pytest.approx(sum(losses) / NUM_STEPS, rel=1e-12)


def test_the_answer_is_the_threads_own_and_survives_an_error() -> None:
    answers: list[bool] = []

    class Failing(AskingCell):
        def forward(self, x: Tensor, h: Tensor | None) -> tuple[Any, Tensor]:
            if not outputs_needed():
                other = threading.Thread(target=lambda: answers.append(outputs_needed()))
                other.start()
                other.join()
                raise ValueError("in an advance")
            return super().forward(x, h)

    module = Failing().double()
    with pytest.raises(ValueError, match="in an advance"):
        verify(module, mean_loss, *random_data(NUM_STEPS), random_state(), strategy="uniform:3")
    assert answers == [True]
    assert outputs_needed()


def test_compiled_code_always_makes_outputs() -> None:
    class Asking(TanhCell):  # without counters, which would be compiled anew at each count
        def forward(self, x: Tensor, h: Tensor | None) -> tuple[Any, Tensor]:
            y, h = super().forward(x, h)
            return y if outputs_needed() else None, h

    compiled, x = torch.compile(Asking().double(), backend="eager"), random_data(1)[0][0]
    for needed in (False, True):
        with OutputsNeeded(needed):
            output, _ = compiled(x, random_state())
        assert output is not None, needed


@pytest.mark.parametrize("make", [asking_cell, asking_segments])
def test_outputs_left_out_where_a_loss_counts_are_an_error(make: Any) -> None:
    module = make()
    weights = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def confused(x: Tensor, state: Any) -> tuple[None, Any]:
        return None, module(x, state)[1]

    per_step = isinstance(module, AskingCell)
    tbptt = TBPTT(confused, mean_loss, K1, K2, optimizer, per_step=per_step, strategy="step")
    with pytest.raises(ArgumentError, match=r"returned None .* only where outputs_needed\(\)"):
        tbptt.train(TensorSequence(*random_data(NUM_STEPS)))
    assert bitwise([p.detach() for p in module.parameters()], weights)


def test_verify_finds_a_state_that_hangs_on_the_answer() -> None:
    class Drawing(AskingCell):
        """Draws where outputs are needed, so that later draws are others than in a plain loop."""

        def forward(self, x: Tensor, h: Tensor | None) -> tuple[Any, Tensor]:
            y, h = super().forward(x, h)
            y = None if y is None else nn.functional.dropout(y, 0.5)
            return y, nn.functional.dropout(h, 0.5)

    torch.manual_seed(0)
    found = verify(Drawing().double(), mean_loss, *random_data(NUM_STEPS), strategy="uniform:3")
    assert not found.ok
