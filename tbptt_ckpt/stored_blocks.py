"""Blocks as plain data, for steps that a stream has given and a later window still needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tbptt_ckpt.blocks import Column, StepBlock
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.state import Tree, detach_state

_PLAIN = (int, float, complex, bool, str, bytes, type(None), Tensor)


def store_block(block: StepBlock) -> dict[str, Any]:
    """A block as containers of numbers, strings and tensors.

    Raises:
        ArgumentError: Steps of other types, which could not be loaded without running code.
    """
    return {
        "start": block.start,
        "stop": block.stop,
        "inputs": _store(block.inputs),
        "targets": _store(block.targets),
        "weight": block.weight,
        "time_dim": block.time_dim,
        "resets": block.resets,
    }


def load_block(stored: dict[str, Any]) -> StepBlock:
    """The block that was stored."""
    return StepBlock(
        **{**stored, "inputs": _load(stored["inputs"]), "targets": _load(stored["targets"])}
    )


def _store(values: Tree) -> dict[str, Any]:
    if isinstance(values, Column):
        _check_plain(values.values)
        return {"column": list(detach_state(values.values))}
    _check_plain(values)
    return {"packed": detach_state(values)}


def _load(stored: dict[str, Any]) -> Tree:
    return Column(tuple(stored["column"])) if "column" in stored else stored["packed"]


def _check_plain(tree: Tree) -> None:
    if type(tree) in (tuple, list):
        for item in tree:
            _check_plain(item)
    elif type(tree) is dict:
        for key, item in tree.items():
            _check_plain(key)
            _check_plain(item)
    elif not isinstance(tree, _PLAIN):
        raise ArgumentError(
            f"steps of a stream hold a {type(tree).__name__}, which cannot be stored; use tuples, "
            "lists, dicts, tensors, numbers and strings, or a source with a length"
        )
