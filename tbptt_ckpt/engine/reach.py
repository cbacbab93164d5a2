"""How far back a window's gradient reaches, from what was measured where leaves begin."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt_ckpt.arguments import AboveZero, PositiveInt, checked

TOLERANCE = 1e-3  # of the reach that every window's figures have


@dataclass(frozen=True, slots=True)
class Border:
    """Where a leaf begins.

    Attributes:
        steps_back: Steps from there to the window's end.
        norm: Norm of the gradient of the window's loss with respect to the state there: all that
            steps before can learn from. None where nobody asks for it, as at the window's start.
        error: What is missing there of the gradient of the weights, relative to the whole of it,
            or to the running norm of such gradients where that is larger.
    """

    steps_back: int
    norm: float | None
    error: float


@dataclass(frozen=True, slots=True)
class Reach:
    """How many steps back make a window's gradient, between two borders.

    Attributes:
        tolerance: Relative error that is tolerated.
        above: So many steps are not enough; 0 where those of the first border are.
        within: So many are. None: no border inside the window is; it takes more than `above`, and
            whether the whole window is enough cannot be known from it.
        of: Steps of the window.
    """

    tolerance: float
    above: int
    within: int | None
    of: int

    @property
    def steps(self) -> int:
        """Steps that are known to make this window's gradient: all of it where none inside do."""
        return self.of if self.within is None else self.within

    def __str__(self) -> str:
        if self.within is None:
            return f"more than {self.above:,} of {self.of:,} steps at {self.tolerance:g}"
        return f"{self.above:,} to {self.within:,} of {self.of:,} steps at {self.tolerance:g}"


@dataclass(frozen=True, slots=True)
class Decay:
    """How a window's gradient fades, or grows, from its end back to its start.

    Attributes:
        borders: Where leaves begin, the last one first, the window's start last.
        loss_steps: Steps at the window's end that have a loss.
    """

    borders: tuple[Border, ...]
    loss_steps: int

    @checked
    def reach(self, tolerance: AboveZero = TOLERANCE) -> Reach:
        """The steps back whose gradient is within a relative error of the window's.

        The first border within it does not count where a later one is not: parts cancel. Nothing is
        extrapolated.

        Args:
            tolerance: Relative error of the gradient of the weights.

        Raises:
            ArgumentError: A tolerance that is no positive number.
        """
        above = 0
        within: int | None = None
        for border in self.borders[:-1]:
            if border.error >= tolerance:
                above, within = border.steps_back, None
            elif within is None:
                within = border.steps_back
        return Reach(tolerance, above, within, self.borders[-1].steps_back)

    @checked
    def errors(self, every: PositiveInt | None = None) -> list[float]:
        """What is missing at each border where a gradient may be stopped by lot.

        From where losses begin back to the window's start, as `roulette_price` and
        `fitted_roulette` take them. Where no leaf begins at such a border it is the error of the
        next one after it in time, which is mostly larger; 1.0 where there is none.

        Args:
            every: Steps between them, as for `Roulette`.

        Raises:
            ArgumentError: No positive number.
        """
        step = every or self.loss_steps
        found = []
        for steps_back in range(self.loss_steps, self.borders[-1].steps_back, step):
            known = [border.error for border in self.borders if border.steps_back <= steps_back]
            found.append(known[-1] if known else 1.0)
        return found

    @property
    def growth(self) -> float | None:
        """What the norm at the earliest border is of that where losses end; above 1 it grows.

        None where fewer than two are known.
        """
        known = [b.norm for b in self.borders if b.steps_back >= self.loss_steps and b.norm]
        return known[-1] / known[0] if len(known) > 1 else None
