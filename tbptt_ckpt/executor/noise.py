"""How much runs of one step differ by chance, where kernels are not deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from tbptt_ckpt.module.trees import Tree, structure, tensors_of

# How much more the first and the last of these may differ than two in a row, where they differ by
# chance: of few numbers, and of many.
_GROWTH = (12.0, 4.0)


@dataclass(slots=True)
class Noise:
    """How much runs of one step differ, over the steps where they do."""

    is_there: bool = False
    _numbers: int = 0
    _in_a_row: float = 0.0
    _first_to_last: float = 0.0

    def add(self, runs: list[tuple[Tree, Tree]]) -> None:
        """Several runs of a step."""
        self.is_there = True
        self._numbers += sum(t.numel() for t in tensors_of(runs[0]))
        in_a_row = [_squared_distance(a, b) for a, b in pairwise(runs)]
        self._in_a_row += sum(in_a_row) / len(in_a_row)
        self._first_to_last += _squared_distance(runs[0], runs[-1])

    def grows(self) -> bool:
        """Whether runs differ the more the longer they are apart, which chance does not do."""
        return self._first_to_last > _GROWTH[self._numbers >= 64] * self._in_a_row


def _squared_distance(one: Tree, other: Tree) -> float:
    if form(one) != form(other):
        return 0.0
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return sum(float((a.double() - b.double()).abs().square().sum()) for a, b in pairs)


def form(tree: Tree) -> object:
    """Containers and shapes, without which no two runs can be compared."""
    return structure(tree), [tensor.shape for tensor in tensors_of(tree)]
