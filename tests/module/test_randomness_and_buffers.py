"""Random numbers and buffers in steps that run again, against loops that reuse the recorded ones.

A step changes buffers and draws random numbers once, when it is new. Every later run sees
what that run saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    OVERLAPS,
    WIDTH,
    WIDTH_IN,
    bitwise,
    check_window,
    clear_gradients,
    gradients,
    mean_loss,
    naive_problem,
    random_data,
    relative_error,
)
from devices import CPU, generator_states, here, placed
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence, evaluate, unroll, verify
from tbptt_ckpt.module.buffers import find_buffers

pytestmark = pytest.mark.usefixtures("device")

NUM_STEPS, LANES = 13, 4
STRATEGIES = ("retain", "uniform:2", "uniform:3", "revolve:2")
# Windows that overlap several earlier ones, that reach back to the start, that leave steps out.
REACHES = ((2, 5), (3, 4), (3, None), (4, 2))


class Recurrent(nn.Module):
    """A tanh cell in two parts, so that subclasses can disturb the new state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.Linear(WIDTH_IN + WIDTH, WIDTH)
        self.readout = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.shape[0], WIDTH) if h is None else h
        h = self.disturbed(torch.tanh(self.recurrence(torch.cat([x, h], 1))), x)
        return self.readout(h), h

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("a subclass says how")


class FunctionalDropout(Recurrent):
    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        return F.dropout(h, 0.4, training=True)


class ModuleDropout(Recurrent):
    """Some steps draw more random numbers than others."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        h = self.dropout(h)
        return h + 0.1 * torch.randn(WIDTH, dtype=h.dtype, device=h.device) if x[0, 0] > 0 else h


class Normalised(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(h)


class FedBackNorm(Normalised):
    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        mean = self.norm.running_mean.clone()
        return super().disturbed(h, x) - 0.5 * mean


class CountingInPlace(Recurrent):
    """The step counter and the running mean feed the output, and are written in place."""

    counter: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        self.counter += 1
        scale = 1.0 + 0.1 * self.counter.to(h.dtype)
        new = h * scale - 0.5 * self.mean.clone()
        self.mean.mul_(0.8).add_(0.2 * h.detach().mean(0))
        return new


class CountingByReassignment(CountingInPlace):
    """The same, with a new tensor for each value."""

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        self.counter = self.counter + 1
        new = h * (1.0 + 0.1 * self.counter.to(h.dtype)) - 0.5 * self.mean
        self.mean = 0.8 * self.mean + 0.2 * h.detach().mean(0)
        return new


class Everything(CountingInPlace):
    """Dropout, batch normalisation and a fed-back buffer in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        return F.dropout(self.norm(super().disturbed(h, x)), 0.2)


MODULES = (
    FunctionalDropout,
    ModuleDropout,
    Normalised,
    CountingInPlace,
    CountingByReassignment,
    Everything,
)


def make(kind: type[Recurrent]) -> Recurrent:
    torch.manual_seed(0)
    return placed(kind().double())


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_buffers()}


def nothing() -> None:
    """The user does nothing between windows."""


def draw() -> Tensor:
    """The user draws numbers between windows."""
    return torch.rand(5, device=here())


def naive_run(
    kind: type[Recurrent],
    overlap: str,
    reach: tuple[int, int | None],
    learning_rate: float | None,
    between: Callable[[], object] = nothing,
) -> list[tuple[naive.NaiveWindow, list[Tensor], dict[str, Tensor]]]:
    """Windows with the generator state and the buffers after each."""
    module, (inputs, targets) = make(kind), random_data(NUM_STEPS, lanes=LANES)
    problem = naive_problem(module, inputs, targets, None)
    optimizer = optimizer_for(module, learning_rate)
    torch.manual_seed(7)
    seen = []
    for window in naive.OVERLAPS[overlap](problem, *reach, optimizer=optimizer):
        seen.append((window, generator_states(), buffers(module)))
        between()
    return seen


def optimizer_for(module: nn.Module, learning_rate: float | None) -> torch.optim.Optimizer | None:
    if learning_rate is None:
        return None
    return torch.optim.SGD(module.parameters(), lr=learning_rate)


def check_against_naive(
    kind: type[Recurrent],
    overlap: str,
    reach: tuple[int, int | None],
    learning_rate: float | None,
    strategy: str,
    executor: str,
    between: Callable[[], object] = nothing,
) -> None:
    expected = naive_run(kind, overlap, reach, learning_rate, between)
    module, (inputs, targets) = make(kind), random_data(NUM_STEPS, lanes=LANES)
    parameters = list(module.parameters())
    optimizer = optimizer_for(module, learning_rate)
    tbptt = TBPTT(
        module, mean_loss, *reach, optimizer, overlap=overlap, strategy=strategy, executor=executor
    )
    where = f"{kind.__name__} {overlap} {reach} lr={learning_rate} {strategy} {executor}"
    torch.manual_seed(7)
    results = tbptt.windows(TensorSequence(inputs, targets), None)
    first = True
    for result, (window, generator, expected_buffers) in zip(results, expected, strict=True):
        assert bitwise(generator_states(), generator), f"{where}: generator {window.stop}"
        exact = first or optimizer is None
        check_window(where, result, gradients(parameters), window, bitwise_state=exact)
        check_buffers(f"{where}: buffers at {window.stop}", module, expected_buffers, exact)
        if optimizer is None:
            clear_gradients(parameters)
        first = False
        between()


def check_buffers(where: str, module: nn.Module, expected: dict[str, Tensor], exact: bool) -> None:
    actual = buffers(module)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if exact or not value.is_floating_point():
            assert torch.equal(actual[name], value), (where, name, actual[name], value)
        else:
            torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", MODULES)
def test_naive_overlaps_agree_at_frozen_weights(kind: type[Recurrent]) -> None:
    """A re-run that sees what the first run saw repeats it, whichever state it begins with."""
    for reach in REACHES:
        runs = [
            naive_run(kind, overlap, reach, None, lambda: torch.rand(5, device=here()))
            for overlap in OVERLAPS
        ]
        for one, other in zip(*runs, strict=True):
            assert bitwise([one[0].state, one[1:]], [other[0].state, other[1:]])
            assert one[0].loss == other[0].loss
            assert one[0].drift == other[0].drift == 0.0
            assert relative_error(one[0].grads, other[0].grads) <= 1e-12


@covering(together=1, kind=MODULES, strategy=STRATEGIES, executor=EXECUTORS, overlap=OVERLAPS)
def test_re_runs_see_what_the_first_run_saw(
    kind: type[Recurrent], strategy: str, executor: str, overlap: str
) -> None:
    for reach in REACHES:
        for learning_rate in (None, 0.1):
            check_against_naive(kind, overlap, reach, learning_rate, strategy, executor)


@covering(
    together=1,
    kind=[FunctionalDropout, ModuleDropout, Everything],
    strategy=["retain", "uniform:4", "revolve:2"],
    executor=EXECUTORS,
    overlap=OVERLAPS,
)
def test_recorded_numbers_serve_windows_that_overlap_many_others(
    kind: type[Recurrent], strategy: str, executor: str, overlap: str
) -> None:
    """With k2 > 2 * k1 a step runs again in several windows, across several update points."""
    for reach in ((1, 4), (2, 9), (3, 11), (5, None)):
        check_against_naive(kind, overlap, reach, 0.1, strategy, executor)


@covering(
    together=1,
    kind=[FunctionalDropout, ModuleDropout, Everything],
    strategy=STRATEGIES,
    executor=EXECUTORS,
    overlap=OVERLAPS,
)
def test_the_user_may_draw_random_numbers_between_windows(
    kind: type[Recurrent], strategy: str, executor: str, overlap: str
) -> None:
    """A re-run that crosses an update point has to jump over the user's numbers."""
    for reach in ((2, 5), (2, 7), (3, None)):
        check_against_naive(
            kind,
            overlap,
            reach,
            0.1,
            strategy,
            executor,
            between=lambda: torch.rand(5, device=here()),
        )


@covering(together=1, kind=MODULES, strategy=STRATEGIES, executor=EXECUTORS, overlap=OVERLAPS)
def test_buffers_and_generator_end_as_after_a_single_pass(
    kind: type[Recurrent], strategy: str, executor: str, overlap: str
) -> None:
    """BatchNorm's running statistics and batch counter among them."""
    module, (inputs, targets) = make(kind), random_data(NUM_STEPS, lanes=LANES)
    torch.manual_seed(7)
    state = None
    with torch.no_grad():
        for x in inputs:
            _, state = module(x, state)
    expected, generator = buffers(module), generator_states()

    for reach in REACHES:
        module = make(kind)
        tbptt = TBPTT(
            module, mean_loss, *reach, overlap=overlap, strategy=strategy, executor=executor
        )
        torch.manual_seed(7)
        result = tbptt.train(TensorSequence(inputs, targets), None)
        assert bitwise(generator_states(), generator)
        check_buffers(f"{kind.__name__} {reach}", module, expected, exact=True)
        assert torch.equal(result.state, state)


def test_batch_norm_counts_every_step_once() -> None:
    module, (inputs, targets) = make(Normalised), random_data(NUM_STEPS, lanes=LANES)
    optimizer = optimizer_for(module, 0.1)
    tbptt = TBPTT(module, mean_loss, 2, 7, optimizer, strategy="revolve:2")
    for result in tbptt.windows(TensorSequence(inputs, targets), None):
        assert int(module.norm.num_batches_tracked) == result.stop


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_user_may_run_the_module_between_windows(executor: str) -> None:
    """Batch normalisation changes its running mean without a trace, and here it is fed back."""
    reference, (inputs, targets) = make(FedBackNorm), random_data(12, lanes=LANES)
    expected, state = [], None
    for start, _, stop in naive.windows(12, 3, 3):
        losses = []
        for step in range(start, stop):
            y, state = reference(inputs[step], state)
            losses.append(mean_loss(y, targets[step]))
        clear_gradients(list(reference.parameters()))
        torch.stack(losses).mean().backward()
        expected.append(gradients(list(reference.parameters())))
        state = state.detach()
        with torch.no_grad():
            reference(3.0 * inputs[0], None)

    module = make(FedBackNorm)
    tbptt = TBPTT(module, mean_loss, 3, 3, optimizer_for(module, 0.0), executor=executor)
    for _, grads in zip(tbptt.windows(TensorSequence(inputs, targets)), expected, strict=True):
        assert relative_error(gradients(list(module.parameters())), grads) <= 1e-12
        with torch.no_grad():
            module(3.0 * inputs[0], None)


def test_buffers_that_only_begin_as_one_tensor() -> None:
    class Parting(CountingByReassignment):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("other", self.mean)

        def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
            self.other = 0.5 * self.other + h.detach().mean(0)
            return super().disturbed(h, x) - 0.1 * self.other

    data = random_data(NUM_STEPS, lanes=LANES)
    assert verify(make(Parting), mean_loss, *data, strategy="step", tolerance=1e-12).ok


class SetInAStep(CountingByReassignment):
    """Its buffers are None until a step sets them, in effect to what they are elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = self.mean = None

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        if self.counter is None:
            self.counter, self.mean = h.new_zeros((), dtype=torch.int64), h.new_zeros(WIDTH)
        return super().disturbed(h, x)


class Forgetful(CountingByReassignment):
    """Its mean is None after every fourth step."""

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = h.new_zeros(WIDTH)
        h = super().disturbed(h, x)
        if int(self.counter) % 4 == 0:
            self.mean = None
        return h


class ZeroedInstead(CountingByReassignment):
    """What `Forgetful` computes, without None."""

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        h = super().disturbed(h, x)
        if int(self.counter) % 4 == 0:
            self.mean = torch.zeros_like(self.mean)
        return h


class KeptInAList(Normalised):
    """Its normalisation, without weights, is in a list in a dict, so that torch does not see it."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm
        self.hidden = {"layers": [placed(nn.BatchNorm1d(WIDTH, affine=False).double())]}

    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        (norm,) = self.hidden["layers"]
        return norm(h)


class WithoutWeights(Normalised):
    """What `KeptInAList` computes, with the normalisation in plain sight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)


@covering(
    together=1,
    kinds=[
        (SetInAStep, CountingByReassignment),
        (Forgetful, ZeroedInstead),
        (KeptInAList, WithoutWeights),
    ],
    strategy=STRATEGIES,
    executor=EXECUTORS,
    overlap=OVERLAPS,
)
def test_buffers_that_are_none_or_hidden_count_like_others(
    kinds: tuple[type[Recurrent], type[Recurrent]], strategy: str, executor: str, overlap: str
) -> None:
    """Held bitwise against a module that does the same with buffers that are always there."""
    inputs, targets = random_data(NUM_STEPS, lanes=LANES)

    def run(kind: type[Recurrent], reach: tuple[int, int | None]) -> list[Any]:
        module = make(kind)
        tbptt = TBPTT(
            module,
            mean_loss,
            *reach,
            optimizer_for(module, 0.1),
            overlap=overlap,
            strategy=strategy,
            executor=executor,
        )
        windows = tbptt.windows(TensorSequence(inputs, targets), None)
        return [[w.loss, w.state, gradients(list(module.parameters()))] for w in windows]

    kind, plain = kinds
    for reach in REACHES:
        assert bitwise(run(kind, reach), run(plain, reach)), reach


def test_a_hidden_batch_norm_counts_every_step_once() -> None:
    module, (inputs, targets) = make(KeptInAList), random_data(NUM_STEPS, lanes=LANES)
    tbptt = TBPTT(module, mean_loss, 2, 7, strategy="revolve:2")
    for result in tbptt.windows(TensorSequence(inputs, targets), None):
        assert int(module.hidden["layers"][0].num_batches_tracked) == result.stop


class RegisteredInAStep(Recurrent):
    def disturbed(self, h: Tensor, x: Tensor) -> Tensor:
        if not hasattr(self.readout, "mean"):
            self.readout.register_buffer("mean", h.new_zeros(WIDTH))
        new = h - 0.5 * self.readout.mean.clone()
        self.readout.mean.mul_(0.8).add_(0.2 * h.detach().mean(0))
        return new


def _train(module: nn.Module, inputs: Tensor, targets: Tensor, executor: str = "replay") -> None:
    optimizer = optimizer_for(module, 0.1)
    tbptt = TBPTT(module, mean_loss, 2, 5, optimizer, strategy="step", executor=executor)
    tbptt.train(TensorSequence(inputs, targets), None)


@pytest.mark.parametrize(
    "use",
    [
        _train,
        lambda *problem: _train(*problem, executor="checkpoint"),
        lambda module, inputs, targets: verify(module, mean_loss, inputs, targets),
        lambda module, inputs, targets: unroll(module, inputs, strategy="step"),
        lambda module, *data: evaluate(module, mean_loss, TensorSequence(*data)),
    ],
)
def test_a_buffer_registered_in_a_step_is_refused(use: Any) -> None:
    module, data = make(RegisteredInAStep), random_data(NUM_STEPS, lanes=LANES)
    weights = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(
        ArgumentError, match=r"^module buffer 'readout\.mean' .*in __init__, as None"
    ):
        use(module, *data)
    assert bitwise(list(module.parameters()), weights)


def test_a_buffer_that_turns_into_nan_has_changed() -> None:
    """Batch normalisation leaves no trace but the value, and a NaN is not the zero it replaces.

    On an accelerator nobody waits to compare: what may have changed has.
    """
    norm = placed(nn.BatchNorm1d(WIDTH))
    mean = next(b for b in find_buffers([norm]) if b.present() is norm.running_mean)
    zeros = mean.capture()
    mean.about_to_run()
    norm(torch.full((LANES, WIDTH), float("nan"), device=here()))
    assert mean.capture() is not zeros
    again = mean.capture()
    mean.about_to_run()
    assert (mean.capture() is again) == (here() == CPU)


@pytest.mark.parametrize("wrap", [lambda method: method, functools.partial])
def test_buffers_of_a_method_are_those_of_its_module(wrap: Any) -> None:
    module, (inputs, targets) = make(Normalised), random_data(NUM_STEPS, lanes=LANES)
    tbptt = TBPTT(wrap(module.forward), mean_loss, 2, 7, strategy="step")
    for result in tbptt.windows(TensorSequence(inputs, targets), None):
        assert int(module.norm.num_batches_tracked) == result.stop
    module = make(Normalised)
    assert verify(wrap(module.forward), mean_loss, inputs, targets, strategy="step").ok
    assert int(module.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_windows_without_targets_record_what_their_steps_saw(overlap: str, executor: str) -> None:
    """One label at the end: it is differentiated with the numbers drawn windows ago."""
    absent = tuple(range(NUM_STEPS - 1))
    for kind in (ModuleDropout, Everything):
        module, (inputs, targets) = make(kind), random_data(NUM_STEPS, lanes=LANES)
        problem = naive_problem(module, inputs, targets, None, absent=absent)
        torch.manual_seed(7)
        *_, expected = naive.OVERLAPS[overlap](problem, 3, None)
        expected_buffers, generator = buffers(module), generator_states()

        module = make(kind)
        steps = [
            (x, None if t in absent else y)
            for t, (x, y) in enumerate(zip(inputs, targets, strict=True))
        ]
        tbptt = TBPTT(
            module, mean_loss, 3, None, overlap=overlap, strategy="revolve:2", executor=executor
        )
        torch.manual_seed(7)
        *_, result = tbptt.windows(steps, None)
        grads = gradients(list(module.parameters()))
        check_window(kind.__name__, result, grads, expected, bitwise_state=True)
        assert bitwise(buffers(module), expected_buffers)
        assert bitwise(generator_states(), generator)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", ["retain", "uniform:2"])
def test_the_same_seed_gives_the_same_run(strategy: str, executor: str) -> None:
    def run() -> list[Any]:
        module, (inputs, targets) = make(Everything), random_data(NUM_STEPS, lanes=LANES)
        optimizer = optimizer_for(module, 0.1)
        tbptt = TBPTT(module, mean_loss, 2, 5, optimizer, strategy=strategy, executor=executor)
        torch.manual_seed(7)
        windows = tbptt.windows(TensorSequence(inputs, targets), None)
        return [[w.loss, w.state, gradients(list(module.parameters()))] for w in windows]

    assert bitwise(run(), run())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_loss_that_draws_random_numbers_is_refused(executor: str) -> None:
    def noisy(y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(F.dropout(y, 0.5), target)

    module, (inputs, targets) = make(Normalised), random_data(NUM_STEPS, lanes=LANES)
    tbptt = TBPTT(module, noisy, 2, 5, strategy="uniform:2", executor=executor)
    with pytest.raises(ArgumentError, match="random"):
        tbptt.train(TensorSequence(inputs, targets), None)
