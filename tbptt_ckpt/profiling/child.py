"""The measured process: makes the work, then does what it is asked until nobody asks."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.outcome import describe_failure


def serve(pipe: Connection, configuration: Configuration) -> None:
    """Answer requests for the methods of a `WindowBench` until the pipe is closed.

    The pickled workload comes first. A request is (name, keywords); an answer is what the
    method returns, or a `Failure`.
    """
    _stand_back()
    pickled_workload = pipe.recv_bytes()
    bench: WindowBench | None = None
    while (request := _next_request(pipe)) is not None:
        name, keywords = request
        try:
            if bench is None:
                work = pickle.loads(pickled_workload).build()
                bench = WindowBench(work, configuration, alone=True)
            answer = getattr(bench, name)(**keywords)
        except Exception as error:
            answer = describe_failure(error, traceback.format_exc())
        pipe.send(answer)


def _next_request(pipe: Connection) -> tuple[str, dict[str, Any]] | None:
    try:
        request: tuple[str, dict[str, Any]] = pipe.recv()
    except EOFError:  # the parent is gone
        return None
    return request


def _stand_back() -> None:
    """Leave the terminal to the parent, and be the first to go when memory runs out."""
    os.dup2(2, 1)  # what the user's module prints must not mix with a report
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    with contextlib.suppress(OSError):  # not everywhere is Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
