"""What becomes of a configuration that does not run: a row that says so, or an error."""

from __future__ import annotations

from dataclasses import dataclass

from tbptt_ckpt.errors import ArgumentError, InfeasibleBudgetError, TbpttError
from tbptt_ckpt.memory.exhausted import is_out_of_memory
from tbptt_ckpt.profiling.report import FAILED, OUT_OF_MEMORY, OVER_BUDGET


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a configuration did not run.

    Attributes:
        status: As in `MemoryReport`.
        message: One line.
        traceback: Where it was raised, as Python prints it.
    """

    status: str
    message: str
    traceback: str = ""


class BenchError(Exception):
    """A bench could not do what it was asked.

    Attributes:
        failure: Why.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class ProfileError(ArgumentError):
    """A profile that cannot be made; raised for what goes wrong in plain BPTT already.

    Attributes:
        remote_traceback: Where it was raised, in whatever process, as Python prints it.
    """

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback


def describe_failure(error: BaseException, traceback: str = "") -> Failure:
    """What an error means for its row."""
    line = " ".join(str(error).split())
    if is_out_of_memory(error):
        return Failure(OUT_OF_MEMORY, line or "out of memory", traceback)
    if isinstance(error, InfeasibleBudgetError):
        return Failure(OVER_BUDGET, line, traceback)
    if isinstance(error, TbpttError):
        return Failure(FAILED, line, traceback)
    return Failure(
        FAILED, f"the module or its loss raised {type(error).__name__}: {line}", traceback
    )
