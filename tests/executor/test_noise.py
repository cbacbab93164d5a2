"""Runs that differ by chance come in any order; those of what counts do not."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from tbptt_ckpt.executor.fingerprint import step_difference
from tbptt_ckpt.executor.noise import Noise, _at_most, num_runs


def noise_of(*steps: Tensor) -> Noise:
    """Noise of steps, whose runs are the rows of a tensor each."""
    noise = Noise()
    for runs in steps:
        noise.add([(row, None) for row in runs])
    return noise


@pytest.mark.parametrize("numbers", [1, 64])
@pytest.mark.parametrize("steps", [1, 3])
def test_chance_is_no_count_however_few_numbers_differ(numbers: int, steps: int) -> None:
    """Distances of first and last runs call one in ten of these a count."""
    torch.manual_seed(0)
    scale = torch.full((numbers,), 1e-3, dtype=torch.float64)
    scale[0] = 1.0
    for _ in range(200):
        drawn = torch.randn(steps, num_runs(steps), numbers, dtype=torch.float64) * scale
        assert not noise_of(*drawn).grows()


def test_chance_that_is_rare_or_of_few_values_is_no_count() -> None:
    torch.manual_seed(0)
    for _ in range(200):
        drawn = (torch.rand(3, num_runs(3), 4) < 0.2).double()
        assert not noise_of(*drawn).grows()


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_count_is_found_in_one_step(steps: int, dtype: torch.dtype) -> None:
    counted = 1 + 1e-7 * torch.arange(num_runs(steps), dtype=torch.float64)
    assert noise_of(*[counted.to(dtype)[:, None].expand(-1, 5)] * steps).grows()


def test_a_count_in_as_much_noise_is_found_over_steps() -> None:
    torch.manual_seed(0)
    runs = torch.arange(float(num_runs(8))).unsqueeze(1) + torch.randn(8, num_runs(8), 1)
    assert noise_of(*runs).grows()


def test_without_runs_or_with_other_forms_nothing_grows() -> None:
    assert not Noise().grows()
    noise = Noise()
    noise.add([(torch.ones(k % 2 + 1), None) for k in range(num_runs(1))])
    assert not noise.grows()


@pytest.mark.parametrize("compared", [(3,), (4,), (2, 3), (3, 3)])
def test_how_likely_orders_are_is_what_counting_all_of_them_gives(
    compared: tuple[int, ...],
) -> None:
    sums = [0]
    for n in compared:
        swapped = [
            sum(order[i] > order[j] for j in range(n) for i in range(j))
            for order in permutations(range(n))
        ]
        sums = [one + other for one in sums for other in swapped]
    for most in range(max(sums) + 2):
        expected = sum(each <= most for each in sums) / len(sums)
        assert _at_most(most, compared) == pytest.approx(expected, rel=1e-12)


def test_an_output_near_zero_differs_by_chance_by_as_little_of_the_whole() -> None:
    state = torch.ones(40)
    one, other = (state, torch.tensor([1e-4])), (state, torch.tensor([3e-4]))
    for by_chance in (False, True):
        _, is_rounding = step_difference(one, other, in_half=False, by_chance=by_chance)
        assert is_rounding is by_chance
    far = state, torch.tensor([0.2])
    assert not step_difference(one, far, in_half=False, by_chance=True)[1]
