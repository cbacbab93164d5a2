"""The work that every peer does: one forward and backward of an LSTM over a byte sequence.

It is plain numpy, made from a seed, so that every process and every framework gets equal
weights and data. Names and layout of the weights are those of the torch modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BYTES = 256
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, order=True)
class Size:
    """How much work it is; inputs are as wide as the state."""

    width: int
    num_lanes: int
    num_steps: int

    def __str__(self) -> str:
        return f"width {self.width}, {self.num_lanes} lanes, {self.num_steps:,} steps"


@dataclass(frozen=True)
class Work:
    """Weights and data; what is wanted is the mean cross entropy per byte and its gradient.

    Attributes:
        size: How much it is.
        weights: `weight_ih` [4H, F], `weight_hh` [4H, H], `bias_ih`, `bias_hh` [4H] of the
            cell (gates in the order i, f, g, o), `weight` [256, H], `bias` [256] of the readout.
        inputs: [T, B, F].
        targets: [T, B], bytes.
    """

    size: Size
    weights: Arrays
    inputs: NDArray[np.float32]
    targets: NDArray[np.int64]

    def prefix(self, num_steps: int) -> Work:
        """The same work over the first steps only."""
        size = Size(self.size.width, self.size.num_lanes, num_steps)
        return Work(size, self.weights, self.inputs[:num_steps], self.targets[:num_steps])


def make_work(size: Size) -> Work:
    """Weights as torch initialises them, normal inputs, random targets."""
    generator = np.random.default_rng(0)
    bound = size.width**-0.5
    shapes = {
        "weight_ih": (4 * size.width, size.width),
        "weight_hh": (4 * size.width, size.width),
        "bias_ih": (4 * size.width,),
        "bias_hh": (4 * size.width,),
        "weight": (NUM_BYTES, size.width),
        "bias": (NUM_BYTES,),
    }
    weights = {
        name: generator.uniform(-bound, bound, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    inputs = generator.standard_normal((size.num_steps, size.num_lanes, size.width), np.float32)
    targets = generator.integers(0, NUM_BYTES, inputs.shape[:2])
    return Work(size, weights, inputs, targets)


def relative_error(found: Arrays, expected: Arrays) -> float:
    """Norm of the difference over the norm, of all gradients together."""
    squares = [
        (
            np.square(found[name] - expected[name], dtype=np.float64).sum(),
            np.square(expected[name], dtype=np.float64).sum(),
        )
        for name in expected
    ]
    difference, norm = np.sum(squares, axis=0)
    return float(np.sqrt(difference / norm))
