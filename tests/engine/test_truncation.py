"""`truncation="roulette"`: its law, what a draw runs, and what it is refused for."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise, product
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    WIDTH,
    clear_gradients,
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
from grids import covering
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, LaneSource, TensorSequence, Trainer
from tbptt_ckpt.errors import TbpttWarning
from tbptt_ckpt.executor.observer import ActionTrace
from tbptt_ckpt.schedule import Advance, Differentiate, Keep, Roulette
from tbptt_ckpt.trainer import JsonLines

STEPS, K1, K2 = 13, 3, 10
SURVIVAL = (0.9, 0.5, 0.7)


@dataclass(frozen=True)
class Drawn(Roulette):
    """Windows draw these numbers, so many of them each, in turn."""

    numbers: tuple[float, ...] = ()
    windows: int = 1

    def number(self, window: int) -> float:
        return self.numbers[window // self.windows]


def survivals(roulette: Roulette, count: int) -> list[float]:
    """The probabilities of crossing the first borders, one after the other."""
    return list(islice(accumulate(roulette.probabilities(), lambda a, b: a * b), count))


def numbers(roulette: Roulette, most_borders: int) -> tuple[float, ...]:
    """What stops a window at each of so many borders, and what does at none."""
    edges = [1.0, *survivals(roulette, most_borders), 0.0]
    return tuple((above + below) / 2 for above, below in pairwise(edges))


def every_draw(roulette: Roulette, most_borders: int) -> Iterator[Roulette]:
    """All windows draw alike, in each way."""
    for number in numbers(roulette, most_borders):
        yield Drawn(roulette.survival, roulette.every, numbers=(number,), windows=1000)


def stops(start: int, new_start: int, every: int) -> list[int]:
    """Where a window's gradient may end, the new steps first."""
    return [*range(new_start, start, -every), start]


# Each makes a module, the first state, the sequence, and the naive loop's view of them.
Made = tuple[nn.Module, Any, TensorSequence, naive.Problem]


def cell() -> Made:
    module, data, state = lstm_cell(), random_data(STEPS), (random_state(2), random_state(3))
    return module, state, TensorSequence(*data), naive_problem(module, *data, state)


def segments() -> Made:
    module, data = lstm(), random_data(STEPS)
    state = (random_state(2)[None], random_state(3)[None])
    return module, state, TensorSequence(*data), naive_problem(module, *data, state)


def resets() -> Made:
    module, (x, y), state = tanh_cell(), random_data(STEPS), random_state()
    begins = torch.rand(STEPS, LANES, generator=torch.Generator().manual_seed(5)) < 0.15
    begins[1], begins[9] = False, torch.tensor([True, False])

    def step(given: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        return module(given[0], torch.where(given[1][:, None], state, h))

    problem = naive_problem(module, x, y, state)
    problem.step, problem.inputs = step, list(zip(x, begins, strict=True))
    return module, state, TensorSequence(x, y, resets=begins), problem


def learned() -> Made:
    module, data = tanh_cell(), random_data(STEPS)
    state = nn.Parameter(random_state())
    problem = naive_problem(module, *data, state, extra_parameters=[state])
    return module, state, TensorSequence(*data), problem


def estimates(
    make: Callable[[], Made], overlap: str, roulette: Roulette, k2: int | None = K2
) -> list[dict[int, list[Tensor]]]:
    """By hand, for each window and each step where its gradient may end: what it then is."""
    every, found = roulette.every or K1, []
    cuts: dict[int, list[naive.NaiveWindow]] = {}
    for index, (start, new_start, stop) in enumerate(naive.windows(STEPS, K1, k2)):
        before: list[Tensor] | None = None
        estimate: list[Tensor] = []
        of_window = {}
        ends = stops(start, new_start, every)
        for end, survival in zip(ends, [1.0, *survivals(roulette, len(ends) - 1)], strict=True):
            reach = stop - end
            if reach not in cuts:
                cuts[reach] = list(naive.OVERLAPS[overlap](make()[-1], K1, reach))
            window = cuts[reach][index]
            assert window.start == end
            grads = [torch.zeros(()) if g is None else g for g in window.grads]
            if before is None:
                estimate = grads
            else:
                parts = zip(estimate, grads, before, strict=True)
                estimate = [e + (g - b) / survival for e, g, b in parts]
            before = grads
            of_window[end] = estimate
        found.append(of_window)
    return found


PLANS = [
    ("retain", "replay", True),
    ("uniform:2", "checkpoint", False),
    ("revolve:2", "replay", False),
    ("sqrt", "checkpoint", "auto"),
    ("uniform:5", "replay", "auto"),
]


def check_draws(
    make: Callable[[], Made],
    overlap: str,
    roulette: Roulette,
    *plans: tuple[Any, ...],
    k2: int | None = K2,
) -> None:
    """Every draw against its estimate by hand, and their mean against the whole gradient."""
    every, cuts = roulette.every or K1, naive.windows(STEPS, K1, k2)
    expected = estimates(make, overlap, roulette, k2)
    whole = [window.grads for window in naive.OVERLAPS[overlap](make()[-1], K1, k2)]
    draws = numbers(roulette, max(map(len, expected)) - 1)
    for strategy, executor, time_batching in plans:
        module, state, sequence, problem = make()
        tbptt = TBPTT(
            *(module, mean_loss, K1, k2),
            overlap=overlap,
            truncation=Drawn(roulette.survival, every, numbers=draws, windows=len(cuts)),
            strategy=strategy,
            executor=executor,
            time_batching=time_batching,
        )
        seen: list[dict[int, list[Tensor]]] = [{} for _ in cuts]
        for window in (w for _ in draws for w in tbptt.windows(sequence, state)):
            grads = [torch.zeros(()) if g is None else g for g in gradients(problem.parameters)]
            clear_gradients(problem.parameters)
            where, of_window = (strategy, executor, window), expected[window.index]
            assert relative_error(grads, of_window[window.start]) <= 1e-12, where
            crossed = survivals(roulette, list(of_window).index(window.start))
            assert window.survival == pytest.approx([1.0, *crossed][-1], abs=1e-15), where
            seen[window.index][window.start] = grads
        for (start, new_start, _), of_window, full in zip(cuts, seen, whole, strict=True):
            ends = stops(start, new_start, every)
            edges = [1.0, *survivals(roulette, len(ends) - 1), 0.0]
            shares = [above - below for above, below in pairwise(edges)]
            terms = [
                [share * grad for grad in of_window[end]]
                for share, end in zip(shares, ends, strict=True)
            ]
            mean = [sum(each, torch.zeros(())) for each in zip(*terms, strict=True)]
            assert relative_error(mean, full) <= 1e-12, (strategy, executor, start, new_start)


@covering(together=1, make=[cell, segments, resets], overlap=OVERLAPS)
def test_the_mean_over_all_draws_is_the_whole_gradient(
    make: Callable[[], Made], overlap: str
) -> None:
    """The exact law; each draw is what scaling by hand gives, whatever runs it."""
    check_draws(make, overlap, Roulette(SURVIVAL), *PLANS)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_learned_first_state(executor: str, overlap: str) -> None:
    """It gets a gradient where the draw reaches it, divided by the probability of that."""
    for k2 in (K2, None):
        check_draws(learned, overlap, Roulette(0.6), ("uniform:2", executor, "auto"), k2=k2)


@pytest.mark.parametrize("every", [1, 2, 4, 5, 20])
def test_borders_elsewhere(every: int) -> None:
    check_draws(cell, "refresh", Roulette(0.7, every), ("uniform:3", "replay", "auto"))


def test_wider_borders_under_stale_overlap() -> None:
    check_draws(cell, "stale", Roulette(0.7, 2 * K1), ("uniform:2", "replay", "auto"))


@pytest.mark.parametrize("loss", ["new", "last"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_of_new_steps_are_all_there(loss: str, reduction: str) -> None:
    """Whatever is drawn: its value is that of the whole window."""
    values = []
    for drawn in ("fixed", *every_draw(Roulette(SURVIVAL), 3)):
        module, state, sequence, _ = cell()
        options: dict[str, Any] = {"loss": loss, "reduction": reduction, "truncation": drawn}
        tbptt = TBPTT(module, mean_loss, K1, K2, **options, strategy="uniform:2")
        values.append([window.loss_value for window in tbptt.windows(sequence, state)])
    assert all(found == values[0] for found in values)


class TestDraws:
    def test_follow_the_probabilities(self) -> None:
        """10,000 windows with three borders, seeded: within four deviations of the law."""
        roulette, count = Roulette(SURVIVAL, seed=3), 10_000
        crossing = survivals(roulette, 3)
        drawn = [roulette.number(window) for window in range(count)]
        found = Counter(sum(number < survival for survival in crossing) for number in drawn)
        for crossed, (above, below) in enumerate(pairwise([1.0, *crossing, 0.0])):
            share = above - below
            deviation = (count * share * (1 - share)) ** 0.5
            assert abs(found[crossed] - count * share) <= 4 * deviation, crossed

    def starts(self, tbptt: TBPTT) -> list[int]:
        return [window.start for window in tbptt.windows(TensorSequence(*random_data(30)))]

    def engine(self, **options: Any) -> TBPTT:
        return TBPTT(tanh_cell(), mean_loss, 2, 12, **{"truncation": "roulette", **options})

    def test_are_those_of_the_seed_under_every_plan_and_in_no_other_generator(self) -> None:
        expected = self.starts(self.engine())
        assert len({*expected}) > 4
        before = torch.random.get_rng_state()
        for strategy, executor in product(["retain", "revolve:1"], EXECUTORS):
            torch.rand(1)  # others may draw
            found = self.starts(self.engine(strategy=strategy, executor=executor))
            assert found == expected
        torch.random.set_rng_state(before)
        assert self.starts(self.engine(truncation=Roulette(seed=1))) != expected

    def test_go_on_from_sequence_to_sequence(self) -> None:
        tbptt = self.engine()
        assert self.starts(tbptt) != self.starts(tbptt)

    def test_never_stop_inside_the_new_steps(self) -> None:
        tbptt = self.engine(truncation=Roulette(1e-9))
        windows = list(tbptt.windows(TensorSequence(*random_data(60))))
        assert all(window.start == window.new_start for window in windows)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_what_is_not_reached_is_neither_kept_nor_differentiated(overlap: str) -> None:
    """Under refresh it is advanced over once, for its state; under stale it does not run."""
    for drawn in every_draw(Roulette(SURVIVAL), 3):
        trace = ActionTrace()
        module, state, sequence, _ = cell()
        tbptt = TBPTT(
            *(module, mean_loss, K1, K2),
            overlap=overlap,
            truncation=drawn,
            strategy="uniform:2",
            observer=trace,
        )
        whole = naive.windows(STEPS, K1, K2)
        for window in tbptt.windows(sequence, state):
            actions, trace.actions = trace.actions, []
            start, stop = window.start, window.stop
            assert not any(isinstance(a, Keep) and a.step < start for a in actions)
            parts = [(a.start, a.stop) for a in actions if isinstance(a, Differentiate)]
            assert min(begin for begin, _ in parts) == start
            assert sum(end - begin for begin, end in parts) == stop - start
            lead = [a for a in actions if isinstance(a, Advance) and a.start < start]
            first = whole[window.index][0]
            if overlap == "refresh" and first < start:
                assert lead == [Advance(first, start)]
                assert window.first == window.run_start == first
            else:
                assert lead == []
                assert window.first == start


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_stream_of_unknown_length_keeps_what_later_windows_need(overlap: str) -> None:
    inputs, targets = random_data(STEPS)

    def run(sequence: object) -> list[tuple[int, list[Tensor | None]]]:
        module = lstm_cell()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        tbptt = TBPTT(
            *(module, mean_loss, K1, 9, optimizer), overlap=overlap, truncation=Roulette(0.6)
        )
        windows = tbptt.windows(sequence)
        return [(window.start, gradients(list(module.parameters()))) for window in windows]

    streamed = run(zip(inputs, targets, strict=True))
    known = run(TensorSequence(inputs, targets))
    assert [start for start, _ in streamed] == [start for start, _ in known]
    for (_, found), (_, expected) in zip(streamed, known, strict=True):
        assert relative_error(found, expected) <= 1e-12


def test_windows_without_a_loss_reach_nowhere() -> None:
    inputs, targets = random_data(STEPS)
    weight = torch.ones(STEPS, dtype=torch.float64)
    weight[3:9] = 0
    tbptt = TBPTT(tanh_cell(), mean_loss, K1, K2, truncation=Roulette(1e-9))
    windows = list(tbptt.windows(TensorSequence(inputs, targets, weight=weight)))
    assert [window.loss is None for window in windows] == [False, True, True, False, False]
    for window in windows:
        whole = naive.windows(STEPS, K1, K2)[window.index][0]
        assert window.start == (whole if window.loss is None else window.new_start)
        assert window.survival == 1.0


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_accumulated_windows_are_their_mean(overlap: str) -> None:
    expected = estimates(cell, overlap, Roulette(SURVIVAL))
    module, state, sequence, problem = cell()
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    tbptt = TBPTT(
        *(module, mean_loss, K1, K2, optimizer),
        overlap=overlap,
        truncation=Roulette(SURVIVAL),
        accumulate=2,
        strategy="uniform:2",
    )
    parts: list[Sequence[Tensor]] = []
    for window in tbptt.windows(sequence, state):
        parts.append(expected[window.index][window.start])
        if window.updated:
            mean = [torch.stack(each).mean(0) for each in zip(*parts, strict=True)]
            assert relative_error(gradients(problem.parameters), mean) <= 1e-12
            parts = []


def test_lanes_of_many_lengths() -> None:
    """Sequences begin and end in the middle of windows: the mean is the gradient of the whole."""
    x, y = random_data(4 * STEPS)
    edges = [0, 5, 16, 20, 33, 45, 4 * STEPS]
    parts = [TensorSequence(x[a:b, 0], y[a:b, 0]) for a, b in pairwise(edges)]

    def grads(truncation: Any, repeats: int = 1) -> list[tuple[int, int, list[Tensor]]]:
        module, found = tanh_cell(), []
        parameters = list(module.parameters())
        tbptt = TBPTT(module, mean_loss, K1, K2, truncation=truncation, strategy="uniform:4")
        for _ in range(repeats):
            for window in tbptt.windows(LaneSource(parts, 2), random_state()):
                found.append((window.index, window.start, gradients(parameters)))
                clear_gradients(parameters)
        return found

    whole = [found for _, _, found in grads("fixed")]
    roulette, count = Roulette(0.5), len(whole)
    draws = numbers(roulette, 3)
    drawn = Drawn(0.5, numbers=draws, windows=count)
    means = [[torch.zeros_like(g) for g in each] for each in whole]
    shares = [above - below for above, below in pairwise([1.0, *survivals(roulette, 3), 0.0])]
    for place, (index, _, found) in enumerate(grads(drawn, len(draws))):
        for mean, grad in zip(means[index], found, strict=True):
            mean += shares[place // count] * grad  # draws that a short window has not are alike
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(means, whole, strict=True))


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"truncation": "roulete"}, "is not 'fixed', 'roulette'"),
        ({"truncation": "roulette:0"}, "is not 'fixed', 'roulette'"),
        ({"truncation": "roulette:1.5"}, "is not 'fixed', 'roulette'"),
        ({"truncation": "roulette:0.5", "k2": 3}, "k2 above k1"),
        ({"truncation": "roulette", "k2": 2}, "k2=2 and k1=3 has nothing to stop"),
        (
            {"truncation": Roulette(every=4), "overlap": "stale"},
            "every a multiple of k1=3, such as every=3",
        ),
    ],
)
def test_what_cannot_be_is_one_error(options: dict[str, Any], words: str) -> None:
    given = {"k1": K1, "k2": K2, **options}
    with pytest.raises(ArgumentError, match=words) as caught:
        TBPTT(tanh_cell(), mean_loss, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("survival", [0, 1.1, -0.5, (), (0.5, 0.0), (0.5, True)])
def test_what_is_no_probability(survival: Any) -> None:
    with pytest.raises(ArgumentError, match="probability above 0 and at most 1"):
        Roulette(survival)


def test_texts_and_objects() -> None:
    found = TBPTT(tanh_cell(), mean_loss, 2, 6, truncation="roulette:0.5").options
    assert found.parsed_truncation() == Roulette(0.5)
    assert [str(Roulette(0.5)), str(Roulette())] == ["roulette:0.5", "roulette:0.8"]
    several = Roulette([0.5, 1], 4)
    assert str(several) == "Roulette(survival=(0.5, 1.0), every=4, seed=0)"


# What is told


class Growing(nn.Module):
    """Its state grows, or shrinks, by a factor in each step."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(1, WIDTH)), factor

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.factor * h + self.weight * x[:, :1]
        return h, h


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_gradient_that_grows_with_distance_is_told_of_once(
    executor: str, recwarn: pytest.WarningsRecorder
) -> None:
    def told(factor: float, truncation: Any) -> list[str]:
        module, sequence = Growing(factor), TensorSequence(*(d.float() for d in random_data(40)))
        tbptt = TBPTT(module, mean_loss, 2, 12, truncation=truncation, executor=executor)
        for _ in tbptt.windows(sequence, torch.zeros(LANES, WIDTH)):
            module.zero_grad()
        found = [str(w.message) for w in recwarn if w.category is TbpttWarning]
        recwarn.clear()
        return found

    for truncation in (Roulette(0.9), Roulette((0.9, 0.5, 0.5))):
        (message,) = told(1.2, truncation)
        assert "grows with distance" in message
        assert "Use truncation='fixed'" in message
        assert told(0.9, truncation) == []
    assert told(1.2, "fixed") == []


def test_a_resumed_run_tells_what_an_undisturbed_one_does() -> None:
    """Windows whose gradient grew count before and after; what was told is not told again."""

    def trainer() -> Trainer:
        module = Growing(1.2)
        optimizer = torch.optim.SGD(module.parameters(), 0.0)
        tbptt = TBPTT(module, mean_loss, 2, 12, optimizer, truncation=Roulette(0.9))
        sequence = TensorSequence(*(d.float() for d in random_data(40)))
        return Trainer(tbptt, sequence, init_state=torch.zeros(LANES, WIDTH), epochs=1)

    def told(given: Trainer, count: int | None = None) -> int:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in islice(given.windows(), count):
                pass
        return sum(w.category is TbpttWarning for w in found)

    for done in range(1, 20):
        one, two = trainer(), trainer()
        before = told(one, done)
        two.load_state_dict(one.state_dict())
        assert before + told(two) == 1


def test_events_say_how_far_and_how_probably(tmp_path: Path) -> None:
    module = lstm_cell()
    tbptt = TBPTT(
        *(module, mean_loss, K1, K2, torch.optim.SGD(module.parameters(), 0.1)),
        truncation=Roulette(0.6),
    )
    sinks = [JsonLines(tmp_path / "events")]
    trainer = Trainer(tbptt, TensorSequence(*random_data(20)), epochs=1, events=sinks)
    expected = [(w.start, w.survival, w.executed_steps) for w in trainer.windows()]
    lines = map(json.loads, (tmp_path / "events").read_text().splitlines())
    told = [
        (e["start"], e["survival"], e["stop"] - e["new_start"] + e["recomputed_steps"])
        for e in lines
        if e["event"] == "window"
    ]
    assert told == expected
    assert len({survival for _, survival, _ in told}) > 1


class Beginning(nn.Module):
    """A weight that the first step of a sequence alone has."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.begin = tanh_cell(), nn.Parameter(random_state())

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.cell(x, self.begin if state is None else state)


def test_a_weight_that_is_not_reached_is_no_cause_for_alarm(
    recwarn: pytest.WarningsRecorder,
) -> None:
    module = Beginning()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    tbptt = TBPTT(module, mean_loss, K1, None, optimizer, truncation="roulette")
    reached = [
        (window.start == 0, module.begin.grad is not None)
        for window in tbptt.windows(TensorSequence(*random_data(30)))
    ]
    assert all(is_first == has_gradient for is_first, has_gradient in reached)
    assert {is_first for is_first, _ in reached} == {False, True}
    assert [str(w.message) for w in recwarn if w.category is TbpttWarning] == []


class Scarce(nn.Module):
    """Finds no memory at some calls of a run."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.cell, self.calls, self.done = lstm_cell(), calls, 0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.done += 1
        if self.done in self.calls:
            raise MemoryError
        return self.cell(x, state)


def test_a_window_that_is_run_again_draws_what_it_drew() -> None:
    def run(*calls: int) -> tuple[list[int], list[Tensor]]:
        module = Scarce(*calls)
        tbptt = TBPTT(
            *(module, mean_loss, K1, K2, torch.optim.SGD(module.parameters(), 0.1)),
            truncation=Roulette(0.6),
            strategy="uniform:4",
        )
        trainer = Trainer(tbptt, TensorSequence(*random_data(20)), epochs=1)
        return [window.start for window in trainer.windows()], list(module.parameters())

    starts, weights = run()
    with pytest.warns(TbpttWarning, match="did not fit"):
        again, found = run(20, 60)
    assert again == starts
    assert all(relative_error([a], [b]) <= 1e-12 for a, b in zip(found, weights, strict=True))


# Snapshots


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_resumed_run_draws_as_one_that_was_never_stopped(overlap: str, tmp_path: Any) -> None:
    def trainer(seed: int = 0) -> tuple[Trainer, list[Tensor]]:
        module = lstm_cell()
        optimizer = torch.optim.Adam(module.parameters(), 0.05)
        tbptt = TBPTT(
            *(module, mean_loss, K1, K2, optimizer),
            overlap=overlap,
            truncation=Roulette(0.6, seed=seed),
        )
        return Trainer(tbptt, TensorSequence(*random_data(20)), epochs=3), list(module.parameters())

    straight, weights = trainer()
    starts = [window.start for window in straight.windows()]
    for stopped_after in (2, 7, 9):  # within a pass, at its end, in the next one
        one, _ = trainer()
        before = [window.start for window in islice(one.windows(), stopped_after)]
        state = one.state_dict()
        two, found = trainer()
        two.load_state_dict(state)
        assert before + [window.start for window in two.windows()] == starts
        assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))
        other, _ = trainer(seed=1)
        with pytest.raises(ArgumentError, match="truncation="):
            other.load_state_dict(state)
        other.load_state_dict(state, accept=["truncation"])
