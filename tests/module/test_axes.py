"""Time, lanes and owners: what trains on other axes than was meant is refused, or right."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import relative_error
from layers_inside import B, F, H, T, data, inside, plain_gradient
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.swa_utils import AveragedModel

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    BurnIn,
    TensorSequence,
    Trainer,
    evaluate,
    run_window,
    unroll,
    verify,
)
from tbptt_ckpt.module.first_call import call_first
from tbptt_ckpt.module.recurrence import recognise

LAYERS = [nn.LSTM, nn.GRU, nn.RNN]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda module: module,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "averaged": AveragedModel,
    "parallel": nn.DataParallel,
    "compiled average": lambda module: torch.compile(AveragedModel(module), backend="eager"),
}


# Whether a module takes steps or segments.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("given", ["module", "method", "partial", "lambda", "sequential"])
def test_a_module_with_a_layer_inside_must_say_per_step(kind: Any, given: str) -> None:
    module, (x, y) = inside(kind), data()
    makes: dict[str, Any] = {
        "module": module,
        "method": module.forward,
        "partial": functools.partial(module),
        "lambda": lambda inputs, state: module(inputs, state),
        "sequential": nn.ModuleDict({"deep": nn.Sequential(kind(F, H))}),
    }
    if given == "sequential":
        module.deep = makes["sequential"]
        makes["sequential"] = module
    for entry in (
        lambda m: TBPTT(m, mse_loss, 3, 6),
        lambda m: run_window(m, mse_loss, x, y),
        lambda m: unroll(m, x),
        lambda m: evaluate(m, mse_loss, TensorSequence(x, y)),
        lambda m: verify(m, mse_loss, x, y),
    ):
        wanted = rf"^module=\S+ contains an nn\.{kind.__name__}.*per_step=False.*per_step=True"
        with pytest.raises(ArgumentError, match=wanted):
            entry(makes[given])
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_said_of_a_module_with_a_layer_is_done(kind: Any) -> None:
    """As a segment, and as a step that gives the layer a time dimension."""
    x, y = data()
    for call, per_step in (("segment", False), ("front", True)):
        module = inside(kind, call)
        segment = inside(kind)
        wanted = plain_gradient(segment, segment.layer, x, y)
        for strategy in ("retain", "uniform:5"):
            module.zero_grad()
            run_window(module, mse_loss, x, y, per_step=per_step, strategy=strategy)
            assert relative_error([p.grad for p in module.parameters()], wanted) < 1e-12


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("strategy", ["retain", "auto", "uniform:4"])
@pytest.mark.parametrize("call", ["step", "middle"])
def test_a_step_whose_layer_reads_lanes_as_time_is_found(
    call: str, strategy: str, kind: Any
) -> None:
    module, (x, y) = inside(kind, call), data()
    tbptt = TBPTT(module, mse_loss, 4, 8, per_step=True, strategy=strategy)
    with pytest.raises(
        ArgumentError, match=r"its nn\.\w+ \(layer\).*reads them as 3 steps.*unsqueeze"
    ):
        tbptt.train(TensorSequence(x, y))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(("lanes", "steps"), [(3, 12), (1, 12), (4, 12), (12, 12)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("strategy", ["retain", "uniform:4", "sqrt"])
def test_a_segment_whose_layer_reads_lanes_as_time_is_found(
    strategy: str, batch_first: bool, lanes: int, steps: int
) -> None:
    """Also where a first segment has as many lanes as steps, as long as another one has not."""
    module, (x, y) = inside(batch_first=batch_first), data(lanes, steps, int(not batch_first))
    sequence = TensorSequence(x, y, time_dim=int(not batch_first))
    tbptt = TBPTT(
        module, mse_loss, 7, 7, per_step=False, time_dim=int(not batch_first), strategy=strategy
    )
    with pytest.raises(
        ArgumentError, match=f"batch_first={batch_first}.*say time_dim={int(batch_first)}"
    ):
        tbptt.train(sequence)


def test_calls_that_cannot_tell_are_not_watched_after_the_first() -> None:
    """What is hung on layers to watch them costs time in every call of as many steps as lanes."""
    module, (x, y), watched = inside(batch_first=False), data(lanes=4), list[int]()
    layer = next(each for each in module.modules() if isinstance(each, nn.LSTM))
    module.register_forward_pre_hook(lambda *_: watched.append(len(layer._forward_pre_hooks)))
    TBPTT(module, mse_loss, 4, 4, per_step=False, strategy="retain").train(TensorSequence(x, y))
    assert watched[0] == 1
    assert len(watched) > 1
    assert not any(watched[1:])


def test_a_layer_that_reads_within_a_step_is_left_alone() -> None:
    """Lanes times words of characters, and an encoder that reads them both ways."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.characters = nn.LSTM(2, H, batch_first=True, bidirectional=True)
            self.cell = nn.GRUCell(2 * H, H)

        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
            read, _ = self.characters(x)
            state = self.cell(read[:, -1], state)
            return state, state

    torch.manual_seed(0)
    module = Words().double()
    x, y = torch.randn(T, B, 6, 2).double(), torch.randn(T, B, H).double()
    assert verify(module, mse_loss, x, y, per_step=True, strategy="uniform:5").ok


# What a module is, through wrappers.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_layer_is_the_layer(wrapper: str, kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(F, H, batch_first=True).double()
    x, y = data()
    torch.manual_seed(0)
    time_first = kind(F, H).double()
    wanted = plain_gradient(time_first, time_first, x, y)
    module = WRAPPERS[wrapper](layer)
    sequence = TensorSequence(x.transpose(0, 1), y.transpose(0, 1))
    result = TBPTT(module, mse_loss, T, None, strategy="uniform:5").train(sequence)
    assert result.num_steps == T
    found = [p.grad for p in module.parameters() if p.dim()]
    assert relative_error(found, wanted) < 1e-12
    with pytest.raises(ArgumentError, match="per_step=True does not fit"):
        TBPTT(module, mse_loss, 3, 3, per_step=True)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_cell_is_the_cell(wrapper: str, kind: Any) -> None:
    torch.manual_seed(0)
    cell = kind(F, H).double()
    x, y = data()
    state, losses = None, []
    for step, target in zip(x, y, strict=True):
        state = cell(step, state)
        losses.append(mse_loss(state[0] if kind is nn.LSTMCell else state, target))
    torch.stack(losses).mean().backward()
    wanted = [p.grad for p in cell.parameters()]
    cell.zero_grad()
    module = WRAPPERS[wrapper](cell)
    run_window(module, mse_loss, x, y, strategy="uniform:5")
    assert relative_error([p.grad for p in module.parameters()], wanted) < 1e-12
    with pytest.raises(ArgumentError, match="per_step=False does not fit"):
        TBPTT(module, mse_loss, 3, 3, per_step=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_compiled_ones_are_what_they_were() -> None:
    for kind in LAYERS:
        scripted = recognise(torch.jit.script(kind(F, H, batch_first=True)), None)
        assert (scripted.per_step, scripted.time_dim, scripted.lane_dim) == (False, 1, 1)
    for kind in CELLS:
        scripted = recognise(torch.jit.script(kind(F, H)), None)
        output, state = scripted.call(torch.zeros(B, F), None)
        assert output is (state[0] if kind is nn.LSTMCell else state)
    layer = nn.LSTM(F, H)
    compiled = torch.compile(lambda inputs, state: layer(inputs, state), backend="eager")
    with pytest.raises(ArgumentError, match="per_step must be said"):
        recognise(compiled, None)


def test_a_module_compiled_in_place_is_not_compiled_again() -> None:
    """A hook on what is inside would have it compiled again in its first call."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(F, H).double()

        def forward(self, x: Tensor, state: Any) -> Any:
            state = self.cell(x, state)
            return state[0], state

    (x, _), module = data(), Own()
    module.compile(backend=backend)
    with torch.no_grad():
        _, state = module(x[0], None)
        module(x[1], state)
        known = len(graphs)
        call_first(recognise(module, None), x[1], state)
    assert len(graphs) == known > 0


def test_a_cells_state_is_not_taken_for_an_output_and_a_state() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(F, H).double()

        def forward(self, x: Tensor, state: Any) -> Any:
            return self.cell(x, state)

    x, y = data()
    for init_state in (None, (torch.zeros(B, H).double(), torch.zeros(B, H).double())):
        with pytest.raises(ArgumentError, match=r"returns \(h, c\).*return \(h, \(h, c\)\)"):
            TBPTT(Own(), mse_loss, 3, 6).train(TensorSequence(x, y), init_state)


@pytest.mark.parametrize("kind", CELLS)
def test_a_subclass_of_a_cell_may_return_an_output_too(kind: Any) -> None:
    class Own(kind):  # type: ignore[misc]
        def forward(self, x: Tensor, state: Any = None) -> Any:
            state = super().forward(x, state)
            return 2 * (state[0] if isinstance(state, tuple) else state), state

    torch.manual_seed(0)
    x, y = data()
    own = Own(F, H).double()
    assert verify(own, mse_loss, x, y, strategy="uniform:5").ok
    state, outputs = None, []
    for step in x:
        output, state = own(step, state)
        outputs.append(output)
    found, _ = unroll(own, x)
    assert torch.equal(found, torch.stack(outputs))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_reads_the_future_is_refused_inside_too(kind: Any) -> None:
    for module in (inside(kind, bidirectional=True), kind(F, H, bidirectional=True)):
        with pytest.raises(ArgumentError, match=r"bidirectional=True\).*reads the future"):
            TBPTT(module, mse_loss, 3, 6, per_step=False)


# Where time is.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("wrap", ["sequence", "burn-in", "trainer", "cut", "evaluate"])
def test_a_sequence_that_does_not_say_follows_batch_first(wrap: str, kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(F, H, batch_first=True).double()
    x, y = data(time_dim=1)
    tbptt = TBPTT(module, mse_loss, 4, 8, strategy="uniform:3")
    said, unsaid = TensorSequence(x, y, time_dim=1), TensorSequence(x, y)
    if wrap == "evaluate":
        results = [evaluate(module, mse_loss, each) for each in (said, unsaid)]
        assert results[0].loss == results[1].loss
        assert results[1].num_steps == T
        return
    sources: list[Any] = [said, unsaid]
    if wrap == "burn-in":
        sources = [BurnIn(each, 2) for each in sources]
    losses = []
    for source in sources:
        if wrap in ("trainer", "cut"):
            windows = list(Trainer(tbptt, source, max_steps=7 if wrap == "cut" else None).windows())
        else:
            windows = list(tbptt.windows(source))
        assert windows[-1].stop == (7 if wrap == "cut" else T)
        losses.append([float(window.loss) for window in windows])
    assert losses[0] == losses[1]


def test_data_with_time_first_for_a_batch_first_layer_says_so() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(F, H, batch_first=True).double()
    x, y = data()
    wanted = evaluate(module, mse_loss, TensorSequence(x.transpose(0, 1), y.transpose(0, 1)))
    found = evaluate(module, mse_loss, TensorSequence(x, y, time_dim=0))
    assert found.loss == pytest.approx(wanted.loss, rel=1e-12)
    assert verify(module, mse_loss, x, y, time_dim=0).ok


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_unbatched_sequence_has_time_first(batch_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(F, H, batch_first=batch_first).double()
    x, y = (each[:, 0] for each in data())
    wanted = plain_gradient(module, module, x, y)
    run_window(module, mse_loss, x, y, strategy="uniform:5")
    assert relative_error([p.grad for p in module.parameters()], wanted) < 1e-12
    assert TBPTT(module, mse_loss, 3, 6).train(TensorSequence(x, y)).num_steps == T


class Unsaid:
    """A source that does not say where time is."""

    def __init__(self, x: Tensor, y: Tensor, dim: int, sized: bool = True) -> None:
        self.x, self.y, self.dim = x, y, dim
        if sized:
            self.read_length = x.shape[dim]

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        stop = min(stop, self.x.shape[self.dim])
        return tuple(t.narrow(self.dim, start, max(0, stop - start)) for t in (self.x, self.y))  # type: ignore[return-value]


@pytest.mark.parametrize("lanes", [2, 3, 4, 7])
def test_a_source_of_ones_own_follows_batch_first_or_is_asked(lanes: int) -> None:
    """Never read along another axis: its first read is right, or an error asks."""
    torch.manual_seed(0)
    module = nn.LSTM(F, H, batch_first=True).double()
    tbptt = TBPTT(module, mse_loss, 4, 8, strategy="uniform:3")
    x, y = data(lanes, T, time_dim=1)
    wanted = [float(w.loss) for w in tbptt.windows(TensorSequence(x, y, time_dim=1))]
    for dim in (0, 1):
        turned = (x, y) if dim == 1 else (x.transpose(0, 1), y.transpose(0, 1))
        windows = tbptt.windows(Unsaid(*turned, dim))
        if dim == 0 or lanes == 4:  # steps of a read
            with pytest.raises(ArgumentError, match="give the source an attribute time_dim"):
                next(windows)
        else:
            assert [float(w.loss) for w in windows] == wanted


@pytest.mark.parametrize(
    ("make", "time_dim", "message"),
    [
        (lambda: nn.LSTM(F, H), 1, "time_dim=1 contradicts module=LSTM with batch_first=False"),
        (lambda: nn.GRU(F, H, batch_first=True), 0, "time_dim=0 contradicts .*batch_first=True"),
        (lambda: nn.GRUCell(F, H), 1, "takes one step, without time.*TensorSequence"),
    ],
)
def test_contradictions_name_both(make: Any, time_dim: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TBPTT(make(), mse_loss, 3, 6, time_dim=time_dim)
    x, y = data()
    with pytest.raises(ArgumentError, match=message):
        evaluate(make(), mse_loss, TensorSequence(x, y), time_dim=time_dim)


def test_time_of_an_own_module_is_not_taken_for_that_of_its_data() -> None:
    module, (x, y) = inside(batch_first=True), data(time_dim=1)
    tbptt = TBPTT(module, mse_loss, 4, 8, per_step=False, time_dim=1, strategy="retain")
    with pytest.raises(ArgumentError, match=r"does not say where it has it: .*time_dim=1\)"):
        tbptt.train(TensorSequence(x, y))
    said = [float(w.loss) for w in tbptt.windows(TensorSequence(x, y, time_dim=1))]
    turned = TensorSequence(x.transpose(0, 1), y.transpose(0, 1), time_dim=0)
    assert [float(w.loss) for w in tbptt.windows(turned)] == said


# Outputs and targets of the first call.


class Returns(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cell, self.change = nn.GRUCell(F, H).double(), change

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return self.change(state), state


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("strategy", ["auto", "retain", "step"])
@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        (lambda y: y[None], lambda y: y, "a dimension more"),
        (lambda y: y[None], lambda y: y[..., 0], "a dimension more"),
        (lambda y: y, lambda y: y[:, 0], "3 lanes on dimension 0"),
        (lambda y: y, lambda y: y[:, :1], "3 lanes on dimension 0"),
        (lambda y: y.mean(0, keepdim=True), lambda y: y[:, 0, None] + 0 * y, "3 lanes"),
    ],
)
def test_outputs_that_a_loss_would_broadcast_are_refused(
    change: Any, target: Any, message: str, strategy: str
) -> None:
    x, y = data()
    module = Returns(change)
    with pytest.raises(ArgumentError, match=message):
        TBPTT(module, mse_loss, 4, 8, strategy=strategy).train(TensorSequence(x, target(y)))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_segments_outputs_and_targets_agree_in_lanes() -> None:
    module, (x, y) = inside(), data()
    for target in (y[:, :1], y[:, 0, 0]):
        tbptt = TBPTT(module, mse_loss, H, H, per_step=False, strategy="retain")
        with pytest.raises(ArgumentError, match="3 lanes on dimension 1"):
            tbptt.train(TensorSequence(x, target))


@pytest.mark.parametrize(
    ("change", "target", "loss"),
    [
        (lambda y: y, lambda y: y[..., 0].abs().long().clamp(max=H - 1), cross_entropy),
        (lambda y: y[..., :1], lambda y: y[..., 0], lambda o, t: mse_loss(o.squeeze(-1), t)),
        (lambda y: y[:, None].expand(B, 2, H), lambda y: y, lambda o, t: mse_loss(o[:, 1], t)),
        (lambda y: y.mean(), lambda y: y.mean((1, 2)), mse_loss),
        (lambda y: y.mean(0), lambda y: y.mean(1), mse_loss),
        (lambda y: y, lambda y: y[:, :2], lambda o, t: mse_loss(o[:2], t)),
        (lambda y: (y, y), lambda y: y, lambda o, t: mse_loss(o[0], t)),
    ],
)
def test_outputs_of_other_shapes_that_a_loss_takes_are_left_alone(
    change: Any, target: Any, loss: Any
) -> None:
    x, y = data()
    assert verify(Returns(change), loss, x, target(y), strategy="uniform:5").ok


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "batch_first", "lanes", "strategy", "executor"),
    [
        *itertools.product(
            LAYERS,
            (False, True),
            (1, 2, 5),
            ("retain", "uniform:5", "auto"),
            ("replay", "checkpoint"),
        )
    ],
)
def test_every_way_to_give_a_layer_is_one_call_of_it(
    kind: Any, batch_first: bool, lanes: int, strategy: str, executor: str
) -> None:
    """Bare, wrapped, inside; time first or second, said or followed: one gradient."""
    x, y = data(lanes)
    torch.manual_seed(0)
    reference = kind(F, H).double()
    wanted = plain_gradient(reference, reference, x, y)
    for wrapper, time_dim in itertools.product(WRAPPERS.values(), (None, 0, 1)):
        torch.manual_seed(0)
        module = wrapper(kind(F, H, batch_first=batch_first).double())
        dim = int(batch_first) if time_dim is None else time_dim
        sequence = TensorSequence(x.transpose(0, dim), y.transpose(0, dim), time_dim=time_dim)
        TBPTT(module, mse_loss, T, None, strategy=strategy, executor=executor).train(sequence)
        found = [p.grad for p in module.parameters()]
        assert relative_error(found, wanted) < 1e-12


def test_outputs_of_unroll_have_no_targets() -> None:
    """It runs inputs in their place, which outputs need not resemble."""
    x, _ = data()
    module = Returns(lambda y: y[..., :1].mean(0, keepdim=True))
    assert unroll(module, x)[0].shape == (T, 1, 1)


# What cannot be seen.


def test_lanes_read_as_time_in_segments_of_as_many_steps_are_not_seen() -> None:
    module, (x, y) = inside(batch_first=True), data(lanes=4)
    tbptt = TBPTT(module, mse_loss, 4, 4, per_step=False, strategy="retain")
    assert tbptt.train(TensorSequence(x, y)).num_steps == T
    with pytest.raises(ArgumentError, match="reads them as 4 steps"):
        tbptt.train(TensorSequence(x[:5], y[:5]))  # its last segment has one step


def test_layers_of_a_compiled_module_are_not_looked_at() -> None:
    module, (x, y) = torch.compile(inside(batch_first=True), backend="eager"), data()
    with pytest.raises(ArgumentError, match="per_step must be said"):
        TBPTT(module, mse_loss, 3, 6)
    tbptt = TBPTT(module, mse_loss, 3, 6, per_step=False, strategy="uniform:6")
    assert tbptt.train(TensorSequence(x, y)).num_steps == T
