"""What is said of a step's parts, when they are held against it, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepped_parts import (
    LANES,
    STEPS,
    WIDTH,
    WORDS,
    Net,
    agree,
    floats,
    lm,
    net,
    own,
    two,
    words,
)
from torch import Tensor, nn

from tbptt_ckpt.module import recurrent_parts
from tbptt_ckpt.module.attributes import plain_attributes
from tbptt_ckpt.module.held_parts import hold_against
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.traced_parts import find_parts, traced_parts


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def square_rows(m: Any, x: Tensor, h: Tensor) -> Any:
    h = torch.tanh(m.rec(h) + m.lin(x))
    return m.out(h), h


def kinds(make: Callable[[Net], object], reason: str, name: str) -> Any:
    return pytest.param(make, reason, id=name)


def parametrized(m: Net) -> None:
    nn.utils.parametrizations.weight_norm(m.lin)


class Marked(Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        kinds(lambda m: m.lin.register_forward_hook(lambda *_: None), "lin has hooks", "forward"),
        kinds(lambda m: m.register_forward_pre_hook(lambda *_: None), "Net has hooks", "before"),
        kinds(lambda m: m.register_full_backward_hook(lambda *_: None), "has hooks", "backward"),
        kinds(parametrized, "lin has parametrized weights", "parametrized"),
        kinds(lambda m: vars(m).update(_compiled_call_impl=print), "compiled", "compiled"),
        kinds(lambda m: setattr(m.lin, "forward", m.rec.forward), "in place of", "patched"),
        kinds(
            lambda m: m.register_buffer("b", torch.zeros(2).as_subclass(Marked)), "Marked", "kind"
        ),
        kinds(
            lambda m: m.register_buffer("b", torch.zeros(2, dtype=torch.cfloat)),
            "complex",
            "cfloat",
        ),
        kinds(lambda m: m.register_parameter("p", nn.UninitializedParameter()), "Uninit", "lazy"),
        kinds(lambda m: setattr(m, "lin", torch.jit.script(m.lin)), "scripted", "scripted"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_modules_that_a_trace_does_not_see_as_they_are(
    make: Callable[[Net], object], reason: str
) -> None:
    module = net(square_rows)
    make(module)
    assert reason in recurrent_parts(module, (floats(LANES), floats(LANES))).reason


def test_hooks_on_all_modules_and_functions_are_refused() -> None:
    example = (floats(LANES), floats(LANES))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hooks on all modules" in recurrent_parts(net(square_rows), example).reason
    finally:
        handle.remove()
    assert recurrent_parts(net(square_rows), example)
    found = recurrent_parts(lambda x, h: (x, h), example)
    assert "no nn.Module" in found.reason


@pytest.mark.parametrize(
    ("inputs", "state", "reason"),
    [
        (floats(LANES), floats(2, LANES), "lanes on dimension 0"),
        (floats(LANES), (floats(LANES), 3), "hold a int"),
        (floats(LANES).to(torch.cdouble), floats(LANES), "complex"),
        (floats(0), floats(0), "lanes on dimension 0"),
    ],
)
def test_examples_that_say_too_little(inputs: Any, state: Any, reason: str) -> None:
    assert reason in recurrent_parts(net(square_rows), (inputs, state)).reason


RETURNED = {
    "scalar output": (lambda m, h: (m.out(h).sum(), h), "not one row for each lane"),
    "another nesting": (lambda m, h: (m.out(h), (h, h)), "nested in another way"),
    "no pair": (lambda m, h: m.out(h), "does not return"),
    "three": (lambda m, h: (h, h, h), "does not return"),
    "a number": (lambda m, h: ((m.out(h), 3), h), "returns a int"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_must_be_of_lanes(name: str) -> None:
    act, reason = RETURNED[name]

    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        return act(m, torch.tanh(m.rec(h) + m.lin(x)))

    assert reason in recurrent_parts(net(step), (floats(LANES), floats(LANES))).reason


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell])
def test_a_cell_is_the_transition_itself(kind: Any) -> None:
    found = recurrent_parts(kind(WIDTH, WIDTH), (torch.ones(2, WIDTH), torch.ones(2, WIDTH)))
    name = kind.__name__
    assert str(found) == f"encode: nothing; transition: itself ({name}, fused); readout: nothing"


def test_nothing_worth_having_is_said() -> None:
    module = net(lambda m, x, h: (torch.tanh(m.rec(x + h)),) * 2)
    found = recurrent_parts(module, (floats(2), floats(2)))
    assert not found
    assert str(found) == "no parts: all of it is needed by the next state, or mixes lanes"


def test_what_was_found_is_readable() -> None:
    found = recurrent_parts(net(lm), (words()[0], two()))
    assert str(found) == (
        "encode: emb, mul; transition: cell (LSTMCell, fused); readout: norm, tanh, out"
    )


@pytest.mark.parametrize("kind", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_embeddings_that_count_or_write_are_not_folded(kind: str) -> None:
    module = net(own)
    module.emb = nn.Embedding(WORDS, WIDTH, **{kind: True}).double()
    if kind == "max_norm":
        assert "in place" in recurrent_parts(module, (words()[0], floats(LANES))).reason
    else:
        assert "emb" in find_parts(module, words()[0], floats(LANES)).transition


def test_dropout_that_does_not_drop_is_folded() -> None:
    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(m.rec(h) + m.drop(m.lin(x)))
        return m.bn(F.dropout(m.out(h), 0.3, m.training)), h

    module = net(step).eval()
    steps, state = floats(STEPS, LANES), floats(LANES)
    found = find_parts(module, steps[0], state)
    assert found.readout == ("out", "dropout", "bn")
    assert found.encode == ("lin", "drop")
    agree(module, found.parts, steps, state)
    before = plain_attributes(module)
    assert before == plain_attributes(module)
    module.drop.train()
    assert before != plain_attributes(module)


def test_plain_attributes_let_weights_and_buffers_be_others() -> None:
    module = net(square_rows)
    before = plain_attributes(module)
    module.load_state_dict(net(square_rows).state_dict(), assign=True)
    module.scale = torch.rand(WIDTH)
    assert before == plain_attributes(module)


@pytest.mark.parametrize("attribute", ["factor", "count", "table", "notes", "extra"])
def test_plain_attributes_tell_of_changes(attribute: str) -> None:
    module = net(square_rows)
    before = plain_attributes(module)
    assert before == plain_attributes(module)
    setattr(module, attribute, [1] if attribute == "notes" else torch.ones(WIDTH))
    assert before != plain_attributes(module)


def test_weights_and_attributes_are_those_of_the_module_at_each_call() -> None:
    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(m.rec(h) * m.table + m.lin(x) * m.scale)
        return m.out(h) @ m.w, h

    module, steps, state = net(step), floats(STEPS, LANES), floats(LANES)
    parts = traced_parts(module, steps[0], state)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    sum(p.sum() for p in module.parameters()).backward()
    optimizer.step()
    agree(module, parts, steps, state)
    other = net(step).state_dict()
    module.load_state_dict(other)
    agree(module, parts, steps, state)
    module.load_state_dict(net(step).state_dict(), assign=True)
    module.table = torch.rand(WIDTH)
    module.scale = torch.rand(WIDTH, dtype=torch.float64)
    agree(module, parts, steps, state)
    module.rec = nn.Linear(WIDTH, WIDTH, bias=False).double()
    agree(module, parts, steps, state)


def test_parts_found_in_float32_work_after_a_move_to_float64() -> None:
    module = Net(square_rows)
    parts = traced_parts(module, torch.randn(LANES, WIDTH), torch.randn(LANES, WIDTH))
    agree(module.double(), parts, floats(STEPS, LANES), floats(LANES))


def test_it_works_without_gradients_outside_and_leaves_everything_as_it_was() -> None:
    module, x, h = net(square_rows), floats(LANES), floats(LANES)
    module.lin.weight.grad = torch.ones(WIDTH, WIDTH, dtype=torch.float64)
    before, drawn = {**vars(module)}, torch.get_rng_state()
    with torch.no_grad():
        assert recurrent_parts(module, (x, h))
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert recurrent_parts(module, (x, h))
    assert vars(module) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (module.lin.weight.grad == 1).all()
    assert module.rec.weight.grad is None


def wrong(module: Net, part: str, change: Callable[..., Any]) -> Any:
    parts = traced_parts(module, floats(LANES), floats(LANES))
    original = getattr(parts, part)
    changed = dataclasses.replace(
        original, function=lambda *given: change(original.function(*given))
    )
    return dataclasses.replace(parts, **{part: changed})


@pytest.mark.parametrize(
    "kind", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("part", ["encode", "transition", "readout"])
@pytest.mark.parametrize(
    "change",
    [
        lambda values: tuple(v + 1e-2 for v in values),
        lambda values: tuple(v.detach() for v in values),
        lambda values: tuple(2 * v - v.detach() for v in values),
        lambda values: tuple(v + (v - v.mean(0)) * 1e-2 for v in values),
    ],
    ids=["values", "no gradient", "gradient", "mixed"],
)
def test_parts_that_are_not_the_module_are_found(part: str, change: Any, kind: Any) -> None:
    module = net(square_rows)
    parts = wrong(module, part, change)
    if kind is torch.float32:  # nothing is copied
        parts = dataclasses.replace(parts, readout=lambda *given, read=parts.readout: read(*given))
        module.float()
    with pytest.raises(NoPartsError, match="do not give the same"):
        hold_against(parts, module, floats(LANES).to(kind), floats(LANES).to(kind))
    good = traced_parts(module, floats(LANES).to(kind), floats(LANES).to(kind))
    hold_against(good, module, floats(LANES).to(kind), floats(LANES).to(kind))


def test_a_head_of_zeros_hides_nothing() -> None:
    module = net(square_rows)
    nn.init.zeros_(module.out.weight)
    parts = wrong(module, "transition", lambda values: (values[0] * 1.01, values[1]))
    with pytest.raises(NoPartsError, match="do not give the same"):
        hold_against(parts, module, floats(LANES), floats(LANES))
    assert not module.out.weight.any()


@pytest.mark.parametrize("example", [None, torch.zeros(2), (1, 2, 3)])
def test_an_example_that_is_no_pair_is_named(example: Any) -> None:
    with pytest.raises(ValueError, match=r"example=.* must be the \(inputs, state\)"):
        recurrent_parts(net(square_rows), example)


def test_what_is_not_finite_is_not_compared() -> None:
    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(m.rec(h) + m.lin(x))
        return m.out(h) / (x - x), h

    found = recurrent_parts(net(step), (floats(LANES), floats(LANES)))
    assert found.reason == "its outputs are not finite on the example"


def test_a_norm_in_float32_is_compared_with_its_rounding() -> None:
    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        e = m.lin(x)
        e = (e.float() * e.float().pow(2).mean(-1, keepdim=True).rsqrt()).type_as(e)
        h = torch.tanh(m.rec(h) + e)
        return m.out(h), h

    assert recurrent_parts(net(step), (floats(LANES), floats(LANES)))
    module = net(step).float()
    assert recurrent_parts(module, (floats(LANES).float(), floats(LANES).float()))
