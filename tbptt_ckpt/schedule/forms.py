"""The forms in which the steps of a run are made; gradients of two forms are equal to rounding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

# "plain": one by one, by the module. "batched": weight gradients and products of inputs once a
# segment, torch's cells as one node. "fused": the same, with torch's kernel for all steps of a cell
# that has one; "mixed": with that in advances, and the node in leaves. "compiled": by blocks of
# steps that a compiler made, and the rest one by one. "auto": by a rule of sizes.
Form = Literal["auto", "plain", "batched", "fused", "mixed", "compiled"]
FormSeconds = dict[Form, float | None]  # predicted of a window; None where no plan fits


def described(form: str, weighed: Iterable[tuple[str, float | None]]) -> str:
    """A form, and what was predicted for each that was weighed."""
    each = (f"{name} {_shown(seconds)}" for name, seconds in weighed)
    return f"steps {form} (predicted: {', '.join(each)})"


def _shown(seconds: float | None) -> str:
    return "does not fit" if seconds is None else f"{seconds:.3g} s"
