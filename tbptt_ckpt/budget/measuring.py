"""How a measurement begins, and how it leaves all as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.data.blocks import narrow_blocks
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.memory.exhausted import empty_cache, older_garbage_kept
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.trees import tensors_of


def warm_up(probe: SegmentProbe) -> None:
    """Have done what first steps alone do; all else is left as it was."""
    with measuring(probe) as (own, _):
        own.warm_up()


@contextmanager
def measuring(probe: SegmentProbe) -> Iterator[tuple[SegmentProbe, Boundary]]:
    """A probe two steps later, and the state before these; all is left as it was."""
    with (
        untouched(probe.loss.loss_fn),
        untouched(tensors=probe.parameters, ambient=probe.ambient),
        older_garbage_kept(),
        probe.runner.counters.paused(True),
    ):
        yield _begun(probe)
    empty_cache()  # segments are as long as memory allows, and others may need it


def _begun(probe: SegmentProbe) -> tuple[SegmentProbe, Boundary]:
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
