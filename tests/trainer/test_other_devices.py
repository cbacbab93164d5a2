"""A snapshot of one device resumes on another: no accelerator is needed to hold that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import test_resume
import torch
from torch import Tensor

from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.snapshot import plain
from tbptt_ckpt.snapshot.store import SnapshotStore
from tbptt_ckpt.trainer.devices import moved

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
