"""How far back a window's gradient goes: all the way, or as far as a draw says.

NOTE [Why the mean is the whole gradient]
Borders lie in the steps that earlier windows have run, which have no loss: what flows back over a
border is the gradient of the state there and nothing else, and all that it brings further back is
linear in it. Where it goes on with probability q and is divided by q, its mean is itself, border by
border; so the mean over all draws is the gradient of the whole window (Tallec & Ollivier 2017).
It holds of the gradient, at given weights: of nothing that is made of it and is not linear.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Annotated, Any, Literal

from tbptt_ckpt.arguments import PositiveInt, check_fields
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.schedule.windows import Window

_PROBABILITY = "a probability above 0 and at most 1"


def check_survival(name: str, value: Any, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` is a probability, or are several."""
    given = value if isinstance(value, tuple | list) else (value,)
    numbers = [each for each in given if isinstance(each, float | int) and each is not True]
    if not given or len(numbers) < len(given) or not all(0 < each <= 1 for each in numbers):
        raise ArgumentError(f"{name}={shown(value)} must be {_PROBABILITY}, or a list of such")


@dataclass(frozen=True, slots=True)
class Roulette:
    """At each border the gradient goes on with some probability, by which it is then divided.

    Its mean over the draws is the gradient of the whole window; a window runs, keeps and
    differentiates what its own draw reaches. Use a fixed cut where the gradient decays fast, and
    where it grows with distance: see `roulette_price`.

    Args:
        survival: Probability of going on at a border; or one for each border, from the new steps
            back, of which the last stands for all further ones too.
        every: Steps between borders, the first of which is where the new steps begin; None for k1.
        seed: Of the draws, which come from no other generator: processes that train together
            draw alike.

    Raises:
        ArgumentError: A number that cannot work.

    References:
        Tallec & Ollivier (2017), arXiv:1705.08209; Beatson & Adams (2019), arXiv:1905.07006.
    """

    survival: Annotated[float | Sequence[float], check_survival] = 0.8
    every: PositiveInt | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.survival, Sequence):
            object.__setattr__(self, "survival", tuple(map(float, self.survival)))

    def probabilities(self) -> Iterator[float]:
        """Of going on, border by border from the new steps back, without end."""
        given = self.survival if isinstance(self.survival, tuple) else (self.survival,)
        return chain(given, repeat(given[-1]))

    def number(self, window: int) -> float:
        """What is drawn for a run's window of that number, from [0, 1)."""
        return random.Random(f"{self.seed}/{window}").random()

    def __str__(self) -> str:
        alone = isinstance(self.survival, float | int) and self == Roulette(self.survival)
        return f"roulette:{self.survival}" if alone else repr(self)


@dataclass(frozen=True, slots=True)
class Draw:
    """How far back one window goes.

    Attributes:
        whole: The window as it would be.
        window: The same as its gradient reaches.
        survival: The probability of reaching as far.
        borders: Where it might have stopped.
        divisors: Borders that are crossed, each with what the state's gradient is divided by.
        quiet: How far it goes where it turns out to have no loss; None for all the way.
        audited: Steps at which its gradient is looked at on the way (`k2="auto"`), in order.
        later: Where the next window may begin, for all that is known before this one has run
            (`k2="auto"`).
    """

    whole: Window
    window: Window
    survival: float = 1.0
    borders: Sequence[int] = ()
    divisors: Mapping[int, float] = field(default_factory=dict)
    quiet: Window | None = None
    audited: Sequence[int] = ()
    later: Sequence[int] = ()

    @property
    def stops(self) -> bool:
        """Whether it reaches less far than it might."""
        return self.window.start > self.whole.start

    def without_loss(self) -> Draw:
        """The same for a window that has no gradient."""
        return Draw(self.whole, self.quiet or self.whole, later=self.later)


def draw(window: Window, roulette: Roulette, k1: int, number: float, *, restarts: bool) -> Draw:
    """As far back as `number`, out of [0, 1), says.

    Args:
        window: The whole window.
        roulette: Where it may stop, and how probably.
        k1: Steps between updates.
        number: What was drawn for it.
        restarts: Whether steps begin at recorded states (stale overlap); else those that are not
            reached run without a graph, for the state that they lead to.
    """
    borders = range(window.new_start, window.start, -(roulette.every or k1))
    survival, divisors, start = 1.0, dict[int, float](), window.start
    for border, probability in zip(borders, roulette.probabilities(), strict=False):
        if number >= survival * probability:
            start = border
            break
        survival *= probability
        divisors[border] = probability
    run_start = None if restarts or start == window.start else window.first
    reached = replace(window, start=start, run_start=run_start)
    return Draw(window, reached, survival, borders, divisors)


TruncationName = Literal["fixed", "roulette"]


def parse_truncation(truncation: object) -> Roulette | None:
    """The draws that a user means: a name, `"roulette:0.8"` or a `Roulette`; None for none.

    Raises:
        ArgumentError: None of these.
    """
    if isinstance(truncation, Roulette):
        return truncation
    text = truncation if isinstance(truncation, str) else ""
    if text == "fixed":
        return None
    found = re.fullmatch(r"roulette(?::(0?\.[0-9]{1,17}|1(?:\.0)?))?", text)
    if found is None or not float(found[1] or 1):
        raise ArgumentError(
            f"truncation={shown(truncation)} is not 'fixed', 'roulette', 'roulette:0.8' with "
            f"{_PROBABILITY}, or an object such as Roulette(0.8)"
        )
    return Roulette(float(found[1])) if found[1] else Roulette()


def check_truncation(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` can be read as a truncation."""
    parse_truncation(value)


# Text with a number is read too, as of strategies.
AnyTruncation = Annotated[TruncationName | Roulette, check_truncation]
