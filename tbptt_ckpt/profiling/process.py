"""A bench in a fresh process of its own, so that no figure is polluted by another."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self, TypeVar, cast

import torch

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import BenchError, Configuration, bench_error
from tbptt_ckpt.profiling.report import FAILED, OUT_OF_MEMORY
from tbptt_ckpt.profiling.workload import Workload

_PATIENCE_SECONDS = 10.0

T = TypeVar("T")
MakeWorkload = Callable[[], Workload]


class ProcessBench:
    """A `WindowBench` in a fresh process.

    Args:
        make: Makes the workload in that process, the same every time; it can be pickled.
        configuration: The row.

    Raises:
        ArgumentError: A workload that cannot be sent to another process.
    """

    def __init__(self, make: MakeWorkload, configuration: Configuration) -> None:
        # Saved here: torch's own way through a pipe would put tensors in shared memory,
        # which the tensor allocator does not count. A plain pickle has of each tensor its whole
        # storage, of which all weights of a cuDNN module are views.
        saved = io.BytesIO()
        try:
            torch.save(make, saved, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # whatever the user's __reduce__ raises
            raise ArgumentError(
                f"the module, its loss, data or optimizer cannot be sent to a fresh process "
                f"({type(error).__name__}: {error}); define classes and functions at the top of a "
                "file, or measure in this process"
            ) from error
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, configuration), daemon=True)
        self._process.start()
        theirs.close()
        # Sent once it runs: large arguments of a process that dies in its first moments,
        # as in a script without its `if __name__ == "__main__":`, would block for ever.
        with contextlib.suppress(ConnectionError):
            self._pipe.send_bytes(saved.getbuffer())

    def __enter__(self) -> Self:
        return self

    def ask(self, request: Callable[[WindowBench], T]) -> T:
        """What a request returns, or `BenchError`; request and answer are pickled."""
        try:
            self._pipe.send(request)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            answer = self._obituary()
        if isinstance(answer, BenchError):
            raise answer
        return cast(T, answer)

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(_PATIENCE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _obituary(self) -> BenchError:
        self._process.join(_PATIENCE_SECONDS)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return BenchError(OUT_OF_MEMORY, "the system killed the process, as it does for memory")
        return BenchError(FAILED, f"the measured process ended by itself with exit code {code}")


def serve(pipe: Connection, configuration: Configuration) -> None:
    """Answer requests, after a saved workload, with what they return or a `BenchError`."""
    # Leaves the terminal to the parent, and is the first to go when memory runs out.
    os.dup2(2, 1)  # what the user's module prints must not mix with a report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    with contextlib.suppress(OSError):  # not everywhere is Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Gradients that vanish on the way end in denormal numbers, which take a CPU many times as long:
    # rows would differ by how far their weights have learned.
    torch.set_flush_denormal(True)
    saved_workload = pipe.recv_bytes()
    bench: WindowBench | None = None
    while True:
        try:
            request = pipe.recv()
        except (EOFError, ConnectionError):  # the parent is gone
            return
        try:
            if bench is None:
                work = torch.load(io.BytesIO(saved_workload), weights_only=False)()
                bench = WindowBench(work, configuration)
            answer = request(bench)
        except Exception as error:
            answer = bench_error(error, traceback.format_exc())
        with contextlib.suppress(ConnectionError):  # the parent is gone, as the next turn finds
            pipe.send(answer)
