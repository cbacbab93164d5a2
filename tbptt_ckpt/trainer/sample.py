"""A sample of a sequence, by which its content is known wherever it lies."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.data.source import Source
from tbptt_ckpt.data.steps import StepIterable, reader_for
from tbptt_ckpt.devices import torch_generators
from tbptt_ckpt.module.recurrence import Recurrence
from tbptt_ckpt.module.trees import iterate_leaves
from tbptt_ckpt.trainer.randomness import random_state, set_random_state

_BLOCKS, _STEPS = 8, 4


def sampled(source: Any, recurrence: Recurrence, place: str | None) -> dict[str, Any]:
    """Lanes and a digest of a few steps over the whole length; None each where none can be read.

    Only what can be read twice is: a source with a length, or a list of steps. Neither the global
    generators nor what a source says of its state is another afterwards.

    Of a source that `own_lanes` gave the steps are those of all ranks. Of others on several ranks
    they are those of the rank in that `place`, which the `share` says.
    """
    whole = getattr(source, "whole", source)
    nothing = {"lanes": None, "data": None, "share": place if whole is source else None}
    is_readable = isinstance(source, Sized) and isinstance(source, Source | Sequence)
    if not is_readable or not len(source):
        return nothing
    used = recurrence.parameters
    generators = random_state(used)
    load = getattr(source, "load_state_dict", None)
    before = source.state_dict() if load is not None else None
    try:
        blocks = [_read(whole, recurrence, start) for start in _starts(len(source))]
        again = _read(whole, recurrence, 0)
        if _digest([again]) != _digest(blocks[:1]):  # it draws its steps anew
            return nothing
        lanes = again.num_lanes() if whole is source else _read(source, recurrence, 0).num_lanes()
        return {**nothing, "lanes": lanes, "data": _digest(blocks)}
    finally:
        if load is not None:
            load(before)
        set_random_state(generators, used)


def _starts(length: int) -> list[int]:
    last = max(0, length - _STEPS)
    return sorted({last * block // (_BLOCKS - 1) for block in range(_BLOCKS)})


def _read(source: Any, recurrence: Recurrence, start: int) -> StepBlock:
    for generator in torch_generators(recurrence.parameters):  # what is augmented is so alike
        generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global one
    stop = min(start + _STEPS, len(source))
    if isinstance(source, Source):
        block = reader_for(source, recurrence).read_block(start, stop)
    else:
        block = StepIterable(source[start:stop]).read_block(0, stop - start)
    assert block is not None, "a source with a length has its steps"
    return block


def _digest(blocks: Sequence[StepBlock]) -> str:
    sha = hashlib.sha256()
    for block in blocks:
        for part in _parts(block):
            sha.update(part)
    return sha.hexdigest()


def _parts(block: StepBlock) -> Iterator[bytes]:
    for leaf in iterate_leaves((block.inputs, block.targets, block.weight, block.resets)):
        if isinstance(leaf, Tensor):
            yield f"{leaf.dtype} {list(leaf.shape)}".encode()
            flat = leaf.detach().cpu().contiguous().clone().reshape(-1)
            yield flat.view(torch.uint8).numpy().tobytes()
        else:
            yield repr(leaf).encode()
