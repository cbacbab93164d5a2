"""The events of a training run and the protocol of their sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from tbptt_ckpt.engine.results import WindowFigures, WindowResult


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowEvent(WindowFigures):
    """One window has run; attributes not named here are those of its `WindowResult`.

    Attributes:
        steps: Steps trained in total, this window's included.
        total_steps: Those there will be; None where that is not known before.
        epoch: Passes completed before this one.
        loss: What was differentiated; None where no step has a target.
        steps_per_second: New steps per second.
        executed_steps_per_step: Module steps run for every new step; 0.0 where it has none, since
            other ranks alone have run it.
    """

    steps: int
    total_steps: int | None
    epoch: int
    loss: float | None
    steps_per_second: float
    executed_steps_per_step: float

    @classmethod
    def of(
        cls, result: WindowResult, *, steps: int, total_steps: int | None, epoch: int
    ) -> WindowEvent:
        """What is told of a window; its tensors are not kept alive."""
        new = result.num_new_steps
        return cls(
            steps=steps,
            total_steps=total_steps,
            epoch=epoch,
            loss=result.loss_value,
            steps_per_second=new / result.seconds,
            executed_steps_per_step=1 + result.recomputed_steps / new if new else 0.0,
            **{each.name: getattr(result, each.name) for each in fields(WindowFigures)},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateEvent:
    """The weights were updated.

    Attributes:
        steps: Steps trained in total.
        updates: Updates made in total.
        grad_norm: Norm of the gradients before they were clipped.
        learning_rate: The one the update was made with, of the first group of parameters.
    """

    steps: int
    updates: int
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something else happened: a snapshot, a resume, a fault and what was done about it.

    Attributes:
        steps: Steps trained in total.
        kind: One word for it, such as "snapshot", "resumed", "out_of_memory".
        message: The same for people.
        figures: Numbers and strings.
    """

    steps: int
    kind: str
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)


class EventSink(Protocol):
    """Takes events as they come; it must not raise where training should go on.

    One that derives from this does nothing about what it does not define.
    """

    def on_window(self, event: WindowEvent) -> None:
        """A window has run."""

    def on_update(self, event: UpdateEvent) -> None:
        """The weights were updated; the window's own event follows."""

    def on_notice(self, event: Notice) -> None:
        """Something else happened."""

    def resume_at(self, steps: int) -> None:
        """Training goes on after `steps`: what was told of later steps will be told again."""

    def flush(self) -> None:
        """Write out what is held back."""

    def close(self) -> None:
        """Nothing will follow."""
