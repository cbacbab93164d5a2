"""In what units an optimizer takes the gradient of each weight.

Adam and its kin divide each element by the root of a running mean of its square: what is small
beside other elements moves its own weight as far as theirs move theirs. What such an optimizer
makes of a gradient is not told by the gradient's norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tbptt_ckpt.updates.shards import is_shard

# In the state of Adam, AdamW, NAdam, RAdam; of RMSprop, Adadelta; of Adagrad.
_NAMES = ("exp_avg_sq", "square_avg", "sum")
_LEAST_EPS = 1e-12


class Unit(NamedTuple):
    """What the gradient of a weight is divided by: the root of `squares`, and `eps`."""

    squares: Tensor
    eps: float


def step_units(optimizer: Any, weights: Sequence[Tensor]) -> list[Unit | None] | None:
    """The unit of each weight, None where it has none; None for optimizers that have none at all.

    They are the optimizer's own tensors, as they are before its next step. A factor that all
    weights have in common, as that for the first steps, is left out. Sharded weights have none: no
    rank holds the squares of all elements.
    """
    state = getattr(optimizer, "state", None) or {}
    groups = [] if optimizer is None else optimizer.param_groups
    eps_of = {id(weight): group.get("eps") for group in groups for weight in group["params"]}
    units = [_unit(weight, state.get(weight), eps_of.get(id(weight))) for weight in weights]
    return units if any(units) else None


def _unit(weight: Tensor, state: Any, eps: Any) -> Unit | None:
    found = [state[name] for name in _NAMES if name in state] if isinstance(state, dict) else []
    squares = next((each for each in found if isinstance(each, Tensor)), None)
    if (
        squares is None
        or is_shard(squares)
        or weight.is_complex()
        or squares.layout is not torch.strided
    ):
        return None
    if squares.shape != weight.shape or squares.device != weight.device:
        return None
    return Unit(squares, max(_LEAST_EPS, float(eps or 0.0)))
