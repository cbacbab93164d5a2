"""State is lifted out of modules that keep it on themselves, and nothing else is."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    STRATEGIES,
    WIDTH,
    WIDTH_IN,
    bitwise,
    check_window,
    gradients,
    mean_loss,
    random_data,
    relative_error,
)
from stateful_modules import KINDS, Attribute, Items, LazyBuffer, Logging, Stateful, stateful
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, Snapshots, TensorSequence, Trainer
from tbptt_ckpt.errors import ArgumentError, ReplayMismatchError
from tbptt_ckpt.module import lifted
from tbptt_ckpt.module.trees import tensors_of

STEPS, K1, K2 = 11, 3, 7
CHOICES = list(itertools.product(STRATEGIES, EXECUTORS, OVERLAPS))


def check(kind: type[Any], strategy: str, executor: str, overlap: str) -> None:
    inputs, targets = random_data(STEPS)
    plain, net = stateful(kind), stateful(kind)
    made = lifted(net, inputs[0])

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        plain.load(state)
        return plain(x), plain.store()

    problem = naive.Problem(
        step=step,
        loss_fn=mean_loss,
        inputs=inputs,
        targets=targets,
        init_state=None,
        parameters=list(plain.parameters()),
        module=plain if kind.__name__ == "Normalised" else None,
    )
    sgd = torch.optim.SGD(plain.parameters(), 0.1)
    torch.manual_seed(3)
    expected = list(naive.OVERLAPS[overlap](problem, K1, K2, optimizer=sgd))
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    tbptt = TBPTT(
        made,
        mean_loss,
        K1,
        K2,
        optimizer,
        per_step=True,
        strategy=strategy,
        executor=executor,
        overlap=overlap,
        time_batching=False,
    )
    where = kind.__name__, strategy, executor, overlap
    for window, result in zip(
        expected, tbptt.windows(TensorSequence(inputs, targets)), strict=True
    ):
        grads = gradients(list(net.parameters()))
        result = dataclasses.replace(result, state=tensors_of(result.state))
        check_window(where, result, grads, window, bitwise_state=False)
    for mine, its in zip(net.buffers(), plain.buffers(), strict=False):
        assert kind.__name__ != "Normalised" or torch.equal(mine, its)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_a_plain_loop(kind: type[Any]) -> None:
    check(kind, *CHOICES[5 * KINDS.index(kind) % len(CHOICES)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_a_plain_loop_under_every_choice(kind: type[Any]) -> None:
    for choice in CHOICES:
        check(kind, *choice)


class Counting(Attribute):
    """Clears its state after some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.steps % 20 == 0:
            self.h = None
        return super().forward(x)


class Detached(Attribute):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.h = self.h.detach()
        return y


class Masked(Attribute):
    """One mask for a whole sequence, drawn in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.rand(x.shape, dtype=x.dtype) > 0.5
        return super().forward(x * self.mask)


class Late(Attribute):
    """A state moves through many attributes, one a step, before it is read."""

    def forward(self, x: Tensor) -> Tensor:
        new = self.gru(x, self.delayed[-1])
        for n in range(7, 0, -1):
            setattr(self, f"h{n}", getattr(self, f"h{n - 1}"))
        self.h0 = new
        return new

    def load(self, state: Any) -> None:
        zero = torch.zeros(LANES, WIDTH, dtype=torch.float64)
        for n in range(8):
            setattr(self, f"h{n}", zero)

    @property
    def delayed(self) -> list[Tensor]:
        return [getattr(self, f"h{n}") for n in range(8)]


class Memory:
    def __init__(self) -> None:
        self.values: list[Tensor] = []


class Foreign(Attribute):
    """Keeps tensors in an object of a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.memory.values = [super().forward(x)]
        return self.memory.values[0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counting, "cell.steps (int) changes from step to step"),
        (Detached, "cell.h (Tensor) changes from step to step, and no gradient passes"),
        (Masked, "cell.mask (Tensor) changes"),
        (Foreign, "changes Foreign.memory in a step"),
        (Late, "changes Late in a step"),
    ],
)
def test_what_else_changes_is_refused_by_name(kind: type[Any], reason: str) -> None:
    net, x = stateful(kind), random_data(1)[0][0]
    before = dict(vars(net.cell))
    with pytest.raises(ArgumentError) as raised:
        lifted(net, x)
    assert reason in str(raised.value)
    assert vars(net.cell) == before


def test_what_is_to_be_left_is_left() -> None:
    net, x = stateful(Counting), random_data(1)[0][0]
    made = lifted(net, x, leave=["cell.steps"])
    assert net.cell.steps == 0
    made(x, None)
    assert net.cell.steps == 1
    made = lifted(stateful(Foreign), x, leave=["Foreign.memory"])
    assert made.names == ("cell.h",)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_is_left_and_matters_is_found_by_the_replay_check(executor: str) -> None:
    inputs, targets = random_data(30)
    net = stateful(Counting)
    made = lifted(net, inputs[0], leave=["cell.steps"])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    tbptt = TBPTT(made, mean_loss, 8, 24, optimizer, strategy="uniform:8", executor=executor)
    with pytest.raises(ReplayMismatchError):
        tbptt.train(TensorSequence(inputs, targets))


def test_a_module_without_a_state_or_with_other_inputs_is_refused() -> None:
    x = random_data(1)[0][0]
    with pytest.raises(ArgumentError, match="keeps no state from step to step"):
        lifted(nn.Linear(WIDTH_IN, WIDTH).double(), x)
    with pytest.raises(ArgumentError, match=r"inputs=.* must be what one call .* RuntimeError"):
        lifted(stateful(Attribute), x[:, :1])


def test_more_state_than_was_found_is_an_error() -> None:
    class Hiding(Attribute):
        def __init__(self) -> None:
            super().__init__()
            self.counter = itertools.count()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + next(self.counter)

    with pytest.raises(ArgumentError, match="it has more state, which was not found"):
        lifted(stateful(Hiding), random_data(1)[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_left_as_it_was(kind: type[Any]) -> None:
    net, x = stateful(kind), random_data(1)[0][0]
    random, attributes = torch.get_rng_state(), dict(vars(net.cell))
    buffers = {name: (buffer, buffer.clone()) for name, buffer in net.named_buffers()}
    made = lifted(net, x)
    state = made(x, made(x, None)[1])[1]
    assert kind.__name__ == "Frozen" or all(tensor.grad_fn for tensor in tensors_of(state))
    if kind.__name__ != "Dropping":
        assert torch.equal(torch.get_rng_state(), random)
    assert vars(net.cell).keys() == attributes.keys()
    for name, value in vars(net.cell).items():
        assert value is attributes[name] or value == attributes[name]
    if kind.__name__ != "Normalised":
        assert {name: id(b) for name, b in net.named_buffers()} == {
            name: id(buffer) for name, (buffer, _) in buffers.items()
        }
        assert all(torch.equal(buffer, value) for buffer, value in buffers.values())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_used_module_goes_on_from_what_it_holds(kind: type[Any]) -> None:
    inputs, _ = random_data(5)
    net, plain = stateful(kind), stateful(kind)
    for x in inputs[:2]:
        torch.manual_seed(1)
        plain(x)
        torch.manual_seed(1)
        net(x)
    made, state = lifted(net, inputs[0]), None
    for x in inputs[2:]:
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        y, state = made(x, state)
        assert torch.equal(y, expected)
    assert not any(t.grad_fn for m in net.modules() for t in tensors_of(dict(vars(m))))


def test_other_lanes_and_a_state_of_ones_own() -> None:
    made = lifted(stateful(Items), random_data(1)[0][0])
    assert made.names == ("cell.h",)
    assert "state: cell.h" in repr(made)
    x = random_data(1, lanes=LANES + 3)[0][0]
    first = [torch.randn(LANES + 3, WIDTH, dtype=torch.float64) for _ in range(2)]
    before = copy.deepcopy(first)
    y, state = made(x, (first,))
    assert bitwise(first, before)
    plain = stateful(Items)
    plain.load(first)
    assert torch.equal(y, plain(x))
    assert bitwise(state, (plain.store(),))
    _, state = made(x, None)
    plain.load(None)
    plain(x)
    assert bitwise(state, (plain.store(),))


def test_a_state_that_is_not_that_of_the_module_is_refused() -> None:
    inputs, targets = random_data(STEPS)
    state = torch.zeros(LANES, WIDTH, dtype=torch.float64)
    for kind, wrong in (
        (Attribute, state),
        (Attribute, (state, state)),
        (Items, (state,)),
        (Attribute, "h"),
    ):
        made = lifted(stateful(kind), inputs[0])
        name = made.names[0]
        with pytest.raises(ArgumentError, match=rf"must be a tuple of what .* keeps in {name}"):
            TBPTT(made, mean_loss, K1, K2).train(TensorSequence(inputs, targets), wrong)


@pytest.mark.parametrize("kind", [Attribute, LazyBuffer, Logging])
def test_it_is_copied_saved_and_loaded(kind: type[Any]) -> None:
    x = random_data(1)[0][0]
    made = lifted(stateful(kind), x)
    copied = copy.deepcopy(made)
    expected, state = made(x, None)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    y, _ = copied(x, None)
    assert torch.equal(y, expected)
    assert not torch.equal(made(x, state)[0], copied(x, state)[0])
    assert {f"module.{name}" for name in stateful(kind).state_dict()} == set(made.state_dict())
    copied.load_state_dict(made.state_dict())
    assert torch.equal(made(x, state)[0], copied(x, state)[0])


SOME = {"Memories", "Nested", "LazyBuffer"}


@pytest.mark.parametrize(
    "kind",
    [k if k.__name__ in SOME else pytest.param(k, marks=pytest.mark.exhaustive) for k in KINDS],
)
def test_it_is_resumed_and_kept_within_a_budget_as_any_module(
    kind: type[Any], tmp_path: Path
) -> None:
    sequence = TensorSequence(*random_data(STEPS))

    def trainer(folder: str, **options: Any) -> tuple[Trainer, nn.Module]:
        net = stateful(kind)
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        made = lifted(net, sequence.inputs[0])
        tbptt = TBPTT(made, mean_loss, K1, K2, optimizer, **options)
        snapshots = Snapshots(directory=tmp_path / folder)
        return Trainer(tbptt, sequence, epochs=2, snapshots=snapshots), net

    whole, net = trainer("whole", strategy="uniform:2")
    whole.train()
    expected = [weight.detach() for weight in net.parameters()]
    cut, _ = trainer("cut", strategy="uniform:2")
    windows = cut.windows()
    for _ in range(3):
        next(windows)
    cut.save()
    windows.close()
    resumed, net = trainer("cut", strategy="uniform:2")
    resumed.resume()
    resumed.train()
    assert bitwise([weight.detach() for weight in net.parameters()], expected)
    budgeted, net = trainer("budgeted", memory_budget="4MiB")
    budgeted.train()
    assert relative_error(list(net.parameters()), expected) < 1e-12


@pytest.mark.exhaustive
def test_a_compiled_module() -> None:
    inputs, targets = random_data(STEPS)
    results = []
    for is_compiled in (False, True):
        net = stateful(Attribute)
        module = torch.compile(net, backend="eager") if is_compiled else net
        made = lifted(module, inputs[0])
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        tbptt = TBPTT(made, mean_loss, K1, K2, optimizer, strategy="uniform:2")
        tbptt.train(TensorSequence(inputs, targets))
        results.append(list(net.parameters()))
    assert made.names == ("_orig_mod.cell.h",)
    assert relative_error(*results) < 1e-12


def test_a_step_that_fails_leaves_the_module_as_it_was() -> None:
    net = stateful(Attribute)
    made = lifted(net, random_data(1)[0][0])
    with pytest.raises(RuntimeError):
        made(torch.zeros(LANES, WIDTH_IN + 1, dtype=torch.float64), None)
    assert net.cell.h is None


def test_a_segment_module() -> None:
    class Layer(Stateful):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.gru, self.h = nn.GRU(WIDTH_IN, WIDTH), None

        def forward(self, x: Tensor) -> Tensor:
            y, self.h = self.gru(x, self.h)
            return y

    inputs, targets = random_data(STEPS)
    torch.manual_seed(0)
    layer = Layer().double()
    made, plain = lifted(layer, inputs[:2]), copy.deepcopy(layer.gru)
    results = []
    for module in (made, plain):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        tbptt = TBPTT(
            module, mean_loss, K1, K2, optimizer, per_step=False, lane_dim=1, strategy="sqrt"
        )
        losses = [w.loss_value for w in tbptt.windows(TensorSequence(inputs, targets))]
        results.append((losses, gradients(list(module.parameters()))))
    assert results[0][0] == results[1][0]
    assert bitwise(*[grads for _, grads in results])


def snntorch_net() -> Any:
    snn = pytest.importorskip("snntorch")
    first = snn.Synaptic(0.8, 0.9, init_hidden=True)
    second = snn.RLeaky(0.9, linear_features=WIDTH, init_hidden=True)
    return nn.Sequential(
        *(nn.Linear(WIDTH_IN, WIDTH), first, nn.Linear(WIDTH, WIDTH), second),
        *(nn.Linear(WIDTH, WIDTH), snn.Leaky(0.9, init_hidden=True), nn.Linear(WIDTH, WIDTH)),
    ), ("1.syn", "1.mem", "3.spk", "3.mem", "5.mem")


def spikingjelly_net() -> Any:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    return nn.Sequential(
        *(nn.Linear(WIDTH_IN, WIDTH), neuron.LIFNode(), nn.Linear(WIDTH, WIDTH)),
        *(neuron.ParametricLIFNode(), nn.Linear(WIDTH, WIDTH)),
    ), ("1._memories", "3._memories")


@pytest.mark.filterwarnings("default")
def test_a_network_of_norse_is_given_its_state_already() -> None:
    norse = pytest.importorskip("norse.torch")
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH_IN, WIDTH), norse.LIFCell(), nn.Linear(WIDTH, WIDTH), norse.LICell()
    net = norse.SequentialState(*layers).double()
    inputs, targets = random_data(40)
    state, loss = None, torch.zeros(())
    for x, y in zip(5 * inputs, targets, strict=True):
        output, state = net(x, state)
        loss = loss + mean_loss(output, y) / len(inputs)
    loss.backward()
    expected = gradients(list(net.parameters()))
    net.zero_grad()
    result = TBPTT(net, mean_loss, 40, None, strategy="uniform:7").train(
        TensorSequence(5 * inputs, targets)
    )
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert relative_error(gradients(list(net.parameters())), expected) < 1e-12


@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [(snntorch_net, torch.float32, 1e-5), (spikingjelly_net, torch.float64, 1e-12)],
)
@pytest.mark.filterwarnings("default")
def test_networks_of_spiking_libraries(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    net, names = make()
    inputs, targets = random_data(40)
    inputs, targets = 3 * inputs.to(dtype), targets.to(dtype)  # so that some fire
    plain = copy.deepcopy(net.to(dtype))
    made = lifted(net, inputs[0])
    assert made.names == names
    loss = sum(mean_loss(plain(x), y) for x, y in zip(inputs, targets, strict=True)) / len(inputs)
    loss.backward()
    expected = gradients(list(plain.parameters()))
    for strategy, executor in itertools.product(("retain", "uniform:7", "sqrt"), EXECUTORS):
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        tbptt = TBPTT(made, mean_loss, 40, None, optimizer, strategy=strategy, executor=executor)
        result = tbptt.train(TensorSequence(inputs, targets))
        assert result.loss == pytest.approx(loss.item(), rel=tolerance)
        assert relative_error(gradients(list(net.parameters())), expected) < tolerance
