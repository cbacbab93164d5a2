"""Where a test runs: on the CPU, and on the accelerator of a machine that has one.

A test that asks for the fixture `device` runs once on each. What `cases` makes lies `here()`, and
what a test makes by itself is `placed`. References run on the CPU, in `with running_on(CPU)`, or
where they draw random numbers on the same device: what is promised bitwise is promised within one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")
_places = [CPU]


def found() -> list[torch.device]:
    """The CPU, and the accelerator where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [CPU] if accelerator is None else [CPU, torch.device(accelerator.type, 0)]


def here() -> torch.device:
    """The device of the test that runs, which is the CPU where it asked for none."""
    return _places[-1]


@contextlib.contextmanager
def running_on(device: torch.device) -> Iterator[torch.device]:
    """What is placed within lies on this device."""
    _places.append(device)
    try:
        yield device
    finally:
        _places.pop()


def placed(thing: Any) -> Any:
    """A module, or a nesting of tensors, on the device of the test."""
    if isinstance(thing, nn.Module):
        return thing.to(here())
    return tree_map_only(Tensor, lambda tensor: tensor.to(here()), thing)


def generator_states() -> list[Tensor]:
    """States of the generators that a test's draws may have moved."""
    states = [torch.get_rng_state()]
    if here() != CPU:
        states.append(torch.get_device_module(here()).get_rng_state(here()))
    return states


def set_generator_states(states: list[Tensor]) -> None:
    """Take them back to where `generator_states` found them."""
    torch.set_rng_state(states[0])
    if here() != CPU:
        torch.get_device_module(here()).set_rng_state(states[1], here())
