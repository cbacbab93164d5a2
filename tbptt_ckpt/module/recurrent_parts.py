"""What the parts of a step hold, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.held_parts import hold_against
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.traced_parts import find_parts


@dataclass(frozen=True, slots=True)
class RecurrentParts:
    """What `recurrent_parts` found.

    Attributes:
        encode: Names of what depends on the input alone, which runs once for a segment.
        transition: Names of what runs step by step.
        readout: Names of what runs once for a segment after it.
        cell: The kind of torch's cell that the transition is, such as "LSTMCell", and then runs
            over a segment at once; empty where it is none.
        reason: Why there are none, with the line where there is one; empty where there are.
    """

    encode: tuple[str, ...] = ()
    transition: tuple[str, ...] = ()
    readout: tuple[str, ...] = ()
    cell: str = ""
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"no parts: {self.reason}"
        fused = f" ({self.cell}, fused)" if self.cell else ""
        named = {"encode": self.encode, "transition": self.transition, "readout": self.readout}
        return "; ".join(
            f"{part}: {', '.join(names) or 'nothing'}{fused if part == 'transition' else ''}"
            for part, names in named.items()
        )


def recurrent_parts(module: nn.Module, example: tuple[Any, Any]) -> RecurrentParts:
    """What of a step can run once for a whole segment, and what must run step by step.

    The parts of a `forward(inputs, state)` are found by symbolic trace, and held against the
    module itself: outputs, states and gradients over a few steps. A step that the trace cannot
    follow, or that does more than return its results, is left as it is.

    Args:
        module: Takes one step and returns `(outputs, state)`; a cell of torch's returns its state.
        example: The `(inputs, state)` of one step, tensors nested in any way with lanes on
            dimension 0.

    Returns:
        The names of what each part holds, or the reason why there are none.

    Raises:
        ArgumentError: The example is no `(inputs, state)`.
    """
    if not isinstance(example, tuple | list) or len(example) != 2:
        raise ArgumentError(
            f"example={shown(example)} must be the (inputs, state) of one step, such as "
            "(torch.zeros(8, 16), torch.zeros(8, 32))"
        )
    inputs, state = example
    try:
        found = find_parts(module, inputs, state)
        hold_against(found.parts, module, inputs, state, on_copy=True)
    except NoPartsError as error:
        return RecurrentParts(reason=str(error))
    cell = "" if found.parts.cell is None else type(found.parts.cell.cell).__name__
    return RecurrentParts(found.encode, found.transition, found.readout, cell)
