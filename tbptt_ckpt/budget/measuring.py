"""How a measurement begins, and how it leaves all as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tbptt_ckpt.budget.probe import SegmentProbe
from tbptt_ckpt.budget.samples import SegmentBytes
from tbptt_ckpt.data.blocks import narrow_blocks
from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.causes import KEPT_OUTSIDE
from tbptt_ckpt.executor.fingerprint import Fingerprint, fingerprint, read
from tbptt_ckpt.executor.noise import Noise, num_runs
from tbptt_ckpt.executor.sinks import Sink
from tbptt_ckpt.memory.exhausted import empty_cache, older_garbage_kept
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.trees import Tree, tensors_of


def warm_up(probe: SegmentProbe) -> None:
    """Have done what first steps alone do; all else is left as it was."""
    with measuring(probe) as (own, _):
        own.warm_up()


@contextmanager
def measuring(probe: SegmentProbe) -> Iterator[tuple[SegmentProbe, Boundary]]:
    """A probe two steps later, and the state before these; all is left as it was.

    Raises:
        ReplayMismatchError: The module acts otherwise after it, so that the windows to come would
            not be what they are without it.
    """
    with (
        untouched(probe.loss.loss_fn),
        untouched(tensors=probe.parameters, ambient=probe.ambient),
        older_garbage_kept(),
        probe.runner.counters.paused(True),
    ):
        before = _first_step(probe)
        yield _begun(probe)
        if before is not None:
            _check_unmoved(probe, before)
            # Which was a pass without a look; steps run by their parts as in the passes before.
            probe.runner.parts.look(probe.blocks, probe.first, probe.boundary.state, ahead=True)
    empty_cache()  # segments are as long as memory allows, and others may need it


def settled_bytes(probe: SegmentProbe, steps: int) -> SegmentBytes:
    """What a segment takes, where the loss is called as it is from here on."""
    taken = probe.bytes_of(steps)
    return probe.bytes_of(steps) if probe.loss.go_on_as_shown() else taken  # all steps at once


_Seen = tuple[Fingerprint, Fingerprint]  # of all bits, and of what rounding leaves


def _first_step(probe: SegmentProbe) -> _Seen | None:
    """What the first step gives; None where that is not to be compared."""
    return _seen(probe, *_run_first_step(probe)) if probe.checks_replays else None


def _run_first_step(probe: SegmentProbe) -> tuple[Tree, Tree]:
    """The state that the first step reaches, and its output, on copies of its input."""
    given = narrow_blocks(probe.blocks, probe.first, probe.first + 1)
    sink = Sink()
    reached = replace(probe, blocks=[block.copied() for block in given]).step(sink)
    return reached.state, sink.outputs


def _seen(probe: SegmentProbe, state: Tree, shown: Tree) -> _Seen:
    in_half = probe.runner.is_in_half(probe.boundary.state)
    prints = [fingerprint((state, shown), sketched=s, in_half=in_half) for s in (False, True)]
    bits, sketch = read(prints)
    return bits, sketch


def _check_unmoved(probe: SegmentProbe, before: _Seen) -> None:
    """See whether the first step is what it was; kernels may round otherwise in every run."""
    again, noise = _run_first_step(probe), Noise()
    (bits, sketch), (bits_now, sketch_now) = before, _seen(probe, *again)
    if bits.equals(bits_now):
        return
    if is_near := sketch.is_near(sketch_now):
        more = num_runs(1) - 1
        noise.add([again, *(_run_first_step(probe) for _ in range(more))])
    if not is_near or noise.grows():
        step = probe.first
        raise ReplayMismatchError(
            f"costs were measured, and step {step} acts otherwise than before that: "
            f"{KEPT_OUTSIDE}; a fixed strategy, such as 'retain' or 'sqrt', without a "
            "memory_budget measures nothing, and check_replays=False leaves this unchecked",
            start=step,
            stop=step + 1,
            difference=0.0,
        )


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
