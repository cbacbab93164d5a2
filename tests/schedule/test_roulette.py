"""Where a gradient may stop, what that costs, and what its variance is, against plain sums."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from tbptt_ckpt import ArgumentError, tbptt_windows
from tbptt_ckpt.engine.reach import Border, Decay
from tbptt_ckpt.profiling.measured_reach import MeasuredReach
from tbptt_ckpt.schedule import Roulette, fitted_roulette, roulette_price
from tbptt_ckpt.schedule.truncation import draw


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("every", [None, 1, 2, 5])
@pytest.mark.parametrize("k2", [4, 7, None])
def test_every_window_of_a_sequence_may_stop_at_its_borders(
    k2: int | None, every: int | None, restarts: bool
) -> None:
    """Law and places, by hand, for numbers that are all over [0, 1)."""
    k1, roulette = 3, Roulette((0.75, 0.5, 0.25), every)
    for window in tbptt_windows(14, k1, k2):
        borders = list(range(window.new_start, window.start, -(every or k1)))
        stops = dict.fromkeys([*borders, window.start], 0)
        for part in range(512):
            drawn = draw(window, roulette, k1, part / 512, restarts=restarts)
            crossed = [border for border in borders if border > drawn.window.start]
            assert list(drawn.divisors) == crossed
            given = [0.75, 0.5, *[0.25] * len(borders)]
            assert list(drawn.divisors.values()) == given[: len(crossed)]
            assert drawn.survival == np.prod(given[: len(crossed)])
            assert list(drawn.borders) == borders
            assert drawn.whole == window
            led = not restarts and drawn.window.start > window.start
            assert drawn.window.first == (window.start if led else drawn.window.start)
            stops[drawn.window.start] += 1
        left = 1.0
        for border, probability in zip(borders, [0.75, 0.5, *[0.25] * len(borders)], strict=False):
            expected = left * (1 - probability) * 512
            assert abs(stops[border] - expected) <= 1
            left *= probability
        assert abs(stops[window.start] - left * 512) <= 1


def sections(seed: int, count: int = 7) -> np.ndarray:
    """What so many sections bring to a gradient of five weights, by and by less."""
    generator = np.random.default_rng(seed)
    decay = generator.choice([0.3, 0.7, 1.0])
    return generator.normal(size=(count, 5)) * decay ** np.arange(count)[:, None]


def errors_of(parts: np.ndarray) -> list[float]:
    full = parts.sum(0)
    cut = [np.linalg.norm(parts[j:].sum(0)) for j in range(1, len(parts))]
    return [float(each / np.linalg.norm(full)) for each in cut]


@pytest.mark.parametrize("seed", range(6))
def test_cost_and_variance_are_the_sums_over_all_stopping_points(seed: int) -> None:
    rng, parts = random.Random(seed), sections(seed)
    given = [rng.uniform(0.2, 1.0) for _ in range(rng.randint(1, 6))]
    crossing = [1.0]
    for border in range(len(parts) - 1):
        crossing.append(crossing[-1] * given[min(border, len(given) - 1)])
    mean, square, walked = np.zeros(5), 0.0, 0.0
    estimates = (parts / np.array(crossing)[:, None]).cumsum(0)
    for count, (estimate, (here, further)) in enumerate(
        zip(estimates, pairwise([*crossing, 0.0]), strict=True), 1
    ):
        mean += (here - further) * estimate
        square += (here - further) * float(((estimate - parts.sum(0)) ** 2).sum())
        walked += (here - further) * count / len(parts)
    np.testing.assert_allclose(mean, parts.sum(0), rtol=1e-12)
    price = roulette_price(Roulette(given), errors_of(parts), noise=0.5, advance=0.25)
    assert price.variance == pytest.approx(square / (parts.sum(0) ** 2).sum(), rel=1e-12)
    assert price.cost == pytest.approx(0.25 + 0.75 * walked, rel=1e-12)
    assert price.work == pytest.approx(price.cost * (1 + 2 * price.variance), rel=1e-12)
    assert price.pays == (price.work < 1)


@pytest.mark.parametrize("noise", [1.0, 10.0])
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_the_fitted_one_is_at_least_as_good_as_any_constant(ratio: float, noise: float) -> None:
    """Of a gradient whose remainder decays geometrically, where a constant is the best shape."""
    errors = [ratio**border for border in range(1, 12)]
    fitted = roulette_price(fitted_roulette(errors, noise=noise, least=1e-9), errors, noise=noise)
    others = [roulette_price(Roulette(p / 100), errors, noise=noise) for p in range(30, 100)]
    assert fitted.work <= 1.02 * min(other.work for other in others)
    assert fitted.pays


def test_the_fitted_one_follows_what_is_left() -> None:
    """Half of the gradient comes from four sections back, and next to nothing from further on."""
    errors = [0.5, 0.5, 0.5, 0.5, 1e-9, 1e-9]
    roulette = fitted_roulette(errors, least=0.02, every=7, seed=3)
    assert (roulette.every, roulette.seed) == (7, 3)
    crossing = np.cumprod(list(roulette.survival))
    assert np.allclose(crossing[:4], crossing[0])
    assert np.allclose(crossing[4:], 0.02)  # and not 1e-9
    best = min(roulette_price(Roulette(p / 100), errors).work for p in range(1, 101))
    assert roulette_price(roulette, errors).work < 0.8 * best


@pytest.mark.parametrize("errors", [[1.0] * 8, [1.5, 2.0, 1.2], [1 - j / 9 for j in range(8)]])
def test_what_does_not_pay_is_refused(errors: list[float]) -> None:
    """A gradient that comes from far away; the last one, of which all is alike, pays a little."""
    if errors[-1] < 0.5:
        assert roulette_price(fitted_roulette(errors), errors).pays
        return
    with pytest.raises(ArgumentError, match="use truncation='fixed'"):
        fitted_roulette(errors)
    for survival in (0.3, 0.8, 0.99):
        assert not roulette_price(Roulette(survival), errors).pays


def test_errors_of_a_measured_reach_are_taken_at_borders() -> None:
    """Where no leaf begins, the error of a shorter cut; and of several windows the largest."""
    known = [(4, 0.9), (6, 0.7), (8, 0.4), (12, 0.1), (20, 0.0)]
    decay = Decay(tuple(Border(back, None, error) for back, error in known), 6)
    assert decay.errors() == [0.7, 0.1, 0.1]  # 6, 12 and 18 steps back
    assert decay.errors(2) == [0.7, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1]
    assert Decay(decay.borders[3:], 6).errors() == [1.0, 0.1, 0.1]
    lower = Decay(tuple(Border(back, None, 0.2) for back, _ in known), 6)
    assert MeasuredReach(k1=6, k2=20, decays=(decay, lower)).errors() == [0.7, 0.2, 0.2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"errors": []}, "a number for each border"),
        ({"advance": 1.0}, "advance=1.0 must be a share below 1"),
        ({"least": 1.5}, "least=1.5 must be a probability"),
    ],
)
def test_what_cannot_be_priced(given: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        fitted_roulette(**{"errors": [0.1], **given})
