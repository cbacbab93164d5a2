"""Which storages nested objects hold, and how many bytes those are."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def tensor_bytes(*trees: object, grads: bool = False, device: torch.device | None = None) -> int:
    """Bytes of the distinct storages that the trees hold.

    A storage counts once and whole, however many views of it there are.

    Args:
        *trees: Tensors, modules (parameters and buffers), optimizers (their state, not
            the parameters), and nested tuples, lists, sets, dicts and dataclasses of
            these. Anything else holds no bytes.
        grads: Whether the `.grad` of each leaf tensor counts too.
        device: Where they count; None is everywhere.
    """
    storages = distinct_storages(trees, grads=grads)
    return sum(each.nbytes() for each in storages if device is None or each.device == device)


def distinct_storages(tree: object, *, grads: bool = False) -> list[torch.UntypedStorage]:
    """Every storage that a tree holds, each once."""
    found: dict[int, torch.UntypedStorage] = {}
    # Looking is no operation: modes and tensor subclasses do not get to see it.
    with torch._C.DisableTorchFunction():
        for tensor in _tensors(tree, grads):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage
    return list(found.values())


def copy_sharing(trees: Any) -> Any:
    """A deep copy whose parameters share storages as the originals do.

    Those of a cuDNN module are views of one flat buffer. Copied one by one, as torch does, they are
    another module: each call gathers them into a buffer of its own, and takes longer for it.
    """
    sharing: dict[int, list[nn.Parameter]] = {}
    for each in _tensors(trees, grads=False):
        if type(each) is nn.Parameter:
            sharing.setdefault(each.untyped_storage()._cdata, []).append(each)
    known: dict[int, Any] = {}
    for parameters in sharing.values():
        if len(parameters) > 1:
            storage = parameters[0].untyped_storage().clone()  # type: ignore[no-untyped-call]
            for each in parameters:
                place = each.storage_offset(), each.shape, each.stride()
                data = torch.empty(0, dtype=each.dtype, device=each.device).set_(storage, *place)
                known[id(each)] = nn.Parameter(data, each.requires_grad)
    return copy.deepcopy(trees, known)


def live_storages() -> list[torch.UntypedStorage]:
    """Every storage that Python's garbage collector can see, gradients included, each once.

    Takes some 10 ms for 100,000 tracked objects. Tensors that only C++ holds, such as
    those saved in a graph, are not seen.
    """
    objects = gc.get_objects()
    # By exact type: isinstance would run the code of proxies and lazy modules.
    kinds = {kind for kind in set(map(type, objects)) if Tensor in kind.__mro__}
    return distinct_storages([each for each in objects if type(each) in kinds], grads=True)


def _tensors(tree: object, grads: bool) -> Iterator[Tensor]:
    """The plain tensors inside a tree, one for each storage that it may hold."""
    for each in _children(tree):
        yield from _tensors(each, grads)
    if isinstance(tree, Tensor):
        if _has_storage(tree):
            yield tree
        if grads and tree.is_leaf and tree.grad is not None:
            yield from _tensors(tree.grad, grads)


def _children(tree: object) -> Iterable[object]:
    """What a container holds; a tensor made of other tensors holds those."""
    if isinstance(tree, Tensor):
        return _inner_tensors(tree)
    if isinstance(tree, nn.Module):
        return [*tree.parameters(), *tree.buffers()]
    if isinstance(tree, torch.optim.Optimizer):
        return tree.state.values()
    if isinstance(tree, Mapping):
        return tree.values()
    if isinstance(tree, list | tuple | set | frozenset):
        return tree
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return ()


def _inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors a sparse or wrapping tensor is made of; none for a plain one."""
    if is_traceable_wrapper_subclass(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has bytes of its own: not so sparse, opaque and wrapping ones."""
    try:
        return not is_traceable_wrapper_subclass(tensor) and tensor.untyped_storage() is not None
    except RuntimeError:
        return False
