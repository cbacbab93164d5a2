"""Parts that a symbolic trace finds, against the module stepped in a plain loop."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from stepped_parts import LANES, STEPS, WIDTH, Step, agree, floats, lm, net, own, two, words
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tbptt_ckpt.module import recurrent_parts
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.traced_parts import find_parts, traced_parts
from tbptt_ckpt.module.trees import iterate_leaves, map_tensors


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def check(step: Step, state: Any, steps: Any = None) -> Any:
    """The parts of a step, after they have agreed with it, also for another number of lanes."""
    module, steps = net(step), floats(STEPS, LANES) if steps is None else steps
    found = find_parts(module, map_tensors(lambda t: t[0], steps), state)
    agree(module, found.parts, steps, state)
    steps, state = (
        map_tensors(lambda t, d=d: torch.cat([t, t.narrow(d, 0, 2)], d), tree)
        for d, tree in ((1, steps), (0, state))
    )
    agree(module, found.parts, steps, state)
    assert recurrent_parts(module, (map_tensors(lambda t: t[0], steps), state))
    return found


def residual(m: Any, x: Tensor, h: Tensor) -> Any:
    e = m.lin(x)
    h = m.gru(e, h)
    return m.out(h) + e, h


def old_state(m: Any, x: Tensor, h: Tensor) -> Any:
    return m.out(h) * x, torch.tanh(m.rec(h) + m.lin(x))


def stacked(m: Any, x: Tensor, state: Any) -> Any:
    first = m.cell(m.lin(x), state[0])
    second = m.cell2(m.norm(first[0]), state[1])
    return m.out(second[0]), [first, second]


def deep(m: Any, x: Tensor, h: Tensor) -> Any:
    for _ in range(3):
        h = torch.tanh(m.rec(F.relu(m.lin(x)) + m.norm(h)))
    return {"y": m.out(h), "h": (h, None)}, h


def whole_result(m: Any, x: Tensor, state: Any) -> Any:
    state = m.cell(m.lin(x), state)
    return m.out(state[0]), state


def with_sizes(m: Any, x: Tensor, h: Tensor) -> Any:
    lanes, width = x.shape
    if lanes != h.shape[0] or x.dim() != 2:
        raise ValueError
    h = torch.tanh(m.rec(h) + m.lin(x).view(lanes, -1) + torch.zeros(width, dtype=torch.float64))
    return m.out(h).sum(-1, keepdim=True) * m.scale, h


def test_the_language_model_is_a_fused_cell() -> None:
    found = check(lm, two(), words())
    assert (found.encode, found.transition) == (("emb", "mul"), ("cell",))
    assert found.readout == ("norm", "tanh", "out")
    cell = found.parts.cell
    h, c = two()
    assert cell.split((h, c)) == (h, c)
    assert cell.join(h, c) == (h, c)


def test_a_cell_with_a_state_in_another_nesting() -> None:
    def step(m: Any, x: Tensor, state: Any) -> Any:
        h, c = m.cell(m.lin(x), (state["h"], state["c"]))
        return m.out(h) + m.norm(x), {"c": c, "h": h}

    h, c = two()
    found = check(step, {"c": c, "h": h})
    assert found.parts.cell.split({"c": c, "h": h}) == (h, c)
    assert found.parts.cell.join(h, c) == {"c": c, "h": h}
    encoded = found.parts.encode(x := floats(LANES))
    module = found.parts.encode.step.step
    assert torch.equal(encoded[0], module.lin(x))  # of more than one the cell's input is first


@pytest.mark.parametrize("step", [lm, whole_result])
def test_bare_cells_are_found(step: Step) -> None:
    assert check(step, two(), words() if step is lm else None).parts.cell is not None


def swapped(m: Any, x: Tensor, state: Any) -> Any:
    h, c = m.cell(m.lin(x), state)
    return m.out(h), (c, h)


def reads_memory(m: Any, x: Tensor, state: Any) -> Any:
    h, c = m.cell(m.lin(x), state)
    return m.out(h) + c, (h, c)


def cell_of_state(m: Any, x: Tensor, state: Any) -> Any:
    h, c = m.cell(m.lin(x) + state[0], state)
    return m.out(h), (h, c)


@pytest.mark.parametrize("step", [swapped, reads_memory, cell_of_state])
def test_a_cell_with_more_to_it_is_not_bare(step: Step) -> None:
    assert check(step, two()).parts.cell is None


@pytest.mark.parametrize("step", [residual, old_state, deep, with_sizes])
def test_steps_with_one_state(step: Step) -> None:
    assert check(step, floats(LANES)).readout


def test_a_dtype_of_the_state_keeps_an_input_in_the_transition() -> None:
    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        e = m.lin(x).to(h.dtype)
        h = torch.tanh(m.rec(h) + F.relu(e))
        return m.out(h) + x.to(h.dtype), h

    found = check(step, floats(LANES))
    assert found.encode == ("lin",)
    assert found.readout == ("out", "to", "add")


def test_own_cells_and_stacks() -> None:
    assert check(own, floats(LANES), words()).encode == ("emb", "lin", "chunk")
    found = check(stacked, [two(), two()])
    assert found.transition == ("cell", "norm", "cell2")


class Pair(NamedTuple):
    h: Tensor
    c: Any


@dataclasses.dataclass(frozen=True)
class Held:
    h: Tensor
    c: Any


@pytest.mark.parametrize(
    "nest", [Pair, Held, lambda h, c: [h, {"c": c}], lambda h, c: {"a": (h,), "b": [c, None]}]
)
def test_states_of_every_nesting(nest: Any) -> None:
    def step(m: Any, x: Any, state: Any) -> Any:
        h, c = tensors_of_any(state)
        h = torch.tanh(m.rec(h) + m.lin(x["a"][0]))
        return (m.out(h), {"c": m.norm(c)}), nest(h, c * 0.5 + h)

    found = check(step, nest(*two()), {"a": [floats(STEPS, LANES)], "b": None})
    _, state = found.parts.transition(found.parts.encode({"a": [floats(LANES)]}), nest(*two()))
    assert type(state) is type(nest(*two()))


def tensors_of_any(tree: Any) -> list[Any]:
    return [each for each in iterate_leaves(tree) if each is not None]


MIXING = {
    "mean": lambda m, v: v - v.mean(0),
    "whole mean": lambda m, v: v - v.mean(),
    "softmax": lambda m, v: v.softmax(0),
    "cumsum": lambda m, v: v.cumsum(0),
    "item": lambda m, v: v + v[0],
    "flip": lambda m, v: v.flip(0),
    "product": lambda m, v: (v @ v.T) @ v,
    "outer": lambda m, v: v * torch.outer(v[:, 0], v[:, 0]).sum(0)[:, None],
    "view": lambda m, v: v.view(v.shape[0], -1),
    "transposed": lambda m, v: v.t().cumsum(-1).t(),
    "size": lambda m, v: v * v.shape[0],
    "batch": lambda m, v: F.batch_norm(v, None, None, training=True),
    "sorted": lambda m, v: v.sort(0).values,
    "rolled": lambda m, v: v.roll(1, 0),
    "shifted": lambda m, v: F.pad(v, (0, 0, 1, 0))[:-1],
    "norm": lambda m, v: v / v.norm(),
    "max": lambda m, v: v / v.abs().max(),
    "einsum": lambda m, v: torch.einsum("bi,ci->bi", v, v),
    "every row": lambda m, v: F.layer_norm(v, v.shape),
    "joined": lambda m, v: torch.cat([v[1:], v[:1]]),
}
LANE_WISE = {
    "relu": lambda m, v: F.relu(m.lin(v)),
    "scaled": lambda m, v: v * m.factor + m.scale,
    "softmax": lambda m, v: v.softmax(-1),
    "mean": lambda m, v: v - v.mean(-1, keepdim=True),
    "norm": lambda m, v: m.norm(v),
    "halves": lambda m, v: torch.cat([*v.chunk(2, -1)][::-1], -1) + v.flip(-1),
    "items": lambda m, v: torch.stack([v[..., 0], v[:, 1], v[:, 2], v[:, 3]], 1),
    "product": lambda m, v: v @ m.w,
    "square": lambda m, v: (m.square(v).unflatten(1, (WIDTH, -1)) @ v.unsqueeze(-1)).squeeze(-1),
    "table": lambda m, v: v * m.table,
    "where": lambda m, v: torch.where(v > 0, v, 0.1 * v.exp()),
    "max": lambda m, v: v.max(1, keepdim=True).values + v,
    "normal": lambda m, v: F.normalize(v) + v.cumsum(1).clamp(-1, 1),
    "cast": lambda m, v: v.to(m.w.dtype) - v.detach(),
    "cancelled": lambda m, v: (m.lin(v) + m.w[0, 0]).softmax(-1),
    "like the state": lambda m, v: v.to(v.dtype) * m.scale.to(v.device),
    "weights": lambda m, v: F.linear(v, m.w.exp().softmax(0)),
}


def some(table: dict[str, Any], *names: str) -> list[Any]:
    """Names of a table, of which a few run always."""
    rest = [pytest.param(n, marks=pytest.mark.exhaustive) for n in table if n not in names]
    return [*names, *rest]


@pytest.mark.parametrize(
    "name", some(MIXING, "mean", "softmax", "item", "flip", "product", "view", "size")
)
def test_what_mixes_lanes_stays_in_the_transition(name: str) -> None:
    def before(m: Any, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(m.rec(h) + m.lin(MIXING[name](m, torch.tanh(x))))
        return m.out(h), h

    def after(m: Any, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(m.rec(h) + m.lin(x))
        return m.out(MIXING[name](m, h)), h

    assert set(check(before, floats(LANES)).encode) <= {"tanh", "getitem", "abs"}
    assert check(after, floats(LANES)).readout[-1] == "out"


@pytest.mark.parametrize("name", some(LANE_WISE, "relu", "scaled", "items", "weights", "cancelled"))
def test_what_is_lane_wise_is_folded(name: str) -> None:
    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(m.rec(h) + LANE_WISE[name](m, x))
        return LANE_WISE[name](m, h) + h, h

    found = check(step, floats(LANES))
    assert set(found.transition) <= {"rec", "add", "tanh", "mul", "exp", "softmax"}
    assert len(found.transition) == 3 or name == "weights"


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Silent(Reversed):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


SEEN: list[Any] = []
CALLS = 0
GENERATOR = torch.Generator()


def counts(m: Any, v: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return v


def stores(m: Any, v: Tensor, at: str) -> Tensor:
    setattr(m, at, v)
    return v


def mode(context: Any) -> Callable[[Any, Tensor], Tensor]:
    def step(m: Any, v: Tensor) -> Tensor:
        with context():
            return v * 2

    return step


def hooked(m: Any, v: Tensor) -> Tensor:
    v.register_hook(lambda grad: grad * 2)
    return v


def branches(m: Any, v: Tensor) -> Tensor:
    return v if v.sum() > 0 else 2 * v


def adds(m: Any, v: Tensor) -> Tensor:
    v = v * 2
    v += 1
    return v


REFUSED = {
    "no_grad": (mode(torch.no_grad), "grad mode"),
    "enable_grad": (mode(torch.enable_grad), "grad mode"),
    "set_grad_enabled": (mode(lambda: torch.set_grad_enabled(True)), "grad mode"),
    "inference_mode": (mode(torch.inference_mode), "inference mode"),
    "autocast": (mode(lambda: torch.autocast("cpu", dtype=torch.bfloat16)), "autocast"),
    "autocast off": (mode(lambda: torch.autocast("cpu", enabled=False)), "autocast"),
    "function": (lambda m, v: Reversed.apply(v), "autograd.Function"),
    "silent function": (lambda m, v: Silent.apply(v), "autograd.Function"),
    "dropout": (lambda m, v: m.drop(v), "random"),
    "functional dropout": (lambda m, v: F.dropout(v, 0.1), "random"),
    "rand_like": (lambda m, v: v + torch.rand_like(v), "random"),
    "bernoulli": (lambda m, v: v * torch.bernoulli(v.sigmoid()), "random"),
    "asked": (lambda m, v: v if torch.is_grad_enabled() else -v, "asks for a grad mode"),
    "data": (lambda m, v: (setattr(v, "data", v.data * 2), v)[1], "__set__"),
    "generator": (lambda m, v: v * torch.rand((), generator=GENERATOR), "random"),
    "python's random": (lambda m, v: v * random.random(), "random"),
    "batch norm": (lambda m, v: m.bn(v), "in place"),
    "buffer in place": (lambda m, v: v * m.scale.add_(1), "in place"),
    "buffer replaced": (lambda m, v: stores(m, v.detach()[0], "scale"), "_buffers.scale|changes"),
    "attribute": (lambda m, v: stores(m, v, "table"), "changes"),
    "list": (lambda m, v: (m.notes.append(v), v)[1], "notes"),
    "array": (lambda m, v: (m.tally.__iadd__(1), v)[1], "tally"),
    "global list": (lambda m, v: (SEEN.append(v), v)[1], "SEEN"),
    "global number": (counts, "CALLS"),
    "in place": (lambda m, v: torch.tanh(v).mul_(2), "in place"),
    "in place on the argument": (lambda m, v: v.mul_(2), "in place"),
    "augmented": (adds, "in place"),
    "index put": (lambda m, v: v.clone().index_fill_(0, torch.tensor([0]), 1.0), "in place"),
    "inplace": (lambda m, v: F.relu(v * 2, inplace=True), "in place"),
    "control flow": (branches, "test_traced_parts.py"),
    "number": (lambda m, v: v * float(v.detach().sum()), "test_traced_parts.py"),
    "hook": (hooked, "register_hook"),
    "checkpoint": (
        lambda m, v: checkpoint(torch.tanh, v, use_reentrant=False),
        "hooks on saved tensors",
    ),
    "fixed lanes": (lambda m, v: v.view(LANES, 2, -1).flatten(1), "another number of lanes"),
    "printed": (lambda m, v: (f"{v}", v)[1], "makes a text"),
    "tensors of its own": (lambda m, v: v * m.table.exp(), "does not follow"),
    "nothing": (lambda m, v: v[10], "fails on the example"),
}


WHERE = ["output", *(pytest.param(p, marks=pytest.mark.exhaustive) for p in ("input", "state"))]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_trace_would_lose_is_refused(name: str, where: str) -> None:
    act, reason = REFUSED[name]

    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        x = act(m, x) if where == "input" else x
        h = act(m, h) if where == "state" else h
        h = torch.tanh(m.rec(h) + m.lin(x))
        return (m.out(act(m, h)) if where == "output" else m.out(h)), h

    if (name, where) in {("silent function", "input")}:
        pytest.skip("a function of what has no gradient changes none")
    module, x, h = net(step), floats(LANES), floats(LANES)
    before = {**vars(module)}
    given, weights = (x.clone(), h.clone()), copy.deepcopy(module.state_dict())
    drawn, globals_before = torch.get_rng_state(), (list(SEEN), CALLS, random.getstate())
    found = recurrent_parts(module, (x, h))
    assert not found
    assert re.search(reason, found.reason), found.reason
    with pytest.raises(NoPartsError):
        traced_parts(module, x, h)
    assert vars(module) == before
    assert module.notes == []
    assert not module.tally.any()
    assert (SEEN, CALLS, random.getstate()) == globals_before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(x, given[0])
    assert torch.equal(h, given[1])
    for key, value in module.state_dict().items():
        assert torch.equal(value, weights[key])


def closure_with_count() -> Step:
    count = 0

    def step(m: Any, x: Tensor, h: Tensor) -> Any:
        nonlocal count
        count += 1
        h = torch.tanh(m.rec(h) + m.lin(x))
        return m.out(h), h

    return step


def test_a_variable_of_a_closure_that_changes_is_named() -> None:
    found = recurrent_parts(net(closure_with_count()), (floats(LANES), floats(LANES)))
    assert found.reason == "a step changes count"


PIECES: list[Callable[[Any, Tensor], Tensor]] = [
    *MIXING.values(),
    *LANE_WISE.values(),
    *(lambda m, v, layer=layer: getattr(m, layer)(v) for layer in ("lin", "out", "norm")),
]


def made_of_pieces(draw: random.Random) -> Step:
    """A step with values of input, state and each other combined at random."""
    plan = [
        (draw.choice(PIECES), draw.random(), draw.random(), draw.choice(("add", "mul", "cat")))
        for _ in range(draw.randint(3, 9))
    ]
    picks = [draw.random() for _ in range(3)]
    is_cell = draw.random() < 0.5

    def step(m: Any, x: Tensor, state: Any) -> Any:
        values = [x, *state]

        def pick(place: float) -> Tensor:
            return values[int(place * len(values))]

        for piece, first, second, how in plan:
            a, b = torch.tanh(piece(m, pick(first))), pick(second)
            if how == "cat":
                values.append(torch.cat([a[:, :1], b[:, 1:]], -1))
            else:
                values.append(torch.tanh(a + b) if how == "add" else a * b)
        if is_cell:
            h, c = m.cell(pick(picks[0]), state)
            values.append(m.norm(h))
        else:
            h, c = m.rec(pick(picks[0])).tanh() + state[1] * 0.1, pick(picks[1])
            values.append(h)
        return (pick(picks[2]) + m.out(values[-1]), pick(picks[1]) * values[-1]), (h, c)

    return step


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(300))
def test_steps_made_of_pieces(seed: int) -> None:
    module, steps, state = net(made_of_pieces(random.Random(seed))), floats(STEPS, LANES), two()
    found = find_parts(module, steps[0], state)
    agree(module, found.parts, steps, state)
    assert recurrent_parts(module, (steps[0], state))
