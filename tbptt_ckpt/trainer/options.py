"""What a trainer does about snapshots, non-finite numbers and missing memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tbptt_ckpt.arguments import AboveZero, AnyPath, Dimension, PositiveInt, check_fields
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.trainer.events import EventSink


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshots:
    """When and where the training state is saved.

    One is always taken before the first update, at the end, and when a signal stops the run.

    Attributes:
        directory: Where; made if need be. The log `events.jsonl` is written there too.
        every_steps: Steps between snapshots, taken at the next update point; None for none.
        every_minutes: Minutes between snapshots; None for none.
        keep: How many of the newest stay.
        on_failure: "stop" raises `SnapshotError` where one cannot be written; "go on" warns.
    """

    directory: AnyPath
    every_steps: PositiveInt | None = None
    every_minutes: AboveZero | None = None
    keep: PositiveInt = 3
    on_failure: Literal["stop", "go on"] = "stop"

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFinite:
    """What happens when a loss, a gradient or a state handed on is NaN or infinite.

    With a `GradScaler` non-finite gradients are its business: it skips the update and lowers
    its scale. Loss and state stay under this policy.

    Attributes:
        policy: "stop" raises `NonFiniteError` before the update, with everything as it was
            before the window. "skip" makes no update and goes on after the window from the
            state before it, which no later window reaches across. "go on" makes the update.
        most_in_a_row: With "skip", windows that may be skipped one after the other.
    """

    policy: Literal["stop", "skip", "go on"] = "stop"
    most_in_a_row: PositiveInt = 10

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    """What happens when a window does not fit into memory.

    The window is undone and run again under a plan that takes less, which then stays.

    Attributes:
        retries: How often one window is tried again before an error is raised.
        protect_update: Copy weights and optimizer state for the time of each update, when the
            window's memory is free again, so that an update that was cut short can be undone
            too. They lie on the device: with Adam three times the weights. False saves that
            memory; an update cut short then raises.
    """

    retries: Dimension = 8
    protect_update: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


class Stateful(Protocol):
    """Anything whose state a snapshot can hold."""

    def state_dict(self) -> Any:
        """Its state, in tensors, numbers, strings and containers."""

    def load_state_dict(self, state: Any) -> Any:
        """Put it back."""


def check_offers(events: Sequence[EventSink], extra: Mapping[str, Stateful]) -> None:
    """Look whether each of them has all the methods that it will be asked for.

    Raises:
        ArgumentError: One that has not.
    """
    given: list[tuple[str, object, type]] = [
        *((f"events[{index}]", sink, EventSink) for index, sink in enumerate(events)),
        *((f"extra[{name!r}]", each, Stateful) for name, each in extra.items()),
    ]
    for name, value, kind in given:
        methods = [method for method in vars(kind) if not method.startswith("_")]
        lacking = [method for method in methods if not callable(getattr(value, method, None))]
        if lacking or isinstance(value, type):
            problem = f"lacks {', '.join(lacking)}" if lacking else "is a class; pass an instance"
            raise ArgumentError(f"{name}={shown(value)} is no {kind.__name__}: it {problem}")
