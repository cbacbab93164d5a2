"""Training state as values that `torch.load(weights_only=True)` accepts, and back.

Tensors, numbers, strings and the built-in containers stay as they are. Named tuples and
dataclasses are written as their fields and the name of their class, which is looked up on
loading among the modules that are already imported: nothing is imported or called for a
snapshot's sake.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt.errors import SnapshotError
from tbptt_ckpt.memory.exhausted import is_out_of_memory
from tbptt_ckpt.module.generators import described, from_description
from tbptt_ckpt.module.inside import is_a

_EXTRA = "_extra_state"  # how torch ends the name of a module's
_TAG = "tbptt_ckpt.kind"


def to_plain(value: Any, name: str = "state") -> Any:
    """The value in plain types; tensors are detached and on the CPU, copied only if need be.

    `name` is what it is, for the error.

    Raises:
        SnapshotError: A value that a snapshot cannot hold.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return _plain_scalar(value)
    if isinstance(value, Tensor):
        return _plain_tensor(value, name)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {_TAG: "array", "dtype": value.dtype.str, "values": _array_bytes(value)} | {
            "shape": list(value.shape)
        }
    if isinstance(value, tuple(_KINDS.values())):
        return _plain_container(value, name)
    if (generator := described(value)) is not None:
        return {_TAG: "generator", **to_plain(generator, name)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _tagged("dataclass", value, to_plain(fields, name))
    raise SnapshotError(
        f"{name} holds a {type(value).__module__}.{type(value).__qualname__}, which a snapshot "
        "cannot; it takes tensors, arrays of numbers, random generators, numbers, strings and "
        "containers of these"
    )


def _plain_scalar(value: Any) -> Any:
    kinds: tuple[Any, ...] = (bool, int, float, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)  # not a subclass, such as an enumeration
    return value


def _plain_tensor(tensor: Tensor, name: str) -> Tensor | dict[str, Any]:
    if tensor.is_meta:
        raise SnapshotError(f"{name} holds a tensor on the meta device, which has no values")
    if is_a(tensor, "torch", "DTensor"):
        raise SnapshotError(
            f"{name} is held by ranks together (DTensor); a snapshot has that of weights and of an "
            "optimizer's state, under ranks='all', and of nothing else"
        )
    plain = tensor.detach()
    if type(plain) is not Tensor:
        plain = plain.as_subclass(Tensor)
    device = plain.device
    if device.type == "cpu":
        # A view would take all of its storage along.
        whole = plain.layout != torch.strided or (
            plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        )
        return plain if whole else plain.clone()
    return {_TAG: "tensor", "device": str(device), "values": plain.cpu()}


def _array_bytes(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(array.tobytes(), dtype=np.uint8).copy())


# The first that fits, so subclasses before what they are of.
_KINDS: dict[str, type] = {
    "Counter": Counter,
    "OrderedDict": OrderedDict,
    "dict": dict,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "tuple": tuple,
    "list": list,
}


def _plain_container(value: Any, name: str) -> Any:
    kind = next(kind for kind, owner in _KINDS.items() if isinstance(value, owner))
    if isinstance(value, dict):
        items = {
            _plain_scalar(key): to_plain(item, f"{name}[{key!r}]") for key, item in value.items()
        }
        if type(value) is dict and _TAG not in value:
            return items
        return {_TAG: kind, "items": list(items.items())}
    parts = [to_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _tagged("namedtuple", value, parts)
    if type(value) in (tuple, list):
        return type(value)(parts)
    return {_TAG: kind, "items": parts, "maximum": getattr(value, "maxlen", None)}


def _tagged(kind: str, value: object, fields: Any) -> dict[str, Any]:
    owner = type(value)
    return {_TAG: kind, "module": owner.__module__, "class": owner.__qualname__, "fields": fields}


def from_plain(value: Any) -> Any:
    """What `to_plain` was given; tensors go back to the device they were on, if it is here.

    Raises:
        SnapshotError: A class that is not imported, or not there any more.
    """
    if isinstance(value, tuple | list):
        return type(value)(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return _whole(value) if isinstance(value, Tensor) else value
    if _TAG not in value:
        return {key: from_plain(item) for key, item in value.items()}
    kind = value[_TAG]
    if kind == "tensor":
        return _to_device(_whole(value["values"]), value["device"])
    if kind == "array":
        flat = np.frombuffer(value["values"].numpy(), dtype=value["dtype"])
        return flat.reshape(value["shape"])
    if kind == "generator":
        return _generator({key: from_plain(item) for key, item in value.items()})
    if kind in _KINDS:
        owner, items = _KINDS[kind], [from_plain(item) for item in value["items"]]
        if owner is deque:
            return deque(items, value["maximum"])
        return owner(dict(items) if issubclass(owner, dict) else items)
    return _from_fields(kind, value)


def kept_on_host(plain: Any) -> Any:
    """The same plain data, of which `from_plain` moves no tensor to the device it was on.

    But for the extra state of modules: they take it as it is, and copy nothing from it.
    """
    if isinstance(plain, tuple | list):
        return type(plain)(map(kept_on_host, plain))
    if not isinstance(plain, dict):
        return plain
    if plain.get(_TAG) == "tensor":
        return {**plain, "device": "cpu"}
    return {
        key: item if isinstance(key, str) and key.endswith(_EXTRA) else kept_on_host(item)
        for key, item in plain.items()
    }


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, if it is as they are saved: no parameter, and none expanded beyond its bytes."""
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.is_meta:
        raise SnapshotError(f"it holds a {type(tensor).__name__} where only values are saved")
    if tensor.layout == torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise SnapshotError(f"it holds a tensor {tuple(tensor.shape)} of fewer bytes than that")
    return tensor


def _generator(described: dict[str, Any]) -> Any:
    try:
        return from_description(described)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SnapshotError(f"it holds a random generator that cannot be made: {error}") from error


def _to_device(values: Tensor, device: str) -> Tensor:
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise SnapshotError(f"it holds a tensor of device {device!r}: {error}") from error
    if where.type == "meta":
        raise SnapshotError("it holds a tensor on the meta device, which has no values")
    try:
        return values.to(where)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        return values  # there is no such device here


def _from_fields(kind: object, value: dict[str, Any]) -> Any:
    """A named tuple or dataclass of a class that is imported already; its code does not run."""
    found: Any = sys.modules.get(value["module"])
    for part in value["class"].split("."):
        found = getattr(found, "__dict__", {}).get(part)  # getattr might run a module's code
    if kind == "namedtuple" and isinstance(found, type) and issubclass(found, tuple):
        return tuple.__new__(found, [from_plain(item) for item in value["fields"]])
    if kind == "dataclass" and isinstance(found, type) and dataclasses.is_dataclass(found):
        made = object.__new__(found)
        for field in dataclasses.fields(found):
            object.__setattr__(made, field.name, from_plain(value["fields"][field.name]))
        return made
    raise SnapshotError(
        f"it holds a {kind} {value['module']}.{value['class']}, which is not imported here"
    )
