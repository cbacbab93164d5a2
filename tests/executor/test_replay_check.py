"""A replay that is not the run it repeats is an error; rounding, chaos and noise are none.

Every module here keeps, or draws, something that is put back by nobody, or acts within what
rounding explains.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models_for_tests import skip_unless_torch_runs_lstm
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, TensorSequence, run_window, unroll
from tbptt_ckpt.errors import NonFiniteError, ReplayMismatchError, TbpttError, TbpttWarning
from tbptt_ckpt.executor.fingerprint import fingerprint, read, step_difference
from tbptt_ckpt.module import outputs_needed

NUM_STEPS, LANES, WIDTH = 40, 3, 4
STRATEGIES = ("uniform:7", "step", "revolve:3")


class Cell(nn.Module):
    """A tanh cell whose state is disturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 + WIDTH, WIDTH)
        self.calls, self.hidden = 0, torch.zeros(LANES, WIDTH)
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(LANES, WIDTH) if h is None else h
        self.calls += 1
        h = torch.tanh(self.linear(torch.cat([x, self.disturbed(h)], 1)))
        return h, h

    def disturbed(self, h: Tensor) -> Tensor:
        return h

    def noise(self) -> Tensor:
        return torch.randn(LANES, WIDTH, generator=self.generator)


class Counter(Cell):
    def disturbed(self, h: Tensor) -> Tensor:
        return h + 0.01 * self.calls


class SlowCounter(Cell):
    """Each call changes the next by less than kernels of lower precision would."""

    def disturbed(self, h: Tensor) -> Tensor:
        return h * (1 + 1e-6 * self.calls)


class Cache(Cell):
    def disturbed(self, h: Tensor) -> Tensor:
        h, self.hidden = h + 0.1 * self.hidden, h.detach()
        return h


class HiddenDraws(Cell):
    """Draws from a generator in a closure, where nobody finds it."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(1)
        self.draw = lambda: torch.rand(WIDTH, generator=source)

    def disturbed(self, h: Tensor) -> Tensor:
        return h + 0.1 * self.draw()


class OtherWithGraph(Cell):
    def disturbed(self, h: Tensor) -> Tensor:
        return h + 0.1 if torch.is_grad_enabled() else h


class ThresholdCounter(Cell):
    """Two runs in a row are equal; the first and the second of the window are not."""

    def disturbed(self, h: Tensor) -> Tensor:
        return h + 0.1 * (self.calls > 15)


class Chaotic(Cell):
    def disturbed(self, h: Tensor) -> Tensor:
        return 20 * h


class Dropout(Cell):
    def disturbed(self, h: Tensor) -> Tensor:
        return torch.dropout(h, 0.4, train=True)


class Counted(Cell):
    """Counts in a buffer, which is put back."""

    def disturbed(self, h: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return h + 0.01 * self.steps


class Atomics(Cell):
    """Noise of the size of sums in another order, in every run another, in a chaotic state."""

    def disturbed(self, h: Tensor) -> Tensor:
        return 20 * h * (1 + 1e-7 * self.noise())


class LowPrecision(Cell):
    """Noise of the size of products in TF32."""

    def disturbed(self, h: Tensor) -> Tensor:
        return h * (1 + 5e-4 * self.noise())


class CountedOutput(Cell):
    """Its states are right."""

    by = 0.1

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = super().forward(x, h)
        return y + self.by * self.calls, h


class BlowsUp(Cell):
    def disturbed(self, h: Tensor) -> Tensor:
        return h / (h - h)


def _data(num_steps: int = NUM_STEPS) -> TensorSequence:
    torch.manual_seed(0)
    return TensorSequence(torch.randn(num_steps, LANES, 2), torch.randn(num_steps, LANES, WIDTH))


def _tbptt(module: Any, k1: int, k2: int | None, strategy: str, **options: Any) -> TBPTT:
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    return TBPTT(module, mse_loss, k1, k2, optimizer, strategy=strategy, **options)


FAULTS = (Counter, SlowCounter, Cache, HiddenDraws, CountedOutput)
EXECUTORS = ("replay", "checkpoint")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_kept_outside_of_the_state_is_an_error(
    fault: type[Cell], strategy: str, executor: str
) -> None:
    with pytest.raises(ReplayMismatchError, match=r"steps \[\d+, \d+\) ran again") as caught:
        _tbptt(fault(), 10, 17, strategy, executor=executor).train(_data())
    assert 0 <= caught.value.start < caught.value.stop <= NUM_STEPS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_acts_otherwise_with_a_graph_is_one_where_advances_have_none(strategy: str) -> None:
    with pytest.raises(ReplayMismatchError, match="where a graph is recorded"):
        _tbptt(OtherWithGraph(), 10, 17, strategy).train(_data())
    _tbptt(OtherWithGraph(), 10, 17, strategy, executor="checkpoint").train(_data())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_two_runs_in_a_row_do_not_show_is_an_error(executor: str) -> None:
    with pytest.raises(ReplayMismatchError):
        _tbptt(ThresholdCounter(), 20, 20, "uniform:7", executor=executor).train(_data())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("fault", [Counter, SlowCounter, Cache, HiddenDraws])
def test_an_overlap_that_nothing_replays_is_run_twice(
    fault: type[Cell], overlap: str, executor: str
) -> None:
    how: dict[str, Any] = {"overlap": overlap, "executor": executor}
    _tbptt(fault(), 10, 10, "retain", **how).train(_data())  # no step runs again: nothing is wrong
    windows = _tbptt(fault(), 10, 20, "retain", **how).windows(_data())
    next(windows)
    with pytest.raises(ReplayMismatchError):
        next(windows)


def test_leaves_that_end_where_a_state_is_recorded_are_no_way_around() -> None:
    with pytest.raises(ReplayMismatchError):
        _tbptt(Counter(), 2, 8, "uniform:2", overlap="stale").train(_data())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "retain"])
@pytest.mark.parametrize("module", [Cell, Chaotic, Dropout, Counted, Atomics, LowPrecision])
def test_what_is_right_is_no_error(module: type[Cell], strategy: str, executor: str) -> None:
    _tbptt(module(), 10, 17, strategy, executor=executor).train(_data(20))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["uniform:16", "optimal", "step"])
@pytest.mark.parametrize("gain", [1.0, 15.0])
def test_segments_that_are_cut_otherwise_are_no_error(
    gain: float, strategy: str, dtype: torch.dtype | None
) -> None:
    if dtype is not None:
        skip_unless_torch_runs_lstm(dtype)
    torch.manual_seed(0)
    module = nn.LSTM(2, WIDTH)
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(gain)
    _tbptt(module, 32, 64, strategy, autocast_dtype=dtype).train(_data(96))


class PartOfATensor(nn.Module):
    """Its state lies within a tensor, so that products with it have other bits than of a copy."""

    def __init__(self, is_column: bool) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(2, 7), nn.Linear(7, 7)
        self.is_column = is_column

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.of_input(x) + self.of_state(h))
        if self.is_column:
            return y, torch.cat([y, y], 1)[:, :7]
        return y, torch.cat([y.new_zeros(1), y.flatten()])[1:].view(y.shape)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_column", [False, True])
def test_a_state_that_is_part_of_a_tensor_is_no_error(
    is_column: bool, dtype: torch.dtype, strategy: str
) -> None:
    module, first = PartOfATensor(is_column).to(dtype), torch.zeros(LANES, 7, dtype=dtype)
    x, y = (torch.randn(NUM_STEPS, LANES, n, dtype=dtype) for n in (2, 7))
    data = TensorSequence(x, y)
    TBPTT(module, mse_loss, 10, 20, strategy=strategy, time_batching=False).train(data, first)
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    for stop in range(10, NUM_STEPS + 1, 10):
        start, terms, h = max(0, stop - 20), list[Tensor](), first
        with torch.no_grad():
            for t in range(start):
                h = module(x[t], h)[1]
        for t in range(start, stop):
            out, h = module(x[t], h)
            terms += [mse_loss(out, y[t])] if t >= stop - 10 else []
        torch.stack(terms).mean().backward()
    for mine, weight in zip(found, module.parameters(), strict=True):
        assert torch.allclose(
            mine, weight.grad, rtol=0, atol=1e-12 if dtype.itemsize == 8 else 1e-5
        )


def test_batched_leaves_and_plain_steps_are_no_error() -> None:
    _tbptt(Chaotic(), 20, 30, "revolve:3", time_batching=True).train(_data())
    with pytest.raises(ReplayMismatchError):
        _tbptt(Counter(), 20, 30, "revolve:3", time_batching=True).train(_data())


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_error_leaves_gradients_buffers_and_generators_as_they_were(executor: str) -> None:
    class Faulty(Counted):
        def disturbed(self, h: Tensor) -> Tensor:
            h = torch.dropout(super().disturbed(h), 0.1, train=True)
            return h + (0.01 * self.calls if self.faulty else 0.0)

    module = Faulty()
    module.faulty = False
    tbptt = TBPTT(module, mse_loss, 20, 30, strategy="uniform:7", executor=executor)
    windows = tbptt.windows(_data())
    next(windows)
    grads = [p.grad.clone() for p in module.parameters()]
    steps, random = module.steps.clone(), torch.get_rng_state()
    module.faulty = True
    with pytest.raises(ReplayMismatchError):
        next(windows)
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    assert torch.equal(module.steps, steps)
    assert torch.equal(torch.get_rng_state(), random)


def test_it_can_be_turned_off() -> None:
    _tbptt(Counter(), 20, 30, "uniform:7", check_replays=False).train(_data())
    data = _data()
    run_window(Counter(), mse_loss, data.inputs, data.targets, strategy="sqrt", check_replays=False)
    with pytest.raises(ReplayMismatchError):
        run_window(Counter(), mse_loss, data.inputs, data.targets, strategy="sqrt")


def test_a_state_that_is_not_finite_is_not_this_error() -> None:
    with pytest.raises(NonFiniteError):
        _tbptt(BlowsUp(), 20, 30, "uniform:7").train(_data())


def test_a_thread_that_draws_is_named() -> None:
    class Disturbed(Dropout):
        """Another thread draws while a graph is recorded, as its turn may come at any time."""

        def disturbed(self, h: Tensor) -> Tensor:
            if torch.is_grad_enabled() and self.calls < 45:
                thread = threading.Thread(target=torch.rand, args=(3,))
                thread.start()
                thread.join()
            return super().disturbed(h)

    with pytest.raises(ReplayMismatchError, match="random generator stood elsewhere"):
        _tbptt(Disturbed(), 40, 40, "uniform:7").train(_data())


class TestFingerprint:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32, torch.bool])
    def test_any_bit_tells(self, dtype: torch.dtype) -> None:
        state = torch.arange(60).reshape(4, 15).to(dtype)
        before = _print(state)
        assert before.equals(_print(state.clone()))
        assert before.equals(_print(state.T.contiguous().T))
        changed = state.clone()
        changed[2, 3] = changed[2, 3] == 0
        for other in (changed, state.flip(1)) if dtype != torch.bool else (changed,):
            assert not before.equals(_print(other))

    def test_it_is_near_where_a_state_is(self) -> None:
        torch.manual_seed(0)
        for shape in ((), (1,), (7,), (4, 16), (2, 3, 33)):
            state, noise = torch.randn(shape), torch.randn(shape)
            before = _print((state, 3))
            assert before.is_near(_print((state + 1e-7 * state * noise, 3)))
            assert not before.is_near(_print((state + 1e-2 * noise, 3)))
            assert not before.is_near(_print((state, 4)))

    def test_nan_equals_nan(self) -> None:
        state = torch.tensor([1.0, float("nan"), 2.0])
        assert _print(state).is_near(_print(state + 1e-8))
        assert not _print(state).is_near(_print(torch.ones(3)))
        assert step_difference(state, state.clone(), in_half=False) == (0.0, True)


def _print(state: Any) -> Any:
    return read([fingerprint(state, sketched=True, in_half=False)])[0]


class TestInputs:
    """Steps that write into what they are given."""

    class Writes(Cell):
        def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
            return super().forward(x.mul_(0.5), h)

    @staticmethod
    def _steps() -> Any:
        """Steps that share no memory, so that plain BPTT can differentiate them too."""
        data = _data(20)
        return [(x.clone(), t.clone()) for x, t in zip(data.inputs, data.targets, strict=True)]

    @pytest.mark.parametrize("executor", EXECUTORS)
    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("in_one_tensor", [False, True])
    def test_an_input_that_is_written_is_named(
        self, in_one_tensor: bool, strategy: str, executor: str
    ) -> None:
        steps = _data(20) if in_one_tensor else self._steps()
        tbptt = _tbptt(self.Writes(), 10, 10, strategy, executor=executor, per_step=True)
        with pytest.raises(TbpttError, match="wrote into the input of a step"):
            tbptt.train(steps)

    def test_an_overlap_is_run_again_too(self) -> None:
        windows = _tbptt(self.Writes(), 5, 10, "retain").windows(self._steps())
        next(windows)
        with pytest.raises(ReplayMismatchError, match="wrote into the input of a step"):
            next(windows)

    def test_a_target_that_a_loss_writes_is_named(self) -> None:
        def halving(y: Tensor, target: Tensor) -> Tensor:
            return mse_loss(y, target.mul_(0.5))

        optimizer = torch.optim.SGD((cell := Cell()).parameters(), 0.1)
        tbptt = TBPTT(cell, halving, 10, 10, optimizer, strategy="sqrt", executor="checkpoint")
        with pytest.raises(TbpttError, match="wrote into the target of a step"):
            tbptt.train(self._steps())

    def test_where_no_step_runs_again_it_is_as_in_plain_bptt(self) -> None:
        torch.manual_seed(1)
        module = self.Writes()
        other, h, losses = copy.deepcopy(module), None, []
        for x, target in self._steps()[:10]:
            y, h = other(x, h)
            losses.append(mse_loss(y, target))
        torch.stack(losses).mean().backward()
        next(iter(TBPTT(module, mse_loss, 10, 10, strategy="retain").windows(self._steps())))
        for mine, its in zip(module.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad)


class Keeps(Cell):
    """Makes something of its weight once per update, be it in an advance."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.made: tuple[int, Tensor] = (-1, self.scale)
        self.per_step = False

    def disturbed(self, h: Tensor) -> Tensor:
        if self.per_step or self.made[0] != self.scale._version:
            self.made = (self.scale._version, self.scale.exp())
        return h * self.made[1]


def test_a_weight_that_lost_its_gradient_is_one_warning() -> None:
    windows = _tbptt(Keeps(), 5, 5, "uniform:3").windows(_data(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(windows)  # it never had one, as an unused weight has none
    module = Keeps()
    module.per_step = True
    windows = _tbptt(module, 5, 5, "uniform:3").windows(_data())
    next(windows)
    module.per_step = False
    with pytest.warns(TbpttWarning, match="'scale' got no gradient") as told:
        list(windows)
    assert len(told) == 1


class InnerGradient(Cell):
    """Takes a gradient within a step, through a state that is `detached` or not."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self.detached, self.fast = detached, nn.Linear(WIDTH, WIDTH)

    def disturbed(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            error = torch.tanh(self.fast(h.detach() if self.detached else h)).square().sum()
            (grad,) = torch.autograd.grad(error, self.fast.weight, create_graph=True)
        return h - nn.functional.linear(h, 0.1 * grad)


@pytest.mark.parametrize("strategy", ["uniform:3", "step", "revolve:2"])
@pytest.mark.parametrize("first", ["zeros", "random"])
def test_a_state_that_depends_on_how_far_a_graph_reaches_is_an_error(
    strategy: str, first: str
) -> None:
    state = torch.zeros(LANES, WIDTH) if first == "zeros" else torch.randn(LANES, WIDTH)
    data = _data(5)  # each step differentiates all before, twice over
    run = (mse_loss, data.inputs, data.targets, state)
    run_window(InnerGradient(detached=True), *run, strategy=strategy)
    run_window(InnerGradient(detached=False), *run, strategy="retain")
    with pytest.raises(ReplayMismatchError, match="how far back the graph"):
        run_window(InnerGradient(detached=False), *run, strategy=strategy)


class OnOutputs(Cell):
    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = super().forward(x, h)
        return y + 0.1 * self.calls, h


@pytest.mark.parametrize("strategy", ["uniform:3", "step", "revolve:2", "sqrt"])
@pytest.mark.parametrize("make", [Counter, Cache, HiddenDraws, OnOutputs])
def test_what_a_user_differentiates_is_checked_in_the_backward(
    make: Callable[[], Cell], strategy: str
) -> None:
    data = _data(20)

    def loss_of(module: nn.Module, **options: Any) -> Tensor:
        outputs, _ = unroll(module, data.inputs, strategy=strategy, **options)
        return mse_loss(outputs, data.targets)

    loss_of(Cell()).backward()
    unchecked = loss_of(make(), check_replays=False)
    with pytest.raises(ReplayMismatchError, match="ran again and gave something else: the module"):
        loss_of(make()).backward()
    unchecked.backward()


class TestWhatIsNotSeen:
    """The limits that `docs/limitations.md` names."""

    def test_calls_that_mix_their_steps_late_or_in_unroll(self) -> None:
        """Looked for in the first four steps of a window, which `unroll` has not."""

        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.GRU(2, WIDTH)

            def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
                y, h = self.layer(x, h)
                late = bool(x[-1, 0, 0] > first) if first is not None else True
                return (y - y.mean(0) if late else y), h

        data = _data()
        inputs = torch.arange(NUM_STEPS).view(-1, 1, 1) + 0 * data.inputs
        sequence, first = TensorSequence(inputs, data.targets), 20.0
        TBPTT(Late(), mse_loss, 40, 40, None, per_step=False, strategy="uniform:5").train(sequence)
        first = None
        unroll(Late(), inputs, per_step=False, strategy="uniform:5")[0].sum().backward()

    def test_outputs_of_other_steps(self) -> None:
        """Of each window the first step is looked at that ends a leaf and was advanced to."""

        class Other(Cell):
            def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
                y, h = super().forward(x, h)
                return (y + 0.1 * self.calls if x[0, 0] == changed else y), h

        data = _data()
        changed = data.inputs[25, 0, 0]
        _tbptt(Other(), 20, 20, "uniform:7").train(data)
        changed = data.inputs[26, 0, 0]
        with pytest.raises(ReplayMismatchError):
            _tbptt(Other(), 20, 20, "uniform:7").train(data)

    def test_outputs_that_are_left_out_of_advances(self) -> None:
        class Asks(CountedOutput):
            def forward(self, x: Tensor, h: Tensor | None) -> tuple[Any, Tensor]:
                y, h = super().forward(x, h)
                return (y if outputs_needed() else None), h

        windows = _tbptt(module := Asks(), 20, 20, "uniform:7").windows(_data())
        module.by = 0.0  # the first advance evaluates losses
        next(windows)
        module.by = 0.1
        next(windows)

    def test_a_short_leaf_between_two_that_are_compared(self) -> None:
        class Spike(Cell):
            """Another state at one step, which no later one remembers, where a graph is made."""

            def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
                y, h = super().forward(x, None if bool(x[0, 0] == forgets) else h)
                return y, h + (torch.is_grad_enabled() and bool(x[0, 0] == spikes))

        data = _data(8)
        spikes, forgets = data.inputs[4, 0, 0], data.inputs[5, 0, 0]
        _tbptt(Spike(), 8, 8, "step").train(data)
        spikes = data.inputs[0, 0, 0]
        with pytest.raises(ReplayMismatchError):
            _tbptt(Spike(), 8, 8, "step").train(data)

    def test_a_graph_that_matters_after_the_first_steps(self) -> None:
        windows = _tbptt(module := InnerGradient(detached=True), 20, 20, "step").windows(_data())
        next(windows)
        module.detached = False
        next(windows)


@pytest.mark.parametrize("time_batching", [False, True])
def test_looking_leaves_states_to_the_meter(time_batching: bool) -> None:
    """A storage that numpy shares is not counted, so that a budget would not see it freed."""
    seen: list[torch.UntypedStorage] = []

    class Seen(Cell):
        def disturbed(self, h: Tensor) -> Tensor:
            seen.append(h.untyped_storage())
            return h

    _tbptt(Seen(), 10, 20, "uniform:8", time_batching=time_batching).train(_data())
    assert seen
    assert all(storage.resizable() for storage in seen)
