"""Runs of two ranks, then of one, then of two again, against one of one process."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import WIDTH, mean_loss, random_data, random_state, relative_error, tanh_cell
from joined_ranks import held, in_copies, local, sharded, sharded_inside
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    Batches,
    LaneSource,
    NonFiniteError,
    SharedState,
    SnapshotError,
    Snapshots,
    TbpttWarning,
    TensorSequence,
    Trainer,
    Validation,
)
from tbptt_ckpt.data import lane_range, own_lanes
from tbptt_ckpt.module.trees import iterate_leaves
from tbptt_ckpt.snapshot import SnapshotStore, shards

STEPS, LANES, K1, K2 = 17, 5, 3, 7
WINDOWS = (4, 4, 1000)  # of two ranks, of one, and of two again: it changes in both passes


class Stream:
    """Steps without a length, which goes on where it stood."""

    def __init__(self, whole: TensorSequence) -> None:
        self.whole, self.position = whole, 0

    def read(self, start: int, stop: int) -> Any:
        self.position = stop = min(stop, len(self.whole))
        return self.whole.read(start, stop) if start < stop else ((), None)

    def weights(self, start: int, stop: int) -> Tensor:
        return self.whole.weights(start, stop)

    def resets(self, start: int, stop: int) -> Tensor:
        return self.whole.resets(start, stop)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def tensors() -> TensorSequence:
    inputs, targets = random_data(STEPS, lanes=LANES)
    resets = torch.zeros(STEPS, LANES, dtype=torch.bool)
    resets[4, 1] = resets[7, 0] = resets[10, 3] = resets[11, 4] = True
    weight = torch.ones(STEPS, LANES, dtype=torch.float64)
    weight[8:11, 2] = weight[6:, 4] = 0
    return TensorSequence(inputs, targets, weight=weight, resets=resets)


def steps() -> list[Any]:
    inputs, targets = random_data(STEPS, lanes=LANES)
    return list(zip(inputs, targets, strict=True))


def lanes() -> LaneSource:
    lengths = (9, 4, 12, 3, 5, 7, 6, 8)
    data = [random_data(length, seed=length, lanes=1) for length in lengths]
    return LaneSource([TensorSequence(x[:, 0], y[:, 0]) for x, y in data], LANES, seed=1)


def batches() -> Batches:
    loader = [random_data(length, seed=length, lanes=LANES) for length in (8, 9)]
    return Batches(loader, time_dim=0)


def first(_: nn.Module, own: slice) -> Tensor:
    return random_state(lanes=LANES)[own]


def shared(module: nn.Module, own: slice) -> SharedState:
    return SharedState(module.first, own.stop - own.start)


def cell() -> nn.Module:
    module = tanh_cell()
    module.first = nn.Parameter(torch.full((1, WIDTH), 0.1, dtype=torch.float64))
    return module


def fused() -> nn.Module:
    torch.manual_seed(3)
    return nn.LSTM(2, WIDTH).double()


CASES: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module], Any, Mapping[str, Any]]] = {
    "tensors": (tensors, tanh_cell, first, {}),
    "stale, in the middle of a group": (
        *(tensors, tanh_cell, first),
        {"overlap": "stale", "accumulate": 3, "clip_grad_norm": 0.05},
    ),
    "wrapped, in the middle of a group": (tensors, tanh_cell, first, {"accumulate": 2}),
    "lanes of sequences": (lanes, fused, None, {"strategy": "sqrt"}),
    "a learned state": (tensors, cell, shared, {"accumulate": 2}),
    "a stream": (lambda: Stream(tensors()), tanh_cell, first, {}),
    "a list": (steps, tanh_cell, None, {}),
    "batches": (batches, fused, None, {"strategy": "uniform:2"}),
    "a budget": (tensors, tanh_cell, first, {"strategy": "auto", "memory_budget": "64MiB"}),
    "shards": (lanes, fused, None, {}),
    "shards, in the middle of a group": (
        *(tensors, tanh_cell, first),
        {"accumulate": 3, "clip_grad_norm": 0.05, "strategy": "sqrt"},
    ),
    "shards in copies": (batches, tanh_cell, None, {"overlap": "stale"}),
    "a reach by audits": (tensors, tanh_cell, first, {"k2": "auto", "max_k2": 9}),
    "a graph": (tensors, tanh_cell, first, {"executor": "checkpoint"}),
}
SHARDED = {
    "shards": sharded,
    "shards, in the middle of a group": sharded_inside,
    "shards in copies": in_copies,
}
SHARDS = ("__0_0.distcp", "__1_0.distcp")
VALIDATED = ("lanes of sequences", "shards")
BY_DEFAULT = ("stale, in the middle of a group", "lanes of sequences")


def trainer(name: str, path: Path | None, *, alone: bool, **how: Any) -> Trainer:
    source, make, init_state, options = CASES[name]
    module, who = make(), {"rank": 0, "ranks": 1} if alone else {}
    own = lane_range(LANES, **who)
    is_wrapped = name.startswith("wrapped") and not alone
    called = DistributedDataParallel(module) if is_wrapped else module
    if name in SHARDED and not alone:
        module = called = SHARDED[name](module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    options = {"k2": K2, "strategy": "uniform:3", **options}
    ranks = None if alone else "all"
    if name in VALIDATED:
        seen = TensorSequence(*random_data(9, seed=5, lanes=LANES))
        seen = seen if alone else own_lanes(seen)
        how["validation"] = Validation(source=seen, every_windows=2)
    tbptt = TBPTT(called, mean_loss, K1, optimizer=optimizer, ranks=ranks, **options)
    return Trainer(
        tbptt,
        source() if alone else own_lanes(source()),
        init_state=None if init_state is None else init_state(module, own),
        epochs=2,
        snapshots=None if path is None else Snapshots(directory=path),
        **how,
    )


def losses_of(trainer: Trainer, most: int = 1000, *, saves: bool = True) -> list[float | None]:
    """Of so many windows, after which it saves."""
    found = []
    for window in trainer.windows():
        found.append(window.loss_value)
        if len(found) == most:
            if saves:
                trainer.save()
            break
    return found


def check_shared_once(name: str, path: Path) -> None:
    loaded = SnapshotStore(path).newest_valid()
    assert loaded is not None
    (other,) = loaded.state["ranks"]["others"]
    found = {(*path, "")[:2] for path, _ in other["own"]}
    assert ("run", "records") in found
    assert not {("learning", "modules"), ("learning", "optimizer")} & found
    names = {file.name for file in loaded.manifest.files}
    assert (name in SHARDED) == (names == {"state.pt", ".metadata", *SHARDS}), names


def check_refused(name: str, path: Path) -> None:
    """What only the first rank finds is an error on all of them."""
    with pytest.raises(ArgumentError, match="holds snapshots of another run"):
        losses_of(trainer(name, path, alone=False))
    with pytest.raises(SnapshotError, match="cannot be written"):
        losses_of(trainer(name, path / "events.jsonl" / "inside", alone=False))


def check_goes_on(path: Path, names: tuple[str, ...], rank: int, count: int) -> None:
    warnings.simplefilter("ignore", TbpttWarning)
    for number, name in enumerate(names):
        found: list[float | None] = []
        for stage, most in enumerate(WINDOWS):
            is_alone = stage == 1
            if not is_alone or rank == 0:
                here = trainer(name, path / str(number), alone=is_alone)
                assert here.resume() == (stage > 0), (name, stage)
                found += losses_of(here, most)
            dist.barrier()
            if stage == 0:
                check_shared_once(name, path / str(number))
                check_refused(name, path / str(number))
        whole = trainer(name, None, alone=True)
        expected = losses_of(whole)
        results = [each.result() for each in (here, whole)]
        if name in VALIDATED:
            assert results[0].best_loss == pytest.approx(results[1].best_loss, rel=1e-12)
            assert results[0].best_steps == results[1].best_steps
            assert here.resume(best=True)
            assert here.num_steps == results[0].best_steps
            here.resume()
        if rank == 0:
            assert found == pytest.approx(expected, rel=1e-12), name
        weights, expected = (list(each.tbptt.parts.parameters) for each in (here, whole))
        assert relative_error(local(weights), held(expected, weights)) <= 1e-12, name


def all_of(trainer: Trainer) -> list[Tensor]:
    """Copies of what is learned with, of the parts that are here."""
    state = trainer.state_dict()
    found = [each for each in iterate_leaves(state["learning"]) if isinstance(each, Tensor)]
    return [each.clone() for each in local(found)]


def check_refused_shards(trainer: Trainer) -> None:
    """What no other ranks could take up is an error as it is saved, on all ranks."""
    state = trainer.tbptt.parts.updater.optimizer.state
    weight = next(weight for weight in state if isinstance(weight, DTensor))
    state[weight]["rows"] = weight.detach().sum(1)
    with pytest.raises(SnapshotError, match=r"state of Adam has a tensor .* otherwise than its"):
        trainer.save()
    del state[weight]["rows"]
    if trainer.tbptt.parts.updater.deliveries.ranks.rank == 1:
        weight.detach().to_local()[0] = torch.nan  # which only this rank can see
    with pytest.raises(NonFiniteError, match="no snapshot is taken"):
        trainer.save()
    weight.detach().to_local().zero_()
    trainer._state._extra["mean"] = nn.ParameterDict({"weight": weight})
    with pytest.raises(SnapshotError, match=r"\['mean'\]\['weight'\] is held by ranks together"):
        trainer.save()


def with_shard_changed(folder: Path) -> None:
    path = folder / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def without_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def with_places_signed(folder: Path) -> None:
    """What would run as it is unpickled, by somebody who can sign it."""
    data = pickle.dumps(partial(print, "it has run"))
    (folder / ".metadata").write_bytes(data)
    fields = json.loads((folder / "manifest.json").read_bytes().partition(b"\n")[2])
    for entry in fields["files"]:
        if entry["name"] == ".metadata":
            entry |= {"num_bytes": len(data), "sha256": [hashlib.sha256(data).hexdigest()]}
    body = json.dumps(fields).encode()
    head = b"tbptt-ckpt snapshot sha256 " + hashlib.sha256(body).hexdigest().encode()
    (folder / "manifest.json").write_bytes(head + b"\n" + body)


def check_broken_shards(path: Path, rank: int, count: int) -> None:
    """All ranks pass over what one of them cannot use; nothing has changed where none is left."""
    name = "shards, in the middle of a group"
    begun = trainer(name, path, alone=False)
    losses_of(begun, 2)
    older, steps = all_of(begun), begun.num_steps
    losses_of(begun, 2)
    newest = path / f"step-{begun.num_steps}"
    check_refused_shards(begun)
    for change in (with_shard_changed, with_places_signed, None):
        here, patch = trainer(name, path, alone=False), pytest.MonkeyPatch()
        if change is None and rank == 1:
            patch.setattr(shards, "_places", fails_once(shards._places))
        elif change is not None and rank == 0:
            shutil.copytree(newest, kept := path.parent / "kept")
            change(newest)
        dist.barrier()
        words = "SNAPSHOT PASSED OVER" if rank == 0 else ""
        with pytest.warns(match=words) if rank == 0 else nullcontext():
            assert here.resume()
        assert here.num_steps == steps, change
        assert all(map(torch.equal, all_of(here), older)), change
        dist.barrier()
        patch.undo()
        if change is not None and rank == 0:
            shutil.rmtree(newest)
            shutil.move(kept, newest)
        dist.barrier()
    if rank == 0:
        for folder in path.glob("step-*"):
            without_shard(folder)
    dist.barrier()
    here = trainer(name, path, alone=False)
    before = all_of(here)
    with pytest.raises(SnapshotError, match="can be used"):
        here.resume()
    assert all(map(torch.equal, all_of(here), before))
    assert here.num_steps == 0


def fails_once(function: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the disk of this rank, as if")
        return function(*args)

    return fails
