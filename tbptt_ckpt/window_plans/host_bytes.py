"""What leaves and states take on the host besides their tensors, as part of their bytes."""

from __future__ import annotations

import math
from dataclasses import replace

from tbptt_ckpt.costs import Costs, Curve


def with_host_bytes(costs: Costs) -> Costs:
    """The costs with what a leaf and a state take on the host besides tensors."""

    def added(curve: Curve) -> Curve:
        per_step = costs.host_step_bytes
        return Curve(tuple((steps, value + per_step * steps) for steps, value in curve.points))

    return replace(
        costs,
        state_bytes=costs.state_bytes + math.ceil(costs.host_state_bytes),
        leaf_bytes=added(costs.leaf_bytes),
        last_leaf_bytes=costs.last_leaf_bytes and added(costs.last_leaf_bytes),
    )
