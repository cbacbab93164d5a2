"""The first steps of a measurement, on inputs of their own: a module may write into them."""

from __future__ import annotations

from dataclasses import replace

from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.data.blocks import narrow_blocks
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.module.trees import tensors_of


def begun(probe: SegmentProbe) -> tuple[SegmentProbe, Boundary]:
    """The probe two steps later, and the state before the last of them.

    Where a step writes into its inputs, the probe has copies of all; else it takes no memory.
    """
    steps = narrow_blocks(probe.blocks, probe.first, probe.first + 1)
    copies = [block.copied() for block in steps]
    trial = replace(probe, blocks=copies)
    trial.go_on()
    before = trial.go_on()
    written = any(t._version for block in copies for t in tensors_of(block.inputs))
    blocks = [block.copied() for block in probe.blocks] if written else probe.blocks
    resets = probe.resets.of(())
    return replace(probe, blocks=blocks, boundary=trial.boundary, resets=resets), before
