"""Takes an update of the weights back that was cut short."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import TbpttError
from tbptt_ckpt.module.trees import iterate_tensors


class Update:
    """One update of the weights while it goes on."""

    def __init__(self, optimizer: Any, scheduler: Any, scaler: Any) -> None:
        self._optimizer, self._scheduler, self._scaler = optimizer, scheduler, scaler
        self._known = set(optimizer.state)
        self._versions = self._fingerprint()
        self._copy: _Copy | None = None

    def copy(self) -> None:
        """Copy all that the update changes: weights, optimizer state, schedule, scale.

        It costs that much memory until the update is done.
        """
        self._copy = _Copy(self._optimizer, self._scheduler, self._scaler)

    def take_back(self) -> None:
        """Put everything back as it was.

        Raises:
            TbpttError: Something was changed already, and there is no copy.
        """
        if self._copy is not None:
            self._copy.restore(self._optimizer, self._scheduler, self._scaler)
            return
        if self._fingerprint() != self._versions:
            raise TbpttError(
                "the optimizer's step was cut short after it had updated some of the weights, "
                "and no copy was kept; go on from the last snapshot"
            )
        for key in set(self._optimizer.state) - self._known:
            del self._optimizer.state[key]  # perhaps filled only in part

    def _fingerprint(self) -> list[int]:
        return [tensor._version for tensor in self._tensors()]

    def _tensors(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]
        for key in self._known:
            yield from iterate_tensors(self._optimizer.state[key])


class _Copy:
    """What an update changes, as it was before."""

    def __init__(self, optimizer: Any, scheduler: Any, scaler: Any) -> None:
        self._groups = [dict(group) for group in optimizer.param_groups]
        self._weights = [(p, p.detach().clone()) for g in self._groups for p in g["params"]]
        self._state = {key: _cloned(value) for key, value in optimizer.state.items()}
        self._schedule = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._scale = None if scaler is None else copy.deepcopy(scaler.state_dict())

    def restore(self, optimizer: Any, scheduler: Any, scaler: Any) -> None:
        with torch.no_grad():
            for parameter, weights in self._weights:
                parameter.copy_(weights)
        optimizer.state.clear()
        optimizer.state.update(self._state)
        for group, before in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(before)
        if self._schedule is not None:
            scheduler.load_state_dict(self._schedule)
        if self._scale:
            scaler.load_state_dict(self._scale)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return value
