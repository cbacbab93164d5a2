"""What becomes of a configuration that does not run: a row that says so, or an error."""

from __future__ import annotations

from tbptt_ckpt.errors import ArgumentError, InfeasibleBudgetError, TbpttError
from tbptt_ckpt.memory.exhausted import is_out_of_memory
from tbptt_ckpt.profiling.report import FAILED, OUT_OF_MEMORY, OVER_BUDGET


class BenchError(Exception):
    """Why a configuration did not run: status, a line, and where, as Python prints it."""

    def __init__(self, status: str, message: str, traceback: str = "") -> None:
        super().__init__(status, message, traceback)  # so that it can be pickled
        self.status, self.message, self.traceback = status, message, traceback


class ProfileError(ArgumentError):
    """A profile that cannot be made; raised for what goes wrong in plain BPTT already.

    Attributes:
        remote_traceback: Where it was raised, in whatever process, as Python prints it.
    """

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback


def bench_error(error: BaseException, traceback: str) -> BenchError:
    """What an error means for its row."""
    status, line = FAILED, " ".join(str(error).split())
    if is_out_of_memory(error):
        status, line = OUT_OF_MEMORY, line or "out of memory"
    elif isinstance(error, InfeasibleBudgetError):
        status = OVER_BUDGET
    elif not isinstance(error, TbpttError):
        line = f"the module or its loss raised {type(error).__name__}: {line}"
    return BenchError(status, line, traceback)
