"""What all peers in JAX share: one step of the model, compilation, and its memory analysis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.work import Arrays, Work

Carry = tuple[tuple[jax.Array, jax.Array], jax.Array]
Step = Callable[[Carry, tuple[jax.Array, jax.Array]], tuple[Carry, None]]


def make_step(weights: dict[str, jax.Array]) -> Step:
    """One step: `((h, c), summed loss), (x, target)` to the next; loss and readout are in it,
    so that no logits are kept. Matrices come transposed, as XLA multiplies fastest."""

    def step(carry: Carry, step_data: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
        ((h, c), total), (x, target) = carry, step_data
        gates = x @ weights["weight_ih"] + weights["bias_ih"]
        gates += h @ weights["weight_hh"] + weights["bias_hh"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        scores = jax.nn.log_softmax(h @ weights["weight"] + weights["bias"])
        loss = -jnp.take_along_axis(scores, target[:, None], axis=-1).mean()
        return ((h, c), total + loss), None

    return step


class JaxPeer(ABC):
    """A compiled function of weights, inputs and targets to the loss and its gradient."""

    def __init__(self, work: Work) -> None:
        weights = {name: _transposed(weight) for name, weight in work.weights.items()}
        targets = work.targets.astype(np.int32)
        self._arguments = jax.device_put((weights, work.inputs, targets))
        self._gradients: dict[str, jax.Array] = {}
        self._compiled: Any = None

    @abstractmethod
    def scan(self, step: Step, first: Carry, inputs: jax.Array, targets: jax.Array) -> Carry:
        """The loop over time."""

    def warm_up(self) -> None:
        """Compile."""
        function = jax.jit(jax.value_and_grad(self._loss))
        self._compiled = function.lower(*self._arguments).compile()

    def run(self) -> float:
        loss, self._gradients = jax.block_until_ready(self._compiled(*self._arguments))
        return float(loss)

    def gradients(self) -> Arrays:
        return {name: _transposed(np.asarray(g)) for name, g in self._gradients.items()}

    def peak_bytes(self) -> int:
        """What the compiled program needs beside its arguments and results; nothing runs."""
        return int(self._compiled.memory_analysis().temp_size_in_bytes)

    def _loss(
        self, weights: dict[str, jax.Array], inputs: jax.Array, targets: jax.Array
    ) -> jax.Array:
        zeros = jnp.zeros(inputs.shape[1:])
        first = ((zeros, zeros), jnp.zeros(()))
        _, total = self.scan(make_step(weights), first, inputs, targets)
        return total / len(inputs)


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T)
