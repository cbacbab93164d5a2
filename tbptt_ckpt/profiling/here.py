"""A bench in this process, on copies, so that what the user gave stays as it is."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.ambient import Ambient
from tbptt_ckpt.module.recurrence import parameters_of
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.profiling.bench import Resident, WindowBench
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.failure import BenchError, describe_failure
from tbptt_ckpt.profiling.report import MemoryReport
from tbptt_ckpt.profiling.work import Work


class BenchHere:
    """A `WindowBench` in this process, on copies; what is copied stays as it is.

    Args:
        work: What to copy.
        configuration: The row.
    """

    def __init__(self, work: Work, configuration: Configuration) -> None:
        self._work, self._configuration = work, configuration
        self._bench: WindowBench | None = None

    def __enter__(self) -> BenchHere:
        return self

    def __exit__(self, *_: object) -> None:
        self._bench = None

    def warm_up(self) -> Resident:
        """As `WindowBench.warm_up`."""
        with self._translated() as bench:
            return bench.warm_up()

    def time_window(self) -> float:
        """As `WindowBench.time_window`."""
        with self._translated() as bench:
            return bench.time_window()

    def measure(self, *, trace: bool = False) -> MemoryReport:
        """As `WindowBench.measure`."""
        with self._translated() as bench:
            return bench.measure(trace=trace)

    def write_history(self, path: Path) -> None:
        """As `WindowBench.write_history`."""
        with self._translated() as bench:
            bench.write_history(path)

    @contextmanager
    def _translated(self) -> Iterator[WindowBench]:
        """The bench, made when it is first needed; its errors as `BenchError`."""
        tensors = [*parameters_of(self._work.module), *tensors_of(self._work.init_state)]
        ambient = Ambient([self._work.module], tensors)
        found = ambient.capture()
        try:
            if self._bench is None:
                self._bench = WindowBench(copied(self._work), self._configuration)
            yield self._bench
        except Exception as error:
            failure = describe_failure(error, traceback.format_exc())
            raise BenchError(failure) from error
        finally:
            ambient.restore(found)


def copied(work: Work) -> Work:
    """The same work with copies of what training changes.

    Raises:
        ArgumentError: It cannot be copied.
    """
    try:
        module, loss_fn, optimizer, state = copy.deepcopy(work.held())
    except Exception as error:  # whatever the user's own __deepcopy__ raises
        raise ArgumentError(
            f"module, loss_fn, optimizer and init_state must be copied, so that yours stay as "
            f"they are, and cannot be ({type(error).__name__}: {error})"
        ) from error
    return Work(
        module=module,
        loss_fn=loss_fn,
        source=work.source,
        init_state=state,
        optimizer=optimizer,
        options=work.options,
    )
