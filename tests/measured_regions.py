"""How the tests of memory measure a region: here, in a fresh thread, in a child process."""

import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn

from tbptt_ckpt.memory.meter import peak_memory

MIB = 1024**2
LINUX = sys.platform == "linux"
needs_proc = pytest.mark.skipif(not LINUX, reason="reads /proc")
needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="needs an accelerator"
)


def blob(num_bytes):
    return torch.empty(num_bytes, dtype=torch.uint8)


def measure(work, **options):
    """A meter after `work(meter)`; the resident memory is left out, being no matter here."""
    with peak_memory(**{"held": (), "rss": False, **options}) as meter:
        work(meter)
    return meter


def in_fresh_thread(work):
    """Result of `work()` on a thread that has never measured anything."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def run_script(script, *arguments):
    """What a script prints as JSON, run in a fresh process on one core."""
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


class CellLoop:
    """Plain BPTT over an LSTM cell, with something to call after each step."""

    def __init__(self, num_steps=30, lanes=4, width=16):
        self.cell = nn.LSTMCell(width, width)
        self.inputs = torch.randn(num_steps, lanes, width)

    def __call__(self, after_step=lambda step: None):
        state, loss = None, 0.0
        for step, inputs in enumerate(self.inputs):
            state = self.cell(inputs, state)
            loss = loss + state[0].square().mean()
            after_step(step)
        loss.backward()
        self.cell.zero_grad()
