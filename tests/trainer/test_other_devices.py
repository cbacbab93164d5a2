"""A snapshot of one device resumes on another: no accelerator is needed to hold that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import test_resume
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_jobs import EXACT, Job, assert_equal

from tbptt_ckpt import Snapshots
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.snapshot import plain
from tbptt_ckpt.snapshot.store import SnapshotStore
from tbptt_ckpt.trainer.devices import moved
from tbptt_ckpt.trainer.learning_state import copied_learning_state

NAMES = (
    "dropout and buffers, stale",
    "nested state, stale",
    "stream",
    "lanes, learned",
    "groups, learned",
    "buffers set later",
)


def elsewhere(tensor: Tensor, name: str) -> Any:
    """What `to_plain` makes of a tensor on an accelerator that is not here."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    return {"tbptt_ckpt.kind": "tensor", "device": "cuda:7", "values": tensor.detach().clone()}


def stopped(name: str) -> tuple[dict[str, Any], list[Any]]:
    trainer, _ = test_resume.CASES[name].build()
    windows = test_resume._run_and_stop(trainer, 3)
    return trainer.state_dict(), windows


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there is such a device")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_a_device_that_is_not_here_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = test_resume._finish(test_resume.CASES[name].build()[0], [])
    state, windows = stopped(name)
    records = dict(state["run"]["records"])
    records["random"] = [*records["random"], torch.zeros(16, dtype=torch.uint8)]  # its generator's
    last = len(records["random"]) - 1
    records["ambients"] = [each | {"devices": [last]} for each in records["ambients"]]
    state |= {"device": "cuda:7", "run": state["run"] | {"records": records}}
    store = SnapshotStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(plain, "_plain_tensor", elsewhere)
        store.save(1, state)
    resumed, _ = test_resume.CASES[name].build()
    with pytest.warns(UserWarning, match="device cpu replaces cuda:7"):
        resumed.load_state_dict(store.load(1).state)
    assert test_resume._finish(resumed, windows) == expected


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_run_carries_moves_but_generators(name: str) -> None:
    state, _ = stopped(name)
    run = copy.deepcopy(state["run"])
    found = moved(run, "cpu", torch.device("meta"))
    records = found["records"]
    carried = [records[part] for part in ("values", "boundaries", "origin_state")]
    carried += [found["collected"], found["group"]]
    carried += [(b["inputs"], b["targets"]) for b in found["reader"].get("held", ())]
    tensors = tensors_of(carried)
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
    kept = [records["random"], *(b["weight"] for b in found["reader"].get("held", ()))]
    assert all(tensor.device.type == "cpu" for tensor in tensors_of(kept))
    assert moved(run, "cpu", torch.device("cpu")) is run


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="there is such a device")
def test_what_is_copied_from_a_snapshot_is_not_put_on_the_device_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it would be twice for a moment."""
    job, at = Job(), {"snapshots": Snapshots(directory=tmp_path, every_steps=2)}
    with monkeypatch.context() as patched:
        patched.setattr(plain, "_plain_tensor", elsewhere)
        trainer, _, listener = job.build(**at)
        trainer.train()
    expected, put = job.account(trainer, listener), []

    def to_device(values: Tensor, device: str) -> Tensor:
        if device != "cpu":
            put.append(tuple(values.shape))
        return values

    trainer, module, listener = job.build(**at)
    monkeypatch.setattr(plain, "_to_device", to_device)
    trainer.resume()
    found = job.account(trainer, listener)
    assert_equal(found["learning"], expected["learning"], EXACT)
    weight = tuple(next(p.shape for p in module.parameters() if p.dim() == 2))
    alike = sum(p.shape == weight for p in module.parameters())
    assert put.count(weight) == 3 * alike  # of the optimizer, which takes what it is given


class Copies(TorchDispatchMode):
    """Sizes of what was copied where it lay, and of what was copied to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.there: list[torch.Size] = []
        self.to_host: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.clone:
            self.there.append(args[0].shape)
        if func.overloadpacket is torch.ops.aten._to_copy and str(kwargs["device"]) == "cpu":
            self.to_host.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_what_takes_a_failed_load_back_waits_on_the_host() -> None:
    trainer, module, _ = Job().build()
    trainer.train()
    parts, weights = trainer._state._parts, list(module.parameters())
    before = copy.deepcopy(trainer.state_dict()["learning"])
    with Copies() as copies:
        put_back = copied_learning_state(parts)
    with torch.no_grad():
        for tensor in (*weights, *module.buffers()):
            tensor.zero_()
    parts.updater.optimizer.state.clear()
    put_back()
    assert_equal(trainer.state_dict()["learning"], before, EXACT)
    assert not set(copies.there) & {weight.shape for weight in weights}
    for weight in weights:
        assert copies.to_host.count(weight.shape) >= 4  # and three moments
