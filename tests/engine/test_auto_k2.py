"""`k2="auto"`: held against plain loops, which choose by whole gradients what it chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import naive
import naive_auto_k2
import pytest
import torch
from cases import (
    LANES,
    OVERLAPS,
    check_window,
    gradients,
    lstm,
    lstm_cell,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
)
from compiled_kinds import LEAF, names, normed
from simulated_device import SimulatedWaits, on_device
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, InfeasibleBudgetError, TensorSequence, Trainer
from tbptt_ckpt.engine import reach_rule
from tbptt_ckpt.errors import SnapshotError, TbpttWarning
from tbptt_ckpt.executor import compiled_steps
from tbptt_ckpt.schedule import Differentiate
from tbptt_ckpt.trainer import JsonLines

STEPS, K1, MAX_K2 = 118, 3, 18
LR, TOLERANCE = 0.03, 0.05
FIRST, MOST = 4, 3  # audits before anything is chosen, windows between two
EARLY, RARE = 6, 5  # audits, after which there are so many at most between two

# Each makes a module, the first state, the sequence, and the naive loop's view of them.
Made = tuple[nn.Module, Any, TensorSequence, naive.Problem]


def data_of(num_steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Targets are inputs of the step before, later on of five steps before, and noise."""
    inputs, noise = random_data(num_steps)
    targets = 0.2 * noise
    for step in range(5, num_steps):
        delay = 1 if step < num_steps // 2 else 5
        targets[step, :, :2] += inputs[step - delay]
    return inputs, targets


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices follow each other sooner."""
    monkeypatch.setattr(reach_rule, "_FIRST", FIRST)
    monkeypatch.setattr(reach_rule, "_MOST", MOST)
    monkeypatch.setattr(reach_rule, "_EARLY", EARLY)
    monkeypatch.setattr(reach_rule, "_RARE", RARE)


def cell() -> Made:
    module, data, state = lstm_cell(), data_of(), (random_state(2), random_state(3))
    return module, state, TensorSequence(*data), naive_problem(module, *data, state)


def segments() -> Made:
    module, data = lstm(), data_of()
    state = (random_state(2)[None], random_state(3)[None])
    return module, state, TensorSequence(*data), naive_problem(module, *data, state)


def silent() -> Made:
    """Windows without a loss in between, some of them several in a row."""
    module, data, state = tanh_cell(), data_of(), random_state()
    weights = [float(t // K1 % 7 not in (2, 4, 5)) for t in range(STEPS)]
    weight = torch.tensor(weights, dtype=torch.float64)
    problem = naive_problem(module, *data, state, weights=weights)
    return module, state, TensorSequence(*data, weight=weight), problem


def resets() -> Made:
    module, (x, y), state = tanh_cell(), data_of(), random_state()
    begins = torch.rand(STEPS, LANES, generator=torch.Generator().manual_seed(5)) < 0.05

    def step(given: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        return module(given[0], torch.where(given[1][:, None], state, h))

    problem = naive_problem(module, x, y, state)
    problem.step, problem.inputs = step, list(zip(x, begins, strict=True))
    return module, state, TensorSequence(x, y, resets=begins), problem


def engine(module: nn.Module, **options: Any) -> TBPTT:
    optimizer = torch.optim.Adam(module.parameters(), LR)
    given = {"max_k2": MAX_K2, "k2_tolerance": TOLERANCE, **options}
    return TBPTT(module, mean_loss, K1, "auto", optimizer, **given)


def expected_windows(
    make: Callable[[], Made], overlap: str, window_tolerance: float | None = None
) -> list[naive_auto_k2.AutoWindow]:
    module, _, _, problem = make()
    optimizer = torch.optim.Adam(module.parameters(), LR)
    rule = naive_auto_k2.Rule(K1, MAX_K2, TOLERANCE, FIRST, MOST, window_tolerance, EARLY, RARE)
    found = naive_auto_k2.windows(problem, rule, optimizer, stale=overlap == "stale")
    return list(found)


PLANS: list[dict[str, Any]] = [
    {"strategy": "retain", "time_batching": False},
    {"strategy": "uniform:4", "time_batching": False},
    {"strategy": "revolve:2", "time_batching": "auto"},
    {"strategy": "optimal", "memory_budget": "1MiB"},
]


EVERY = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("make", "overlap", "plans"),
    [
        (cell, "refresh", PLANS[::2]),
        (silent, "stale", PLANS[:1]),
        *(
            pytest.param(make, overlap, PLANS, marks=EVERY)
            for make in (cell, segments, silent, resets)
            for overlap in OVERLAPS
        ),
    ],
)
def test_windows_and_choices_are_those_of_a_plain_loop(
    make: Callable[[], Made], overlap: str, plans: list[dict[str, Any]]
) -> None:
    expected = expected_windows(make, overlap)
    chosen_sizes = {window.k2 for window in expected if not window.is_audit}
    assert len(chosen_sizes) >= (3 if make is cell else 2)
    for plan in plans:
        module, state, sequence, problem = make()
        tbptt = engine(module, overlap=overlap, **plan)
        for result, window in zip(tbptt.windows(sequence, state), expected, strict=True):
            where = (plan, overlap)
            check_window(where, result, gradients(problem.parameters), window, bitwise_state=False)
            chosen = result.chosen_k2
            assert (chosen is None) == (window.loss is None), where
            if chosen is not None:
                assert (chosen.k2, chosen.is_audit) == (window.k2, window.is_audit), where
                assert (chosen.missing is None) == (window.missing is None), where
                missing = chosen.missing or 0.0, window.missing or 0.0
                assert missing[0] == pytest.approx(missing[1], rel=1e-8, abs=1e-7)


@pytest.mark.parametrize(
    ("overlap", "strategy"),
    [("refresh", "uniform:4"), *(pytest.param(o, "retain", marks=EVERY) for o in OVERLAPS)],
)
def test_compiled_steps_give_the_same_windows_and_choices(
    overlap: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a leaf behind whole blocks, as where an audit cuts it, runs step by step."""
    monkeypatch.setattr(compiled_steps, "BLOCK_STEPS", 2)

    def make() -> Made:
        (module, state), data = normed(), data_of()
        problem = naive_problem(module, *data, state)
        problem.step = module
        return module, state, TensorSequence(*data), problem

    expected = expected_windows(make, overlap)
    assert len({window.k2 for window in expected if not window.is_audit}) > 1
    module, state, sequence, problem = make()
    tbptt = engine(module, overlap=overlap, strategy=strategy, compile="eager")
    for result, window in zip(tbptt.windows(sequence, state), expected, strict=True):
        grads = gradients(problem.parameters)
        check_window(strategy, result, grads, window, bitwise_state=False, tolerance=1e-10)
        if (found := result.chosen_k2) is not None:
            assert (found.k2, found.is_audit) == (window.k2, window.is_audit)
    assert LEAF in names(tbptt)


def test_calls_end_where_the_next_window_begins_and_at_no_other_update_point() -> None:
    module, state, sequence, _ = segments()
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    found = []
    for window in engine(module, strategy="retain", per_step=False).windows(sequence, state):
        chosen = window.chosen_k2
        if chosen is not None and not chosen.is_audit and window.stop % K1 == 0:
            found.append((window.stop - window.start, list(calls)))
        calls.clear()
    assert {reach for reach, _ in found if reach > 3 * K1}
    # The next one's first state, and the last update point's, which is what drift is told by.
    assert all(ran == [K1, reach - 2 * K1, K1] for reach, ran in found if reach > 2 * K1)


def test_single_windows_may_be_asked_to_miss_little_too() -> None:
    of_means = [window.k2 for window in expected_windows(cell, "refresh")]
    expected = [window.k2 for window in expected_windows(cell, "refresh", 0.2)]
    assert sum(expected) > sum(of_means)
    module, state, sequence, _ = cell()
    tbptt = engine(module, strategy="retain", k2_window_tolerance=0.2)
    assert [found.k2 for found in chosen(tbptt, sequence, state)] == expected


def chosen(tbptt: TBPTT, sequence: object, state: Any = None) -> list[Any]:
    return [window.chosen_k2 for window in tbptt.windows(sequence, state)]


@pytest.mark.exhaustive
def test_a_stream_is_run_as_a_sequence_of_known_length() -> None:
    known = cell()
    expected = chosen(engine(known[0]), *known[2:0:-1])
    module, state, _, _ = cell()
    assert chosen(engine(module), zip(*data_of(), strict=True), state) == expected
    assert all(map(torch.equal, module.parameters(), known[0].parameters()))


@pytest.mark.exhaustive
def test_the_one_size_that_is_chosen_is_that_k2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is ever trusted, windows are those of a fixed k2."""
    monkeypatch.setattr(reach_rule, "_FIRST", 10**6)
    module, state, sequence, _ = silent()
    windows = list(engine(module, strategy="uniform:4").windows(sequence, state))
    other, state, sequence, _ = silent()
    optimizer = torch.optim.Adam(other.parameters(), LR)
    fixed = TBPTT(other, mean_loss, K1, MAX_K2, optimizer, strategy="uniform:4")
    for one, its in zip(windows, fixed.windows(sequence, state), strict=True):
        if one.stop % K1 == 0:  # a short last window of the other begins off the grid
            assert one.start == its.start
            assert relative_error([one.state], [its.state]) <= 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 3},
        pytest.param({"optimizer": None}, marks=EVERY),
        pytest.param({"scaler": torch.amp.GradScaler("cpu", init_scale=8.0)}, marks=EVERY),
        pytest.param({"deliver": "once"}, marks=EVERY),
    ],
    ids=lambda options: next(iter(options)),
)
def test_accumulated_gradients_are_audited_window_by_window(options: dict[str, Any]) -> None:
    """Whatever `.grad` holds before: weights that stay are audited alike."""

    def run(**options: Any) -> list[Any]:
        module, state, sequence, _ = cell()
        given = {"optimizer": torch.optim.SGD(module.parameters(), 0.0), **options}
        tbptt = TBPTT(module, mean_loss, K1, "auto", max_k2=MAX_K2, k2_tolerance=0.05, **given)
        return chosen(tbptt, sequence, state)

    expected = run()
    assert len({each.k2 for each in expected if not each.is_audit}) > 1
    for one, other in zip(run(**options), expected, strict=True):
        assert (one.k2, one.is_audit) == (other.k2, other.is_audit)
        errors = one.audited_error or 0.0, other.audited_error or 0.0
        assert errors[0] == pytest.approx(errors[1], rel=1e-6)


class Wide(nn.Module):
    """States and leaves that a budget has to count."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 64)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(x, state)
        return h, (h, c)


def within(budget: int | None, overlap: str) -> tuple[list[int], list[bool]]:
    """The peaks of windows, and which of them are audits."""
    torch.manual_seed(0)
    module = Wide()
    data = TensorSequence(torch.randn(72, 4, 16), torch.randn(72, 4, 64))
    tbptt = TBPTT(
        *(module, mean_loss, 4, "auto", torch.optim.Adam(module.parameters())),
        **{"max_k2": 32, "overlap": overlap, "memory_budget": budget, "measure_memory": True},
        strategy="retain" if budget is None else "optimal",
    )
    windows = list(tbptt.windows(data))
    peaks = [window.peak_bytes or 0 for window in windows]
    return peaks, [bool(w.chosen_k2 and w.chosen_k2.is_audit) for w in windows]


@pytest.mark.parametrize(
    "overlap", ["refresh", pytest.param("stale", marks=pytest.mark.exhaustive)]
)
def test_audits_keep_within_the_budget(overlap: str) -> None:
    peaks, _ = within(None, overlap)
    most = max(peaks)
    with pytest.raises(InfeasibleBudgetError) as caught:
        within(most // 4, overlap)
    smallest = caught.value.smallest_budget_bytes
    assert smallest is not None
    assert smallest < most
    peaks, audits = within(smallest, overlap)
    assert any(audits)
    assert max(peaks) <= smallest


@pytest.mark.parametrize(
    ("overlap", "places"),
    [
        ("refresh", (13, 41)),  # after the first audits, in the next pass
        pytest.param("refresh", (3, 7, 23), marks=EVERY),
        pytest.param("stale", (3, 7, 13, 41), marks=EVERY),
    ],
)
def test_a_resumed_run_goes_on_bit_by_bit(overlap: str, places: tuple[int, ...]) -> None:
    def trainer(**options: Any) -> tuple[Trainer, list[Tensor]]:
        module, state, sequence, _ = cell()
        tbptt = engine(module, overlap=overlap, strategy="uniform:4", **options)
        parameters = list(module.parameters())
        return Trainer(tbptt, sequence, init_state=state, epochs=2), parameters

    straight, weights = trainer()
    expected = [window.chosen_k2 for window in straight.windows()]
    for stopped_after in places:
        one, _ = trainer()
        before = [window.chosen_k2 for window in islice(one.windows(), stopped_after)]
        state = one.state_dict()
        two, found = trainer()
        two.load_state_dict(state)
        assert before + [window.chosen_k2 for window in two.windows()] == expected
        assert all(map(torch.equal, found, weights))
    other, _ = trainer(max_k2=MAX_K2 + K1)
    with pytest.raises(ArgumentError, match="max_k2="):
        other.load_state_dict(state)
    state["truncation"]["audits"]["k2"] = 4
    with pytest.raises(SnapshotError, match="it chose k2=4"):
        trainer()[0].load_state_dict(state)


def test_a_device_is_waited_for_once() -> None:
    def run(put: Any, waits: SimulatedWaits) -> tuple[list[Any], list[int]]:
        module, counts, found = put(lstm_cell()), [0], []
        data = TensorSequence(*map(put, data_of(60)))
        for window in engine(module, strategy="uniform:4").windows(data):
            counts.append(waits.total)
            found.append(window.chosen_k2)
        return found, [after - before for before, after in pairwise(counts)]

    expected, _ = run(lambda given: given, SimulatedWaits())
    with SimulatedWaits() as waits:
        found, counts = run(on_device, waits)
    assert sum(each.is_audit for each in found) > FIRST
    # The first windows, and the leaves of the first audit, are held against their first runs.
    assert set(counts[6:]) == {1}, waits.found
    for one, other in zip(found, expected, strict=True):
        assert (one.k2, one.is_audit) == (other.k2, other.is_audit)
        errors = one.audited_error or 0.0, other.audited_error or 0.0
        assert errors[0] == pytest.approx(errors[1], rel=1e-9, abs=1e-13)


def test_events_say_what_was_chosen(tmp_path: Path) -> None:
    module, state, sequence, _ = cell()
    sinks = [JsonLines(tmp_path / "events")]
    trainer = Trainer(engine(module), sequence, init_state=state, epochs=1, events=sinks)
    expected = [asdict(w.chosen_k2) for w in trainer.windows() if w.chosen_k2 is not None]
    lines = map(json.loads, (tmp_path / "events").read_text().splitlines())
    assert [line["chosen_k2"] for line in lines if line["event"] == "window"] == expected


class Growing(nn.Module):
    """Its state grows, or shrinks, by a factor in each step."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(1, 3)), factor

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.factor * h + self.weight * x[:, :1]
        return h, h


@pytest.mark.parametrize(("factor", "is_told"), [(1.3, True), (1.05, False), (0.8, False)])
def test_a_gradient_that_grows_with_distance_is_told_of_once(
    factor: float, is_told: bool, recwarn: pytest.WarningsRecorder
) -> None:
    sequence = TensorSequence(*(d.float() for d in random_data(90)))
    chosen(engine(Growing(factor)), sequence, torch.zeros(LANES, 3))
    messages = [str(w.message) for w in recwarn if w.category is TbpttWarning]
    assert len(messages) == is_told
    if is_told:
        assert "it explodes" in messages[0]
        assert "clip_grad_norm" in messages[0]


def test_sequences_without_room_for_an_audit_are_reached_back_to_their_start() -> None:
    tbptt = engine(tanh_cell())
    for _ in range(3):
        for window in tbptt.windows(TensorSequence(*random_data(MAX_K2 - K1))):
            assert window.start == 0
            assert window.chosen_k2 == reach_rule.ChosenK2(MAX_K2, False, None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "k2='auto' needs max_k2, .* such as max_k2=48"),
        ({"max_k2": 7}, "max_k2=7 must be a multiple of k1=3, .* such as max_k2=9"),
        ({"max_k2": 3}, "twice as much at least, such as max_k2=6"),
        ({"k2": 6, "max_k2": 12}, "max_k2=12 is for k2='auto', and k2=6 is fixed"),
        ({"k2": None, "k2_tolerance": 0.2}, "k2_tolerance=0.2 is for k2='auto'"),
        ({"k2": 6, "k2_window_tolerance": 0.3}, "k2_window_tolerance=0.3 is for k2='auto'"),
        ({"max_k2": 12, "truncation": "roulette"}, "truncation='roulette' does not go with"),
        ({"max_k2": 12, "executor": "checkpoint"}, "use executor='replay'"),
        ({"max_k2": 12, "strategy": [Differentiate(0, 12)]}, "given as actions, or as a plan"),
        ({"max_k2": 12, "k2_tolerance": 0.0}, "k2_tolerance=0.0 must be a positive number"),
        ({"k2": "automatic"}, "k2='automatic' must be"),
    ],
)
def test_what_cannot_be_is_one_error(options: dict[str, Any], words: str) -> None:
    given = {"k1": 3, "k2": "auto", **options}
    with pytest.raises(ArgumentError, match=words) as caught:
        TBPTT(tanh_cell(), mean_loss, **given)
    assert "\n" not in str(caught.value)


def test_sizes_are_few_and_grow_by_a_quarter() -> None:
    assert reach_rule.reach_sizes(4, 64) == (4, 8, 12, 16, 20, 24, 28, 36, 48, 60, 64)
    assert reach_rule.reach_sizes(3, 6) == (3, 6)
    sizes = reach_rule.reach_sizes(64, 64 * 1000)
    assert len(sizes) == 29
    assert all(size % 64 == 0 for size in sizes)
