"""A step of an optimizer on tensors without values, to see whether it can be taken at all."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tbptt_ckpt.errors import first_line
from tbptt_ckpt.module.trees import iterate_tensors


def step_rehearsal(optimizer: Any) -> Callable[[], str]:
    """Tells what keeps an optimizer from a step once it was loaded: "" where nothing does.

    torch's `load_state_dict` compares numbers of parameters and no shapes, keys or kinds of what
    it is given. What no step of this optimizer can do without values, before the load and from its
    first state, tells nothing: optimizers that read a device, or that are wrapped, are not held
    against anything.
    """
    waits = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not isinstance(optimizer, torch.optim.Optimizer) or waits:
        return lambda: ""  # a step may wait for other processes
    groups = [dict(group) for group in optimizer.param_groups]
    nothing: dict[Any, Any] = defaultdict(dict)

    def problem() -> str:
        found = _problem_of_a_step(optimizer, optimizer.param_groups, optimizer.state)
        return found and ("" if _problem_of_a_step(optimizer, groups, nothing) else found)

    return problem


def _problem_of_a_step(
    optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]
) -> str:
    """Of two steps with these hyper-parameters from this state."""
    weights = [parameter for group in groups for parameter in group["params"]]
    held = [t for each in state.values() for t in iterate_tensors(each) if t.numel() > 1]
    known = {id(t): torch.empty_like(t, device="meta") for t in (*weights, *held)}
    # Fused kernels look at no shapes, and run on no such tensors.
    plain = [{**group, "fused": None} if "fused" in group else group for group in groups]
    found = {"defaults": optimizer.defaults, "state": state, "param_groups": plain}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = object.__new__(type(optimizer))
            twin.__setstate__(copy.deepcopy(found, known))
            for weight in map(known.__getitem__, map(id, weights)):
                weight.requires_grad_().grad = torch.empty_like(weight)
            for _ in range(2):
                twin.step()
    except Exception as error:  # the optimizer may be the user's
        said = first_line(error)
        return "" if isinstance(error, NotImplementedError) or "meta tensor" in said else said
    return ""
