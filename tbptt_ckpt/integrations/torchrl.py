"""TorchRL's recurrent modules by windows, in any loss: all windows of a rollout, one backward.

A loss runs its networks in recurrent mode over a rollout. There a windowed module runs `k1` steps
at a time, each with the steps before it, so that gradients reach `k2` steps back. Trajectories that
begin on the way are begun anew by the module itself.

NOTE [Weights of a loss]
A loss has its networks' weights, and puts them into a network for the time of its forward. What
runs again in the backward is given those that it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.arguments import PositiveInt, checked
from tbptt_ckpt.engine.chunks import Chunks
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.integrations.hosts import imported
from tbptt_ckpt.schedule.strategies import AnyStrategy

__all__ = ["windowed"]

_BEGINS = "is_init"


@checked
def windowed(
    module: nn.Module,
    k1: PositiveInt,
    k2: PositiveInt | None,
    *,
    strategy: AnyStrategy = "auto",
    check_replays: bool = True,
) -> Any:
    """An `LSTMModule` or `GRUModule` whose gradients in a loss are those of windows.

    It takes the module's place in a network, with its keys and the names of its weights. In
    recurrent mode, and where gradients are recorded, outputs of `k1` steps at a time come from the
    window of `k2` steps that ends with them. So the one backward of a rollout adds up the gradients
    of all its windows, each recomputed by itself; otherwise calls are the module's own. As there, a
    trajectory that begins (`is_init`) does so with the state stored at that step, or zeros.

    Args:
        module: An `LSTMModule` or a `GRUModule`.
        k1: Steps of a rollout whose gradients reach back together.
        k2: Steps that they reach back from the last of these; None for back to the start.
        strategy: As for `Windowed`.
        check_replays: As for `unroll`.

    Raises:
        ArgumentError: An argument that cannot work, or TorchRL is missing.
    """
    modules = imported("torchrl.modules", "torchrl")
    if not isinstance(module, modules.LSTMModule | modules.GRUModule):
        raise ArgumentError(f"module={shown(module)} must be an LSTMModule or a GRUModule")
    if k2 is not None and k2 < k1:
        raise ArgumentError(f"k2={k2} must be at least k1={k1}")
    return _windowed_kind()(module, k1, k2, strategy, check_replays)


@cache
def _windowed_kind() -> Any:
    """The class, made where TorchRL is needed."""
    base: Any = imported("tensordict.nn", "torchrl").TensorDictModuleBase

    class Windowed(_Windowed, base):  # type: ignore[misc]
        pass

    return Windowed


def _check_no_ensemble(module: nn.Module) -> None:
    try:
        for weight in module.parameters():
            weight.data_ptr()
    except RuntimeError as error:
        raise ArgumentError(
            f"windowed({type(module).__name__}) was called under torch.vmap, as ensembles are "
            "(expand_dim, num_qvalue_nets): such a module goes without windows"
        ) from error


def _rebuilt(*given: Any) -> Any:
    return _windowed_kind()(*given)


class _Windowed:
    """A recurrent module's place in a network; the layers inside are its own, by their names."""

    in_keys: list[Any]
    out_keys: list[Any]

    def __init__(self, module: Any, *options: Any) -> None:
        super().__init__()
        self.in_keys, self.out_keys = module.in_keys, module.out_keys
        for name, layer in module.named_children():
            self.add_module(name, layer)
        self._inner, self._given = (module,), options  # in a tuple: it is no layer of this one

    def __reduce__(self) -> Any:
        return _rebuilt, (self._inner[0], *self._given)

    def __getattr__(self, name: str) -> Any:
        """What is not found here is the module's, such as `make_tensordict_primer`."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name == "_inner":
                raise
            return getattr(self._inner[0], name)

    def forward(self, tensordict: Any) -> Any:
        """What the module makes of a rollout, or of one step."""
        (inner,) = self._inner
        if not inner.recurrent_mode or not torch.is_grad_enabled():
            return inner(tensordict)
        _check_no_ensemble(inner)
        rollout = tensordict.unsqueeze(0) if tensordict.ndim == 1 else tensordict.flatten(0, -2)
        k1, *given = self._given
        keys = [key for key in dict.fromkeys((*self.in_keys, _BEGINS)) if key in rollout.keys(True)]
        weights = imported("tensordict", "torchrl").from_module(inner)
        k2, strategy, check_replays = given
        segment = partial(self._segment, weights, keys)
        chunks = Chunks(segment, k2, strategy, 1, check_replays, recomputes_all=True)
        chunks.begin(num_steps := rollout.shape[1])
        steps = [rollout.get(key) for key in keys]
        found = []
        for start in range(0, num_steps, k1):
            stop = min(start + k1, num_steps)
            found.append(chunks.run([each[:, start:stop] for each in steps], None)[0])
        for key, *values in zip(self.out_keys, *found, strict=True):
            rollout.set(key, torch.cat(values, 1))
        return tensordict.update(rollout.reshape(tensordict.shape))

    def _segment(
        self, weights: Any, keys: Sequence[Any], steps: Sequence[Tensor], state: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the module gives for some steps, and its states after them, [B, L, H] each."""
        (inner,), shape = self._inner, steps[0].shape[:2]
        rollout = imported("tensordict", "torchrl").TensorDict({}, shape)
        for key, each in zip(keys, steps, strict=True):
            rollout.set(key, each)
        names = [key for key in self.in_keys[1:] if key != _BEGINS]
        for name, value in () if state is None else zip(names, state, strict=True):
            stored = rollout.get(name)
            if stored is None:  # then a trajectory begins with zeros
                stored = value.new_zeros(*shape, *value.shape[1:])
            begins = rollout[_BEGINS][:, 0].reshape(-1, *[1] * (value.dim() - 1))
            first = torch.where(begins, stored[:, 0], value)
            rollout.set(name, torch.cat([first[:, None], stored[:, 1:]], 1))
        in_recurrent_mode = imported("torchrl.modules", "torchrl").set_recurrent_mode
        with weights.to_module(inner), in_recurrent_mode(True):
            inner(rollout)
        outputs = [rollout.get(key) for key in self.out_keys]
        return outputs, [each[:, -1] for each in outputs[1:]]
