"""Snapshots on disk under every fault: the old state or the new one, never a third."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import (
    CountingDisk,
    FailingDisk,
    HastyDisk,
    JournalDisk,
    KillingDisk,
    contents,
    surviving_tree,
    survivors,
    write_tree,
)
from grids import later
from torch import Tensor

from tbptt_ckpt import ArgumentError, SnapshotError
from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.manifest import FORMAT_VERSION, MANIFEST
from tbptt_ckpt.snapshot.plain import from_plain, to_plain
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning

GOLDEN = Path(__file__).parent / "golden"
Injected = Callable[..., None]


def state(value: int) -> dict[str, Any]:
    return {"value": value, "tensor": torch.full((3,), float(value))}


def value_of(loaded: Any) -> int:
    """Which state was loaded; it must be whole."""
    assert torch.equal(loaded.state["tensor"], torch.full((3,), float(loaded.state["value"])))
    return int(loaded.state["value"])


def store_at(path: Path, disk: Disk | None = None, keep: int = 3) -> SnapshotStore:
    return SnapshotStore(path, keep, disk or HastyDisk())


def save(store: SnapshotStore, step: int, value: int) -> None:
    store.save(step, state(value))
    store.wait()


def leftovers(path: Path) -> list[str]:
    return [p.name for p in path.iterdir() if p.name.startswith(".")]


# From which step to which, and how many are kept: an ordinary save, one that retires the old,
# and one that replaces a snapshot of the same step.
SAVES = {"next": (1, 2, 3), "retiring": (1, 2, 1), "replacing": (2, 2, 3)}


@pytest.mark.parametrize("kind", [later("next"), later("retiring"), "replacing"])
def test_a_loss_of_power_leaves_the_old_state_or_the_new(
    kind: str, tmp_path: Path, injected: Injected
) -> None:
    old_step, new_step, keep = SAVES[kind]
    root = tmp_path / "snapshots"
    save(store_at(root, keep=keep), old_step, 1)
    base = contents(root)
    disk = JournalDisk()
    save(store_at(root, disk, keep), new_step, 2)
    assert value_of(store_at(root).newest_valid()) == 2
    seen: dict[int, int] = {}
    for operations, is_complete in survivors(disk.journal):
        tree = surviving_tree(base, operations)
        key = hash(frozenset(tree.items()))  # equal directories are looked at once
        if key not in seen:
            remains = tmp_path / str(len(seen))
            write_tree(tree, root, remains)
            seen[key] = found(remains)
            shutil.rmtree(remains)
        # A save that has returned is kept whatever happens.
        assert seen[key] in ((2,) if is_complete else (1, 2)), operations
        injected("power loss, torn write")
    assert set(seen.values()) == {1, 2}


def found(remains: Path) -> int:
    """What a resume would load."""
    store = store_at(remains)
    store.clean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SnapshotWarning)
        value = value_of(store.newest_valid())
    assert leftovers(remains) == []
    return value


@pytest.mark.parametrize("kind", [later("next"), later("retiring"), "replacing"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_every_failing_call_leaves_the_old_state_or_the_new(
    kind: str, error: int, tmp_path: Path, injected: Injected
) -> None:
    old_step, new_step, keep = SAVES[kind]
    count = 0
    while True:
        count += 1
        root = tmp_path / str(count)
        save(store_at(root, keep=keep), old_step, 1)
        disk = FailingDisk(count, error)
        store = store_at(root, disk, keep)
        failure: SnapshotError | None = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                save(store, new_step, 2)
            except SnapshotError as error_raised:
                failure = error_raised
        raised = failure is not None
        for words in (f"{root / f'step-{new_step}'}", os.strerror(error), "12 bytes"):
            assert failure is None or words in str(failure)
        if not disk.fired:
            assert not raised
            assert value_of(store.newest_valid()) == 2
            break
        injected("disk full" if error == errno.ENOSPC else "power loss, torn write")
        loaded = value_of(store_at(root).newest_valid())
        assert loaded in (1, 2)
        is_committed = disk.calls[: count - 1].count("replace") >= 1 + (kind == "replacing")
        assert loaded == 2 if not raised else loaded == 1 or is_committed, disk.calls
        if raised:
            assert not [name for name in leftovers(root) if name.endswith(".part")]
        else:  # only what is removed afterwards may fail without an error
            assert disk.calls[count - 1] in ("unlink", "remove_directory", "replace", "close")
            assert caught or kind == "replacing"
        cleaned = store_at(root)
        cleaned.clean()
        assert leftovers(root) == []
        save(cleaned, 3, 3)  # and the next one works
        assert value_of(cleaned.newest_valid()) == 3
    assert count > 20


def test_every_write_that_finds_the_disk_full_is_one_clear_error(
    tmp_path: Path, injected: Injected
) -> None:
    count = 0
    save(store_at(tmp_path), 1, 1)
    before = contents(tmp_path)
    while True:
        count += 1
        disk = FailingDisk(count, errno.ENOSPC, "write")
        try:
            save(store_at(tmp_path, disk), 2, 2)
        except SnapshotError as failure:
            message = str(failure)
        else:
            break
        assert disk.fired
        injected("disk full")
        assert f"{tmp_path / 'step-2'} cannot be written: No space left on device" in message
        assert "the state has 12 bytes" in message
        assert "are free" in message
        assert f"{tmp_path / 'step-1'} is intact" in message
        assert contents(tmp_path) == before
    assert not disk.fired
    assert count > 5


def test_a_full_file_system(tmp_path: Path, injected: Injected) -> None:
    """The real thing, where a small file system may be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs root and mount")
    try:
        store = SnapshotStore(tmp_path)
        store.save(1, state(1))
        big = {"tensor": torch.zeros(100_000)}
        with pytest.raises(SnapshotError, match=r"No space left on device.*400,000 bytes"):
            store.save(2, big)
        injected("disk full")
        assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
        assert value_of(store.newest_valid()) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_short_writes_are_finished(tmp_path: Path) -> None:
    class Short(HastyDisk):
        def write(self, descriptor: int, data: memoryview) -> int:
            return super().write(descriptor, data[: max(1, len(data) // 3)])

    store = store_at(tmp_path, Short())
    save(store, 1, 7)
    assert value_of(store.newest_valid()) == 7


@pytest.mark.parametrize("kind", [later("next"), later("retiring"), "replacing"])
def test_a_kill_at_every_call_of_a_save(kind: str, tmp_path: Path, injected: Injected) -> None:
    old_step, new_step, keep = SAVES[kind]
    counter = CountingDisk()
    save(store_at(tmp_path / "counted", keep=keep), old_step, 1)
    save(store_at(tmp_path / "counted", counter, keep), new_step, 2)
    for count in range(1, len(counter.calls) + 1):
        root = tmp_path / str(count)
        save(store_at(root, keep=keep), old_step, 1)
        pid = os.fork()
        if pid == 0:
            try:
                save(store_at(root, KillingDisk(count), keep), new_step, 2)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        injected("kill -9 during a save")
        store = store_at(root, keep=keep)
        store.clean()
        assert value_of(store.newest_valid()) in (1, 2)
        assert leftovers(root) == []
        save(store, 3, 3)
        assert value_of(store.newest_valid()) == 3


class Deserialised(BaseException):
    """No handler of the package takes it for a fault of the snapshot."""


class TestDamage:
    @pytest.fixture
    def saved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SnapshotStore:
        """A tiny snapshot; whatever is wrong with it must be found before it is deserialised."""
        store = store_at(tmp_path)
        store.save(5, {"a": 1})

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise Deserialised

        monkeypatch.setattr(torch, "load", refuse)
        return store

    def test_every_flipped_byte_is_found(self, saved: SnapshotStore, injected: Injected) -> None:
        folder = saved.path(5)
        for path in sorted(folder.iterdir()):
            whole = path.read_bytes()
            for index in range(len(whole)):
                flipped = bytearray(whole)
                flipped[index] ^= 1 << index % 8
                path.write_bytes(flipped)
                with pytest.raises(SnapshotError):
                    saved.load(5)
                injected("flipped bit, truncation, missing file")
            path.write_bytes(whole)
        with pytest.raises(Deserialised):  # else nothing was shown
            saved.load(5)

    def test_every_truncation_is_found(self, saved: SnapshotStore, injected: Injected) -> None:
        for path in sorted(saved.path(5).iterdir()):
            whole = path.read_bytes()
            for length in range(0, len(whole), 7):
                path.write_bytes(whole[:length])
                with pytest.raises(SnapshotError):
                    saved.load(5)
                injected("flipped bit, truncation, missing file")
            path.write_bytes(whole + b"\0")
            with pytest.raises(SnapshotError):
                saved.load(5)
            injected("flipped bit, truncation, missing file")
            path.write_bytes(whole)

    def test_a_missing_file_is_named(self, saved: SnapshotStore, injected: Injected) -> None:
        for path in sorted(saved.path(5).iterdir()):
            whole = path.read_bytes()
            path.unlink()
            with pytest.raises(SnapshotError, match=f"{path.name} is missing"):
                saved.load(5)
            injected("flipped bit, truncation, missing file")
            path.write_bytes(whole)

    def test_a_snapshot_under_another_name_is_found(
        self, saved: SnapshotStore, injected: Injected
    ) -> None:
        saved.path(5).rename(saved.path(6))
        with pytest.raises(SnapshotError, match="its manifest says step 5"):
            saved.load(6)
        injected("flipped bit, truncation, missing file")


def damage(folder: Path) -> None:
    path = folder / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_valid_one_is_taken_with_a_loud_warning(
    tmp_path: Path, injected: Injected
) -> None:
    store = store_at(tmp_path, keep=5)
    for step in (1, 20, 100):
        save(store, step, step)
    assert store.steps() == [1, 20, 100]
    assert value_of(store.newest_valid()) == 100
    damage(store.path(100))
    injected("flipped bit, truncation, missing file")
    with pytest.warns(SnapshotWarning, match=r"PASSED OVER.*step-100.*falling back to .*step-20"):
        assert value_of(store.newest_valid()) == 20
    (store.path(20) / MANIFEST).unlink()
    injected("flipped bit, truncation, missing file")
    with pytest.warns(SnapshotWarning) as caught:
        assert value_of(store.newest_valid()) == 1
    assert len(caught) == 2
    shutil.rmtree(store.path(1))
    with pytest.raises(SnapshotError, match="none of the 2 snapshots"):
        store.newest_valid()
    save(store, 100, 7)  # in place of the broken one
    assert value_of(store.newest_valid()) == 7


def test_broken_snapshots_do_not_push_out_valid_ones(tmp_path: Path, injected: Injected) -> None:
    store = store_at(tmp_path, keep=2)
    for step in (1, 2, 3):
        save(store, step, step)
    assert store.steps() == [2, 3]
    (store.path(3) / "state.pt").unlink()
    injected("flipped bit, truncation, missing file")
    save(store, 4, 4)
    assert store.steps() == [2, 3, 4]


@pytest.mark.parametrize("started", [0, 1])
def test_where_no_thread_can_be_started_a_save_does_all_itself(
    started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injected: Injected
) -> None:
    start, count = threading.Thread.start, 0

    def start_some(thread: threading.Thread) -> None:
        nonlocal count
        count += 1
        if count > started:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    large = {"value": torch.arange(3 << 20)}  # in several pieces
    store = store_at(tmp_path, keep=1)
    for step in (1, 2):
        store.save(step, large)
    assert count > 4
    assert (store.steps(), leftovers(tmp_path)) == ([2], [])
    assert torch.equal(store.newest_valid().state["value"], large["value"])  # type: ignore[union-attr]
    injected("out of memory")


def test_an_empty_or_missing_directory_has_none(tmp_path: Path) -> None:
    assert store_at(tmp_path).newest_valid() is None
    assert store_at(tmp_path / "none" / "yet").newest_valid() is None
    save(store_at(tmp_path / "none" / "yet"), 0, 3)
    assert value_of(store_at(tmp_path / "none" / "yet").newest_valid()) == 3
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a file"):
        store_at(tmp_path / "file")


class Touch:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"mkdir {self.path}",)


class Evaluate(Touch):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


class Make(Touch):
    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Nested(Touch):
    def __reduce__(self) -> Any:
        return OrderedDict, ([("x", Touch(self.path))],)


@pytest.mark.parametrize("payload", [Touch, Evaluate, Make, Nested])
@pytest.mark.parametrize("form", ["archive", "bare pickle"])
def test_nothing_in_a_hostile_snapshot_is_executed(
    payload: type[Touch],
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    injected: Injected,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    store = store_at(tmp_path / "snapshots")
    save(store, 1, 1)
    save(store, 2, 2)
    mark = tmp_path / "executed"
    path = store.path(2) / "state.pt"
    if form == "archive":
        torch.save({"value": payload(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"value": payload(mark)}, protocol=2))
    sign(store.path(2))
    with pytest.raises(SnapshotError, match="holds more than plain values"):
        store.load(2)
    injected("hostile snapshot")
    with pytest.warns(SnapshotWarning, match="PASSED OVER"):
        assert value_of(store.newest_valid()) == 1
    assert not mark.exists()
    if form == "archive":  # the payload is a real one
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert mark.exists()


def sign(folder: Path) -> None:
    """Write a manifest that fits, as whoever forges a snapshot would."""
    files = []
    for path in folder.iterdir():
        if path.name != MANIFEST:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            files.append(
                {"name": path.name, "num_bytes": len(data), "piece_bytes": 1 << 30}
                | {"sha256": [digest]}
            )
    step = int(folder.name.partition("-")[2])
    write_manifest(folder, {"format": FORMAT_VERSION, "step": step, "files": files})


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    fields = {"created": "2026-11-29", "versions": {"tbptt_ckpt": "9.9"}, **fields}
    body = json.dumps(fields).encode()
    head = b"tbptt-ckpt snapshot sha256 " + hashlib.sha256(body).hexdigest().encode()
    (folder / MANIFEST).write_bytes(head + b"\n" + body)


@dataclass
class Plain:
    number: int


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        ("dataclass", "subprocess", "Popen"),
        ("dataclass", "os", "system"),
        ("namedtuple", "builtins", "list"),
        ("namedtuple", "this", "s"),
        ("dataclass", "antigravity", "webbrowser"),
        ("function", "os", "system"),
    ],
)
def test_classes_of_a_hostile_snapshot_are_neither_imported_nor_called(
    kind: str, module: str, name: str, injected: Injected
) -> None:
    plain = {"tbptt_ckpt.kind": kind, "module": module, "class": name, "fields": ["true"]}
    was_imported = module in sys.modules
    with pytest.raises(SnapshotError, match="not imported here"):
        from_plain(plain)
    assert (module in sys.modules) == was_imported
    injected("hostile snapshot")


def test_plain_values_come_back_as_they_were() -> None:
    value = {
        1: (1, 2.5, "x", None, True, b"bytes", 2**70, float("inf")),
        "tensors": [torch.arange(3), torch.ones(2, 2).t(), torch.tensor(1j)],
        "arrays": (np.arange(3, dtype=np.uint32), np.float32(1.5), np.zeros((0, 2))),
        "ordered": OrderedDict(b=1, a=2),
        "counted": Counter({30: 1, 80: 2}),
        "set": {1, 2},
        "own": Plain(3),
        "pair": Pair(torch.zeros(1), {"deep": Pair(1, 2)}),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
    }
    again = from_plain(to_plain(value))
    assert repr(again["own"]) == repr(value["own"])
    assert type(again["pair"]) is Pair
    assert type(again["pair"].second["deep"]) is Pair
    assert again["ordered"] == value["ordered"]
    assert type(again["ordered"]) is OrderedDict
    assert again[1] == value[1]
    assert again["set"] == {1, 2}
    assert again["counted"] == value["counted"]
    assert type(again["counted"]) is Counter
    for new, old in zip(again["arrays"], value["arrays"], strict=True):
        assert np.array_equal(new, old)
    for new, old in zip(again["tensors"], value["tensors"], strict=True):
        assert torch.equal(new, old)
    with pytest.raises(SnapshotError, match=r"state\['f'\] holds a builtins.function"):
        to_plain({"f": lambda: None})


def test_views_are_saved_without_the_rest_of_their_storage(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.save(1, {"row": torch.zeros(1000, 1000)[3]})
    assert sum(f.stat().st_size for f in store.path(1).iterdir()) < 20_000


def test_tensors_on_the_cpu_are_not_copied() -> None:
    weight = torch.nn.Linear(3, 3).weight
    plain = to_plain({"weight": weight, "none": None})
    assert isinstance(plain["weight"], Tensor)
    assert plain["weight"].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, None, "1"])
def test_another_format_is_refused_by_name(
    version: Any, tmp_path: Path, injected: Injected
) -> None:
    store = store_at(tmp_path)
    save(store, 1, 1)
    write_manifest(store.path(1), {"format": version, "step": 1, "files": []})
    expected = (
        f"snapshot format {version!r}, written by tbptt-ckpt 9.9; "
        f"this version reads format {FORMAT_VERSION}"
    )
    with pytest.raises(SnapshotError, match=expected):
        store.load(1)
    injected("upgrade of the library")


def test_the_archive_is_one_that_torch_reads(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    save(store, 1, 1)
    with zipfile.ZipFile(store.path(1) / "state.pt") as archive:
        assert any(name.endswith("data.pkl") for name in archive.namelist())
    assert torch.load(store.path(1) / "state.pt", weights_only=True)["value"] == 1
    assert torch.serialization.get_crc32_options()  # as it was before
