"""Time batching: what is left to the plain operations, refused, or reported."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_modules import (
    INPUTS,
    LANES,
    OUTPUTS,
    STEPS,
    WIDTH,
    OfLinears,
    WithCell,
    batched,
    by_hand,
    by_window,
    check,
    computed_weight,
    elman,
    make_cell,
    make_data,
    make_linears,
    make_state,
    present,
)
from cases import bitwise, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tbptt_ckpt import TBPTT, ArgumentError, TbpttError, TensorSequence, run_window
from tbptt_ckpt.time_batching.cell_calls import CellCalls
from tbptt_ckpt.time_batching.cell_kinds import GRU, LSTM, RNN
from tbptt_ckpt.time_batching.interception import opened
from tbptt_ckpt.time_batching.policy import TimeBatching
from tbptt_ckpt.time_batching.region import Region
from tbptt_ckpt.time_batching.rows import InputRows


def test_a_second_derivative_within_a_step_is_refused_with_the_remedy() -> None:
    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            h = h if h.requires_grad else h.detach().requires_grad_()
            energy = torch.tanh(m.wh(h)).square().sum()
            (slope,) = torch.autograd.grad(energy, h, create_graph=True)
        h = torch.tanh(m.wx(x) - slope)
        return m.wy(h), h

    check(make_linears(step), time_batching=False, strategy="uniform:3")
    check(make_linears(step), time_batching="auto", strategy="uniform:3")
    with pytest.raises(TbpttError, match="time_batching=False"):
        check(make_linears(step), strategy="uniform:3")


@pytest.mark.parametrize("make", [lambda s: make_linears(s)])
def test_a_weight_that_is_written_to_within_the_segment_is_an_error_as_without(make: Any) -> None:
    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.wx(x) + m.wh(h))
        with torch.no_grad():
            m.wh.weight.mul_(1.01)
        return m.wy(h), h

    for time_batching in (False, True):
        module = make(step)
        with pytest.raises(TbpttError):
            by_window(module, [], make_data(), make_state(module), time_batching=time_batching)


def test_a_state_that_is_written_to_is_an_error_as_without() -> None:
    def step(m: WithCell, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new_h = m.cell(x, h)
        if h.grad_fn is not None:
            h.mul_(2)
        return m.readout(new_h), new_h

    module = make_cell("gru")
    for time_batching in (False, True):
        with pytest.raises(TbpttError, match="modified in place"):
            by_window(
                lambda x, h: step(module, x, h),
                [],
                make_data(),
                make_state(module),
                time_batching=time_batching,
                strategy="retain",
            )


def test_fast_weights_that_change_in_place_are_left_to_the_plain_operation() -> None:
    class FastWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow = nn.Linear(INPUTS, WIDTH)
            self.readout = nn.Linear(WIDTH, OUTPUTS)
            self.register_buffer("fast", torch.zeros(WIDTH, INPUTS))

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            new_h = torch.tanh(self.slow(x) + F.linear(x, self.fast.clone()) + h)
            with torch.no_grad():
                self.fast.add_(new_h.detach().t() @ x, alpha=0.1)
            return self.readout(new_h), new_h

    torch.manual_seed(0)
    module = FastWeights().double()
    fast = module.fast.clone()
    parameters, data, state = list(module.parameters()), make_data(), make_state(module)
    expected = by_hand(module, parameters, data, state)[1]
    module.fast = fast
    found = by_window(module, parameters, data, state, strategy="uniform:3")[1]
    assert relative_error(found, expected) <= 1e-12


def test_other_threads_meet_plain_functions() -> None:
    module, seen = make_linears(elman), []
    plain = torch._C._nn.linear

    class Elsewhere(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            def work() -> None:
                y = F.linear(h.detach(), module.wh.weight)
                seen.append(y.grad_fn.name())

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return module(x, h)

    expected = plain(torch.ones(1, WIDTH, dtype=torch.float64), module.wh.weight).grad_fn.name()
    by_window(Elsewhere(), [], make_data(), make_state(module))
    assert len(seen) >= STEPS
    assert set(seen) == {expected}
    assert F.linear is plain


def test_functions_are_torchs_own_again_after_an_error() -> None:
    def fail(x: Tensor, h: Tensor) -> Any:
        raise KeyError("from the module")

    forward = nn.LSTMCell.forward
    with pytest.raises(KeyError):
        by_window(fail, [], make_data(), torch.zeros(1))
    assert F.linear is torch._C._nn.linear
    assert nn.LSTMCell.forward is forward


def test_what_was_batched_and_what_not_is_reported() -> None:
    module, (inputs, targets) = make_linears(computed_weight), make_data()
    how: Any = {"strategy": "uniform:3", "time_batching": True, "check_replays": False}
    tbptt = TBPTT(module, F.mse_loss, STEPS, None, **how)
    assert tbptt.batched_operations == []
    tbptt.train(TensorSequence(inputs, targets), make_state(module))
    taken = [o for o in tbptt.batched_operations if not o.reason]
    left = [o for o in tbptt.batched_operations if o.reason]
    assert [(o.operation, o.shape, o.count) for o in taken] == [("linear", (OUTPUTS, WIDTH), 3)]
    assert [o.operation for o in left] == ["linear"]
    assert "computed in the step" in left[0].reason


def test_auto_leaves_small_operations_alone_bit_for_bit() -> None:
    module = make_cell("lstm")
    arguments = (module, list(module.parameters()), make_data(), make_state(module))
    one = by_window(*arguments, time_batching="auto", strategy="uniform:3")
    other = by_window(*arguments, time_batching=False, strategy="uniform:3")
    assert bitwise(present(one), present(other))
    changed = by_window(*arguments, time_batching=True, strategy="uniform:3")
    assert not bitwise(present(changed), present(other))


@pytest.mark.parametrize("value", ["yes", None, 1, 0, "True"])
def test_a_choice_that_is_none_is_refused(value: object) -> None:
    module, (inputs, targets) = make_cell("gru"), make_data()
    with pytest.raises(ArgumentError, match=r"time_batching=.*True or False or 'auto'"):
        run_window(module, F.mse_loss, inputs, targets, make_state(module), time_batching=value)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_window_leaves_nothing_to_the_garbage_collector(kind: type[nn.RNNCellBase]) -> None:
    """Else tensors of a leaf would stay until Python happens to look for circles."""
    cell = kind(INPUTS, WIDTH)
    inputs, targets = torch.randn(STEPS, LANES, INPUTS), torch.randn(STEPS, LANES, WIDTH)

    def run() -> None:
        run_window(cell, F.mse_loss, inputs, targets, strategy="uniform:3", time_batching=True)

    run()
    gc.collect()
    gc.disable()
    try:
        run()
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [lambda: make_cell("lstm"), lambda: make_linears(elman)])
def test_a_run_in_inference_mode_is_plain(make: Any) -> None:
    module, (inputs, targets) = make(), make_data()
    usual, inferring = (
        TBPTT(module, F.mse_loss, STEPS, None, time_batching=True) for _ in range(2)
    )
    state = make_state(module)
    expected = usual.evaluate(TensorSequence(inputs, targets), state).loss
    with torch.inference_mode():
        found = inferring.evaluate(TensorSequence(inputs, targets), state).loss
    assert found == pytest.approx(expected, rel=1e-12)
    assert usual.batched_operations
    assert not inferring.batched_operations


@pytest.mark.parametrize(("width", "operations"), [(16, set()), (256, {"LSTMCell of inputs"})])
def test_auto_batches_what_has_a_large_weight(width: int, operations: set[str]) -> None:
    module = WithCell(nn.LSTMCell(width, width))
    module.readout = nn.Linear(width, OUTPUTS)
    data = TensorSequence(torch.randn(4, 1, width), torch.randn(4, 1, OUTPUTS))
    state = (torch.zeros(1, width), torch.zeros(1, width))
    tbptt = TBPTT(module, F.mse_loss, 4, None, strategy="uniform:2")
    tbptt.train(data, state)
    assert {o.operation for o in tbptt.batched_operations if not o.reason} == operations


@pytest.mark.parametrize("make", [lambda: make_cell("lstm"), lambda: make_linears(elman)])
@pytest.mark.parametrize("default", [False, True])
def test_a_default_device_changes_nothing(default: bool, make: Any) -> None:
    """It is a function mode: what is batched is as without it, and has the same bits."""
    module, made = make(), []

    def step(x: Tensor, state: Any) -> Any:
        made.append(torch.zeros(2).device.type)
        return module(x, state)

    arguments = (step, list(module.parameters()), make_data(), make_state(module))
    usual = present(by_window(*arguments, strategy="uniform:3"))
    operations = batched(step, *arguments[2:])
    assert set(made) == {"cpu"}
    made.clear()
    if default:
        torch.set_default_device("meta")
    try:
        with nullcontext() if default else torch.device("meta"):
            found = present(by_window(*arguments, strategy="uniform:3"))
            assert batched(step, *arguments[2:]) == operations
    finally:
        torch.set_default_device(None)
    assert bitwise(found, usual)
    assert set(made) == {"meta"}
    assert operations


@pytest.mark.parametrize("multiply", [torch.mm, Tensor.mm, lambda x, w: torch.addmm(w[0], x, w)])
@pytest.mark.parametrize("lead", [(), (2, 2)])
def test_products_of_matrices_refuse_what_torch_refuses(multiply: Any, lead: Any) -> None:
    def step(m: OfLinears, x: Tensor, h: Tensor) -> Any:
        return multiply(torch.zeros(*lead, WIDTH, dtype=x.dtype), m.wh.weight.t()), h

    with pytest.raises(RuntimeError):
        by_window(make_linears(step), [], make_data(), make_state(make_linears(step)))


def test_a_bias_of_another_shape_is_left_to_the_plain_operation() -> None:
    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        one = m.wx.bias[:1]
        h = torch.tanh(F.linear(x, m.wx.weight, nn.Parameter(one.detach())) + m.wh(h))
        return torch.addmm(nn.Parameter(h[:, :1].detach()), h, m.wy.weight.t()), h

    check(make_linears(step), strategy="uniform:3")


def test_a_replacement_bears_the_name_of_what_it_replaces() -> None:
    """By which function modes tell them."""
    names = {}

    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        for function in (F.linear, F.embedding, F.conv1d, torch.mm, Tensor.matmul):
            names[function.__qualname__] = function.__name__
        return elman(m, x, h)

    check(make_linears(step), strategy="uniform:3")
    functions = F.linear, F.embedding, F.conv1d, torch.mm, Tensor.matmul
    assert names == {f.__qualname__: f.__name__ for f in functions}


class Wrapped:
    """A tensor in an object of another type, which torch's functions take as well."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        given = [arg.tensor if isinstance(arg, Wrapped) else arg for arg in args]
        return func(*given, **(kwargs or {}))


@pytest.mark.parametrize("wrapped", [0, 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_objects_that_are_no_tensors(autocast: bool, wrapped: int) -> None:
    functions: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = [
        (F.linear, (2, 3), (4, 3)),
        (torch.mm, (2, 3), (3, 4)),
        (torch.matmul, (2, 3), (3, 4)),
        (lambda x, w: torch.addmm(torch.ones(4), x, w), (2, 3), (3, 4)),
        (lambda x, w: F.bilinear(x, torch.ones(2, 3), w), (2, 3), (4, 3, 3)),
        (F.conv1d, (2, 3, 5), (4, 3, 2)),
        (F.conv2d, (2, 3, 5, 5), (4, 3, 2, 2)),
        (F.embedding, (), (4, 3)),
    ]
    seen = 0

    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal seen
        for function, shape, weight in functions:
            values = torch.ones(shape) if shape else torch.tensor([1, 3])
            operands: list[Any] = [values, torch.nn.Parameter(torch.ones(weight))]
            expected = function(*operands)
            operands[wrapped] = Wrapped(operands[wrapped])
            assert torch.equal(function(*operands), expected)
            seen += 1
        return elman(m, x, h)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        by_window(
            make_linears(step).float(), [], make_data(torch.float32), torch.zeros(LANES, WIDTH)
        )
    assert seen


def test_a_function_that_was_imported_by_name_stays_plain() -> None:
    imported = F.linear

    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(imported(x, m.wx.weight) + imported(h, m.wh.weight))
        return imported(h, m.wy.weight), h

    check(make_linears(step), strategy="uniform:3")
    assert batched(make_linears(step), make_data(), make_state(make_linears(step))) == set()


def test_a_weight_that_is_written_to_unseen_is_that_of_the_first_step() -> None:
    """A limit: PyTorch counts no write through `.data`."""

    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.wx(x) + m.wh(h))
        m.wx.weight.data.mul_(1.1)
        return m.wy(h), h

    losses = {}
    for time_batching in (False, True):
        module = make_linears(step)
        how = {"strategy": "retain", "time_batching": time_batching}
        losses[time_batching] = by_window(module, [], make_data(), make_state(module), **how)[0]
    module = make_linears(step)
    expected = by_hand(module, [], make_data(), make_state(module))[0]
    assert relative_error([losses[False]], [expected]) <= 1e-12
    assert relative_error([losses[True]], [expected]) > 1e-3


def zeros(*shape: int, **kind: Any) -> Tensor:
    return torch.zeros(shape, **{"dtype": torch.float64, **kind})


class _Other(Tensor):
    """Not of the plain type."""


MISFITS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # inputs and state, and of which kind
    "a cell on another device than the CPU": (
        *(zeros(LANES, 3, device="meta"), zeros(LANES, WIDTH, device="meta")),
        {"device": "meta"},
    ),
    "no batch of lanes": (zeros(3), zeros(WIDTH), {}),
    "complex numbers": (
        *(zeros(LANES, 3, dtype=torch.complex64), zeros(LANES, WIDTH, dtype=torch.complex64)),
        {"dtype": torch.complex64},
    ),
    "dtypes that differ": (zeros(LANES, 3), zeros(LANES, WIDTH, dtype=torch.float32), {}),
    "shapes that differ": (zeros(LANES, 3), zeros(1, WIDTH), {}),
    "inputs of another type, or without a dimension": (
        *(zeros(LANES, 3), zeros(LANES, WIDTH).as_subclass(_Other)),
        {},
    ),
    "": (zeros(LANES, 3), zeros(LANES, WIDTH), {}),
}


@pytest.mark.parametrize(
    ("make", "kind"), [(nn.LSTMCell, LSTM()), (nn.GRUCell, GRU()), (nn.RNNCell, RNN("tanh"))]
)
@pytest.mark.parametrize("reason", [*MISFITS, "autocast"])
def test_a_cell_says_why_it_is_left_alone(reason: str, make: Any, kind: Any) -> None:
    x, state, how = MISFITS.get(reason, MISFITS[""])
    cell, tally = make(3, WIDTH, **{"dtype": x.dtype, **how}), Counter[Any]()
    calls = CellCalls(STEPS, 0, tally, InputRows())
    with torch.autocast("cpu", enabled=reason == "autocast"):
        result = calls.call(cell, kind, x, (state,) * kind.num_states)
    assert (result is None) == bool(reason)
    assert [key[2] for key in tally] == [reason]


def test_other_operations_say_why_they_are_left_alone() -> None:
    table, kernel = nn.Parameter(zeros(5, 3)), nn.Parameter(zeros(2, 1, 3))
    words, row = torch.zeros(LANES, dtype=torch.long), zeros(LANES, 1, 600)
    tally = Counter[Any]()
    with opened(Region(STEPS, tally, 2)):
        F.embedding(words, table, max_norm=1.0)
        F.conv1d(row, kernel, padding="same")
        F.conv1d(row, kernel)
        F.linear(row, nn.Parameter(zeros(2, 600)), nn.Parameter(zeros(1)))
    assert [key[::2] for key in tally] == [
        ("embedding", "max_norm, scale_grad_by_freq or sparse"),
        ("conv1d", "an input of another type, no batch of lanes, or padding by a word"),
        ("conv1d", "more positions than pay"),
        ("linear", "shapes that differ"),
    ]


def test_a_mode_around_the_run_leaves_all_plain_and_says_so() -> None:
    module, (inputs, targets) = make_linears(elman), make_data()
    tbptt = TBPTT(module, F.mse_loss, STEPS, None, strategy="uniform:3", time_batching=True)
    with FlopCounterMode(display=False) as flops:
        tbptt.train(TensorSequence(inputs, targets), make_state(module))
    assert flops.get_total_flops()
    assert {o.operation: o.reason for o in tbptt.batched_operations} == {
        "step": "a mode that sees each operation"
    }


def test_indices_on_a_device_are_not_read() -> None:
    with torch.device("meta"):  # whose numbers nobody can read
        embedding, indices = nn.Embedding(5, 3), torch.zeros(4, 2, dtype=torch.long)
    batching = TimeBatching(True, embedding)
    with batching.region(4, per_step=True):
        rows = batching.step_inputs(indices, 0)
        assert rows is not None
        outputs = [embedding(row) for row in rows]
    torch.stack(outputs).sum().backward()
    assert [each.operation for each in batching.report()] == ["embedding"]
    assert embedding.weight.grad is not None
