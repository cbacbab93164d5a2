"""What a state of a run looks like, so that nothing else is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.errors import SnapshotError, shown

_LARGEST = 2**62
# A type stands for its values, ints below zero apart; a list for lists of what is in it; a tuple
# for any of these; a dict with types as keys for dicts of such, others for dicts of these keys; a
# range for ints in it.
_RECORDS = {
    "random": [Tensor],
    "values": [(Tensor, None)],
    "generators": [object],
    "ambients": [
        {
            **{"cpu": int, "devices": [int], "buffers": [int]},
            **{"generators": [int], "drawn": [bool]},
        }
    ],
    "boundaries": [{"step": int, "state": object, "ambient": int}],
    "kept": {int: int},
    "recorded": {int: int},
    "carried": (int, None),
    "present": int,
    "origin": int,
    "origin_state": object,
    "has_origin_state": bool,
}
_TOTALS = {
    "loss_sum": float,
    "weight": float,
    "num_steps": int,
    "num_windows": int,
    "num_tokens": int,
    "peak_bytes": (int, None),
}
_COUNTING = {
    "name": str,
    "reduction": str,
    "unit": float,
    "foretold": bool,
    "leaf": (int, None),
    "ignore_index": (range(-_LARGEST, _LARGEST), None),
    "class_weight": (Tensor, None),
}
_RUN = {
    "index": int,
    "records": (_RECORDS, None),
    "totals": _TOTALS,
    "weights": str,
    "collected": {int: Tensor},
    "group": {"pending": int, "loss_sum": (Tensor, None)},
    "returns_pairs": {
        **{"pairs": (bool, None), "counting": (_COUNTING, None)},
        **{"segments": bool, "folds": (bool, None)},
    },
    "reader": dict,
    "reached": int,
}
_PROGRESS = {
    "epoch": int,
    "sequence": int,
    "steps_before": int,
    "windows": int,
    "updates": int,
    "loss": (float, None),
    "recomputed_steps": int,
    "drift": float,
}
_LEARNING = {
    "modules": {str: {"state": dict, "metadata": dict, "other_buffers": {str: (Tensor, None)}}},
    "loose": [Tensor],
    "grads": ([(Tensor, None)], None),
    "optimizer": (dict, None),
    "scheduler": (dict, None),
    "scaler": (dict, None),
    "generators": [object],
}
_AUDITS = {
    **{"means": Tensor, "squares": Tensor, "errors": Tensor, "over": Tensor},
    **{"k2": int, "audits": int, "since": int, "gap": int, "power": float},
}
_KINDS: tuple[Any, ...] = (int | float, str, list | tuple, dict, Tensor)  # of `check_alike`
# Which older snapshots lack.
_LATER = {
    *("generators", "drawn", "sequence", "folds", "truncation", "audits", "ranks", "share"),
    *("growing", "has_warned", "reach", "reached"),
}
STATE = {
    "learning": _LEARNING,
    "progress": _PROGRESS,
    "run": (_RUN, None),
    "device": str,
    "limit": (int, None),
    "init_state": [{"value": Tensor, "grad": (Tensor, None)}],
    "truncation": {
        **{"drawn": int, "growing": int, "has_warned": bool},
        "audits": (_AUDITS, None),
    },
    "reach": {"mean_norm": float},
    "plan": {"asked": str, "used": str, "measured": dict, "time_batching": (bool, str)},
    "identity": {
        "run": {str: object},
        "hyper_parameters": {str: object},
        "data": (
            {
                **{"epoch": int, "lanes": (int, None), "data": (str, None)},
                "share": (str, None),
            },
            None,
        ),
    },
    "ranks": (
        {"rank": int, "count": int, "others": [{"own": [object], "gone": [object]}]},
        None,
    ),
    "extra": {str: object},
    "random": {str: object},
}


def check_schema(value: Any, schema: Any = STATE, name: str = "state") -> None:
    """Raise `SnapshotError` unless a value looks as the schema says."""
    if not _fits(value, schema, name):
        raise SnapshotError(f"{name} is {shown(value)}, which no run has there")


def check_alike(value: Any, own: Any, name: str) -> None:
    """Raise `SnapshotError` where a run has a number, a text or so many, and a value is none.

    Nothing is known where the run has None, nor of keys that it has not.
    """
    if isinstance(own, dict) and isinstance(value, dict):
        for key in own.keys() & value.keys():
            check_alike(value[key], own[key], f"{name}[{key!r}]")
        return
    if isinstance(own, list | tuple) and isinstance(value, list | tuple) and len(own) == len(value):
        for index, (item, known) in enumerate(zip(value, own, strict=True)):
            check_alike(item, known, f"{name}[{index}]")
        return
    known_as = next((kind for kind in _KINDS if isinstance(own, kind)), None)
    if known_as is not None and (
        not isinstance(value, known_as) or isinstance(value, bool) != isinstance(own, bool)
    ):
        raise SnapshotError(f"{name} is {shown(value)}, where this run has {shown(own)}")


def _fits(value: Any, schema: Any, name: str) -> bool:
    if isinstance(schema, tuple):
        known = [each for each in schema if not isinstance(each, list | dict)]
        if any(_fits(value, each, name) for each in known):
            return True
        return any(_fits(value, each, name) for each in schema if isinstance(each, list | dict))
    if isinstance(schema, list):
        return isinstance(value, list | tuple) and all(
            _checked(item, schema[0], f"{name}[{index}]") for index, item in enumerate(value)
        )
    if isinstance(schema, dict):
        return isinstance(value, dict) and _fits_dict(value, schema, name)
    if schema is None or schema is object:
        return value is None or schema is object
    if schema is Tensor:  # one that is expanded may be of any size
        return isinstance(value, Tensor) and value.layout == torch.strided
    if schema is dict:
        return isinstance(value, dict)
    if isinstance(schema, range):
        return type(value) is int and value in schema
    return type(value) is schema and (schema is not int or 0 <= value <= _LARGEST)


def _fits_dict(value: dict[Any, Any], schema: dict[Any, Any], name: str) -> bool:
    ((first, of_each), *_) = schema.items()
    if isinstance(first, type):
        return all(
            _fits(key, first, name) and _checked(item, of_each, f"{name}[{key!r}]")
            for key, item in value.items()
        )
    if lacking := (schema.keys() - value.keys() - _LATER) | (value.keys() - schema.keys()):
        raise SnapshotError(f"{name} lacks {sorted(map(str, lacking))}, or has more than a run's")
    return all(_checked(each, schema[key], f"{name}[{key!r}]") for key, each in value.items())


def _checked(value: Any, schema: Any, name: str) -> bool:
    check_schema(value, schema, name)
    return True
