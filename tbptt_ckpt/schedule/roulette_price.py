"""What `Roulette` costs and saves, from how far off the gradient is when it is cut at a border.

NOTE [The law of stopping points]
Let section 0 be the new steps, section j what lies between borders j and j + 1, g_j what it brings
to the gradient, R_j = g_j + ... + g_n what is cut off at border j, and S_j the probability of
crossing it. The estimate that stops before border j + 1 is the sum of g_i / S_i for i up to j. Of
its square, products with min(i, k) = j appear with 1 / S_j, and they add up to
|R_j|^2 - |R_{j+1}|^2; so the variance is the sum of (1 / S_j - 1 / S_{j-1}) |R_j|^2. It needs the
norms of what is cut off, and nothing of the sections' directions. The expected work is the sum of
S_j. Less of one is more of the other, and (work) x (noise + variance) is what a given precision
of the mean over many windows takes (Beatson & Adams 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

from tbptt_ckpt.arguments import AboveZero, Size, checked
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.schedule.truncation import Roulette

_TRIES = 200  # survivals in proportion to what is cut off
_LARGEST = 1e6  # factor of the proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class RoulettePrice:
    """What drawing costs against the whole walk.

    Attributes:
        cost: Expected time of a window, relative to one that reaches all the way.
        variance: Of the gradient over the draws, relative to its squared norm.
        noise: That of the gradient itself from window to window, which both have.
    """

    cost: float
    variance: float
    noise: float

    @property
    def work(self) -> float:
        """Time to the same precision of a mean over windows, relative to the whole walk's."""
        return self.cost * (1 + self.variance / self.noise)

    @property
    def pays(self) -> bool:
        """Whether that is less than the whole walk takes."""
        return self.work < 1


@checked
def roulette_price(
    roulette: Roulette, errors: Sequence[Size], *, noise: AboveZero = 1.0, advance: Size = 0.0
) -> RoulettePrice:
    """Expected cost and exact variance where the gradient is off by so much at each border.

    Args:
        roulette: The probabilities; its borders are at equal distances.
        errors: For each border, from the new steps back: the norm of what a gradient that is cut
            there lacks, relative to that of the whole gradient.
        noise: Variance of the gradient from window to window relative to its squared norm: 1 where
            the noise of a batch is as large as the gradient; the larger, the sooner drawing pays.
        advance: Share of a whole window's time that each takes however far it reaches: 0.22 to
            0.25 for the steps without a graph under refresh overlap, 0 under stale.

    Raises:
        ArgumentError: No errors, or a share of 1 or more.
    """
    if not errors:
        raise ArgumentError("errors=[] must hold a number for each border")
    if advance >= 1:
        raise ArgumentError(f"advance={shown(advance)} must be a share below 1")
    survivals = [*accumulate(islice(roulette.probabilities(), len(errors)), lambda a, b: a * b)]
    return _price(survivals, errors, noise, advance)


@checked
def fitted_roulette(
    errors: Sequence[Size],
    *,
    noise: AboveZero = 1.0,
    advance: Size = 0.0,
    least: AboveZero = 0.01,
    every: int | None = None,
    seed: int = 0,
) -> Roulette:
    """Survival in proportion to what is cut off, as much of it as takes the least work.

    Args:
        errors: As for `roulette_price`; of several windows, their largest.
        noise: As there.
        advance: As there.
        least: No border is survived less probably, all those before it included, so that nothing
            is ever divided by less: what was measured is not what is to come.
        every: As for `Roulette`.
        seed: As for `Roulette`.

    Raises:
        ArgumentError: No survival pays: the work is that of the whole walk, or more.
    """
    if least > 1:
        raise ArgumentError(f"least={shown(least)} must be a probability above 0 and at most 1")
    roulette_price(Roulette(1.0), errors, noise=noise, advance=advance)  # refuses what it refuses
    left = [max(errors[j:]) for j in range(len(errors))]
    tries = [
        [min(1.0, max(least, _LARGEST ** (k / _TRIES - 0.5) * each)) for each in left]
        for k in range(_TRIES + 1)
    ]
    best = min(tries, key=lambda survivals: _price(survivals, errors, noise, advance).work)
    price = _price(best, errors, noise, advance)
    if not price.pays:
        raise ArgumentError(
            f"errors={shown(errors)}: no survival takes less work than the whole walk (the best "
            f"{price.work:.2f} times as much); use truncation='fixed', and where the gradient "
            "grows with distance look at why it explodes"
        )
    probabilities = [after / before for before, after in pairwise([1.0, *best])]
    return Roulette(probabilities, every, seed)


def _price(
    survivals: Sequence[float], errors: Sequence[float], noise: float, advance: float
) -> RoulettePrice:
    walked = (1 + sum(survivals)) / (1 + len(survivals))
    variance = sum(
        (1 / after - 1 / before) * error**2
        for (before, after), error in zip(pairwise([1.0, *survivals]), errors, strict=True)
    )
    return RoulettePrice(cost=advance + (1 - advance) * walked, variance=variance, noise=noise)
