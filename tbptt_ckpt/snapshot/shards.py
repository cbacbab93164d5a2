"""Shards of tensors that ranks hold together: each rank writes its own beside the state.

NOTE [What is unpickled]
`torch.distributed.checkpoint` pickles where shards lie, and whoever can sign a snapshot can write
anything into it. Of what is read only its own records are made, only files of the snapshot are
opened, and there is nothing but tensors in them.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tbptt_ckpt.errors import SnapshotError, first_line
from tbptt_ckpt.snapshot.digests import PIECE_BYTES, file_digests
from tbptt_ckpt.snapshot.manifest import PLACES, FileEntry

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
}


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], rank: int, group: Any
) -> list[FileEntry]:
    """Write what this rank holds of `tensors`, which all ranks of `group` do; its own files.

    Raises:
        OSError: A rank could not write; all of them raise it.
        SnapshotError: Ranks hold what does not fit together.
    """
    try:
        save(dict(tensors), storage_writer=_Writer(folder), process_group=group)
    except CheckpointException as error:
        raise _first_problem(error) from error
    own = sorted(folder.glob(f"__{rank}_*"))
    if rank == 0:
        own.append(folder / PLACES)
    return [
        FileEntry(path.name, path.stat().st_size, PIECE_BYTES, file_digests(path, PIECE_BYTES))
        for path in own
    ]


def read_shards(folder: Path, files: Collection[str], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, by their names, each with its part of what all ranks have written.

    Nothing is sent. `files` are those of the snapshot, which was verified.

    Raises:
        SnapshotError: They are not in it, as these tensors.
    """
    try:
        found = _places(folder, files)
        for name, tensor in tensors.items():
            _check_fits(name, tensor, found.state_dict_metadata.get(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is sent
            reader, planner = _Reader(folder, found), _Planner()
            load(dict(tensors), storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise _unusable(_first_problem(error)) from error
    except Exception as error:  # whoever can sign it can write anything into it
        raise _unusable(error) from error


def _check_fits(name: str, tensor: Tensor, stored: object) -> None:
    is_alike = isinstance(stored, metadata.TensorStorageMetadata) and (
        (stored.size, stored.properties.dtype) == (tensor.shape, tensor.dtype)
    )
    if not is_alike:
        raise ValueError(f"{name} of {tensor.dtype} {list(tensor.shape)} is there as {stored}")


def _unusable(error: Exception) -> SnapshotError:
    return SnapshotError(f"its shards are none of these weights: {first_line(error)}")


def _first_problem(error: CheckpointException) -> Exception:
    """What the first rank that failed has raised."""
    problem, _ = error.failures[min(error.failures)]
    if isinstance(problem, OSError):
        return problem
    return SnapshotError(f"{type(problem).__name__}: {problem}")


class _Writer(filesystem.FileSystemWriter):
    def storage_meta(self) -> None:
        """Where a snapshot was written is no part of it."""


class _Reader(filesystem.FileSystemReader):
    def __init__(self, folder: Path, found: metadata.Metadata) -> None:
        super().__init__(folder)
        self._found = found

    def read_metadata(self) -> metadata.Metadata:
        """What was read and checked."""
        return self._found


class _Planner(DefaultLoadPlanner):
    def create_local_plan(self) -> LoadPlan:
        """That of torch, if it reads tensors, and all of each."""
        plan, found = super().create_local_plan(), Counter[str]()
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR:
                raise ValueError(f"{item.dest_index.fqn} is no tensor")
            found[item.dest_index.fqn] += math.prod(item.lengths)
        for name, tensor in self.state_dict.items():
            held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if found[name] != held.numel():
                raise ValueError(f"{found[name]} of {held.numel()} numbers of {name} are there")
        return plan


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of the records that torch makes of where shards lie."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"{PLACES} holds a {module}.{name}")
        return super().find_class(module, name)


def _places(folder: Path, files: Collection[str]) -> metadata.Metadata:
    """Where shards lie; in no other files than those of the snapshot."""
    if PLACES not in files:
        raise FileNotFoundError(f"it has no {PLACES}")
    with (folder / PLACES).open("rb") as file:
        found = _Unpickler(file).load()
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise TypeError(f"{PLACES} is a {type(found).__name__}")
    for info in found.storage_data.values():
        is_plain = isinstance(info, filesystem._StorageInfo) and not info.transform_descriptors
        if not is_plain or info.relative_path not in files:
            raise ValueError(f"a shard lies at {info}")
    return found
