"""Data whose entries are their own numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tbptt_ckpt import TensorSequence

LENGTHS = (3, 1, 4, 1, 5, 2)


def numbers(num_steps: int, first: int = 0) -> np.ndarray:
    """[T, 2]: rows that tell steps apart."""
    return np.arange(2 * first, 2 * (first + num_steps), dtype=np.float32).reshape(num_steps, 2)


def several(lengths: Iterable[int] = LENGTHS) -> list[TensorSequence]:
    """Sequences whose rows tell sequences and steps apart."""
    return [
        TensorSequence(numbers(n, 100 * i + 1), numbers(n, 100 * i + 1) + 1)
        for i, n in enumerate(lengths)
    ]
