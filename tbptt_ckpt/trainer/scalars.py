"""Events as named numbers, which trackers draw over steps."""

from __future__ import annotations

from tbptt_ckpt.trainer.events import EventSink, Notice, UpdateEvent, WindowEvent

Event = WindowEvent | UpdateEvent | Notice


class ScalarSink(EventSink):
    """A sink of named numbers over steps, and of messages by their kind."""

    def on_window(self, event: WindowEvent) -> None:
        """Log its figures."""
        self._log(event)

    def on_update(self, event: UpdateEvent) -> None:
        """Log its figures."""
        self._log(event)

    def on_notice(self, event: Notice) -> None:
        """Log its message, and its figures."""
        self._say(event)
        self._log(event)

    def _log(self, event: Event) -> None:
        if scalars := scalars_of(event):
            self._write(scalars, event.steps)

    def _write(self, scalars: dict[str, float], steps: int) -> None:
        raise NotImplementedError

    def _say(self, notice: Notice) -> None:
        raise NotImplementedError


def scalars_of(event: Event) -> dict[str, float]:
    """Its numbers by their names, such as "window/loss"; those that there are."""
    if isinstance(event, UpdateEvent):
        return {
            "update/grad_norm": event.grad_norm,
            "update/learning_rate": event.learning_rate,
        }
    if isinstance(event, Notice):
        numbers = {name: v for name, v in event.figures.items() if isinstance(v, int | float)}
        return {f"{event.kind}/{name}": value for name, value in numbers.items()}
    found = {
        "loss": event.loss,
        "drift": event.drift,
        "steps_per_second": event.steps_per_second,
        "executed_steps_per_step": event.executed_steps_per_step,
        "peak_bytes": event.peak_bytes,
        "reach_steps": None if event.reach is None else event.reach.steps,
        "k2": None if event.chosen_k2 is None else event.chosen_k2.k2,
    }
    return {f"window/{name}": value for name, value in found.items() if value is not None}
