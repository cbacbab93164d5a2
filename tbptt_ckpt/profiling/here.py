"""A bench in this process, on copies, so that what the user gave stays as it is."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.ambient import untouched
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.profiling.bench import WindowBench
from tbptt_ckpt.profiling.configuration import Configuration
from tbptt_ckpt.profiling.failure import BenchError, describe_failure
from tbptt_ckpt.profiling.work import Work

T = TypeVar("T")


class BenchHere:
    """A `WindowBench` in this process, on copies; what is copied stays as it is."""

    def __init__(self, work: Work, configuration: Configuration) -> None:
        self._work, self._configuration = work, configuration
        self._bench: WindowBench | None = None

    def __enter__(self) -> BenchHere:
        return self

    def __exit__(self, *_: object) -> None:
        self._bench = None

    def ask(self, request: Callable[[WindowBench], T]) -> T:
        """What a request returns; the `WindowBench` is made for the first one."""
        try:
            with untouched(self._work.module, tensors=tensors_of(self._work.init_state)):
                if self._bench is None:
                    self._bench = WindowBench(copied(self._work), self._configuration)
                return request(self._bench)
        except Exception as error:
            raise BenchError(describe_failure(error, traceback.format_exc())) from error


def copied(work: Work) -> Work:
    """The same work with copies of what training changes; `ArgumentError` if there are none."""
    try:
        module, loss_fn, optimizer, state = copy.deepcopy(work.held())
    except Exception as error:  # whatever the user's own __deepcopy__ raises
        raise ArgumentError(
            f"module, loss_fn, optimizer and init_state must be copied, so that yours stay as "
            f"they are, and cannot be ({type(error).__name__}: {error})"
        ) from error
    return replace(work, module=module, loss_fn=loss_fn, optimizer=optimizer, init_state=state)
