"""Events as named numbers, which trackers draw over steps."""

from __future__ import annotations

from tbptt_ckpt.trainer.events import Notice, UpdateEvent, WindowEvent


def scalars_of(event: WindowEvent | UpdateEvent | Notice) -> dict[str, float]:
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
