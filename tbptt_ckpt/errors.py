"""The errors that users see; every one derives from `TbpttError`."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "InfeasibleBudgetError",
    "NonFiniteError",
    "OutOfMemoryError",
    "RankError",
    "ReplayMismatchError",
    "ScheduleError",
    "SnapshotError",
    "StaleWeightsError",
    "TbpttError",
    "TbpttWarning",
]

_LONGEST_SHOWN = 200  # characters


class TbpttError(Exception):
    """Base of every error this package raises on purpose."""


class TbpttWarning(UserWarning):
    """Something went wrong, and what was done about it."""


class ArgumentError(TbpttError, ValueError):
    """An argument that cannot work; the message names it, its value and what would work."""

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.split()))  # a value may be shown in many lines


class InfeasibleBudgetError(TbpttError, ValueError):
    """A memory budget that no schedule meets, or not the one asked for.

    Attributes:
        smallest_budget_bytes: The smallest budget that works for this window under the
            strategy asked for; in training without an optimizer also for later sequences, which
            find the gradients of earlier ones.
        optimal_budget_bytes: The smallest that works under strategy="optimal".
        largest_steps: The most steps that a window may reach back within this budget under
            strategy="optimal"; 0 if not even one fits.
    """

    def __init__(
        self,
        message: str,
        *,
        smallest_budget_bytes: int | None = None,
        optimal_budget_bytes: int | None = None,
        largest_steps: int | None = None,
    ) -> None:
        super().__init__(message)
        self.smallest_budget_bytes = smallest_budget_bytes
        self.optimal_budget_bytes = optimal_budget_bytes
        self.largest_steps = largest_steps


class RankError(TbpttError):
    """Ranks that train together and do not do the same, or one of them that is gone."""


class ReplayMismatchError(TbpttError):
    """Steps that ran again and reached another state than at first, so that no gradient is right.

    Attributes:
        start: The steps are `[start, stop)`.
        stop: See `start`.
        difference: The largest one found, relative to a tensor of the state; 0.0 where it was not
            seen again.
    """

    def __init__(self, message: str, *, start: int, stop: int, difference: float) -> None:
        super().__init__(message)
        self.start, self.stop, self.difference = start, stop, difference


class ScheduleError(TbpttError):
    """A schedule that is not a valid way to differentiate its window."""


class StaleWeightsError(TbpttError):
    """Weights changed between the advance of a window and its replay."""


class SnapshotError(TbpttError):
    """A snapshot that cannot be written, or cannot be trusted."""


class NonFiniteError(TbpttError):
    """A loss, gradient or state that is NaN or infinite."""


class OutOfMemoryError(TbpttError, MemoryError):
    """A window that did not fit into memory under any plan that was tried."""


def first_line(error: BaseException) -> str:
    """An error's type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def shown(value: object) -> str:
    """A value as one short line of a message: tensors and long ones by their kind."""
    try:
        if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type):
            return f"<{type(value).__name__} {value.dtype} {list(value.shape)}>"
        text = repr(value)
    except Exception:  # of a class of the user's
        text = f"<{type(value).__name__}>"
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_SHOWN else line[: _LONGEST_SHOWN - 3] + "..."
