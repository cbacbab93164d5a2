"""What a resumed run must have in common with the one that was saved, and how its plan goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.trainer.progress import Progress


def fixed_settings(options: Options) -> dict[str, Any]:
    """What fixes the gradient, and so must be the same."""
    names = ("k1", "k2", "loss", "reduction", "overlap", "accumulate")
    return {name: getattr(options, name) for name in names}


def check_same(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` unless this run and the saved one have the same values."""
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise ArgumentError(
                f"{name}={here.get(name)!r} differs from the {there.get(name)!r} of the run that "
                "was saved; resume with the same"
            )


def check_can_go_on(
    progress: Progress, steps: int, max_steps: int | None, options: Options
) -> None:
    """Raise where a run ended in a window that was cut short, and more steps are asked for."""
    if progress.cut_at == steps and (max_steps is None or max_steps > steps):
        raise ArgumentError(
            f"max_steps={max_steps} goes on from a run that max_steps={steps} cut between two "
            f"update points of k1={options.k1}; go on from an earlier snapshot (remove the last), "
            "and choose multiples of k1 where runs are to go on"
        )


def plan_state(parts: Parts, asked: str) -> dict[str, Any]:
    """How windows are planned, as plain data."""
    return {
        "asked": asked,
        "used": str(parts.budget.strategy),
        "measured": parts.budget.state_dict(),
        "time_batching": parts.runner.time_batching.choice,
    }


def resume_plan(parts: Parts, asked: str, plan: Mapping[str, Any]) -> list[str]:
    """Go on with a saved plan, unless another was asked for; what is to be told of it."""
    messages, choice = [], parts.runner.time_batching.choice
    if plan["time_batching"] != choice:
        messages.append(
            f"time_batching={choice!r} replaces {plan['time_batching']!r}; from here on the run "
            "equals the other to rounding"
        )
    if plan["asked"] == asked:
        parts.budget.load_state_dict(plan["measured"], plan["used"])
    else:
        messages.append(
            f"strategy {asked} replaces {plan['used']}; from here on the run equals the other to "
            "rounding"
        )
    return messages
