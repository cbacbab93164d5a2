"""Hooks, which see a window's gradient once (kinds of section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .carriers import CELLS, Cell, Segments, carried
from .case import Case, Dice


def _hooked(dice: Dice, register: Callable[[nn.Module], Any], **given: Any) -> Case:
    segment = dice.maybe(0.4)
    form = dice.choice(("nn.LSTM", "nn.GRU", "loop") if segment else CELLS)

    def make() -> nn.Module:
        module = Segments(form) if segment else Cell(form)
        register(module)
        return module

    return carried(dice, make, segment=segment, **given)


def clamp(dice: Dice) -> Case:
    """The usual recipe: gradients are clamped elementwise by a hook."""
    most = dice.choice((1e-3, 1e-2))
    only_some = dice.maybe(0.3)

    def register(module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if not only_some or "bias" not in name:
                parameter.register_hook(lambda g: g.clamp(-most, most))

    return _hooked(dice, register)


def post_accumulate(dice: Dice) -> Case:
    """Hooks on the accumulated gradient, which change it in place."""

    def register(module: nn.Module) -> None:
        def change(parameter: Tensor) -> None:
            parameter.grad.clamp_(-1e-3, 1e-3)

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(change)

    return _hooked(dice, register)


def optimizer_in_backward(dice: Dice) -> Case:
    """A hook that steps, as in optimizers that keep no gradient."""

    def register(module: nn.Module) -> None:
        def step(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter -= 0.05 * parameter.grad
            parameter.grad = None

        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    case = _hooked(dice, register, has_optimizer=False)
    case.options.pop("clip_grad_norm", None)
    return case


class HookedState(Cell):
    """Clamps the gradient of a state that it returns."""

    def __init__(self, most: float) -> None:
        super().__init__("gru")
        self.most = most

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        if state.requires_grad:
            state.register_hook(lambda g: g.clamp(-self.most, self.most))
        return y, state


def returned_state(dice: Dice) -> Case:
    """A hook on a new state sees the gradient of all that comes after."""
    most = dice.choice((1e-3, 1e-2))
    return carried(dice, lambda: HookedState(most), segment=False, options={"overlap": "refresh"})


class HookedInput(nn.Module):
    """Clamps the gradient of the state that it is given, which is the last step's output too."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.cell = most, nn.GRUCell(4, 4)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if state.requires_grad:
            state.register_hook(lambda g: g.clamp(-self.most, self.most))
        h = self.cell(x, state)
        return h, h


def incoming_state(dice: Dice) -> Case:
    """A hook on an incoming state that is the last step's output too."""
    return carried(dice, lambda: HookedInput(1e-3), segment=False, options={"overlap": "refresh"})


KINDS = {
    "hooks.clamp": clamp,
    "hooks.post_accumulate": post_accumulate,
    "hooks.optimizer_in_backward": optimizer_in_backward,
    "hooks.returned_state": returned_state,
    "hooks.incoming_state": incoming_state,
}
