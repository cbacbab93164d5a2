"""Losses of TorchRL over the windows of a rollout: its recurrent modules are handed their states.

A loss runs its networks in recurrent mode over a few steps of the rollout at a time. What its
`LSTMModule` and `GRUModule` begin those steps with, and end them with, is the state that passes
from one segment to the next; trajectories that begin on the way are theirs to begin anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.data.tensors import TensorSequence
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.integrations.hosts import imported

__all__ = ["RecurrentLoss", "rollout_sequence"]

_BEGINS = "is_init"


class RecurrentLoss(nn.Module):
    """A loss module of TorchRL as one that is given segments of steps, and hands on its states.

    Called with the steps of a `rollout_sequence` and a state, it returns the losses of these steps,
    [B, n], those of all keys "loss_..." added up, and the state after them: one tensor [B, L, H]
    for each state of each `LSTMModule` and `GRUModule` inside. None stands for the states that the
    rollout has itself at its first step. Where a step begins a trajectory (`is_init`), its states
    are the rollout's own, which are zeros as a `TensorDictPrimer` makes them.

    What a step's loss reads must be that step's: advantages and value targets are computed over the
    whole rollout beforehand.

    Attributes:
        loss_module: The one that was given, which has the weights.

    Raises:
        ArgumentError: The loss reduces its steps, or nothing inside is recurrent.
    """

    @checked
    def __init__(self, loss_module: nn.Module) -> None:
        super().__init__()
        name = type(loss_module).__name__
        if getattr(loss_module, "reduction", None) != "none":
            raise ArgumentError(
                f"loss_module={name} must be made with reduction='none', so that each step has its "
                "loss"
            )
        self.loss_module = loss_module
        if not self._recurrent():
            raise ArgumentError(
                f"loss_module={name} must have an LSTMModule or a GRUModule in its networks"
            )

    def forward(self, steps: Mapping[str, Any], state: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The losses of some steps, and the states after them."""
        recurrent, begins = self._recurrent(), steps[_BEGINS]
        rollout = imported("tensordict", "torchrl").TensorDict(dict(steps), begins.shape[:2])
        names = [name for each in recurrent for name in each.in_keys[1:] if name != _BEGINS]
        for name, value in () if state is None else zip(names, state, strict=True):
            stored = rollout.get(name)
            if stored is None:  # then a trajectory begins with zeros
                stored = value.new_zeros(*begins.shape[:2], *value.shape[1:])
            begins_now = begins[:, 0].reshape(-1, *[1] * (value.dim() - 1))
            first = torch.where(begins_now, stored[:, 0], value)
            rollout.set(name, torch.cat([first[:, None], stored[:, 1:]], 1))
        in_recurrent_mode = imported("torchrl.modules", "torchrl").set_recurrent_mode
        with self._watched(recurrent) as last, in_recurrent_mode(True):
            losses = self.loss_module(rollout)
        terms = [loss for name, loss in losses.items() if name.startswith("loss_")]
        total = sum(term.reshape(begins.shape[:2]) for term in terms)
        return total, tuple([value for values in last for value in values])

    def _recurrent(self) -> list[Any]:
        """What is recurrent in the loss's networks, which it keeps out of its own modules."""
        modules = imported("torchrl.modules", "torchrl")
        kinds = modules.LSTMModule, modules.GRUModule
        held = [each for each in vars(self.loss_module).values() if isinstance(each, nn.Module)]
        inside = [each for owner in (self.loss_module, *held) for each in owner.modules()]
        return list(dict.fromkeys(each for each in inside if isinstance(each, kinds)))

    @contextmanager
    def _watched(self, recurrent: list[Any]) -> Iterator[list[list[Tensor]]]:
        """While entered, the states that recurrent modules end with are noted."""
        last: list[list[Tensor]] = [[] for _ in recurrent]

        def note(values: list[Tensor], module: Any, _inputs: Any, output: Any) -> None:
            if values:
                raise ArgumentError(
                    f"loss_module={type(self.loss_module).__name__} calls a recurrent module twice "
                    "over the same steps, so that its state is not one; compute value targets over "
                    "the whole rollout beforehand"
                )
            values += [output.get(name)[:, -1] for name in module.out_keys[1:]]

        hooks = [
            module.register_forward_hook(partial(note, values))
            for module, values in zip(recurrent, last, strict=True)
        ]
        try:
            yield last
        finally:
            for hook in hooks:
                hook.remove()


@checked
def rollout_sequence(rollout: Any) -> TensorSequence:
    """A rollout of TorchRL as a source, to be read by a `RecurrentLoss`.

    Args:
        rollout: A TensorDict [B, T] with `is_init` (`InitTracker`), and all that the loss reads:
            observations, actions, advantages, and the states that were stored, if there are any.

    Returns:
        A sequence with time on dimension 1. Its first state is None: the rollout's own.

    Raises:
        ArgumentError: It is no such rollout.
    """
    shape, begins = getattr(rollout, "batch_size", ()), _BEGINS in getattr(rollout, "keys", list)()
    if len(shape) != 2 or not begins:
        raise ArgumentError(
            f"rollout={shown(rollout)} must be a TensorDict of [B, T] with {_BEGINS!r}, as "
            "InitTracker makes it (rollout.unsqueeze(0) has one lane)"
        )
    steps = rollout.to_dict()
    return TensorSequence(steps, steps[_BEGINS], time_dim=1)
