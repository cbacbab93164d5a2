"""A cell over all steps of a run equals a loop of torch's own, to rounding in float64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt import TbpttError
from tbptt_ckpt.time_batching.over_time import run_cell
from tbptt_ckpt.time_batching.policy import TimeBatching

STEPS, LANES, WIDTH_IN, WIDTH = 7, 2, 3, 5
KINDS = ("lstm", "gru", "tanh", "relu")


def make_cell(kind: str, bias: bool, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(1)
    made = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}.get(kind)
    if made is None:
        return nn.RNNCell(WIDTH_IN, WIDTH, bias=bias, nonlinearity=kind, dtype=dtype)
    return made(WIDTH_IN, WIDTH, bias=bias, dtype=dtype)


def given(kind: str, *, learns: bool = True) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(2)
    states = [torch.randn(LANES, WIDTH).double() for _ in range(1 + (kind == "lstm"))]
    x = torch.randn(STEPS, LANES, WIDTH_IN).double()
    return x.requires_grad_(learns), [state.requires_grad_(learns) for state in states]


def loop(cell: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    outputs = []
    for row in x.unbind():
        result = cell(row, tuple(states) if isinstance(cell, nn.LSTMCell) else states[0])
        states = list(result) if isinstance(result, tuple) else [result]
        outputs.append(states[0])
    return torch.stack(outputs), states


def over(cell: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    found = run_cell(cell, x, states)
    assert found is not None
    return found[0], list(found[1])


def gradients(run: Any, cell: Any, x: Tensor, states: list[Tensor], read: tuple[int, ...]) -> Any:
    """Of all that has one, from random gradients of those of outputs and last states that count."""
    outputs, last = run(cell, x, states)
    results = [outputs, *last]
    torch.manual_seed(3)
    seeds = [torch.randn_like(result) for result in results]
    roots = [i for i in read if i < len(results)]
    leaves = [leaf for leaf in (x, *states, *cell.parameters()) if leaf.requires_grad]
    found = torch.autograd.grad(
        [results[i] for i in roots],
        leaves,
        [seeds[i] for i in roots],
        allow_unused=True,
        materialize_grads=True,
    )
    return [*results, *found]


@pytest.mark.parametrize("most", [1 << 18, 100, 1])  # of a piece: all steps, a few, one
@pytest.mark.parametrize("read", [(0,), (1,), (-1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_states_and_every_gradient(
    kind: str, bias: bool, read: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tbptt_ckpt.time_batching.cells_over_time._PIECE_ELEMENTS", most)
    cell, (x, states) = make_cell(kind, bias), given(kind)
    expected = gradients(loop, cell, x, states, read)
    for mine, its in zip(gradients(over, cell, x, states, read), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_any_weights_may_be_frozen(kind: str) -> None:
    x, states = given(kind, learns=False)
    names = [name for name, _ in make_cell(kind, bias=True).named_parameters()]
    for learning in itertools.chain.from_iterable(
        itertools.combinations(names, number) for number in range(1, len(names) + 1)
    ):
        cell = make_cell(kind, bias=True)
        for name, weight in cell.named_parameters():
            weight.requires_grad_(name in learning)
        expected = gradients(loop, cell, x, states, (0, 1))
        for mine, its in zip(gradients(over, cell, x, states, (0, 1)), expected, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_to_those_that_are_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbptt_ckpt.time_batching.taps._SMALLEST_TOTAL", 1)  # in place, too
    (x, states), cell, own = given(kind), make_cell(kind, bias=True), make_cell(kind, bias=True)
    for run, each in ((loop, own), (over, cell)):
        for _ in range(3):
            run(each, x.detach(), [state.detach() for state in states])[0].square().sum().backward()
    for mine, its in zip(cell.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_is_kept_gives_the_same_twice(kind: str) -> None:
    (x, states), cell = given(kind), make_cell(kind, bias=True)
    outputs, _ = over(cell, x, states)
    leaves = [x, *states, *cell.parameters()]
    first = torch.autograd.grad(outputs.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(outputs.sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_were_written_to_and_second_derivatives_are_errors(kind: str) -> None:
    (x, states), cell = given(kind), make_cell(kind, bias=True)
    outputs, _ = over(cell, x, states)
    with pytest.raises(TbpttError, match="cannot be differentiated again"):
        torch.autograd.grad(outputs.sum(), x, create_graph=True)
    outputs, _ = over(cell, x, states)
    with torch.no_grad():
        cell.weight_hh.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


def test_what_it_cannot_take_is_left_to_the_cell() -> None:
    (x, (h,)), cell = given("gru"), make_cell("gru", bias=True)
    assert run_cell(cell, x.float(), [h]) is None
    assert run_cell(cell, x[0], [h]) is None
    assert run_cell(cell, x[..., :2], [h]) is None
    assert run_cell(cell, x, [h[:1]]) is None
    assert run_cell(cell, x[:0], [h]) is None
    with torch.autocast("cpu"):
        assert run_cell(cell, x, [h]) is None
    del cell.bias_hh
    cell.register_parameter("bias_hh", None)
    assert run_cell(cell, x, [h]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_without_states_it_begins_with_zeros(kind: str) -> None:
    (x, states), cell = given(kind), make_cell(kind, bias=True)
    zeros = run_cell(cell, x, [torch.zeros_like(state) for state in states])
    found = run_cell(cell, x, None)
    assert found is not None
    assert zeros is not None
    assert torch.equal(found[0], zeros[0])


@pytest.mark.parametrize("choice", [True, "auto", "fused", "mixed"])
def test_a_kernel_runs_where_its_form_says(choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, states), cell = given("lstm"), make_cell("lstm", bias=True)
    kernels, real = [], torch._VF.lstm
    monkeypatch.setattr(torch._VF, "lstm", lambda *given: kernels.append(1) or real(*given))
    for is_recorded in (True, False):
        with torch.set_grad_enabled(is_recorded):
            assert run_cell(cell, x, states, takes_kernel=TimeBatching(choice).takes_kernel)
        kernels.append(0)
    leaf, advance = {True: (0, 0), "mixed": (0, 1)}.get(choice, (1, 1))
    assert kernels == [*[1] * leaf, 0, *[1] * advance, 0]


def test_by_its_rule_auto_has_the_kernel_in_leaves_of_narrow_cells() -> None:
    narrow, wide = torch.empty(1024, 100), torch.empty(1024, 256)
    taken = [TimeBatching("auto").takes_kernel(weight, in_leaves=True) for weight in (narrow, wide)]
    assert taken == [True, False]
