"""What anyone could have signed is refused in one way, and older snapshots are tried."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import HastyDisk

from tbptt_ckpt import SnapshotError
from tbptt_ckpt.snapshot.manifest import MANIFEST, STATE_FILE
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning

Injected = Callable[..., None]
KIND = "tbptt_ckpt.kind"


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    store = SnapshotStore(tmp_path, disk=HastyDisk())
    for step in (1, 2):
        store.save(step, {"value": step})
    store.wait()
    return store


def manifest_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes().partition(b"\n")[2])
    return fields


def sign(folder: Path, body: bytes) -> None:
    head = b"tbptt-ckpt snapshot sha256 " + hashlib.sha256(body).hexdigest().encode()
    (folder / MANIFEST).write_bytes(head + b"\n" + body)


def sign_state(folder: Path) -> None:
    """A manifest that fits the state file as it is now."""
    fields = manifest_of(folder)
    data = (folder / STATE_FILE).read_bytes()
    fields["files"][0].update(
        num_bytes=len(data), piece_bytes=1 << 30, sha256=[hashlib.sha256(data).hexdigest()]
    )
    sign(folder, json.dumps(fields).encode())


def assert_passed_over(store: SnapshotStore, injected: Injected) -> None:
    with pytest.raises(SnapshotError):
        store.load(2)
    with pytest.warns(SnapshotWarning, match="PASSED OVER"):
        assert store.newest_valid().state == {"value": 1}  # type: ignore[union-attr]
    injected("hostile snapshot")


def _files(*more: str) -> dict[str, Any]:
    empty = {"num_bytes": 0, "piece_bytes": 1, "sha256": []}
    return {"more files": [{"name": name, **empty} for name in more]}


def _file(**changes: Any) -> dict[str, Any]:
    return {"files": [{"name": STATE_FILE, **changes}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": None},
        _files("state.pt"),
        _files("../.metadata"),
        _files(".metadata", ".metadata"),
        _files("__0_0.distcp/x"),
        _files(".metadata"),  # it is not there
        {"files": [3]},
        {"step": "2"},
        {"step": -2},
        {"created": 3},
        {"created": "\x1b[2J"},
        {"format": 2.0},
        {"versions": None},
        {"versions": {"torch": 2}},
        {"more": 1},
        {"file": {"name": 3}},
        {"file": {"name": "a\0b"}},
        {"file": {"name": "../step-1/state.pt"}},
        {"file": {"piece_bytes": 0}},
        {"file": {"piece_bytes": "4"}},
        {"file": {"piece_bytes": True}},
        {"file": {"num_bytes": -1}},
        {"file": {"sha256": None}},
        {"file": {"sha256": []}},
        {"file": {"sha256": [[1]]}},
    ],
    ids=str,
)
def test_manifests_with_wrong_fields(
    changes: dict[str, Any], store: SnapshotStore, injected: Injected
) -> None:
    fields = manifest_of(store.path(2))
    fields["files"][0].update(changes.pop("file", {}))
    fields["files"] += changes.pop("more files", [])
    sign(store.path(2), json.dumps(fields | changes).encode())
    assert_passed_over(store, injected)


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'], ids=len
)
def test_manifests_that_are_none(body: bytes, store: SnapshotStore, injected: Injected) -> None:
    sign(store.path(2), body)
    assert_passed_over(store, injected)


@pytest.mark.parametrize("name", [MANIFEST, STATE_FILE])
@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_only_regular_files_are_read(
    name: str, kind: str, store: SnapshotStore, injected: Injected
) -> None:
    path = store.path(2) / name
    path.rename(path.with_name("aside"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("aside")
    else:
        path.mkdir()
    with pytest.raises(SnapshotError, match=f"{name} is not a regular file"):
        store.load(2)
    assert_passed_over(store, injected)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _in_two_places(depth: int) -> list[Any]:
    """A few hundred bytes that unfold to 2 ** depth lists."""
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def _in_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["value"] = (value,)
    return value


@pytest.mark.parametrize(
    "state",
    [
        _in_two_places(18),
        _in_itself(),
        {"weight": torch.nn.Parameter(torch.ones(2))},
        {KIND: "tensor", "device": "cpu", "values": torch.zeros(2, device="meta")},
        {KIND: "array"},
        {KIND: "array", "dtype": "?!", "shape": [1], "values": torch.zeros(1, dtype=torch.uint8)},
        {KIND: "array", "dtype": "|O", "shape": [1], "values": torch.zeros(8, dtype=torch.uint8)},
        {KIND: "array", "dtype": "<f8", "shape": [9], "values": torch.zeros(8, dtype=torch.uint8)},
        {KIND: "array", "dtype": "|u1", "shape": [1 << 33]}
        | {"values": torch.zeros(1, dtype=torch.uint8).expand(1 << 33)},
        {"weights": torch.zeros(1).expand(1 << 33)},
        {KIND: "tensor", "device": "cpu", "values": torch.zeros(1).expand(1 << 33)},
        {KIND: "tensor", "device": "nowhere", "values": torch.zeros(1)},
        {KIND: "tensor", "device": "cpu", "values": 3},
        {KIND: ["unhashable"]},
        {KIND: "set", "items": [[1]]},
        {KIND: "dict", "items": [1]},
        {KIND: "namedtuple", "module": "os", "class": "terminal_size", "fields": [1, 2]},
        {KIND: "dataclass", "module": 3, "class": None},
        _nested(900),
    ],
    ids=lambda state: repr(type(state)) if isinstance(state, list) else str(state)[:60],
)
def test_states_that_are_none(state: Any, store: SnapshotStore, injected: Injected) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        torch.save(state, store.path(2) / STATE_FILE)
    finally:
        sys.setrecursionlimit(limit)
    sign_state(store.path(2))
    assert_passed_over(store, injected)


def test_other_digits_are_no_step(store: SnapshotStore) -> None:
    shutil.copytree(store.path(2), store.directory / "step-٣")
    assert store.steps() == [1, 2]


def test_a_compressed_state_is_not_unfolded(store: SnapshotStore, injected: Injected) -> None:
    path = store.path(2) / STATE_FILE
    torch.save({"value": 2}, path)  # with checksums, which `zipfile` looks at
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    sign_state(store.path(2))
    with pytest.raises(SnapshotError, match="compressed"):
        store.load(2)
    assert_passed_over(store, injected)
