"""A run that was saved on one device, for a module on another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.devices import default_generators
from tbptt_ckpt.module.trees import map_tensors


def moved(
    run: dict[str, Any] | None, saved: str, here: torch.device, *, is_on_host: bool = False
) -> dict[str, Any] | None:
    """The run with its states, buffers, gradients and held steps where the module is now.

    Generators stay, those of a device too where the other is of its kind; those of another kind
    cannot be translated, and go on as they are here. `is_on_host` where its tensors were left on
    the host, to be moved to a device of that name too.
    """
    if run is None or (saved == str(here) and not is_on_host):
        return run

    def move(tensor: Tensor) -> Tensor:
        # Of a device that is not here tensors come as the CPU's.
        return tensor.to(here) if str(tensor.device) in (saved, "cpu") else tensor

    def with_moved(owner: dict[str, Any], *names: str) -> dict[str, Any]:
        return owner | {name: map_tensors(move, owner[name]) for name in names}

    found = with_moved(run, "collected", "group")
    if "held" in run["reader"]:
        held = [with_moved(block, "inputs", "targets") for block in run["reader"]["held"]]
        found["reader"] = run["reader"] | {"held": held}
    if (records := run["records"]) is not None:
        found["records"] = with_moved(records, "values", "boundaries", "origin_state")
        if torch.device(saved).type != here.type:
            found["records"] |= _with_generators_of(here, records)
    return found


def _with_generators_of(here: torch.device, records: dict[str, Any]) -> dict[str, Any]:
    own = [each.get_state() for each in default_generators([torch.empty(0, device=here)])]
    devices = [len(records["random"]) + index for index in range(len(own))]
    return {
        "random": [*records["random"], *own],
        "ambients": [each | {"devices": devices} for each in records["ambients"]],
    }
