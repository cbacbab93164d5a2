"""Shards in files of a snapshot: what is read is what was written, and nothing of it is run."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several_ranks import free_port
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from tbptt_ckpt import SnapshotError
from tbptt_ckpt.snapshot.manifest import PLACES
from tbptt_ckpt.snapshot.shards import read_shards, write_shards


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(12.0, dtype=torch.float64).reshape(4, 3), "b": torch.ones(2)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "written"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    entries = write_shards(folder, tensors, 0, dist.group.WORLD)
    dist.destroy_process_group()
    assert {each.name: each.num_bytes for each in entries} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    return folder


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "here"))


def read(folder: Path, likes: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: torch.full_like(each, torch.nan) for name, each in likes.items()}
    read_shards(folder, {path.name for path in folder.iterdir()} - {"elsewhere"}, found)
    return found


def test_they_are_read_as_they_were_written(folder: Path, tensors: dict[str, Tensor]) -> None:
    assert b"written" not in (folder / PLACES).read_bytes(), "it says where it was written"
    found = read(folder, tensors)
    assert all(torch.equal(found[name], each) for name, each in tensors.items())
    assert torch.equal(read(folder, {"b": tensors["b"]})["b"], tensors["b"])


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2).double(), torch.ones(2, 1)])
def test_other_tensors_are_refused(folder: Path, other: Tensor) -> None:
    with pytest.raises(SnapshotError, match=r"b of .* is there as"):
        read(folder, {"b": other})


class Runs:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def runs(found: Metadata) -> None:
    found.planner_data = Runs("was_run")


def lies_elsewhere(found: Metadata) -> None:
    for info in found.storage_data.values():
        info.relative_path = "../elsewhere"


def lies_beside(found: Metadata) -> None:
    for info in found.storage_data.values():
        info.relative_path = "elsewhere"


def is_folded(found: Metadata) -> None:
    for info in found.storage_data.values():
        info.transform_descriptors = ("zstd",)


def lacks_a_part(found: Metadata) -> None:
    found.state_dict_metadata["a"].chunks[0].sizes = torch.Size((3, 3))


def lacks_one(found: Metadata) -> None:
    del found.state_dict_metadata["a"]


def has_bytes(found: Metadata) -> None:
    found.state_dict_metadata["a"] = BytesStorageMetadata()


def has_no_place(found: Metadata) -> None:
    del found.storage_data[MetadataIndex("a", torch.Size((0, 0)))]


def lies_behind(found: Metadata) -> None:
    for info in found.storage_data.values():
        info.offset += 10_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (runs, r"holds a \w+\.mkdir"),
        (lies_elsewhere, "a shard lies at .*elsewhere"),
        (lies_beside, "a shard lies at .*elsewhere"),
        (is_folded, "a shard lies at .*zstd"),
        (lacks_a_part, "9 of 12 numbers of a"),
        (lacks_one, r"a of .* is there as None"),
        (has_bytes, "holds a .*BytesStorageMetadata"),
        (has_no_place, "none of these weights"),
        (lies_behind, "none of these weights"),
    ],
)
def test_crafted_places_are_refused(
    folder: Path,
    tensors: dict[str, Tensor],
    change: Callable[[Metadata], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    path = folder / PLACES
    (folder / "elsewhere").write_bytes((folder / "__0_0.distcp").read_bytes())
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(SnapshotError, match=words):
        read(folder, tensors)
    assert not Path("was_run").exists()


@pytest.mark.parametrize("data", [b"", b"nothing", pickle.dumps({}), pickle.dumps(3)])
def test_what_is_no_list_of_places_is_refused(
    folder: Path, tensors: dict[str, Tensor], data: bytes
) -> None:
    (folder / PLACES).write_bytes(data)
    with pytest.raises(SnapshotError, match="none of these weights"):
        read(folder, tensors)
    (folder / PLACES).unlink()
    with pytest.raises(SnapshotError, match=r"it has no \.metadata"):
        read(folder, tensors)
