"""What makes a run, so that it is never continued as another one unnoticed.

Budget, strategy, plan, threads, device and `max_steps` are no part of it: they change memory, time
and length, not what is learned.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.engine.options import K2_TOLERANCE
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.engine.tbptt import TBPTT
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.executor.replay import storage_of
from tbptt_ckpt.module.inside import owner_of
from tbptt_ckpt.trainer.learning_state import alone, modules_of
from tbptt_ckpt.updates.shards import class_of

_OPTIONS = (
    *("k1", "k2", "max_k2", "k2_tolerance", "k2_window_tolerance"),
    *("loss", "reduction", "overlap"),
    *("accumulate", "clip_grad_norm"),
)
# Another one of these is another run.
_NEVER = ("accumulate", "k1", "k2", "max_k2", "overlap", "parameters")
# What runs had before there was a choice.
_BEFORE = {
    "truncation": "fixed",
    "max_k2": None,
    "k2_tolerance": K2_TOLERANCE,
    "k2_window_tolerance": None,
    "state_dtype": None,
}
_HOW = ("params", "capturable", "differentiable", "foreach", "fused")  # not what is learned
_ABSENT = "nothing"
_DATA = ("data", "lanes")


class RunIdentity:
    """A run's identity: hyper-parameters as they were when it began, since a scheduler moves them.

    `data` gives a pass's number, its lanes and a digest of its steps, of that pass or of the last
    one that began.
    """

    def __init__(
        self, tbptt: TBPTT, others: Mapping[str, Any], data: Callable[[int | None], Any]
    ) -> None:
        self._tbptt, self._others, self._data = tbptt, others, data
        self._begun: dict[str, Any] | None = None
        known = {*_run(tbptt), *_hyper_parameters(tbptt.parts.updater.optimizer), *_DATA}
        for name, value in others.items():
            if not isinstance(name, str) or name in known or not _is_plain(value):
                raise ArgumentError(
                    f"identity={{{name!r}: {shown(value)}}} must be numbers, texts, and lists and "
                    f"dicts of them, under names other than those of {sorted(known)}"
                )

    def begin(self) -> dict[str, Any]:
        """What there was when this was called first."""
        if self._begun is None:
            hyper_parameters = _hyper_parameters(self._tbptt.parts.updater.optimizer)
            run = {**self._others, **_run(self._tbptt)}
            self._begun = {"run": run, "hyper_parameters": hyper_parameters}
        return self._begun

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.begin(), "data": self._data(None)}

    def differences(self, state: Mapping[str, Any], accept: Sequence[str]) -> dict[str, str]:
        """How this run differs from a saved one, in things that were accepted, by their names.

        Raises:
            ArgumentError: There are differences that were not, or cannot be; all are named.
        """
        saved = state["identity"]
        here, there = self._flat(self.begin(), saved), self._flat(saved, self.begin())
        there.setdefault("module", here["module"])  # older snapshots do not say
        for name, before in _BEFORE.items():
            there.setdefault(name, before)
        data = saved["data"]
        found = self._data(data["epoch"]) if data is not None else None
        for name in _DATA:
            if data is None or found is None or None in (data[name], found[name]):
                continue
            if name == "lanes" or data.get("share") == found["share"]:  # of the same lanes
                here[name], there[name] = found[name], data[name]
        known = sorted({*here, *there, *self.begin()["hyper_parameters"], *_DATA})
        if unknown := [name for name in accept if name not in known]:
            raise ArgumentError(f"accept={unknown} must be among {known}")
        never = _NEVER if state["run"] is None else (*_NEVER, "lanes")
        different = {
            name: _difference(here.get(name, _ABSENT), there.get(name, _ABSENT))
            for name in sorted({*here, *there})
            # NaN is NaN.
            if repr(here.get(name, _ABSENT)) != repr(there.get(name, _ABSENT))
            and here.get(name, _ABSENT) != there.get(name, _ABSENT)
        }
        refused = [name for name in different if name not in accept or name in never]
        if refused:
            raise ArgumentError(_refusal(different, refused, never))
        return different

    @staticmethod
    def _flat(identity: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """One dict; of different optimizers the hyper-parameters say nothing."""
        same = identity["run"]["optimizer"] == other["run"]["optimizer"]
        return {**identity["run"], **(identity["hyper_parameters"] if same else {})}


def _refusal(different: Mapping[str, str], refused: Sequence[str], never: Sequence[str]) -> str:
    named = "; ".join(f"{name}={difference}" for name, difference in different.items())
    fixed = [name for name in refused if name in never]
    if fixed:
        remedy = f"resume with the same {', '.join(fixed)}"
    else:
        remedy = (
            f"resume with the same, or accept by name what shall differ: accept={[*different]}, "
            f"or --accept {','.join(different)}"
        )
    return f"this run differs from the one that was saved: {named}; {remedy}"


def _difference(here: Any, there: Any) -> str:
    if isinstance(here, list) and isinstance(there, list):  # only what differs of long ones
        new = [item for item in here if item not in there] or here
        old = [item for item in there if item not in here] or there
        here, there = new[:3], old[:3]
    return f"{shown(here)}, which was {shown(there)}"


def _run(tbptt: TBPTT) -> dict[str, Any]:
    options, parts = tbptt.options, tbptt.parts
    updater, recurrence, roulette = parts.updater, parts.recurrence, options.parsed_truncation()
    return {
        **{name: getattr(options, name) for name in _OPTIONS},
        "autocast_dtype": _dtype_name(options.autocast_dtype),
        "executor": type(parts.executor).__name__,
        "state_dtype": _dtype_name(storage_of(parts.executor).dtype),
        "loss_fn": _described(parts.loss_function.loss_fn),
        "module": _layers(recurrence.module),
        "optimizer": _kind(updater.optimizer),
        "truncation": "fixed" if roulette is None else repr(roulette),
        "parameters": _parameters(parts),
        "per_step": recurrence.per_step,
        "scaler": _kind(updater.scaler),
        "scheduler": _scheduler(updater.scheduler),
        "time_dim": recurrence.time_dim,
    }


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _kind(value: object) -> str | None:
    return None if value is None else type(value).__name__


def _parameters(parts: Parts) -> list[str]:
    """Every weight with its group in the optimizer, in the optimizer's order."""
    names = {
        id(parameter): f"{owner}.{name}"
        for owner, module in modules_of(parts).items()
        for name, parameter in module.named_parameters()
    }
    optimizer = parts.updater.optimizer
    groups = [] if optimizer is None else [group["params"] for group in optimizer.param_groups]
    listed = [(number, p) for number, group in enumerate(groups) for p in group]
    optimized = {id(parameter) for _, parameter in listed}
    others = [(None, weight) for weight in parts.weights() if id(weight) not in optimized]
    return [
        f"{names.get(id(p), 'another')} {str(p.dtype).removeprefix('torch.')} {list(p.shape)}"
        + ("" if number is None else f" in group {number}")
        for number, p in (*listed, *others)
    ]


def _layers(module: object) -> list[str]:
    """What a module is made of beside its parameters, such as how much a layer drops."""
    owner = owner_of(module)
    layers = alone(owner).named_modules() if isinstance(owner, nn.Module) else ()
    printed = [f"{path} {class_of(layer).__name__}({layer.extra_repr()})" for path, layer in layers]
    return [re.sub(" at 0x[0-9a-f]+", "", each).strip() for each in printed]


def _hyper_parameters(optimizer: Any) -> dict[str, Any]:
    """Of all groups; one value where they agree, else one each."""
    groups = [] if optimizer is None else optimizer.param_groups
    found: dict[str, list[Any]] = {}
    for group in groups:
        plain = {name: _plain(value) for name, value in group.items() if name not in _HOW}
        plain["lr"] = plain.pop("initial_lr", plain.get("lr"))  # a scheduler may have begun
        for name, value in plain.items():
            if value is not _ABSENT:
                found.setdefault(name, []).append(value)
    return {
        name: values[0] if all(value == values[0] for value in values) else values
        for name, values in found.items()
    }


def _scheduler(scheduler: Any) -> str | None:
    if scheduler is None or not hasattr(scheduler, "state_dict"):
        return _kind(scheduler)
    state = {name: _plain(value) for name, value in scheduler.state_dict().items()}
    moving = ("last_epoch", "base_lrs")
    given = [
        f"{name}={value!r}"
        for name, value in sorted(state.items())
        if not name.startswith("_") and name not in moving and value not in (None, _ABSENT)
    ]
    return f"{type(scheduler).__name__}({', '.join(given)})"


def _plain(value: Any) -> Any:
    """A value that can be saved and compared; others are left out."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else _ABSENT
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if _is_plain(value) else _ABSENT


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, int | str) and _is_plain(v) for key, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _described(function: Any) -> str:
    """A loss by its name and what it was made with."""
    if isinstance(function, functools.partial):
        keywords = {name: _plain(value) for name, value in function.keywords.items()}
        return f"{_described(function.func)}({_plain(function.args)}, {keywords})"
    if isinstance(function, nn.Module):
        given = {n: _plain(v) for n, v in vars(function).items() if not n.startswith("_")}
        given = {n: v for n, v in sorted(given.items()) if n != "training" and v != _ABSENT}
        return f"{' '.join(repr(function).split())} {given}"
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        return f"{_described(owner)}.{function.__name__}"
    return str(getattr(function, "__qualname__", type(function).__qualname__))
