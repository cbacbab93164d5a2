"""Whether runs of one step differ by chance, as those of kernels that are not deterministic do.

NOTE [The order of runs]
Runs that differ by chance come in any order, whatever their distribution and however few of their
numbers differ. So they are put on the line from the first run to the last, and it is counted how
many pairs of the others, of which neither says where that line lies, are not in the order in which
they ran. How likely so few are is known exactly, for the sum over steps too. A module that counts
goes on and on along the line.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from tbptt_ckpt.module.trees import Tree, structure, tensors_of

# At least so many runs of a step whose kernels may not be deterministic, and more where few share
# them. Of one step 22 are compared (the first two are known to differ, the last ends the line), of
# which a count may swap 27 of 231 pairs by the rounding that it is in.
_RUNS, _SHARED_RUNS = 9, 16
_RARE_RUNS = 256  # of a leaf's steps: noise in one run of ten is missed by 2 in 10^12
_CHANCE = 1e-8  # how often chance may be taken for a count


def num_runs(num_steps: int) -> int:
    """How often each of so many steps is run, so that they can be seen to be in order."""
    return _RUNS + -(-_SHARED_RUNS // num_steps)


def num_rare_runs(num_steps: int) -> int:
    """How often more each of so many steps is run where noise explains all, and none was seen."""
    return -(-_RARE_RUNS // num_steps)


class Noise:
    """How runs of steps differ, over the steps where they do."""

    def __init__(self) -> None:
        self.is_there = False
        self._compared: list[int] = []  # how many runs, of each step
        self._swapped = 0  # pairs that are not in the order in which they ran

    def add(self, runs: list[tuple[Tree, Tree]]) -> None:
        """Several runs of a step."""
        self.is_there = True
        places = _along(runs)[2:-1]
        self._compared.append(len(places))
        self._swapped += sum(not a < b for a, b in combinations(places, 2))  # NaN and equal ones

    def grows(self) -> bool:
        """Whether runs differ the more the longer they are apart, which chance does not do."""
        return self.is_there and _at_most(self._swapped, tuple(self._compared)) < _CHANCE


@lru_cache
def _at_most(swapped: int, compared: tuple[int, ...]) -> float:
    """How likely no more pairs are swapped where each order of so many, of each step, is as likely.

    Of those that are put in order one by one, the k-th is swapped with 0 to k - 1 of those before.
    """
    orders = [1]  # by how many pairs they swap
    for number in (k for n in compared for k in range(1, n + 1)):
        most = len(orders) + number - 1
        orders = [sum(orders[max(0, i - number + 1) : i + 1]) for i in range(most)]
    return sum(orders[: swapped + 1]) / sum(orders)


def _along(runs: list[tuple[Tree, Tree]]) -> list[float]:
    """Where runs lie on the line from the first to the last."""
    if any(form(run) != form(runs[0]) for run in runs):
        return [0.0] * len(runs)
    values = [[t.detach().to("cpu", _wide(t)) for t in tensors_of(run)] for run in runs]
    moved = [[a - b for a, b in zip(run, values[0], strict=True)] for run in values]
    return [
        sum(float((d.conj() * value).real.sum()) for d, value in zip(moved[-1], run, strict=True))
        for run in moved
    ]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def form(tree: Tree) -> object:
    """Containers and shapes, without which no two runs can be compared."""
    return structure(tree), [tensor.shape for tensor in tensors_of(tree)]
