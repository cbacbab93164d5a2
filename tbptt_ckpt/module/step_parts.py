"""A step in three parts: what its input alone decides, what the next state needs, and the rest.

Only the transition is sequential. What is before it and after it runs once for a whole segment,
with time folded into the lanes: a tensor [B, ...] of one step is [L * B, ...] of so many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tbptt_ckpt.module.replaced import found_under
from tbptt_ckpt.module.trees import Tree

CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_FORWARDS: dict[type, Any] = {kind: kind.forward for kind in CELLS}  # torch's own


@dataclass(frozen=True, slots=True)
class BareCell:
    """A transition that is one of torch's cells and nothing else, whose features are the new h.

    Of several encoded tensors the cell's input is the first.

    Attributes:
        cell: The cell.
        split: From the module's state to the cell's: (h, c) of an `nn.LSTMCell`, (h,) of others.
        join: From these to the module's state.
    """

    cell: nn.RNNCellBase
    split: Callable[[Tree], tuple[Tensor, ...]]
    join: Callable[..., Tree]


@dataclass(frozen=True, slots=True)
class StepParts:
    """The parts of a step.

    Attributes:
        encode: From the inputs of steps, folded, to what the others need of them, folded.
        transition: `(encoded, state) -> (features, state)` of one step.
        readout: `(features, encoded) -> outputs`, folded.
        cell: What the transition is, where it is one of torch's cells.
    """

    encode: Callable[[Tree], Tree]
    transition: Callable[[Tree, Tree], tuple[Tree, Tree]]
    readout: Callable[[Tree, Tree], Any]
    cell: BareCell | None = None


def bare_cell(module: object) -> BareCell | None:
    """A module that is one of torch's cells and nothing else; None of others."""
    kind: Any = type(module)
    if kind not in _FORWARDS or not isinstance(module, nn.RNNCellBase):
        return None
    if has_hooks(module) or "forward" in vars(module):
        return None
    if found_under(kind.forward) is not _FORWARDS[kind]:  # others have put theirs in its place
        return None
    if isinstance(module, nn.RNNCell) and module.nonlinearity not in ("tanh", "relu"):
        return None
    is_lstm = isinstance(module, nn.LSTMCell)
    return BareCell(module, tuple if is_lstm else _alone, _pair if is_lstm else _same)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs before or after a module's forward or backward."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    backward = module._backward_hooks or module._backward_pre_hooks
    everywhere = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return bool(before or after or backward or everywhere)


def _alone(state: Tree) -> tuple[Tensor, ...]:
    return (state,)


def _pair(h: Tensor, c: Tensor) -> Tree:
    return h, c


def _same(h: Tensor) -> Tree:
    return h
