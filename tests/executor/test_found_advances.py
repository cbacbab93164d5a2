"""Advances of a segment module written as plain code make its state alone, with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, InfeasibleBudgetError, TbpttWarning, TensorSequence
from tbptt_ckpt.executor import found_advances

NUM_STEPS, LANES, INNER, OUTER = 60, 3, 4, 5
LEFT = "state alone in advances"


class Model(nn.Module):
    """What everybody writes: a layer of torch's between two others."""

    time_dim = 0

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(INNER, INNER), nn.Linear(INNER, OUTER)
        self.layer = nn.LSTM(INNER, INNER, 2, **options)
        self.scale, self.dropout = 2.0, nn.Dropout(0.0)

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        h, state = self.layer(torch.tanh(self.embed(x)) * self.scale, state)
        return self.readout(h), state


class BatchFirst(Model):
    time_dim = 1

    def __init__(self) -> None:
        super().__init__(batch_first=True)


class Fed(Model):
    """What is read out last is a part of the state."""

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        h, inner = self.layer(self.embed(x), None if state is None else state[0])
        read = self.readout(h)
        return read, (inner, read[-1:])


class Drawing(Model):
    """What is drawn for outputs must be drawn whoever looks at them."""

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        h, state = self.layer(self.embed(x), state)
        return self.readout(torch.nn.functional.dropout(h, 0.5)), state


class Asking(Model):
    """Code that is more than expressions."""

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        self.asked = True
        h, state = self.layer(self.embed(x), state)
        return self.readout(h), state


@pytest.fixture(autouse=True)
def small_models_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_advances, "_LEAST_PRODUCTS", 0)


@pytest.fixture
def read_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that were read out, call by call."""
    rows, plain = list[int](), nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape == (OUTER, INNER):
            rows.append(x.shape[:-1].numel())
        return plain(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    return rows


def run(
    kind: Callable[[], Model],
    change: Callable[[Model, int], None] = lambda _module, _number: None,
    **options: Any,
) -> tuple[list[Any], TBPTT]:
    """Losses and gradients of windows, and what made them."""
    torch.manual_seed(0)
    module = kind().double()
    inputs, targets = torch.randn(NUM_STEPS, LANES, INNER), torch.randn(NUM_STEPS, LANES, OUTER)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    options = {"strategy": "uniform:5", "k1": 10, "k2": 30, **options}
    tbptt = TBPTT(
        module,
        nn.functional.mse_loss,
        optimizer=optimizer,
        per_step=False,
        time_dim=module.time_dim,
        **options,
    )
    data = [each.double().movedim(0, module.time_dim) for each in (inputs, targets)]
    windows = tbptt.windows(TensorSequence(*data, time_dim=module.time_dim))
    found = list[Any]()
    torch.manual_seed(1)
    for number, window in enumerate(windows):
        grads = [parameter.grad.clone() for parameter in module.parameters()]
        found.append((window.loss_value, grads, copy.deepcopy(module.state_dict())))
        change(module, number)
    return found, tbptt


def assert_same(ours: list[Any], plain: list[Any]) -> None:
    for (loss, *mine), (expected, *its) in zip(ours, plain, strict=True):
        assert loss == expected
        torch.testing.assert_close(mine, its, rtol=0, atol=0)


def both_read_out(
    kind: Callable[[], Model], read_out: list[int], **options: Any
) -> tuple[int, int, TBPTT]:
    """Rows read out by the module itself and by what was found, whose bits are the same."""
    plain, _ = run(kind, time_batching=False, **options)
    rows = sum(read_out)
    read_out.clear()
    ours, tbptt = run(kind, **options)
    assert_same(ours, plain)
    return rows, sum(read_out), tbptt


def naive_windows(
    module: Model, inputs: Tensor, targets: Tensor, keep: Tensor, resets: Tensor, k1: int, k2: int
) -> list[list[Tensor]]:
    """Gradients of windows, step by step, with weights that stand still."""
    time_dim, found = module.time_dim, list[list[Tensor]]()
    state = tuple(torch.zeros(2, LANES, INNER).double() for _ in range(2))
    states = list[Any]()

    def step(t: int, state: Any) -> tuple[Tensor, Any]:
        alive = (~resets[t]).double()[:, None]
        output, state = module(inputs[t].unsqueeze(time_dim), tuple(s * alive for s in state))
        return output.squeeze(time_dim), state

    for t in range(NUM_STEPS):
        states.append(state)
        with torch.no_grad():
            state = step(t, state)[1]
    for stop in range(k1, NUM_STEPS + 1, k1):
        start, total = max(0, stop - k2), torch.zeros(()).double()
        state = states[start]
        for t in range(start, stop):
            output, state = step(t, state)
            if t >= stop - k1:
                total = total + ((output - targets[t]) ** 2 * keep[t, :, None]).sum()
        loss = total / (keep[stop - k1 : stop].sum() * OUTER)
        found.append(list(torch.autograd.grad(loss, list(module.parameters()))))
    return found


@pytest.mark.parametrize(
    ("kind", "strategy", "executor", "overlap"),
    [
        (Model, "uniform:5", "replay", "refresh"),
        (BatchFirst, "sqrt", "checkpoint", "stale"),
        pytest.param(Model, "retain", "checkpoint", "refresh", marks=pytest.mark.exhaustive),
        pytest.param(BatchFirst, "sqrt", "replay", "stale", marks=pytest.mark.exhaustive),
    ],
)
def test_gradients_are_those_of_a_plain_loop(
    kind: Any, strategy: str, executor: str, overlap: str
) -> None:
    torch.manual_seed(0)
    module = kind().double()
    inputs, targets = torch.randn(2, NUM_STEPS, LANES, INNER + OUTER).double()
    inputs, targets = inputs[..., :INNER], targets[..., :OUTER]
    keep, resets = torch.rand(NUM_STEPS, LANES) > 0.2, torch.rand(NUM_STEPS, LANES) > 0.95
    expected = naive_windows(module, inputs, targets, keep, resets, 12, 30)
    data = [each.movedim(0, module.time_dim) for each in (inputs, targets)]
    sequence = TensorSequence(*data, weight=keep.double(), resets=resets, time_dim=module.time_dim)
    tbptt = TBPTT(
        module, nn.functional.mse_loss, 12, 30, None, per_step=False, time_dim=module.time_dim,
        strategy=strategy, executor=executor, overlap=overlap,
    )  # fmt: skip
    first = tuple(torch.zeros(2, LANES, INNER).double() for _ in range(2))
    for _, its in zip(tbptt.windows(sequence, first), expected, strict=True):
        mine = [parameter.grad for parameter in module.parameters()]
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)
        module.zero_grad(set_to_none=True)
    assert reasons(tbptt) == []


def reasons(tbptt: TBPTT) -> list[str]:
    return [each.reason for each in tbptt.batched_operations if each.operation == LEFT]


@pytest.mark.parametrize(("kind", "overlap"), [(Model, "refresh"), (BatchFirst, "stale")])
def test_advances_read_nothing_out_and_bits_are_the_same(
    kind: Any, overlap: str, read_out: list[int]
) -> None:
    plain, ours, tbptt = both_read_out(kind, read_out, overlap=overlap)
    assert ours < 0.8 * plain
    assert reasons(tbptt) == []


@pytest.mark.parametrize("kind", [Drawing, Asking])
def test_what_would_be_lost_leaves_the_module_as_it_is(kind: Any, read_out: list[int]) -> None:
    plain, ours, tbptt = both_read_out(kind, read_out)
    assert ours >= plain
    assert reasons(tbptt)


def test_a_window_too_small_to_be_looked_at_is_not(
    read_out: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found_advances, "_LEAST_PRODUCTS", 50_000_000)
    plain, ours, _ = both_read_out(Model, read_out)
    assert ours == plain


def test_what_changes_unseen_is_told_after_so_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_advances, "_CHECKED_WINDOWS", 2)

    made = found_advances._Advance.__call__

    def other(advance: Any, inputs: Tensor, state: Any) -> Any:
        return tuple(each + 1 for each in made(advance, inputs, state))

    def change(_module: Model, number: int) -> None:
        if number == 3:
            monkeypatch.setattr(found_advances._Advance, "__call__", other)

    with pytest.warns(TbpttWarning, match="is not what it was .* last 2 windows"):
        _, tbptt = run(Model, change, strategy="retain")
    assert any("does not make the state" in reason for reason in reasons(tbptt))


def test_what_the_state_hangs_on_is_run(read_out: list[int]) -> None:
    plain, ours, _ = both_read_out(Fed, read_out)
    assert ours >= plain


def test_changes_between_windows_are_seen() -> None:
    def change(module: Model, number: int) -> None:
        module.scale = float(number)
        if number == 2:
            module.embed = nn.Linear(INNER, INNER).double()
        if number == 3:
            module.readout.register_forward_hook(lambda *_: None)
        module.train(number % 2 == 0)

    plain, _ = run(Model, change, time_batching=False)
    ours, tbptt = run(Model, change)
    assert_same(ours, plain)
    assert any("hooks" in reason for reason in reasons(tbptt))


def test_a_budget_is_kept_by_a_module_whose_outputs_are_large() -> None:
    class Wide(Model):
        def __init__(self) -> None:
            super().__init__()
            self.readout = nn.Linear(INNER, OUTER)
            self.wide = nn.Linear(OUTER, 3000)

        def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
            h, state = self.layer(self.embed(x), state)
            return self.wide(self.readout(h)).narrow(2, 0, OUTER), state

    options = {"strategy": "optimal", "k1": 6, "k2": 12, "measure_memory": True}
    with pytest.raises(InfeasibleBudgetError) as refused:
        run(Wide, memory_budget=1, **options)
    assert refused.value.smallest_budget_bytes is not None
    for factor in (1.0, 1.2):
        budget = int(factor * refused.value.smallest_budget_bytes)
        torch.manual_seed(0)
        module = Wide().double()
        tbptt = TBPTT(
            module,
            nn.functional.mse_loss,
            optimizer=torch.optim.SGD(module.parameters(), 0.1),
            per_step=False,
            memory_budget=budget,
            **options,
        )
        data = TensorSequence(
            torch.randn(48, LANES, INNER).double(), torch.randn(48, LANES, OUTER).double()
        )
        assert max(window.peak_bytes for window in tbptt.windows(data)) <= budget
        assert reasons(tbptt) == []
