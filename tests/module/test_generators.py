# ruff: noqa: NPY002  (the global generators are the point)
"""Python's, numpy's and a module's own generators in steps that run again.

The reference draws each step's number once, in order, and runs plain loops over what was drawn.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import EXECUTORS, OVERLAPS, clear_gradients, gradients, relative_error
from grids import covering
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, TensorSequence, evaluate
from tbptt_ckpt.budget import measure_costs
from tbptt_ckpt.executor import Observer
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.generators import GLOBAL_PLACES, GeneratorPlace, generator_places

NUM_STEPS, LANES, WIDTH = 13, 4, 3
STRATEGIES = ("retain", "uniform:3", "step", "revolve:2")


def data_of() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, NUM_STEPS, LANES, WIDTH, generator=source, dtype=torch.float64)
    return x, y


class Slotted:
    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = random.Random(5)


class Noise:
    def __init__(self) -> None:
        self.tools = {"all": [(np.random.default_rng(6),)]}


class Cell(nn.Module):
    """Scales its input by a number that `draw` draws."""

    def __init__(self, draw: Callable[[Any], float], **held: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.draw = nn.Linear(2 * WIDTH, WIDTH).double(), draw
        self.calls, self.from_step = 0, 0
        vars(self).update(held)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.draw(self) if float(x[0, 0]) > -0.5 else 0.2
        h = torch.tanh(self.linear(torch.cat([x * (0.5 + scale), h], 1)))
        return h, h


def pythons(_: Any) -> float:
    return random.random()


def pythons_normal(_: Any) -> float:
    return random.gauss(0, 1)


def numpys(_: Any) -> float:
    return float(np.random.randn())  # draws two, and gives the second the next time


MAKERS: dict[str, Callable[[], Cell]] = {
    "python": lambda: Cell(pythons),
    "python's normal numbers, in pairs": lambda: Cell(pythons_normal),
    "numpy": lambda: Cell(numpys),
    "torch.Generator": lambda: Cell(
        lambda m: float(torch.rand((), generator=m.rng)), rng=torch.Generator().manual_seed(2)
    ),
    "random.Random": lambda: Cell(lambda m: m.rng.gauss(0, 1), rng=random.Random(2)),
    "numpy.random.Generator": lambda: Cell(lambda m: m.rng.random(), rng=np.random.default_rng(2)),
    "RandomState": lambda: Cell(lambda m: m.rng.randn(), rng=np.random.RandomState(2)),
    "MT19937": lambda: Cell(
        lambda m: m.rng.random(), rng=np.random.Generator(np.random.MT19937(2))
    ),
    "in slots": lambda: Cell(lambda m: m.noise.rng.random(), noise=Slotted()),
    "nested": lambda: Cell(lambda m: m.noise.tools["all"][0][0].random(), noise=Noise()),
    "in an unregistered module": lambda: Cell(
        lambda m: m.parts[0].rng.random(), parts=[Cell(pythons, rng=random.Random(3))]
    ),
}


def seed() -> None:
    random.seed(9)
    np.random.seed(9)


def others_draw() -> None:
    random.random()
    np.random.randn()


def windows(k1: int, k2: int | None) -> list[tuple[int, int, int]]:
    stops = [*range(k1, NUM_STEPS, k1), NUM_STEPS]
    starts = [0 if k2 is None else max(0, stop - k2) for stop in stops]
    return [
        (start, new, stop) for start, new, stop in zip(starts, [0, *stops], stops, strict=False)
    ]


def plain_gradients(make: Callable[[], Cell], k1: int, k2: int | None) -> list[list[Tensor]]:
    """Windows at frozen weights, from numbers that were drawn once, in order."""
    cell, (x, y) = make(), data_of()
    seed()
    scales, states, h = [], [torch.zeros(LANES, WIDTH).double()], None
    draw, found = cell.draw, []

    def recorded(module: Any) -> float:
        scales.append(draw(module))
        return scales[-1]

    cell.draw = recorded
    drawn: list[float | None] = []
    for _, new, stop in windows(k1, k2):
        for step in range(new, stop):
            before = len(scales)
            h = cell(x[step], states[-1])[1].detach()
            states.append(h)
            drawn.append(scales[-1] if len(scales) > before else None)
        others_draw()
    for start, new, stop in windows(k1, k2):
        h, total = states[min(start, stop)], torch.zeros(()).double()
        for step in range(start, stop):
            cell.draw = lambda _, step=step: drawn[step]
            output, h = cell(x[step], h)
            total = total + (mse_loss(output, y[step]) if step >= new else 0)
        clear_gradients(list(cell.parameters()))
        (total / (stop - new)).backward()
        found.append(gradients(list(cell.parameters())))
    return found


def check(make: Callable[[], Cell], k1: int, k2: int | None, **options: Any) -> None:
    expected = plain_gradients(make, k1, k2)
    cell, data = make(), data_of()
    seed()
    tbptt = TBPTT(cell, mse_loss, k1, k2, **options)
    start = torch.zeros(LANES, WIDTH).double()
    for _, grads in zip(tbptt.windows(TensorSequence(*data), start), expected, strict=True):
        assert relative_error(gradients(list(cell.parameters())), grads) <= 1e-11
        clear_gradients(list(cell.parameters()))
        others_draw()


@covering(together=1, name=MAKERS, executor=EXECUTORS)
def test_a_step_that_runs_again_draws_what_it_drew(name: str, executor: str) -> None:
    for number, (k1, k2) in enumerate(((4, 4), (2, 5), (3, None))):
        strategy, overlap = STRATEGIES[number + (executor == "replay")], OVERLAPS[number % 2]
        check(MAKERS[name], k1, k2, strategy=strategy, executor=executor, overlap=overlap)


@pytest.mark.exhaustive
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_generator_under_every_strategy(
    name: str, strategy: str, executor: str, overlap: str
) -> None:
    for reach in ((4, 4), (2, 5), (3, None), (2, 7)):
        check(MAKERS[name], *reach, strategy=strategy, executor=executor, overlap=overlap)


class Carrying(nn.Module):
    """Scales its input by what the state's other part gives, which a step changes in place."""

    def __init__(self, step: Callable[[Any], float]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.step = nn.Linear(2 * WIDTH, WIDTH).double(), step

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, other = state
        h = torch.tanh(self.linear(torch.cat([x * (0.5 + self.step(other)), h], 1)))
        return h, (h, other)


def counted(array: Any) -> float:
    array += 1
    return 1.0 / float(array[0])


def turned(items: Any) -> float:
    items.rotate(1)
    return float(items[0])


CARRIED: dict[str, tuple[Callable[[Any], float], Callable[[], Any]]] = {
    "array": (counted, lambda: np.zeros(2)),
    "deque": (turned, lambda: deque([0.1, 0.4, 0.9])),
    "random.Random": (lambda rng: rng.random(), lambda: random.Random(4)),
    "numpy.random.Generator": (lambda rng: rng.random(), lambda: np.random.default_rng(4)),
    "torch.Generator": (
        lambda rng: float(torch.rand((), generator=rng)),
        lambda: torch.Generator().manual_seed(4),
    ),
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", CARRIED)
def test_what_a_step_writes_into_its_state_is_kept_as_it_was(name: str, executor: str) -> None:
    step, make = CARRIED[name]
    x, y = data_of()
    for number, (k1, k2) in enumerate(((4, 4), (2, 5), (3, 9))):
        reference, states = Carrying(step), [(torch.zeros(LANES, WIDTH).double(), make())]
        for step_input in x:
            h, other = reference(step_input, copy.deepcopy(states[-1]))[1]
            states.append((h.detach(), other))
        strategy, overlap = STRATEGIES[number + (executor == "replay")], OVERLAPS[number % 2]
        module, first = Carrying(step), (torch.zeros(LANES, WIDTH).double(), make())
        options = {"overlap": overlap, "strategy": strategy, "executor": executor}
        tbptt = TBPTT(module, mse_loss, k1, k2, **options)
        results = tbptt.windows(TensorSequence(x, y), first)
        for (start, new, stop), result in zip(windows(k1, k2), results, strict=True):
            state, total = copy.deepcopy(states[start]), torch.zeros(()).double()
            for t in range(start, stop):
                output, state = reference(x[t], state)
                total = total + (mse_loss(output, y[t]) if t >= new else 0)
            clear_gradients(list(reference.parameters()))
            (total / (stop - new)).backward()
            grads = [gradients(list(each.parameters())) for each in (module, reference)]
            assert relative_error(*grads) <= 1e-11
            assert torch.equal(result.state[0], states[stop][0])
            clear_gradients(list(module.parameters()))
        assert step(first[1]) == step(make()), "the caller's own is not written into"


def test_measuring_and_evaluating_draw_nothing() -> None:
    data = data_of()
    start = torch.zeros(LANES, WIDTH).double()
    for make in MAKERS.values():
        ends = []
        for strategy in ("auto", "retain"):
            cell = make()
            seed()
            TBPTT(cell, mse_loss, 5, 5, strategy=strategy).train(TensorSequence(*data), start)
            evaluate(cell, mse_loss, TensorSequence(*data), start)
            ends.append([random.random(), float(np.random.randn()), cell.draw(cell)])
        assert ends[0] == ends[1]


class Writing(nn.Module):
    """Scales its own input in place, where no backward needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.linear(h) + x.mul_(0.5))
        return h, h


class CountedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return mse_loss(output, target)


def test_measuring_writes_into_no_input_and_no_buffer_of_the_loss() -> None:
    x, y = map(torch.clone, data_of())  # else one memory
    before, loss = x.clone(), CountedLoss()
    start = torch.zeros(LANES, WIDTH).double()
    measure_costs(Writing(), loss, x, y, start)
    assert torch.equal(x, before)
    assert int(loss.calls) == 0


class Drawer(Observer):
    """Draws as each action begins, as another thread may."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def begins(self, action: Any) -> None:
        self.drawn.append(random.random())


def test_what_others_draw_inside_a_window_may_come_again() -> None:
    drawer = Drawer()
    cell = Cell(lambda m: 0.5)
    tbptt = TBPTT(cell, mse_loss, 6, 6, strategy="uniform:2", observer=drawer)
    tbptt.train(TensorSequence(*data_of()), torch.zeros(LANES, WIDTH).double())
    assert len(set(drawer.drawn)) < len(drawer.drawn)


def test_a_generator_that_is_replaced_between_windows_is_followed() -> None:
    expected = []
    for strategy in ("retain", "uniform:2"):
        cell = MAKERS["random.Random"]()
        data = data_of()
        tbptt = TBPTT(cell, mse_loss, 4, 4, strategy=strategy)
        start = torch.zeros(LANES, WIDTH).double()
        for result in tbptt.windows(TensorSequence(*data), start):
            vars(cell)["rng"] = random.Random(result.stop)
        expected.append(gradients(list(cell.parameters())))
    assert relative_error(*expected) <= 1e-11


@pytest.mark.parametrize("place", [*GLOBAL_PLACES, GeneratorPlace(np.random.RandomState(3))])
def test_where_a_generator_stands_is_the_same_object_until_it_moves(place: GeneratorPlace) -> None:
    generator = place.capture().generator
    draws = (generator.gauss, generator.getrandbits) if place is GLOBAL_PLACES[0] else ()
    draws = draws or (generator.normal, generator.randint)
    arguments = ((0, 1), (1,)) if place is GLOBAL_PLACES[0] else ((), (5,))
    for number in range(500):  # past a generation of words
        before = place.capture()
        assert place.capture() is before
        draw, given = draws[number % 3 == 0], arguments[number % 3 == 0]
        drawn, after = draw(*given), place.capture()
        assert after is not before
        place.restore(before)
        assert draw(*given) == drawn
        assert place.capture().digest == after.digest


def test_what_is_no_generator_of_the_module_is_left_alone() -> None:
    held = {"system": random.SystemRandom(), "module": random, "torchs": torch.default_generator}
    assert not generator_places([Cell(pythons, **held, numpys=np.random.mtrand._rand)])
    loop: list[Any] = [random.Random(1)]
    loop.append(loop)
    assert len(generator_places([Cell(pythons, loop=loop, again=loop[0])])) == 1


def test_a_function_has_the_generators_that_it_names() -> None:
    rng = np.random.default_rng(1)

    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return x, h * rng.random()

    (place,) = generator_places([step])
    assert place.capture().generator is rng


def test_others_may_draw_between_windows_without_a_further_cut() -> None:
    """Data is shuffled by numpy's generator; a module that draws nothing is called as before."""
    ambient = Ambient([nn.Linear(1, 1)], [])
    found = {}
    for step in range(3):
        found[step] = ambient.found()
        others_draw()
    assert ambient.changes(found) == [0]
    found[3] = ambient.found()
    random.random()
    found[4] = ambient.capture()
    assert ambient.changes(found) == [0, 1, 2, 3, 4]
