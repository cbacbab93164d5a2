"""How far back gradients reach: held against plain loops that are cut at every border."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cut_windows import cut_at
from simulated_device import SimulatedWaits, on_device
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    TensorSequence,
    Trainer,
    WindowResult,
    peak_memory,
    run_window,
)
from tbptt_ckpt.engine import Border, Decay, reach_gauge
from tbptt_ckpt.executor.gradient_sketch import BUCKETS, Sketcher, sketch, tail_norms
from tbptt_ckpt.updates.step_units import Unit, step_units

NUM_STEPS, K1, K2 = 20, 4, 12
ROUGHLY = 0.25  # relative, of a norm in so many buckets


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure every window."""
    monkeypatch.setattr(reach_gauge, "_SHARE", -1e9)


def ran(
    module: nn.Module, k1: int = K1, k2: int | None = K2, num_steps: int = NUM_STEPS, **options: Any
) -> Iterator[WindowResult]:
    """The windows of an engine whose weights stay as they are, unless an optimizer is given."""
    options = {"optimizer": torch.optim.SGD(module.parameters(), 0.0), **options}
    options = {"strategy": "uniform:2", "time_batching": False, **options}
    data = TensorSequence(*cases.random_data(num_steps))
    return TBPTT(module, F.mse_loss, k1, k2, **options).windows(data)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("strategy", ["uniform:3", "step", "revolve:2"])
@pytest.mark.parametrize("make", [cases.tanh_cell, cases.lstm_cell])
def test_every_border_is_what_a_loop_that_is_cut_there_says(make: Any, strategy: str) -> None:
    module, seen, mean = make(), 0, 0.0
    for window in ran(module, strategy=strategy):
        if window.decay is None:
            assert window.stop - window.start <= K1
            continue
        whole, _ = cut_at(module, NUM_STEPS, window.start, window.new_start, window.stop)
        norm = float(whole.norm())
        against, mean = max(norm, mean), 0.9 * mean + 0.1 * norm if mean else norm
        places = [border.steps_back for border in window.decay.borders]
        assert places == sorted(set(places))
        assert places[-1] == window.stop - window.start
        for border in window.decay.borders:
            step = window.stop - border.steps_back
            cut, state_grad = cut_at(module, NUM_STEPS, step, window.new_start, window.stop)
            error = float((whole - cut).norm()) / against
            assert border.error == pytest.approx(error, rel=ROUGHLY, abs=1e-12)
            if border.norm is not None:
                assert border.norm == pytest.approx(float(state_grad.norm()), rel=1e-9)
            seen += 1
        assert all(border.norm is not None for border in window.decay.borders[:-1])
    assert seen >= 12


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": None},  # gradients of all windows stay
        {"accumulate": 3},
        {"deliver": "once"},
        {"overlap": "stale"},
        {"clip_grad_norm": 1e-3},
        {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0)},
        {"memory_budget": "1MiB"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_is_done_with_gradients_it_is_the_window_s_own(options: dict[str, Any]) -> None:
    expected = [window.decay for window in ran(cases.lstm_cell())]
    found = [window.decay for window in ran(cases.lstm_cell(), **options)]
    assert sum(decay is not None for decay in found) >= NUM_STEPS // K1 - 1
    for one, other in zip(found, expected, strict=True):
        for mine, its in zip(
            one.borders if one else (), other.borders if other else (), strict=True
        ):
            assert mine.steps_back == its.steps_back
            assert mine.error == pytest.approx(its.error, rel=1e-6, abs=1e-12)
            assert mine.norm is None or mine.norm == pytest.approx(its.norm, rel=1e-9)


@pytest.mark.usefixtures("always")
def test_weights_with_hooks_count() -> None:
    expected = [window.reach for window in ran(cases.tanh_cell())]
    module = cases.tanh_cell()
    for weight in module.parameters():
        weight.register_hook(lambda grad: grad)
    assert [window.reach for window in ran(module)] == expected


@pytest.mark.usefixtures("always")
def test_a_resumed_run_measures_what_an_undisturbed_one_does() -> None:
    """Errors are relative to a running norm, which goes on."""

    def trainer() -> Trainer:
        module = cases.lstm_cell()
        optimizer = torch.optim.Adam(module.parameters(), 0.1)
        tbptt = TBPTT(module, F.mse_loss, K1, K2, optimizer, strategy="uniform:2")
        inputs, targets = cases.random_data(2 * NUM_STEPS)
        targets = targets * torch.linspace(1, 0, 2 * NUM_STEPS)[:, None, None]  # they vanish
        return Trainer(tbptt, TensorSequence(inputs, targets), epochs=1)

    expected = [(window.decay, window.reach) for window in trainer().windows()]
    for done in (1, 4):
        one, two = trainer(), trainer()
        before = list(itertools.islice(one.windows(), done))
        two.load_state_dict(one.state_dict())
        after = list(two.windows())
        assert [(window.decay, window.reach) for window in (*before, *after)] == expected


@pytest.mark.parametrize("strategy", ["uniform:3", "revolve:2"])
def test_it_changes_no_bit_and_no_plan(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(share: float) -> tuple[Any, list[Any], int]:
        monkeypatch.setattr(reach_gauge, "_SHARE", share)
        module = cases.lstm_cell()
        optimizer = torch.optim.Adam(module.parameters(), 0.1)
        windows = list(ran(module, optimizer=optimizer, strategy=strategy))
        plans = [window.plan for window in windows]
        found = [(window.loss_value, window.drift, window.recomputed_steps) for window in windows]
        return (found, [*module.parameters()]), plans, sum(w.decay is not None for w in windows)

    (seen, weights), plans, count = run(-1e9)
    (expected, expected_weights), expected_plans, seldom = run(1e9)
    assert count > seldom
    assert seen == expected
    assert plans == expected_plans
    assert all(map(torch.equal, weights, expected_weights))


@pytest.mark.parametrize("budget", [None, "350KiB"])
def test_it_takes_no_byte(budget: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(share: float) -> tuple[list[int], int]:
        monkeypatch.setattr(reach_gauge, "_SHARE", share)
        torch.manual_seed(0)
        module = Wide()
        optimizer = torch.optim.Adam(module.parameters())
        data = TensorSequence(torch.randn(60, 4, 64), torch.randn(60, 4, 64))
        given: dict[str, Any] = {"memory_budget": budget, "measure_memory": True}
        tbptt = TBPTT(module, F.mse_loss, 5, 30, optimizer, strategy="uniform:3", **given)
        windows = list(tbptt.windows(data, torch.zeros(4, 64)))
        return [w.peak_bytes or 0 for w in windows], sum(w.decay is not None for w in windows)

    peaks, count = run(-1e9)
    expected, seldom = run(1e9)
    assert count > seldom
    assert peaks == expected
    assert budget is None or max(peaks) <= 350 * 1024


@pytest.mark.usefixtures("always")
def test_it_leaves_gradients_as_torch_s() -> None:
    """A meter that begins later is to see them freed, whatever their layout."""
    module = nn.GRU(cases.WIDTH_IN, cases.WIDTH, 2).double()
    assert any(window.decay for window in ran(module, time_batching="auto", strategy="uniform:4"))
    held = sum(weight.nbytes for weight in module.parameters())
    assert all(weight.grad.untyped_storage().resizable() for weight in module.parameters())
    with peak_memory(held=module, rss=False) as memory:
        module.zero_grad(set_to_none=True)
    assert memory.net_bytes == -held


class Wide(nn.Module):
    """Weights that are large beside the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = nn.Linear(128, 64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.recurrence(torch.cat([x, h], 1)))
        return h, h


@pytest.mark.usefixtures("always")
def test_what_says_nothing_is_none() -> None:
    module = cases.tanh_cell()
    assert all(window.decay is None for window in ran(module, strategy="retain"))
    assert all(window.reach is None for window in ran(module, executor="checkpoint"))
    inputs, targets = cases.random_data(8)
    assert run_window(module, F.mse_loss, inputs, targets, strategy="step").decay is None
    frozen = cases.tanh_cell().requires_grad_(requires_grad=False)
    assert all(w.decay is None for w in ran(frozen, optimizer=None))


@pytest.mark.usefixtures("always")
def test_a_gradient_that_vanishes_is_held_against_others() -> None:
    """Its own error is noise without end, its reach is not."""

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return (y * target).mean()

    module = cases.tanh_cell()
    inputs, targets = cases.random_data(NUM_STEPS)
    targets[NUM_STEPS // 2 :] *= 1e-9
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    tbptt = TBPTT(module, loss_fn, K1, K2, optimizer, strategy="uniform:2")
    reaches = [window.reach for window in tbptt.windows(TensorSequence(inputs, targets))]
    before, after = reaches[NUM_STEPS // 2 // K1 - 1], reaches[-1]
    assert before is not None
    assert after is not None
    assert before.above > 0
    assert (after.above, after.within) == (0, 2)


@pytest.mark.parametrize("strategy", ["uniform:2", "retain"])
def test_windows_rest_as_long_as_it_takes(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only sketches and windows move; under "retain" gradients that stay are read."""
    now, spent = [0.0], [0.0]
    known = reach_gauge.sketch

    def slow(weights: Any) -> Any:
        now[0] += 0.5
        spent[0] += 0.5
        return known(weights)

    monkeypatch.setattr(reach_gauge, "sketch", slow)
    monkeypatch.setattr(reach_gauge.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(reach_gauge, "_SHARE", 20.0)
    measured = 0
    given: dict[str, Any] = {"strategy": strategy, "optimizer": None}
    for window in ran(cases.tanh_cell(), num_steps=400, **given):
        now[0] += 10.0
        measured += window.decay is not None
    assert (measured >= 2) == (strategy != "retain")
    assert spent[0] > 0.0
    assert spent[0] <= now[0] / reach_gauge._SHARE + 0.5 * (K2 // 2 + 1)


@pytest.mark.usefixtures("always")
def test_long_windows_have_few_borders() -> None:
    *_, window = ran(cases.tanh_cell(), k1=200, k2=None, num_steps=200, strategy="step")
    assert window.decay is not None
    assert 50 == len(window.decay.borders) <= reach_gauge._MOST_BORDERS + 1


@pytest.mark.usefixtures("always")
def test_a_device_is_waited_for_once() -> None:
    def run(put: Any, waits: SimulatedWaits) -> tuple[list[Any], list[int]]:
        module, counts, found = put(cases.lstm_cell()), [0], []
        optimizer = torch.optim.SGD(module.parameters(), 0.0)
        tbptt = TBPTT(module, F.mse_loss, K1, K2, optimizer, strategy="uniform:2")
        data = TensorSequence(*map(put, cases.random_data(NUM_STEPS)))
        for window in tbptt.windows(data):
            counts.append(waits.total)
            found.append(window.decay)
        return found, [after - before for before, after in itertools.pairwise(counts)]

    expected, _ = run(lambda given: given, SimulatedWaits())
    with SimulatedWaits() as waits:
        found, counts = run(on_device, waits)
    assert set(counts[4:]) == {1}, waits.found
    for one, other in zip(found[1:], expected[1:], strict=True):
        for mine, its in zip(one.borders, other.borders, strict=True):
            assert mine.error == pytest.approx(its.error, rel=1e-9, abs=1e-13)
            assert mine.norm == (None if its.norm is None else pytest.approx(its.norm, rel=1e-9))


class TestReach:
    def test_is_the_first_border_from_which_all_are_within(self) -> None:
        for errors in itertools.product((0.5, 0.01), repeat=4):
            errors_at = dict(zip((2, 3, 5, 9), errors, strict=True))
            borders = [Border(place, 1.0, error) for place, error in errors_at.items()]
            reach = Decay((*borders, Border(12, None, 0.0)), 2).reach(0.1)
            enough = [p for p in errors_at if all(errors_at[q] < 0.1 for q in errors_at if q >= p)]
            missing = [place for place, error in errors_at.items() if error >= 0.1]
            assert reach.within == min(enough, default=None)
            assert reach.above == max(missing, default=0)
            assert reach.steps == min(enough, default=12)

    def test_is_told_in_words(self) -> None:
        borders = (Border(25, 1.0, 0.5), Border(50, 0.5, 0.01), Border(1000, None, 0.0))
        assert str(Decay(borders, 25).reach(0.1)) == "25 to 50 of 1,000 steps at 0.1"
        assert str(Decay(borders, 25).reach(1e-3)) == "more than 50 of 1,000 steps at 0.001"
        with pytest.raises(ArgumentError, match="tolerance=0 must be a positive number"):
            Decay(borders, 25).reach(0)

    def test_growth_counts_where_no_loss_is_added(self) -> None:
        norms = [(1, 9.0), (2, 1.0), (3, 3.0), (4, 4.0), (5, None)]
        decay = Decay(tuple(Border(place, norm, 0.0) for place, norm in norms), 2)
        assert decay.growth == 4.0
        assert Decay(decay.borders[-2:], 2).growth is None


SIZES = [(1,), (3, 5), (256,), (300, 7), (257, 256), (513, 300), (700, 700)]


class TestSketch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_linear_and_has_the_norm(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in SIZES]

        def given(rank_one: bool, scale: float) -> list[Tensor]:
            out = [torch.randn(size, generator=generator, dtype=dtype) * scale for size in SIZES]
            if rank_one:
                out = [g[:1] * g[:, :1] if g.dim() > 1 else g for g in out]
            return out

        for rank_one in (False, True):
            one, other = given(rank_one, 1.0), given(rank_one, 1e-3)
            rows = [self.of(weights, grads) for grads in (one, other)]
            both = self.of(weights, [a + b for a, b in zip(one, other, strict=True)])
            close = 1e-12 if dtype is torch.float64 else 1e-4
            torch.testing.assert_close(*map(torch.tensor, (sum(rows), both)), rtol=0, atol=close)
            norms = tail_norms([rows[0] * 0, *rows])
            exact = sum(float(g.double().square().sum()) for g in other) ** 0.5
            assert norms[0] == pytest.approx(exact, rel=ROUGHLY)

    def test_no_two_elements_share_bucket_and_sign_for_no_reason(self) -> None:
        """Each single element is 1 or -1 in one bucket; most are used, and signs are even."""
        weight = nn.Parameter(torch.zeros(2 * BUCKETS * BUCKETS + 77))
        seen = torch.zeros(2, BUCKETS)
        for place in range(0, len(weight), 397):
            weight.grad = torch.zeros_like(weight)
            weight.grad[place] = 1.0
            row = torch.tensor(sketch([weight]))
            assert sorted(row.abs().tolist()) == [0.0] * (BUCKETS - 1) + [1.0]
            bucket = int(row.abs().argmax())
            seen[int(row[bucket] > 0), bucket] += 1
        assert (seen.sum(0) > 0).float().mean() > 0.6
        assert seen.sum(1).tolist() == pytest.approx([float(seen.sum()) / 2] * 2, rel=0.15)

    def test_is_the_same_wherever_it_is_made(self) -> None:
        weights = [nn.Parameter(torch.zeros(size)) for size in SIZES]
        grads = [torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in SIZES]
        row = torch.tensor(self.of(weights, grads), dtype=torch.float32)
        elsewhere = [on_device(weight) for weight in weights]
        for weight, grad in zip(elsewhere, grads, strict=True):
            weight.grad = on_device(grad)
        with SimulatedWaits():
            there = sketch(elsewhere)
        torch.testing.assert_close(there.values, row, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("large", [1, BUCKETS * BUCKETS])
    def test_is_the_same_of_small_weights_together(self, large: int) -> None:
        generator = torch.Generator().manual_seed(3)
        sizes = [(7, 300), (large,), (5,), (3, 4), (255,)]
        weights = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
        units: list[Unit | None] = [
            Unit(torch.rand(size, generator=generator).double(), 0.25) for size in sizes
        ]
        units[3] = None
        for given in (None, units):
            sketcher = Sketcher(weights, given)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).double()
            for change in (lambda grad: grad, lambda grad: grad.mT.contiguous().mT, lambda _: None):
                assert weights[0].grad is not None
                weights[0].grad = change(weights[0].grad)
                expected = [sketch(weights), *([] if given is None else [sketch(weights, given)])]
                for row, its in zip(sketcher.rows(), expected, strict=True):
                    torch.testing.assert_close(*map(torch.tensor, (row, its)), rtol=0, atol=1e-11)

    @pytest.mark.parametrize("put", [lambda given: given, on_device])
    def test_is_in_units_of_steps_where_these_are_given(self, put: Any) -> None:
        """As of gradients that were divided before, however a gradient or a unit lies."""
        generator = torch.Generator().manual_seed(2)
        weights, divided = [], []
        for size in SIZES:
            grad, squares = (torch.rand(size, generator=generator) + 0.1 for _ in range(2))
            weight = nn.Parameter(torch.zeros(size))
            weight.grad = grad.mT.contiguous().mT if grad.dim() > 1 else grad
            quotient = nn.Parameter(torch.zeros(size))
            quotient.grad = (weight.grad / (squares.sqrt() + 0.25)).clone()
            weights.append((weight, Unit(put(squares), 0.25)))
            divided.append(quotient)
        weights[1][1].squares.zero_()
        divided[1].grad = weights[1][0].grad / 0.25
        given = [put(weight) for weight, _ in weights]
        for there, (here, _) in zip(given, weights, strict=True):
            there.grad = put(here.grad)
        units = [None, *(unit for _, unit in weights[1:])]
        divided[0].grad = weights[0][0].grad
        expected = torch.tensor(sketch(divided), dtype=torch.float32)
        with SimulatedWaits():
            row = sketch(given, units)
        row = row.values if put is on_device else torch.tensor(row, dtype=torch.float32)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize(
        ("optimizer", "has_units"),
        [
            (torch.optim.Adam, True),
            (torch.optim.NAdam, True),
            (torch.optim.RMSprop, True),
            (torch.optim.Adagrad, True),
            (torch.optim.SGD, False),
        ],
    )
    def test_units_are_what_steps_divide_by(self, optimizer: Any, has_units: bool) -> None:
        weight, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        steps = optimizer([weight, frozen], lr=0.1)
        for _ in range(3):
            weight.grad = torch.tensor([1e-3, 1.0, 1e3])
            steps.step()
        units = step_units(steps, [weight, frozen])
        assert (units is not None) == has_units
        assert step_units(None, [weight]) is None
        if units is not None and units[0] is not None:
            made = torch.tensor([1e-3, 1.0, 1e3]) / (units[0].squares.sqrt() + units[0].eps)
            assert float(made.max() / made.min()) < 1.01

    def test_half_precision_and_complex_numbers_count_and_sparse_ones_do_not(self) -> None:
        half = nn.Parameter(torch.zeros(300, dtype=torch.bfloat16))
        half.grad = torch.ones_like(half)
        assert tail_norms([sketch([half]), sketch([half]) * 0])[0] == pytest.approx(
            300**0.5, rel=ROUGHLY
        )
        pair = nn.Parameter(torch.zeros(300, dtype=torch.complex64))
        pair.grad = torch.full_like(pair, 3 + 4j)
        assert tail_norms([sketch([pair]), sketch([pair]) * 0])[0] == pytest.approx(
            5 * 300**0.5, rel=ROUGHLY
        )
        table = nn.Embedding(4, 3, sparse=True)
        table(torch.tensor([1])).sum().backward()
        assert not sketch([table.weight]).any()

    @staticmethod
    def of(weights: list[nn.Parameter], grads: list[Tensor]) -> Any:
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        return sketch(weights)
