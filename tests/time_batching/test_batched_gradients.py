"""Time batching: the same gradients as plain BPTT by hand, whatever the module does in a step.

The reference is a plain loop with one graph and one backward, without the package.
"""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from batched_modules import (
    CELLS,
    EXECUTORS,
    INPUTS,
    LANES,
    LINEAR_STEPS,
    OUTPUTS,
    STEPS,
    STRATEGIES,
    WIDTH,
    WORDS,
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
    other_ranks,
    present,
    through_functional_call,
    used_twice,
)
from cases import bitwise, clear_gradients, gradients, relative_error
from devices import here, placed
from grids import covering
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from tbptt_ckpt import TBPTT, TensorSequence, run_window
from tbptt_ckpt.memory.meter import peak_memory


@pytest.mark.parametrize(
    ("before", "reads_inputs", "others"),
    [
        ("inputs", True, {"linear"}),
        ("linear", True, {"linear", "linear of inputs"}),
        ("tanh", False, {"linear", "linear of inputs"}),
        ("words", False, {"linear", "embedding"}),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_the_cells_of_these_tests_are_batched(
    cell: str, before: str, reads_inputs: bool, others: set[str]
) -> None:
    module = make_cell(cell, before=before)
    kind = type(module.cell).__name__ + (f" {cell}" if cell in ("tanh", "relu") else "")
    kind += " of inputs" if reads_inputs else ""
    assert batched(module, make_data(), make_state(module)) == {kind, *others}


@pytest.mark.parametrize("step", LINEAR_STEPS)
def test_the_linear_maps_of_these_tests_are_batched(step: Any) -> None:
    expected = {"linear", "linear of inputs"}
    if step in (other_ranks, computed_weight, through_functional_call):
        expected = {"linear"}  # what reads the inputs is no plain product of them
    module = make_linears(step)
    assert batched(module, make_data(), make_state(module)) == expected


@covering(
    cell=CELLS,
    bias=[True, False],
    before=["inputs", "linear", "tanh", "words"],
    strategy=STRATEGIES,
    executor=EXECUTORS,
)
@pytest.mark.usefixtures("device")
def test_cells_have_the_gradients_of_plain_bptt(
    cell: str, bias: bool, before: str, strategy: str, executor: str
) -> None:
    check(make_cell(cell, bias, before), strategy=strategy, executor=executor)


@covering(step=LINEAR_STEPS, bias=[True, False], strategy=STRATEGIES, executor=EXECUTORS)
@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.usefixtures("device")
def test_linear_maps_have_the_gradients_of_plain_bptt(
    step: Any, bias: bool, strategy: str, executor: str
) -> None:
    check(make_linears(step, bias), strategy=strategy, executor=executor)


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "all"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("device")
def test_frozen_weights_of_cells_stay_without_gradient(cell: str, frozen: str) -> None:
    module = make_cell(cell, before="tanh")
    for name, parameter in module.cell.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all"))
    check(module, strategy="uniform:3")


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.usefixtures("device")
def test_frozen_linear_maps_stay_without_gradient(frozen: str) -> None:
    module = make_linears(elman)
    for layer in (module.wx, module.wh, module.wy):
        getattr(layer, frozen).requires_grad_(False)
    check(module, strategy="uniform:3")


class Stacked(nn.Module):
    """Two cells, the second called twice a step, and a cell that shares the first's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRUCell(INPUTS, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.shared = nn.GRUCell(INPUTS, WIDTH)
        self.shared.weight_ih, self.shared.weight_hh = self.first.weight_ih, self.first.weight_hh
        self.readout = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        g = self.shared(x, self.first(x, state["g"]))
        h, c = self.second(g, state["s"])
        h, c = self.second(torch.tanh(g), (h * 0.9, c))
        return self.readout(h), {"g": g, "s": (h, c)}


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("device")
def test_stacked_shared_and_repeated_cells(strategy: str, executor: str) -> None:
    torch.manual_seed(0)
    module, data = placed(Stacked().double()), make_data()
    g, h, c = placed(torch.randn(3, LANES, WIDTH, dtype=torch.float64))
    state, parameters = {"g": g, "s": (h, c)}, list(module.parameters())
    _, expected = by_hand(module, parameters, data, state)
    _, found = by_window(module, parameters, data, state, strategy=strategy, executor=executor)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error([ours], [theirs]) <= 1e-12


def test_parametrised_weights_are_left_to_the_plain_operation() -> None:
    module = make_linears(elman)
    parametrizations.weight_norm(module.wh)
    parametrizations.orthogonal(module.wy)
    check(module, strategy="uniform:3")


@pytest.mark.usefixtures("device")
def test_a_module_behind_functional_call() -> None:
    module = make_cell("lstm")
    parameters, data, state = list(module.parameters()), make_data(), make_state(module)
    named = dict(module.named_parameters())

    def call(x: Tensor, state: Any) -> Any:
        return functional_call(module, named, (x, state))

    _, expected = by_hand(module, parameters, data, state)
    _, found = by_window(call, parameters, data, state, strategy="uniform:3")
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error([ours], [theirs]) <= 1e-12


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("make", [lambda: make_cell("lstm"), lambda: make_linears(elman)])
def test_under_autocast_gradients_are_those_of_autocast(make: Any, executor: str) -> None:
    module = make().float()
    parameters = list(module.parameters())
    data, state = make_data(torch.float32), make_state(module, torch.float32)

    def autocast(x: Tensor, state: Any) -> Any:
        with torch.autocast(here().type, torch.bfloat16):
            return module(x, state)

    exact = by_hand(module, parameters, data, state)[1]
    expected = by_hand(autocast, parameters, data, state)[1]
    how = {"strategy": "uniform:3", "executor": executor, "autocast_dtype": torch.bfloat16}
    found = by_window(module, parameters, data, state, **how)[1]
    assert all(g is None or g.dtype == torch.float32 for g in found)
    # As near to the exact gradient as plain autocast is, whose error is that of bfloat16.
    assert relative_error(found, exact) <= 1.5 * relative_error(expected, exact) + 1e-3
    assert relative_error(expected, exact) > 1e-5
    assert batched(module, data, state, autocast_dtype=torch.bfloat16) == {"linear"}


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.parametrize("strategy", ["retain", "uniform:3", "step"])
@pytest.mark.parametrize("make", [lambda: make_cell("lstm"), lambda: make_linears(used_twice)])
@pytest.mark.usefixtures("device")
def test_gradient_hooks_fire_once_per_weight(make: Any, strategy: str) -> None:
    module = make()
    parameters, data, state = list(module.parameters()), make_data(), make_state(module)
    grads = by_hand(module, parameters, data, state)[1]
    used = [p for p, grad in zip(parameters, grads, strict=False) if grad is not None]
    seen: dict[int, list[Tensor]] = {id(p): [] for p in used}
    accumulated: list[int] = []
    for parameter in used:
        parameter.register_hook(lambda grad, p=parameter: seen[id(p)].append(grad.clone()))
        parameter.register_post_accumulate_grad_hook(lambda p: accumulated.append(id(p)))
    by_window(module, parameters, data, state, strategy=strategy)
    for parameter in used:
        (total,) = seen[id(parameter)]
        assert accumulated.count(id(parameter)) == 1
        assert relative_error([total], [parameter.grad]) <= 1e-12


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.usefixtures("device")
def test_a_hook_may_change_the_gradient() -> None:
    module = make_cell("gru")
    parameters, data, state = list(module.parameters()), make_data(), make_state(module)
    module.cell.weight_hh.register_hook(lambda grad: 2 * grad)
    expected = by_hand(module, parameters, data, state)[1]
    found = by_window(module, parameters, data, state, strategy="uniform:3")[1]
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("device")
def test_the_same_run_twice_has_the_same_bits(cell: str, executor: str) -> None:
    module = make_cell(cell)
    arguments = (module, list(module.parameters()), make_data(), make_state(module))
    how = {"strategy": "uniform:3", "executor": executor}
    one, other = by_window(*arguments, **how), by_window(*arguments, **how)
    assert bitwise(present(one), present(other))


@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("k1", "k2"), [(2, 5), (3, 2), (4, None)])
@pytest.mark.usefixtures("device")
def test_overlapping_windows(k1: int, k2: int | None, executor: str, overlap: str) -> None:
    module = make_cell("lstm")
    parameters, (inputs, targets) = list(module.parameters()), make_data()
    state = make_state(module)
    problem = naive.Problem(
        step=module,
        loss_fn=F.mse_loss,
        inputs=list(inputs),
        targets=list(targets),
        init_state=state,
        parameters=parameters,
        module=module,
    )
    loop = naive.refresh if overlap == "refresh" else naive.stale
    expected = [window.grads for window in loop(problem, k1, k2)]
    tbptt = TBPTT(
        module,
        F.mse_loss,
        k1,
        k2,
        overlap=overlap,
        strategy="uniform:2",
        executor=executor,
        time_batching=True,
    )
    clear_gradients(parameters)
    for grads, window in zip(
        expected, tbptt.windows(TensorSequence(inputs, targets), state), strict=True
    ):
        assert window.loss is not None
        assert relative_error(gradients(parameters), grads) <= 1e-12
        clear_gradients(parameters)


@pytest.mark.parametrize("lanes", [1, 8, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_products_of_large_shapes_in_single_precision(cell: str, lanes: int) -> None:
    """Shapes at which other kernels multiply."""
    torch.manual_seed(0)
    width = 512
    module = WithCell(CELLS[cell](width, width, bias=True))
    module.readout = nn.Linear(width, OUTPUTS)
    data = torch.randn(6, lanes, width), torch.randn(6, lanes, OUTPUTS)
    h, c = torch.randn(2, lanes, width)
    state = (h, c) if cell == "lstm" else h
    parameters = list(module.parameters())
    expected = by_hand(module, parameters, data, state)[1]
    found = by_window(module, parameters, data, state, strategy="uniform:3")[1]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error([ours], [theirs]) <= 2e-6


def test_checkpoints_drop_what_cells_keep() -> None:
    """The gates of a segment are not held until it is differentiated."""
    torch.manual_seed(0)
    steps, lanes, width = 64, 4, 32
    module = WithCell(nn.LSTMCell(width, width))
    module.readout = nn.Linear(width, OUTPUTS)
    data = torch.randn(steps, lanes, width), torch.randn(steps, lanes, OUTPUTS)
    state = (torch.zeros(lanes, width), torch.zeros(lanes, width))
    peaks = {}
    for strategy in ("retain", "uniform:8"):
        with peak_memory(rss=False) as memory:
            by_window(module, [], data, state, strategy=strategy, executor="checkpoint")
        peaks[strategy] = memory.peak_bytes
    gates = steps * lanes * 4 * width * 4
    assert peaks["retain"] - peaks["uniform:8"] > 0.5 * gates


def products(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    square = m.wh.weight
    lifted = torch.matmul(x, m.wx.weight.t()) + torch.mm(x, m.wx.weight.T)
    mixed = h @ square + h.matmul(square) + h.mm(square.t()) + torch.addmm(m.wx.bias, h, square)
    added = torch.addmm(m.wx.bias, h, square.t()) + torch.addmm(lifted, h, square, beta=0.5)
    h = torch.tanh(lifted + 0.3 * mixed + 0.2 * added + torch.mm(h, mat2=square))
    return torch.matmul(h[:, None], m.wy.weight.t())[:, 0], h


class OfOperations(nn.Module):
    """Embeddings of data and of states, a bilinear map, and convolutions in a step."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=2)
        self.bilinear = nn.Bilinear(WIDTH, INPUTS, WIDTH)
        self.along = nn.Conv1d(1, 2, 3, padding=1, bias=False)
        self.plane = nn.Conv2d(2, 1, (1, 3), stride=(1, 1), padding=(0, 1))
        self.readout = nn.Linear(WIDTH, WORDS if tie else OUTPUTS)
        if tie:
            self.readout.weight = self.words.weight

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (h.detach().abs().sum(1) * 2).long() % WORDS
        rows = self.plane(self.along(h[:, None])[:, :, None])[:, 0, 0]
        h = torch.tanh(self.words(chosen) + rows + self.bilinear(h, x))
        return self.readout(h)[:, :OUTPUTS], h


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.usefixtures("device")
def test_products_with_a_weight(strategy: str, executor: str) -> None:
    check(make_linears(products), strategy=strategy, executor=executor)


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_bilinear_maps_and_convolutions(tie: bool, strategy: str, executor: str) -> None:
    torch.manual_seed(0)
    module = placed(OfOperations(tie).double())
    check(module, strategy=strategy, executor=executor)
    found = batched(module, make_data(), make_state(module), strategy="retain")
    assert {"embedding", "bilinear", "conv1d", "conv2d", "linear"} <= found


def test_embeddings_of_the_inputs_are_made_for_all_steps_at_once() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.cell = nn.Embedding(WORDS, INPUTS), nn.GRUCell(INPUTS, WIDTH)

        def forward(self, token: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.cell(self.words(token), h)
            return h, h

    torch.manual_seed(0)
    module = placed(Words().double())
    tokens = placed(torch.randint(WORDS, (STEPS, LANES)))
    targets = placed(torch.randn(STEPS, LANES, WIDTH, dtype=torch.float64))
    parameters, state = list(module.parameters()), make_state(module)
    expected = by_hand(module, parameters, (tokens, targets), state)[1]
    found = by_window(module, parameters, (tokens, targets), state, strategy="uniform:3")[1]
    assert relative_error(found, expected) <= 1e-12
    found = batched(module, (tokens, targets), state)
    assert found == {"embedding of inputs", "GRUCell of inputs"}


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.usefixtures("device")
def test_gradients_add_up_in_grad() -> None:
    module = make_cell("gru", before="tanh")
    parameters, data, state = list(module.parameters()), make_data(), make_state(module)
    once = by_window(module, parameters, data, state, strategy="uniform:3")[1]
    for _ in range(2):
        run_window(module, F.mse_loss, *data, state, time_batching=True, strategy="uniform:2")
    for parameter, grad in zip(parameters, once, strict=False):
        if grad is not None:
            assert relative_error([parameter.grad], [3 * grad]) <= 1e-12


@pytest.mark.usefixtures("_where_gradients_go")
@pytest.mark.usefixtures("device")
def test_a_gradient_taken_within_a_step_leaves_grad_alone() -> None:
    """Of a weight, too, whose `.grad` exists by then."""

    def step(m: OfLinears, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.wx(x) + m.wh(h))
        if torch.is_grad_enabled():
            before = m.wh.weight.grad
            before = None if before is None else before.clone()
            size = m.wh(h).square().sum()
            (inner,) = torch.autograd.grad(size, m.wh.weight, retain_graph=True)
            assert float(inner.abs().sum()) > 0
            assert before is None or torch.equal(before, m.wh.weight.grad)
        return m.wy(h), h

    check(make_linears(step), strategy="uniform:3")


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_that_begins_by_itself_is_batched_from_its_first_step(kind: Any) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(3, 3, dtype=torch.float64)

        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            state = self.cell(x, state)
            return state[0] if isinstance(state, tuple) else state, state

    module, inputs = Step(), torch.randn(6, 2, 3, dtype=torch.float64)
    grads = []
    for batching in (True, False):
        module.zero_grad()
        tbptt = TBPTT(
            module, nn.functional.mse_loss, 6, 6, strategy="uniform:3", time_batching=batching
        )
        tbptt.train(TensorSequence(inputs, torch.zeros_like(inputs)))
        grads.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        if batching:
            assert not [done for done in tbptt.batched_operations if done.reason]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
