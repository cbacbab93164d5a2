"""Profiles from code: exact, repeatable, and without a trace in what is profiled."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from devices import placed
from grids import covering, later
from torch import nn

from tbptt_ckpt import ArgumentError, Workload, profile_strategies, profile_window
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.process import ProcessBench
from tbptt_ckpt.schedule import Sqrt

MSE = nn.functional.mse_loss
STRATEGIES = ("retain", "step", "uniform:5")
ROW = Configuration(strategy=Sqrt(), k1=4, k2=12)


def make(kind=nn.LSTM, width=8, num_steps=23, lanes=2):
    torch.manual_seed(0)
    module = kind(3, width)
    data = torch.randn(num_steps, lanes, 3), torch.randn(num_steps, lanes, width)
    return placed(module), MSE, *placed(data)


def profile(*work, strategy="sqrt", k1=4, k2=12, **options):
    options = {"time_batching": False, **options}
    return profile_window(*work, strategy=strategy, k1=k1, k2=k2, repeats=1, **options)


def peaks(report):
    return {(row.strategy, row.k1, row.k2): row.peak_bytes for row in report.rows}


@pytest.mark.parametrize("kind", [nn.LSTM, pytest.param(nn.GRUCell, marks=pytest.mark.exhaustive)])
@pytest.mark.usefixtures("device")
def test_peaks_repeat_to_the_byte_in_any_order(kind):
    work = make(kind)
    optimizer = torch.optim.Adam(work[0].parameters())
    options = {"k1": 4, "k2": 12, "optimizer": optimizer, "repeats": 1, "time_batching": False}
    first = profile_strategies(*work, strategies=STRATEGIES, **options)
    second = profile_strategies(*work, strategies=STRATEGIES[::-1], **options)
    assert len(first.rows) == len(STRATEGIES)
    assert peaks(first) == peaks(second)
    assert all(row.ratio for row in first.rows)
    held = {row.strategy: row.held_states for row in first.rows}
    assert held["retain"] == 0 < held["uniform:5"] < held["step"]


def test_a_memory_history_has_the_stacks_that_its_viewer_shows(monkeypatch, tmp_path):
    """Stacks of C++, which torch records by default, take long to find names for."""
    calls = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda *_, **options: calls.append(options)
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    module, loss_fn, inputs, targets = make()
    bench = WindowBench(Workload(module, loss_fn, inputs=inputs, targets=targets), ROW)
    bench.write_history(tmp_path / "history")
    assert calls == [{"stacks": "python"}, str(tmp_path / "history"), {"enabled": None}]


@pytest.mark.exhaustive
def test_peaks_are_the_same_in_processes_of_their_own():
    work = make()
    options = {"k1": 4, "k2": 12, "repeats": 1, "strategies": ("sqrt",)}
    here, fresh = (
        profile_strategies(*work, fresh_processes=fresh, **options) for fresh in (False, True)
    )
    assert peaks(here) == peaks(fresh)
    assert [row.strategy for row in fresh.rows] == ["retain", "sqrt"]
    assert fresh.rows[0].ratio == 1.0
    assert fresh.rows[1].ratio > 0


def flattened(module):
    """The weights as cuDNN wants them: views of one buffer, in any order and with gaps."""
    weights = list(module.parameters())
    buffer, offset = torch.zeros(sum(w.numel() for w in weights) + 16 * len(weights)), 0
    with torch.no_grad():
        for weight in reversed(weights):
            view = buffer[offset : offset + weight.numel()].view_as(weight).copy_(weight)
            weight.set_(view)
            offset += weight.numel() + 16
    return module


def places(module):
    starts = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return len(starts), [(p.storage_offset(), p.stride()) for p in module.parameters()]


def places_in(bench):
    work = bench._work
    return places(work.module), tensor_bytes(work.module), work.optimizer.param_groups[0]["lr"]


def test_weights_that_share_a_buffer_share_one_in_copies_and_in_fresh_processes():
    """The warning of cuDNN about weights in many chunks is of what profiles would measure."""
    module, loss_fn, inputs, targets = make(nn.LSTM, width=32)
    module = flattened(module)
    optimizer = torch.optim.Adam([{"params": module.parameters(), "lr": 0.25}])
    work = Workload(module, loss_fn, inputs=inputs, targets=targets, optimizer=optimizer)
    expected = places(module), tensor_bytes(module), 0.25
    assert expected[0][0] == 1
    copied = work.copied()
    assert places_in(WindowBench(copied, ROW)) == expected
    assert copied.optimizer.param_groups[0]["params"][1] is copied.module.weight_hh_l0
    assert copied.module._flat_weights[1] is copied.module.weight_hh_l0
    assert all(map(torch.equal, copied.module.parameters(), module.parameters()))
    with torch.no_grad():
        copied.module.weight_hh_l0.zero_()
    assert module.weight_hh_l0.any()
    with ProcessBench(functools.partial(itself, work), ROW) as bench:
        assert bench.ask(places_in) == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs cuDNN")
@pytest.mark.filterwarnings("error")
def test_copies_of_a_cudnn_module_are_as_flat_as_it_is():
    module, loss_fn, inputs, targets = make(nn.LSTM, width=32)
    module, inputs, targets = (each.cuda() for each in (module, inputs, targets))
    expected = places(module)
    assert expected[0] == 1
    copied = Workload(module, loss_fn, inputs=inputs, targets=targets).copied().module
    assert places(copied) == expected
    assert torch.equal(copied(inputs)[0], module(inputs)[0])


def itself(work):
    return work


def half_of_the_least(bench):
    return (torch.full((8,), torch.finfo(torch.float32).tiny) * 0.5).sum().item()


def test_rows_are_timed_without_denormal_numbers():
    """On which a CPU is slow: how many there are depends on what the weights have learned."""
    work = make(nn.GRUCell)
    making = functools.partial(Workload, *work[:2], inputs=work[2], targets=work[3])
    with ProcessBench(making, ROW) as bench:
        assert bench.ask(half_of_the_least) == 0.0
    assert half_of_the_least(None) > 0.0  # this process keeps them


def test_the_peak_of_plain_bptt_is_that_of_a_loop_by_hand():
    """Everything a hand-written window holds: weights, gradients, Adam, data, graph."""
    module, _, inputs, targets = make(nn.GRU, width=64, num_steps=24, lanes=16)
    optimizer = torch.optim.Adam(module.parameters())
    state = None
    for _ in range(3):
        base = tensor_bytes(module, optimizer, state, grads=True)
        with peak_memory(held=(module, optimizer, state), rss=False) as meter:
            x, y = inputs.clone(), targets.clone()
            optimizer.zero_grad()
            outputs, state = module(x, state)
            MSE(outputs, y).backward()
            state = state.detach()
            optimizer.step()
            del outputs, x, y
    report = profile(
        module, MSE, inputs, targets, k1=24, k2=24, strategy="retain", optimizer=optimizer
    )
    assert report.peak_bytes == pytest.approx(base + meter.peak_bytes, rel=0.03)
    data = tensor_bytes(inputs, targets)
    assert report.fixed_bytes == pytest.approx(base + data, rel=0.03)


@covering(together=1, kind=[nn.LSTM, nn.GRUCell], reach=[(8, 48), (24, 10)])
@pytest.mark.usefixtures("device")
def test_peaks_are_predicted_within_three_percent(kind, reach):
    k1, k2 = reach
    work = make(kind, width=64, num_steps=48, lanes=32)
    optimizer = torch.optim.Adam(work[0].parameters())
    for strategy in ("retain", "uniform:16"):
        report = profile(*work, strategy=strategy, k1=k1, k2=k2, optimizer=optimizer)
        assert abs(report.prediction_error) < 0.03, strategy


class Readout(nn.Module):
    """Outputs that are many times as large as the state."""

    def __init__(self, inside, classes):
        super().__init__()
        self.inside, self.out = inside, nn.Linear(32, classes)

    def forward(self, x, state):
        h, state = self.inside(x, state)
        return self.out(h), state


class Cell(nn.LSTMCell):
    def forward(self, x, state):
        h, c = super().forward(x, state)
        return h, (h, c)


INSIDE = {
    "lstm": (lambda: nn.LSTM(3, 32), False, 9),
    "gru of 2 layers": (lambda: nn.GRU(3, 32, 2), False, 9),
    "cell with 2,000 classes": (lambda: Cell(3, 32), True, 2000),
}


@covering(
    together=1,
    inside=[*INSIDE],
    strategy=["retain", "uniform:14", "sqrt"],
)
@pytest.mark.usefixtures("device")
def test_rows_are_predicted_as_their_windows_are_cut(inside, strategy):
    """At the first loss and where the next window starts; and no longer segment has more losses."""
    make_inside, per_step, classes = INSIDE[inside]
    torch.manual_seed(0)
    module = placed(Readout(make_inside(), classes))
    data = placed((torch.randn(48, 16, 3), torch.randint(classes, (48, 16))))

    def cross_entropy(logits, targets):
        return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())

    report = profile(
        *(module, cross_entropy, *data),
        k1=8,
        k2=40,
        strategy=strategy,
        time_batching="auto",
        per_step=per_step,
        optimizer=torch.optim.Adam(module.parameters()),
    )
    assert abs(report.prediction_error) < 0.03


@pytest.mark.parametrize("kind", [later(nn.GRUCell), lambda *sizes: Dropped(*sizes)])
def test_generators_that_windows_note_are_predicted(kind):
    work = make(kind)
    optimizer = torch.optim.SGD(work[0].parameters(), lr=0.1)
    state_bytes = torch.get_rng_state().nbytes
    for k1 in (2, 4, 12):
        report = profile(*work, strategy="retain", k1=k1, k2=12, optimizer=optimizer)
        off = report.predicted_peak_bytes - report.peak_bytes
        assert -0.5 * state_bytes < off < 2.2 * state_bytes


@covering(together=1, overlap=["refresh", "stale"], executor=["replay", "checkpoint"])
@pytest.mark.usefixtures("device")
def test_figures_of_a_schedule(overlap, executor):
    options = {"overlap": overlap, "executor": executor}
    report = profile(*make(), strategy="uniform:5", **options)
    kinds = [action.kind for action in report.trace.actions]
    leaves = [a for a in report.trace.actions if a.kind == "differentiate"]
    executed = sum(a.stop - a.start for a in report.trace.actions if a.stop > a.start)
    assert (report.window_steps, report.executed_steps) == (12, executed)
    assert kinds.count("keep") == kinds.count("drop")
    assert report.longest_leaf == max(leaf.stop - leaf.start for leaf in leaves)
    assert all(leaf.began_seconds <= leaf.gradient_seconds <= leaf.ended_seconds for leaf in leaves)
    assert sorted((a.start, a.stop) for a in leaves)[-1][1] - min(a.start for a in leaves) == 12
    ends = [(a.began_seconds, a.ended_seconds) for a in report.trace.actions]
    assert ends == sorted(ends)
    assert all(begin <= end for begin, end in ends)
    assert report.peak_bytes == max(live for _, live in report.trace.timeline)
    assert max(a.peak_bytes for a in report.trace.actions) <= report.peak_bytes


def test_what_is_profiled_stays_as_it_is():
    module, (_, _, inputs, targets) = Noisy(), make()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for weight in module.parameters():
        weight.grad = torch.randn_like(weight)
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    grads = [weight.grad.clone() for weight in module.parameters()]
    generator = torch.get_rng_state()
    report = profile(module, MSE, inputs, targets[..., :3], optimizer=optimizer)
    assert report.is_ok
    assert torch.equal(torch.get_rng_state(), generator)
    after = (module.state_dict(), optimizer.state_dict())
    assert str(before) == str(after)
    assert all(torch.equal(w.grad, g) for w, g in zip(module.parameters(), grads, strict=True))


class Dropped(nn.Module):
    """A cell that draws numbers in every step."""

    def __init__(self, *sizes):
        super().__init__()
        self.cell, self.dropout = nn.GRUCell(*sizes), nn.Dropout(0.5)

    def forward(self, x, state):
        state = self.cell(self.dropout(x), state)
        return state, state


class Alive(torch.autograd.Function):
    """The identity, of which so many may be in a graph at once."""

    most, now, seen = 0, 0, 0

    @classmethod
    def count(cls, change):
        cls.now += change
        cls.seen = max(cls.seen, cls.now)
        if cls.now > cls.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    @staticmethod
    def forward(ctx, x):
        if x.requires_grad:
            ctx.token = Token()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Token:
    def __init__(self):
        Alive.count(+1)

    def __del__(self):
        Alive.now -= 1


class Bounded(nn.Module):
    """A cell whose graph has room for a few steps."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 64)

    def forward(self, x, state):
        state = Alive.apply(self.cell(x, state))
        return state, state


@pytest.fixture
def bounded(monkeypatch):
    for name, value in {"most": 30, "now": 0, "seen": 0}.items():
        monkeypatch.setattr(Alive, name, value)
    _, _, inputs, targets = make(width=64, num_steps=40, lanes=16)
    return Bounded(), MSE, inputs, targets


def test_a_row_that_fits_is_measured_and_predicted_where_plain_bptt_does_not_fit(bounded):
    optimizer = torch.optim.Adam(bounded[0].parameters())
    report = profile(*bounded, strategy="uniform:8", k1=32, k2=128, optimizer=optimizer)
    assert (report.status, report.longest_leaf, Alive.seen) == ("ok", 8, 8)
    assert abs(report.prediction_error) < 0.03
    assert profile(*bounded, strategy="retain", k1=32, k2=128).status == "out of memory"


def test_a_prediction_that_finds_no_memory_leaves_the_row_as_it_was_measured(bounded, monkeypatch):
    rooms = []

    def without_memory(_, limits, *__):
        rooms.append(limits.room_bytes)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("tbptt_ckpt.profiling.predicting.calibrate", without_memory)
    report = profile(*bounded, strategy="uniform:8", k1=32, k2=64)
    assert (report.status, report.predicted_peak_bytes, report.prediction_error) == (
        "ok",
        None,
        None,
    )
    assert rooms == [2 * report.peak_bytes] != [0]
    assert all(action.predicted_bytes is None for action in report.trace.actions)


class Noisy(nn.Module):
    """One step with dropout, and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, state):
        self.count += 1
        state = self.cell(self.dropout(x), state)
        return state, state


def test_memory_that_does_not_suffice_is_a_report_that_says_so():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(3, 8)
            self.calls = 0

        def forward(self, x, state):
            self.calls += 1
            if self.calls > 30:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TiB")
            state = self.cell(x, state)
            return state, state

    _, _, inputs, targets = make()
    report = profile(Greedy(), MSE, inputs, targets)
    assert (report.status, report.peak_bytes) == ("out of memory", None)
    assert "can't allocate memory" in report.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": 0}, "k1=0 must be"),
        ({"k2": None}, "k2=None must be an integer"),
        ({"strategy": "quick"}, "strategy='quick' is not"),
        ({"executor": "fast"}, "executor='fast' must be"),
        ({"memory_budget": "lots"}, "memory_budget='lots' is not a size"),
        ({"colour": 1}, "colour=1 is not an argument"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        profile(*make(), **options)


def test_no_repeats_and_no_targets_are_refused():
    module, loss_fn, inputs, targets = make()
    with pytest.raises(ArgumentError, match="repeats=0 must be"):
        profile_window(module, loss_fn, inputs, targets, k1=4, k2=8, repeats=0)
    with pytest.raises(ArgumentError, match="targets=None leaves nothing"):
        profile_window(module, loss_fn, inputs, None, k1=4, k2=8)


def test_what_cannot_be_sent_to_another_process_is_refused():
    module, _, inputs, targets = make()
    with pytest.raises(ArgumentError, match="cannot be sent to a fresh process"):
        profile_strategies(
            module, lambda y, t: MSE(y, t), inputs, targets, k1=4, k2=8, fresh_processes=True
        )


def test_a_module_that_fails_in_plain_bptt_fails_the_profile():
    class Broken(Noisy):
        def forward(self, x, state):
            raise KeyError("weights")

    _, _, inputs, targets = make()
    with pytest.raises(ArgumentError, match="raised KeyError: 'weights'") as caught:
        profile_strategies(Broken(), MSE, inputs, targets, k1=4, k2=8, repeats=1)
    assert 'raise KeyError("weights")' in caught.value.remote_traceback
