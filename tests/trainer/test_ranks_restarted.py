"""A rank that is killed is started again by torchrun, and training goes on from the snapshots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, signal, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tbptt_ckpt import TBPTT, Snapshots, TensorSequence, Trainer

directory, kills, is_sharded = sys.argv[1], "kills" in sys.argv[2], "sharded" in sys.argv[2]
env = os.environ
# Of torch 2.13: all attempts share a store, where gloo finds addresses of the one before.
store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]))
store = dist.PrefixStore("attempt " + env["TORCHELASTIC_RESTART_COUNT"], store)
dist.init_process_group(
    "gloo", store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"])
)
torch.set_num_threads(1)
torch.manual_seed(0)
module = torch.nn.GRU(2, 3, num_layers=2, dropout=0.2).double()
if is_sharded:
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
torch.manual_seed(dist.get_rank())  # what is drawn is each rank's own
optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
generator = torch.Generator().manual_seed(dist.get_rank())
inputs = torch.randn(40, 2, 2, generator=generator, dtype=torch.float64)
targets = torch.randn(40, 2, 3, generator=generator, dtype=torch.float64)
loss_fn = torch.nn.functional.mse_loss
tbptt = TBPTT(module, loss_fn, 5, 12, optimizer, strategy="uniform:4", ranks="all")
saves = Snapshots(directory=directory, every_steps=5 if dist.get_rank() else 10)
trainer = Trainer(tbptt, TensorSequence(inputs, targets), snapshots=saves, epochs=2)
is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
resumed = trainer.resume()
assert resumed != is_first, "the second attempt goes on"
for window in trainer.windows():
    if kills and is_first and dist.get_rank() == 1 and trainer.num_steps == 55:
        os.kill(os.getpid(), signal.SIGKILL)
state = module.state_dict()
if is_sharded:
    state = {name: each.full_tensor() for name, each in state.items()}
if dist.get_rank() == 0:
    torch.save(state, directory + ".pt")
dist.destroy_process_group()
"""


def run(path: Path, kills: str, *, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    script = path.parent / "script.py"
    script.write_text(SCRIPT)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return subprocess.run(
        [sys.executable, *launch, "--max-restarts", "1", str(script), str(path), kills],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["", " sharded"])
def test_a_killed_rank_is_restarted_and_training_ends_as_if_undisturbed(
    kind: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = run(killed, "kills" + kind)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "exitcode: -9) local_rank: 1" in found.stderr, found.stderr[-3000:]  # it was killed
    assert run(whole, "runs" + kind).returncode == 0
    expected, weights = (torch.load(f"{path}.pt") for path in (whole, killed))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    other = run(killed, "runs", ranks=1)
    assert other.returncode != 0
    assert "lanes=2, which was 4" in other.stderr, other.stderr[-3000:]
    names = {path.name for path in killed.iterdir()}
    assert names == {".lock", "events.jsonl", "step-60", "step-70", "step-80"}  # written once
