"""For how long does a snapshot stop training?

A state of 200 MiB is saved as a snapshot: serialised, hashed, written, synced, renamed. The
baseline writes the same bytes to a file in calls of 16 MiB and syncs it. Both run alternately
in one process on one disk; what they leave is removed between the runs, outside of the times.

    python -m benchmarks.save_time --json FILE
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.paired import time_pairs
from benchmarks.report import Figure, add_output_arguments, publish
from tbptt_ckpt import TBPTT, TensorSequence, Trainer
from tbptt_ckpt.snapshot.store import SnapshotStore

MIB = 2**20
LIMIT = 1.3


def make_trainer(num_bytes: int) -> Trainer:
    """A trainer after one update, with weights and Adam's state of about that size."""
    width = int((num_bytes / 4 / 3 / 8) ** 0.5)  # an LSTMCell has 8 width^2 weights
    module = nn.LSTMCell(width, width)
    engine = TBPTT(
        module,
        nn.functional.mse_loss,
        1,
        1,
        torch.optim.Adam(module.parameters()),
        strategy="retain",
    )
    trainer = Trainer(engine, TensorSequence(torch.zeros(1, 1, width), torch.ones(1, 1, width)))
    trainer.train()
    return trainer


def write_plainly(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    rest = data
    while len(rest):
        rest = rest[os.write(descriptor, rest[: 16 * MIB]) :]
    os.fsync(descriptor)
    os.close(descriptor)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--folder", help="on the disk to measure; not tmpfs")
    add_output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.mib, arguments.pairs = 2, 3
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    trainer = make_trainer(arguments.mib * MIB)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        store = SnapshotStore(folder / "snapshots")
        plain = folder / "plain"
        store.save(1, trainer.state_dict())
        data = memoryview((store.path(1) / "state.pt").read_bytes())

        def clear() -> None:
            """Nothing is left, nothing is dirty, nothing goes on."""
            store.wait()
            plain.unlink(missing_ok=True)
            shutil.rmtree(store.directory, ignore_errors=True)
            os.sync()
            time.sleep(0.1)

        times = time_pairs(
            lambda: write_plainly(plain, data),
            lambda: store.save(1, trainer.state_dict()),
            arguments.pairs,
            between=clear,
        )
        clear()
    figure = Figure(
        f"a snapshot of {len(data) / MIB:.0f} MiB over writing and syncing the same bytes",
        times.ratio,
        "x",
        LIMIT,
        times.interval,
        {**times.seconds(), "bytes": len(data)},
    )
    publish("save_time", [figure], arguments)


if __name__ == "__main__":
    main()
