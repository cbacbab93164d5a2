"""Accelerators that can be used, and others: what stands in for them needs none."""

import contextlib

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import WIDTH, mean_loss, random_data
from torch import Tensor, nn
from training_jobs import EXACT, Job, assert_equal

from tbptt_ckpt import (
    TBPTT,
    BurnIn,
    LaneSource,
    TensorSequence,
    Workload,
    measure_costs,
    run_window,
    unroll,
    verify,
)
from tbptt_ckpt.cli.devices import find_device
from tbptt_ckpt.cli.doctor import examined
from tbptt_ckpt.devices import accelerator, default_generators
from tbptt_ckpt.errors import ArgumentError, ReplayMismatchError
from tbptt_ckpt.executor.fingerprint import _directions
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.exhausted import release_memory
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.trainer.devices import moved
from tbptt_ckpt.trainer.randomness import random_state, set_random_state

STEPS, LANES = 8, 2


class _Elsewhere(Tensor):
    """A tensor of the CPU that says that it is not."""

    name = "cuda:0"
    device = property(lambda self: torch.device(self.name))


class _Second(_Elsewhere):
    name = "cuda:1"


class _OnMac(_Elsewhere):
    name = "mps:0"


def on_card(tensor, kind=_Elsewhere):
    return tensor.detach().clone().as_subclass(kind)


class Counted:
    """A generator that counts how often it is set."""

    def __init__(self, seed):
        self.generator, self.count = torch.Generator().manual_seed(seed), 0

    def get_state(self):
        return self.generator.get_state()

    def set_state(self, state):
        self.count += 1
        self.generator.set_state(state)

    def manual_seed(self, seed):
        self.generator.manual_seed(seed)

    def draw(self, shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


@pytest.fixture
def cards(monkeypatch):
    """Two accelerators of one kind, by their generators."""
    made = (Counted(1), Counted(2))
    monkeypatch.setattr(torch.cuda, "default_generators", made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.fixture
def mac(monkeypatch):
    """A machine whose accelerator has no allocator that torch could ask, as Apple's."""

    def refuse(*_):
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    here = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: here
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name in ("empty_cache", "memory_stats", "get_memory_info", "memory_allocated"):
        monkeypatch.setattr(torch.accelerator, name, refuse)


class Noisy(nn.Module):
    """A cell that draws on the card, in every step or in none."""

    def __init__(self, card, draws=True):
        super().__init__()
        self.card, self.draws = card, draws
        self.linear = nn.Linear(WIDTH + cases.WIDTH_IN, WIDTH).double()

    def forward(self, x, h):
        h = torch.tanh(self.linear(torch.cat([x.as_subclass(Tensor), h], 1)))
        return (h, h * self.card.draw(h.shape)) if self.draws else (h, h)


def window(module, strategy, inputs, targets):
    module.zero_grad()
    found = run_window(
        module, mean_loss, inputs, targets, torch.zeros(LANES, WIDTH).double(), strategy=strategy
    )
    return found.loss, [p.grad for p in module.parameters()]


def data():
    inputs, targets = random_data(STEPS, lanes=LANES)
    return on_card(inputs), targets


class TestRandomNumbers:
    def test_of_steps_that_run_again_are_those_of_the_first_run(self, cards):
        module, results = Noisy(cards[0]), []
        for strategy in ("retain", "uniform:3", "step"):
            cards[0].manual_seed(7)
            results.append((*window(module, strategy, *data()), cards[0].get_state()))
        for found in results[1:]:
            assert_equal(found, results[0], 1e-12)

    @pytest.mark.parametrize("draws", [1, 2])
    def test_that_take_turns_once_a_call_are_refused_where_calls_are_cut(self, cards, draws):
        """As cuDNN's of two layers do; those of one draw do not depend on the cut."""

        class Segments(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.RNN(cases.WIDTH_IN, WIDTH).double()

            def forward(self, x, state):
                y, state = self.layer(x.as_subclass(Tensor) * cards[0].draw(x.shape), state)
                return y * cards[0].draw(y.shape) if draws == 2 else y, state

        tbptt = TBPTT(Segments(), mean_loss, 4, 8, strategy="revolve:1", per_step=False)
        refused = pytest.raises(ReplayMismatchError, match="depend on where its calls are cut")
        with refused if draws == 2 else contextlib.nullcontext():
            tbptt.train(TensorSequence(*data()))

    def test_a_generator_that_stands_where_it_should_is_left_alone(self, cards):
        """Where it is set, cuDNN makes what its dropout needs anew."""
        window(Noisy(cards[0], draws=False), "uniform:2", *data())
        assert cards[0].count == 0
        window(Noisy(cards[0]), "uniform:2", *data())
        assert cards[0].count > 0
        assert cards[1].count == 0

    @pytest.mark.parametrize("where", ["outputs", "targets"])
    def test_of_a_loss_are_refused(self, cards, where):
        def noisy(y, target):
            return F.mse_loss(y * cards[0].draw(y.shape).mean(), target)

        y = target = torch.ones(LANES, WIDTH, dtype=torch.float64)
        y, target = (on_card(y), target) if where == "outputs" else (y, on_card(target))
        LossFunction(F.mse_loss).add_step(LossSum(), y, target, 1.0)
        with pytest.raises(ArgumentError, match="loss_fn drew random numbers"):
            LossFunction(noisy).add_step(LossSum(), y, target, 1.0)

    def test_of_devices_in_use_alone_are_kept(self, cards):
        here, other = torch.ones(1), on_card(torch.ones(1), _Second)
        assert "accelerator" not in random_state([here])
        state = random_state([here, other])
        assert [s.tolist() for s in state["accelerator"][1]] == [cards[1].get_state().tolist()]

    def test_go_on_on_another_device_of_the_kind(self, cards):
        """The run was on cuda:1, and goes on on cuda:0."""
        state = random_state([on_card(torch.ones(1), _Second)])
        expected = cards[1].draw(3)
        set_random_state(state, [torch.ones(1)])  # a CPU has none of its own
        set_random_state(state, [on_card(torch.ones(1))])
        assert torch.equal(cards[0].draw(3), expected)

    def test_go_on_on_the_card_that_they_are_of(self, cards):
        """A process that has another one leaves that alone."""
        here, counts = on_card(torch.ones(1), _Second), [card.count for card in cards]
        state, expected = random_state([here]), cards[1].draw(3)
        set_random_state(state, [here])
        assert torch.equal(cards[1].draw(3), expected)
        assert [card.count for card in cards] == [counts[0], counts[1] + 1]

    def test_of_records_go_on_on_another_device_of_the_kind(self):
        records = {
            **{"random": [torch.ones(2), torch.ones(3)], "values": [], "boundaries": []},
            **{"origin_state": None, "ambients": [{"cpu": 0, "devices": [1]}]},
        }
        run = {"collected": None, "group": {}, "reader": {}, "records": records}
        assert moved(run, "cuda:1", torch.device("cuda:0"))["records"] == records
        there = moved(run, "cuda:1", torch.device("cpu"))["records"]
        assert there["ambients"] == [{"cpu": 0, "devices": []}]


class TestAnAcceleratorOfNoUse:
    """Of which torch gives no generators, or no statistics."""

    def test_leaves_training_on_the_cpu_alone(self, mac):
        job = Job()
        expected = job.undisturbed()
        trainer, _, listener = job.build()
        trainer.train()
        assert_equal(job.account(trainer, listener), expected, EXACT)
        state = trainer.state_dict()
        assert "accelerator" not in state["random"]
        release_memory()
        assert accelerator() is None
        assert find_device(None) == torch.device("cpu")
        assert [each["device"] for each in examined()["devices"]] == ["cpu"]

    def test_is_refused_in_one_line(self, mac):
        words = "cannot be on mps.*: torch has no random generator .*use a device that has both"
        with pytest.raises(ArgumentError, match=f"^--device mps: tensors {words}"):
            find_device("mps")
        with pytest.raises(ArgumentError, match=f"^device='mps': tensors {words}"):
            free_memory("mps")
        with pytest.raises(ArgumentError, match=f"^a tensor of module, state or data {words}"):
            default_generators([on_card(torch.ones(1), _OnMac)])
        module = nn.RNNCell(cases.WIDTH_IN, WIDTH)
        module.bias_hh = nn.Parameter(on_card(module.bias_hh, _OnMac))
        with pytest.raises(ArgumentError, match=f"^module: 'bias_hh' {words}"):
            TBPTT(module, mean_loss, 2, 2)


SOURCES = {
    "weights": lambda x, y: TensorSequence(x, y, weight=torch.linspace(0.0, 1.0, len(x))),
    "resets": lambda x, y: TensorSequence(x, y, resets=torch.arange(len(x)) % 3 == 2),
    "steps without targets": lambda x, y: [
        (step, target if index % 2 else None)
        for index, (step, target) in enumerate(zip(x, y, strict=True))
    ],
    "burn-in": lambda x, y: BurnIn(TensorSequence(x, y), 2),
    "lanes": lambda x, y: LaneSource(
        [TensorSequence(x[:n, 0], y[:n, 0]) for n in (5, 9, 3, 7)], LANES
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_default_device_changes_nothing(name):
    """`torch.set_default_device`: what is made here is made where it belongs."""
    results = []
    for default in (None, "meta"):
        module, source = cases.tanh_cell(), SOURCES[name](*random_data(16, lanes=LANES))
        tbptt = TBPTT(module, mean_loss, 2, 6, strategy="uniform:3", overlap="stale")
        some = random_data(STEPS, lanes=LANES)
        _directions.cache_clear()
        torch.set_default_device(default)
        try:
            tbptt.train(source)
            verify(module, mean_loss, *some, strategy="step")
        finally:
            torch.set_default_device(None)
        results.append([p.grad for p in module.parameters()])
    assert_equal(results[1], results[0], EXACT)


class Spread(nn.Module):
    """A cell with a readout on another device."""

    def __init__(self, kind):
        super().__init__()
        self.cell, self.out = cases.tanh_cell(), nn.Linear(WIDTH, WIDTH).double()
        self.out.weight = nn.Parameter(on_card(self.out.weight, kind))

    def forward(self, x, h):
        h = self.cell(x, h)[1]
        return self.out(h).as_subclass(Tensor), h


class TestWeightsOnSeveralDevices:
    WORDS = r": the weights are on cpu and cuda:0, and bytes are measured on one device"

    @pytest.mark.parametrize(
        ("how", "named"),
        [
            ({}, "strategy='auto', memory_budget=None"),
            ({"strategy": "sqrt", "memory_budget": "1MiB"}, "memory_budget='1MiB'"),
            ({"strategy": "optimal", "memory_budget": "1MiB"}, "strategy='optimal'"),
            ({"strategy": "sqrt", "measure_memory": True}, "measure_memory=True"),
        ],
    )
    def test_are_refused_where_bytes_are_measured(self, how, named):
        with pytest.raises(ArgumentError, match=f"{named}.*{self.WORDS}"):
            TBPTT(Spread(_Elsewhere), mean_loss, 2, 4, **how)

    def test_are_refused_by_measure_costs_and_profiles(self):
        inputs, targets = random_data(STEPS, lanes=LANES)
        with pytest.raises(ArgumentError, match=f"^measure_costs{self.WORDS}"):
            measure_costs(Spread(_Elsewhere), mean_loss, inputs, targets)
        work = Workload(Spread(_Elsewhere), mean_loss, inputs=inputs, targets=targets)
        with pytest.raises(ArgumentError, match=f"a profile{self.WORDS}"):
            WindowBench(work, Configuration(k1=2, k2=4, strategy="sqrt"))

    @pytest.mark.parametrize("strategy", ["retain", "sqrt", "uniform:3"])
    def test_train_under_a_fixed_strategy_as_on_one(self, cards, strategy):
        results = []
        for kind in (Tensor, _Elsewhere):
            torch.manual_seed(0)
            module, (inputs, targets) = Spread(kind), random_data(STEPS, lanes=LANES)
            tbptt = TBPTT(
                *(module, mean_loss, 2, 6),
                optimizer=torch.optim.SGD(module.parameters(), 0.1),
                strategy=strategy,
            )
            tbptt.train(TensorSequence(inputs, targets))
            results.append([p.detach().as_subclass(Tensor) for p in module.parameters()])
        assert_equal(results[1], results[0], EXACT)


@pytest.mark.parametrize("call", ["run_window", "unroll", "windows"])
def test_a_capture_is_refused_before_anything_changes(cards, monkeypatch, call):
    module, (inputs, targets) = Noisy(cards[0]), data()
    first = torch.zeros(LANES, WIDTH).double()
    tbptt = TBPTT(module, mean_loss, 4, 4, optimizer=torch.optim.SGD(module.parameters(), 0.1))
    windows = iter(tbptt.windows(TensorSequence(inputs, targets), init_state=first))
    next(windows)
    state = cards[0].get_state()
    before = [p.detach().clone() for p in module.parameters()]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(ArgumentError, match="graph of cuda:0 is being captured"))
        if call == "run_window":
            run_window(module, mean_loss, inputs, targets, first)
        elif call == "unroll":
            unroll(module, inputs, first)
        else:
            next(windows)
    assert torch.equal(cards[0].get_state(), state)
    assert_equal([p.detach() for p in module.parameters()], before, EXACT)


def test_ambients_of_one_device_have_one_generator(cards):
    twice = [on_card(torch.ones(1)), on_card(torch.ones(2)), torch.ones(1)]
    assert len(Ambient((), twice).capture().device_random) == 1
