"""Gradients, losses, states and drift against the naive loops, over every small window layout.

The default run takes every (T, k1, k2) once and rotates the other choices so that every pair of
choice values occurs; the whole product runs under `-m exhaustive`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import naive
import pytest
import torch
from cases import (
    EXECUTORS,
    OVERLAPS,
    STRATEGIES,
    TanhCell,
    check_window,
    clear_gradients,
    engine_sequence,
    gradients,
    lstm,
    lstm_cell,
    masked_loss,
    mean_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
    tanh_cell,
    twin,
)
from devices import CPU, running_on
from grids import parts

from tbptt_ckpt import TBPTT

pytestmark = pytest.mark.usefixtures("device")

NUM_STEPS = tuple(range(1, 10))
K1 = tuple(range(1, 6))
K2 = (*range(1, 8), None)

# The product of these is the exhaustive grid.
REFERENCE_CHOICES: dict[str, tuple[str, ...]] = {
    "loss": ("new", "last"),
    "reduction": ("mean", "sum"),
    "overlap": OVERLAPS,
    "module": ("cell", "lstm"),
    "weights": ("frozen", "sgd"),
}
PLAN_CHOICES: dict[str, tuple[str, ...]] = {"strategy": STRATEGIES, "executor": EXECUTORS}
# These are rotated in both runs.
ROTATED_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_fn": ("mean", "pair"),
    "absent": ("no", "none", "weight"),
    "init": ("none", "constant", "learned"),
}

ABSENT = (1, 2, 5, 8)
WEIGHTS = (1.0, 0.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 0.0)
LEARNING_RATE = 0.2


@dataclass(frozen=True)
class Case:
    """One run of the engine; its repr names it in a failure."""

    num_steps: int
    k1: int
    k2: int | None
    loss: str
    reduction: str
    overlap: str
    module: str
    weights: str
    loss_fn: str
    absent: str
    init: str
    strategy: str
    executor: str


def rotated_cases() -> list[Case]:
    """A case for every (T, k1, k2); the other choices follow from a fixed sequence."""
    rng = random.Random(1991)
    choices = REFERENCE_CHOICES | PLAN_CHOICES | ROTATED_CHOICES
    return [
        Case(*layout, **{name: v[int(rng.random() * len(v))] for name, v in choices.items()})
        for layout in itertools.product(NUM_STEPS, K1, K2)
    ]


def exhaustive_cases(num_steps: int, k1: int) -> Iterator[list[Case]]:
    """Every case of the grid with this T and k1, in groups that share one naive run."""
    rotated = list(itertools.product(*ROTATED_CHOICES.values()))
    groups = itertools.product(K2, *REFERENCE_CHOICES.values())
    for position, (k2, *reference) in enumerate(groups, start=7 * num_steps + k1):
        values = (*reference, *rotated[position % len(rotated)])
        yield [
            Case(num_steps, k1, k2, *values, *plan)
            for plan in itertools.product(*PLAN_CHOICES.values())
        ]


def initial_state(case: Case) -> Any:
    if case.init == "none":
        return None
    h, c = random_state(2), random_state(3)
    if case.module == "lstm":
        h, c = h[None], c[None]
    learned = case.init == "learned"
    return (h.requires_grad_(learned), c.requires_grad_(learned))


@dataclass
class Setting:
    """A fresh module, state, optimizer and data for a case; equal for all of a group."""

    case: Case

    def __post_init__(self) -> None:
        case = self.case
        self.module = lstm() if case.module == "lstm" else lstm_cell()
        self.init_state = initial_state(case)
        self.inputs, self.targets = random_data(case.num_steps)
        self.loss_fn = masked_loss if case.loss_fn == "pair" else mean_loss
        learned = self.init_state if case.init == "learned" else ()
        self.parameters = [*self.module.parameters(), *learned]
        self.optimizer = None
        if case.weights == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, lr=LEARNING_RATE)
        self.marks = {
            "absent": ABSENT if case.absent == "none" else (),
            "weights": WEIGHTS[: case.num_steps] if case.absent == "weight" else None,
        }


def reference(case: Case) -> list[naive.NaiveWindow]:
    with running_on(CPU):
        setting = Setting(case)
    problem = naive_problem(
        setting.module,
        setting.inputs,
        setting.targets,
        setting.init_state,
        loss_fn=setting.loss_fn,
        extra_parameters=setting.parameters[len(list(setting.module.parameters())) :],
        **setting.marks,
    )
    run = naive.OVERLAPS[case.overlap]
    return list(
        run(
            problem,
            case.k1,
            case.k2,
            loss=case.loss,
            reduction=case.reduction,
            optimizer=setting.optimizer,
        )
    )


def check_case(case: Case, expected: list[naive.NaiveWindow]) -> None:
    setting = Setting(case)
    tbptt = TBPTT(
        setting.module,
        setting.loss_fn,
        case.k1,
        case.k2,
        setting.optimizer,
        loss=case.loss,
        reduction=case.reduction,
        overlap=case.overlap,
        strategy=case.strategy,
        executor=case.executor,
        time_batching=case.num_steps % 2 == 0 and "auto",
    )
    sequence = engine_sequence(setting.inputs, setting.targets, **setting.marks)
    results = tbptt.windows(sequence, setting.init_state)
    # Until the first update both sides have the same bits in their weights, and in states
    # where no cell runs as a kernel.
    same_weights = case.module == "cell" and case.num_steps % 2 > 0
    for index, (result, window) in enumerate(zip(results, expected, strict=True)):
        assert result.index == index, case
        check_window(
            case, result, gradients(setting.parameters), window, bitwise_state=same_weights
        )
        same_weights = same_weights and (setting.optimizer is None or window.loss is None)
        if setting.optimizer is None:
            clear_gradients(setting.parameters)


ROTATED = rotated_cases()


@pytest.mark.parametrize("k1", K1)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_rotated_cases_equal_the_naive_loops(num_steps: int, k1: int) -> None:
    cases = [c for c in ROTATED if (c.num_steps, c.k1) == (num_steps, k1)]
    assert {c.k2 for c in cases} == set(K2)
    for case in cases:
        check_case(case, reference(case))


def test_rotation_covers_every_pair_of_choices() -> None:
    factors: dict[str, tuple[Any, ...]] = {"num_steps": NUM_STEPS, "k1": K1, "k2": K2}
    factors |= REFERENCE_CHOICES | PLAN_CHOICES | ROTATED_CHOICES
    for one, other in itertools.combinations(factors, 2):
        wanted = set(itertools.product(factors[one], factors[other]))
        seen = {(getattr(c, one), getattr(c, other)) for c in ROTATED}
        assert seen == wanted, f"{one} x {other} lacks {wanted - seen}"
    layouts = set(itertools.product(NUM_STEPS, K1, K2))
    assert {(c.num_steps, c.k1, c.k2) for c in ROTATED} == layouts


@pytest.mark.exhaustive
@pytest.mark.parametrize("k1", K1)
@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_every_case_equals_the_naive_loops(
    num_steps: int, k1: int, record_property: pytest.RecordProperty
) -> None:
    count = 0
    for group in exhaustive_cases(num_steps, k1):
        expected = reference(group[0])
        for case in group:
            check_case(case, expected)
            count += 1
    record_property("cases", count)
    print(f"T={num_steps} k1={k1}: {count} cases equal the naive loops")
    assert count == 4096  # 45 of these tests: 184,320 cases


# The naive loops themselves, held against another definition.


def per_step_weight_gradients(
    module: TanhCell, inputs: torch.Tensor, targets: torch.Tensor, steps: list[int]
) -> list[dict[str, torch.Tensor]]:
    """Gradient of the summed losses of `steps` for each step's own copy of the weights."""
    copies = [
        {k: v.detach().clone().requires_grad_() for k, v in module.named_parameters()}
        for _ in inputs
    ]
    state, total = None, torch.zeros((), dtype=torch.float64)
    for t, x in enumerate(inputs):
        y, state = torch.func.functional_call(module, copies[t], (x, state))
        if t in steps:
            total = total + mean_loss(y, targets[t])
    total.backward()
    return [{k: v.grad for k, v in c.items()} for c in copies]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (2, 5), (3, None), (4, 2), (5, 12), (11, 3)])
def test_naive_gradient_is_the_sum_over_the_steps_of_the_window(
    overlap: str, k1: int, k2: int | None
) -> None:
    module, (inputs, targets) = tanh_cell(), random_data(9)
    problem = naive_problem(module, inputs, targets, None)
    for window in naive.OVERLAPS[overlap](problem, k1, k2, reduction="sum"):
        steps = list(range(window.new_start, window.stop))
        by_step = per_step_weight_gradients(module, inputs, targets, steps)
        expected = [
            sum(
                by_step[t][name]
                for t in range(window.start, window.stop)
                if by_step[t][name] is not None
            )
            for name, _ in module.named_parameters()
        ]
        assert relative_error(window.grads, expected) <= 1e-12
        assert window.drift == 0.0


def test_naive_overlaps_agree_at_frozen_weights_and_part_when_weights_move() -> None:
    def run(overlap: str, learning_rate: float) -> list[naive.NaiveWindow]:
        module, (inputs, targets) = tanh_cell(), random_data(9)
        problem = naive_problem(module, inputs, targets, None)
        optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate)
        return list(naive.OVERLAPS[overlap](problem, 2, 5, optimizer=optimizer))

    for one, other in zip(run("refresh", 0.0), run("stale", 0.0), strict=True):
        assert relative_error(one.grads, other.grads) <= 1e-12
        assert one.loss == other.loss
        assert torch.equal(one.state, other.state)
    moved = zip(run("refresh", 0.5), run("stale", 0.5), strict=True)
    later = [(one, other) for one, other in moved if one.new_start > one.start]
    assert all(relative_error(one.grads, other.grads) > 1e-6 for one, other in later)
    assert all(one.drift > 1e-6 and other.drift > 1e-6 for one, other in later)


# Behaviour of the grid's choices that one case shows better than many.


@pytest.mark.parametrize("part", parts(6))
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("k1", K1)
def test_a_stream_of_unknown_length_equals_the_naive_loops(
    k1: int, overlap: str, part: int
) -> None:
    """Its end shows k1 steps ahead, which only the start of a short last window can tell."""
    for num_steps, k2 in list(itertools.product(range(1, 11), K2))[(part + k1) % 6 :: 6]:
        (inputs, targets), module = random_data(num_steps), tanh_cell()
        problem = naive_problem(module, inputs, targets, None)
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
        how: dict[str, Any] = {"stream": True} if overlap == "stale" else {}
        expected = list(naive.OVERLAPS[overlap](problem, k1, k2, optimizer=optimizer, **how))
        module = tanh_cell()
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
        tbptt = TBPTT(module, mean_loss, k1, k2, optimizer, overlap=overlap, strategy="uniform:2")
        stream = iter(list(zip(inputs, targets, strict=True)))
        where = f"stream T={num_steps} k1={k1} k2={k2} {overlap}"
        for result, window in zip(tbptt.windows(stream, None), expected, strict=True):
            grads = gradients(list(module.parameters()))
            check_window(where, result, grads, window, bitwise_state=window.new_start == 0)


@pytest.mark.parametrize("k1", [2, 3])
def test_a_stream_without_targets_starts_from_states_of_todays_weights(k1: int) -> None:
    """Windows that only advance may not pass the start of a short last window again."""
    for num_steps, k2 in itertools.product(range(3 * k1 + 1, 4 * k1 + 1), range(k1 + 1, 3 * k1)):
        (inputs, targets), module = random_data(num_steps), tanh_cell()
        absent = [t for t in range(k1, num_steps - 1) if t < 3 * k1]
        problem = naive_problem(module, inputs, targets, None, absent=absent)
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
        expected = list(naive.refresh(problem, k1, k2, optimizer=optimizer))
        module = tanh_cell()
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
        tbptt = TBPTT(module, mean_loss, k1, k2, optimizer, strategy="uniform:2")
        stream = iter(list(zip(inputs, problem.targets, strict=True)))
        where = f"stream T={num_steps} k1={k1} k2={k2}"
        for result, window in zip(tbptt.windows(stream, None), expected, strict=True):
            grads = gradients(list(module.parameters()))
            check_window(where, result, grads, window, bitwise_state=window.new_start == 0)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_without_optimizer_gradients_accumulate(overlap: str, executor: str) -> None:
    module, (inputs, targets) = tanh_cell(), random_data(9)
    init = random_state().requires_grad_()
    problem = naive_problem(module, inputs, targets, init, extra_parameters=[init])
    expected = list(naive.OVERLAPS[overlap](problem, 2, 5, zero_grad=False))
    module, init = twin(module, init)
    clear_gradients([*module.parameters(), init])
    tbptt = TBPTT(module, mean_loss, 2, 5, overlap=overlap, strategy="uniform:2", executor=executor)
    results = tbptt.windows(engine_sequence(inputs, targets), init)
    for result, window in zip(results, expected, strict=True):
        grads = gradients([*module.parameters(), init])
        check_window("accumulating", result, grads, window, bitwise_state=True)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_init_state_with_a_graph_gets_its_summed_gradients_once(
    overlap: str, executor: str
) -> None:
    (inputs, targets), seed = random_data(9), random_state()
    module, leaf = tanh_cell(), torch.sin(seed).requires_grad_()
    problem = naive_problem(module, inputs, targets, leaf)
    for _ in naive.OVERLAPS[overlap](problem, 2, 5, zero_grad=False):
        pass
    expected = leaf.grad * torch.cos(seed)

    calls: list[torch.Tensor] = []
    again = seed.clone().requires_grad_()
    again.register_hook(calls.append)
    clear_gradients(list(module.parameters()))
    tbptt = TBPTT(module, mean_loss, 2, 5, overlap=overlap, strategy="step", executor=executor)
    tbptt.train(engine_sequence(inputs, targets), torch.sin(again))
    assert relative_error([again.grad], [expected]) <= 1e-12
    assert len(calls) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["new", "last"])
@pytest.mark.parametrize("loss_fn", [mean_loss, masked_loss])
def test_train_returns_the_summed_loss_over_the_summed_weight(
    loss: str, reduction: str, loss_fn: Any
) -> None:
    (inputs, targets), module = random_data(9), tanh_cell()
    problem = naive_problem(module, inputs, targets, None, loss_fn=loss_fn, weights=WEIGHTS)
    expected = list(naive.refresh(problem, 2, 5, loss=loss, reduction=reduction))
    tbptt = TBPTT(module, loss_fn, 2, 5, loss=loss, reduction=reduction)
    result = tbptt.train(engine_sequence(inputs, targets, weights=WEIGHTS), None)
    total = sum(w.loss_sum for w in expected) / sum(w.loss_weight for w in expected)
    assert result.loss == pytest.approx(total, rel=1e-12)
    assert torch.equal(result.state, expected[-1].state)
    assert (result.num_steps, result.num_windows) == (9, 5)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("strategy", ["retain", "uniform:2", "revolve:2"])
def test_one_label_at_the_end_of_the_sequence(overlap: str, executor: str, strategy: str) -> None:
    """Many-to-one: the windows before it run forward only and change nothing."""
    (inputs, targets), module = random_data(9), tanh_cell()
    absent = tuple(range(8))
    before = [p.detach().clone() for p in module.parameters()]
    problem = naive_problem(module, inputs, targets, None, absent=absent)
    *_, expected = naive.OVERLAPS[overlap](problem, 2, None)
    clear_gradients(list(module.parameters()))
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    tbptt = TBPTT(
        module, mean_loss, 2, None, optimizer, overlap=overlap, strategy=strategy, executor=executor
    )
    for result in tbptt.windows(engine_sequence(inputs, targets, absent=absent), None):
        if result.stop == 9:
            grads = gradients(list(module.parameters()))
            check_window("one label", result, grads, expected, bitwise_state=True)
            assert result.updated
        else:
            assert result.loss is None
            assert not result.updated
            assert result.recomputed_steps == 0
            assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
            assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_window_whose_pairs_weigh_nothing_makes_no_update(overlap: str) -> None:
    (inputs, targets), module = random_data(6), tanh_cell()
    targets[2:4] = 100.0  # masked out: the second window of three

    def ignoring(y: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = (target < 50.0).to(y.dtype)
        return (mask * (y - target).square()).sum(), mask.sum()

    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    tbptt = TBPTT(module, ignoring, 2, 4, optimizer, overlap=overlap, strategy="uniform:2")
    weights, results = [], []
    for result in tbptt.windows(engine_sequence(inputs, targets), None):
        results.append(result)
        weights.append([p.detach().clone() for p in module.parameters()])
    assert [r.loss is None for r in results] == [False, True, False]
    assert [r.updated for r in results] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
