# ruff: noqa: NPY002  (the global generator of numpy is the point)
"""Steps that keep or draw something outside of the state (kinds of section 2)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .carriers import LANES, WIDTH, Cell, carried
from .case import Case, Dice
from .labels import PLAIN_STRATEGIES, runs_again


class Drawing(nn.Module):
    """A GRU cell whose input is scaled by what `draw` gives."""

    def __init__(self, draw: Callable[[Drawing, Tensor], Any], **kept: Any) -> None:
        super().__init__()
        self.cell, self.draw = nn.GRUCell(WIDTH, WIDTH), draw
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x * (0.5 + self.draw(self, x)), state)
        return h, h


def drawing(
    dice: Dice, draw: Callable[..., Any], kept: Callable[[], dict[str, Any]] = dict
) -> Case:
    return carried(dice, lambda: Drawing(draw, **kept()), segment=False)


def python_random(dice: Dice) -> Case:
    """Python's own generator."""
    return drawing(dice, lambda m, x: random.random())


def numpy_random(dice: Dice) -> Case:
    """numpy's global generator."""
    return drawing(dice, lambda m, x: torch.from_numpy(np.random.random_sample(tuple(x.shape))))


def torch_random(dice: Dice) -> Case:
    """torch's default generator, as dropout draws from it."""
    return drawing(dice, dice.choice((lambda m, x: F.dropout(x, 0.3), lambda m, x: torch.rand(()))))


def torch_generator(dice: Dice) -> Case:
    """A generator of its own in an attribute of the module."""
    case = drawing(
        dice,
        lambda m, x: torch.rand(x.shape, generator=m.generator),
        lambda: {"generator": torch.Generator().manual_seed(5)},
    )
    case.generators = lambda m: [m.generator]
    return case


def other_generators(dice: Dice) -> Case:
    """A `random.Random` or `numpy.random.Generator` in an attribute."""
    if dice.maybe(0.5):
        case = drawing(
            dice, lambda m, x: m.generator.random(), lambda: {"generator": random.Random(3)}
        )
    else:
        case = drawing(
            dice,
            lambda m, x: float(m.generator.random()),
            lambda: {"generator": np.random.default_rng(3)},
        )
    case.generators = lambda m: [m.generator]
    return case


def _refused(case: Case, why: str, *names: str) -> Case:
    if runs_again(case):
        case.refused, case.names = why, names
    return case


def _known(dice: Dice) -> dict[str, Any]:
    """Options whose leaves are known, in forms whose states the check compares."""
    return {"strategy": dice.choice(PLAIN_STRATEGIES), "overlap": "refresh", "loss": "new"}


def _keeping(
    dice: Dice, make: Callable[[], nn.Module], why: str, *names: str, **given: Any
) -> Case:
    case = carried(dice, make, segment=False, options=_known(dice), **given)
    if dice.maybe(0.4):  # nothing runs again, so that it is legal
        case.options["strategy"], case.k2 = "retain", max(1, case.k1 - dice.randint(0, 1))
    return _refused(case, why, "replay", "state", *names)


def counter(dice: Dice) -> Case:
    """A step counter on the module."""

    def draw(module: Drawing, x: Tensor) -> float:
        module.count += 1
        return 1.0 / module.count

    return _keeping(dice, lambda: Drawing(draw, count=0), "a counter on the module moves on")


def cached(dice: Dice) -> Case:
    """A detached tensor that is kept on the module from step to step."""

    def draw(module: Drawing, x: Tensor) -> Tensor:
        module.cache = 0.5 * module.cache + x.detach().tanh()
        return module.cache

    return _keeping(
        dice,
        lambda: Drawing(draw, cache=torch.zeros(LANES, WIDTH)),
        "a tensor on the module moves on",
    )


def hidden_generator(dice: Dice) -> Case:
    """A generator that only a closure knows."""

    def make() -> nn.Module:
        generator = random.Random(3)
        return Drawing(lambda m, x: generator.random())

    return _keeping(dice, make, "a generator in a closure is not put back")


class NumpyState(nn.Module):
    """Counts in a numpy array that is part of the state, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, count = state
        count += 1
        h = self.cell(x / float(count[0]), h)
        return h, (h, count)


def numpy_state(dice: Dice) -> Case:
    """A numpy array in the state that is written in place: a boundary has its own."""
    start = lambda: (torch.zeros(LANES, WIDTH), np.zeros(1))  # noqa: E731
    return carried(dice, NumpyState, segment=False, options=_known(dice), start=start)


class WritesInput(nn.Module):
    """Normalises its own input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x.mul_(0.5), state)
        return h, h


def input_written(dice: Dice) -> Case:
    """A step that writes into its own input: right with copies, or refused."""
    case = carried(dice, WritesInput, segment=False, options=_known(dice))
    case.refused, case.names = "a step writes into its own input", ("input", "written")
    return case


def parametrize_cached(dice: Dice) -> Case:
    """`parametrize.cached()` around the run, without an update in between that it cannot see."""

    def make() -> nn.Module:
        module = Cell("gru")
        parametrizations.weight_norm(module.core, "weight_hh")
        return module

    window = dice.window()
    window["k1"] = window["steps"]
    window["k2"] = window["steps"]
    case = carried(dice, make, segment=False, window=window)
    case.around = lambda module: parametrize.cached()
    return case


class GeneratorState(nn.Module):
    """Carries a generator in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, generator = state
        h = self.cell(x * (0.5 + generator.random()), h)
        return h, (h, generator)


def generator_state(dice: Dice) -> Case:
    """A generator in the state, which a step advances: a boundary has its own."""
    start = lambda: (torch.zeros(LANES, WIDTH), random.Random(4))  # noqa: E731
    return carried(dice, GeneratorState, segment=False, options=_known(dice), start=start)


KINDS = {
    "replay.python_random": python_random,
    "replay.numpy_random": numpy_random,
    "replay.torch_random": torch_random,
    "replay.torch_generator": torch_generator,
    "replay.other_generators": other_generators,
    "replay.counter": counter,
    "replay.cached": cached,
    "replay.hidden_generator": hidden_generator,
    "replay.numpy_state": numpy_state,
    "replay.generator_state": generator_state,
    "replay.input_written": input_written,
    "replay.parametrize_cached": parametrize_cached,
}
