"""`Recurrent`: a step that says which of its parts is sequential."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.folded_parts import FoldedPart
from tbptt_ckpt.module.inside import (
    is_cell,
    is_layer,
    kind_of,
    name_of,
    recurrent_layers,
    unwrapped,
)
from tbptt_ckpt.module.outputs import Omission, outputs_needed
from tbptt_ckpt.module.step_parts import StepParts, bare_cell, has_hooks
from tbptt_ckpt.module.trees import Tree

Call = Callable[[Any, Any], Any]


class Recurrent(nn.Module):
    """A recurrent module in three parts, of which only the transition is sequential.

        cell, readout = nn.LSTMCell(64, 256), nn.Linear(256, 256)
        model = Recurrent(cell, encode=nn.Embedding(256, 64), readout=readout)

    As a module of one step it is called as `(inputs, state) -> (outputs, state)`, and is
    `encode`, `transition`, `readout`, one after the other. Windows run `encode` and `readout` once
    for all steps of a segment, with time folded into the lanes, [L * B, ...] in place of
    [B, ...], so that modules which are written for one step work unchanged, and where nobody
    looks at outputs they leave the readout out. That is right for modules whose lanes do not
    know of each other. It is held against the plain order of steps first; a module that mixes
    lanes, draws random numbers there or changes buffers is run step by step, and
    `TBPTT.batched_operations` says why. With `time_batching=False` all are.

    Args:
        transition: `(encoded, state) -> (features, state)` over one step, or one of torch's cells,
            whose features are its new h. An `nn.RNN/LSTM/GRU` takes segments, and so does the
            whole then.
        encode: `inputs -> encoded`; None hands inputs on.
        readout: `features -> outputs`; None hands features on.
        per_step: Whether a transition of your own takes one step, the default, or a segment
            with time first.

    Raises:
        ArgumentError: A transition that cannot be called so.
    """

    @checked
    def __init__(
        self,
        transition: Callable[..., Any],
        encode: Callable[[Any], Any] | None = None,
        readout: Callable[[Any], Any] | None = None,
        *,
        per_step: bool | None = None,
    ) -> None:
        super().__init__()
        inner = unwrapped(transition)
        if per_step is None and recurrent_layers(transition) and not is_layer(inner):
            raise ArgumentError(
                f"transition={name_of(transition)} contains an nn.RNN/LSTM/GRU, so per_step must "
                "be said: False if it takes a segment of steps, True if it takes one"
            )
        if per_step and is_layer(inner):
            name = f"nn.{kind_of(inner)}"
            raise ArgumentError(f"per_step=True does not fit {name}, which runs whole segments")
        self.transition, self.encode, self.readout = transition, encode, readout
        self.per_step = not is_layer(inner) and per_step is not False
        self.time_dim = int(is_layer(inner) and inner.batch_first)
        self._omission = Omission(None if self.per_step else self.time_dim)
        self._folded = {n: FoldedPart(n, self.time_dim) for n in ("encode", "readout")}

    def forward(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """Outputs and the next state, of one step or of a segment."""
        return self._run(inputs, state, reads_out=True)

    def as_needed(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """The same, without the readout where the engine looks at no outputs.

        Not for who has the module within one of his own, or hooks on it: they look.
        """
        if has_hooks(self):
            outputs, state = self(inputs, state)
            return outputs, state
        return self._run(inputs, state, reads_out=self.readout is None or outputs_needed())

    def _run(self, inputs: Any, state: Any, *, reads_out: bool) -> tuple[Any, Any]:
        encoded = inputs if self.encode is None else self._part("encode", inputs)
        features, state = as_step(self.transition)(encoded, state)
        if self.readout is None:
            return features, state
        if not reads_out and self._omission.is_allowed(self.readout, features):
            return None, state
        return self._part("readout", features), state

    def _part(self, name: str, value: Tree) -> Any:
        part: Any = getattr(self, name)
        return part(value) if self.per_step else self._folded[name].run(part, value)

    def parts(self) -> StepParts:
        """The parts of one step."""
        encode, readout = self.encode or _same, self.readout or _same
        return StepParts(
            encode,
            as_step(self.transition),
            functools.partial(_of_features, readout),  # with the module it can be copied
            bare_cell(self.transition),
        )


def as_step(module: Callable[..., Any]) -> Call:
    """A module as `(inputs, state) -> (output, state)`; the output of torch's cells is their h."""
    inner = unwrapped(module)
    if not is_cell(inner):
        return module
    is_lstm = isinstance(inner, nn.LSTMCell) or kind_of(inner) == "LSTMCell"
    return functools.partial(_call_cell, module, is_lstm)


def module_of(call: object) -> object:
    """What is called for a cell or a `Recurrent` that was given itself; others as they are."""
    if isinstance(call, functools.partial) and call.func is _call_cell:
        return call.args[0]
    is_recurrent = getattr(call, "__func__", None) is Recurrent.as_needed
    return getattr(call, "__self__", call) if is_recurrent else call


def _call_cell(cell: Call, is_lstm: bool, inputs: Tensor, state: Any) -> tuple[Any, Any]:
    result = cell(inputs, state)
    if isinstance(result, Tensor):
        return result, result
    if is_lstm and isinstance(result[1], Tensor):
        return result[0], result
    output, state = result  # of a subclass
    return output, state


def _of_features(readout: Callable[[Any], Any], features: Tree, _encoded: Tree) -> Any:
    return readout(features)


def _same(value: Any) -> Any:
    return value
