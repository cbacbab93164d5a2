"""One planner in one process: plans, lists all actions, prints one line of JSON.

python -m benchmarks.peers.planner_process ours-optimal --steps 1000000 --states 20
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator

# Each yields, for every action, the module steps that it runs forward.
Planner = Callable[[int, int], Iterator[int]]


def checkpoint_schedules_planner(name: str) -> Planner:
    """A planner of checkpoint_schedules, its states all in memory."""

    def forward_steps(num_steps: int, num_states: int) -> Iterator[int]:
        import checkpoint_schedules as theirs

        warnings.filterwarnings("ignore", message="Numba not available")
        if name == "MixedCheckpointSchedule":
            schedule = theirs.MixedCheckpointSchedule(
                num_steps, num_states, storage=theirs.StorageType.RAM
            )
        elif name == "MultistageCheckpointSchedule":
            schedule = theirs.MultistageCheckpointSchedule(num_steps, num_states, 0)
        else:
            schedule = theirs.Revolve(num_steps, num_states)
        for action in schedule:
            yield action.n1 - action.n0 if isinstance(action, theirs.Forward) else 0
            if isinstance(action, theirs.EndReverse):
                return

    return forward_steps


def our_planner(strategy: str) -> Planner:
    """`tbptt_ckpt.plan`, with a state and a step of a leaf taking one slot each.

    Their slots hold the window's first state; the state and the step that the current leaf
    works on come on top. The package's budget counts those two and not the window's first
    state, which makes one more for the same memory.
    """

    def forward_steps(num_steps: int, num_states: int) -> Iterator[int]:
        from tbptt_ckpt import Costs, plan
        from tbptt_ckpt.schedule.actions import Advance, Differentiate

        costs = Costs.linear(state_bytes=1, step_bytes=1, backward_ratio=0)
        if strategy == "optimal":
            planned = plan(num_steps, costs, budget_bytes=num_states + 1)
        else:
            planned = plan(num_steps, costs, strategy=f"{strategy}:{num_states}")
        for action in planned.schedule:
            runs = isinstance(action, Advance | Differentiate)
            yield action.stop - action.start if runs else 0

    return forward_steps


PLANNERS: dict[str, tuple[str, Planner]] = {
    "cs-revolve": (
        "checkpoint_schedules Revolve",
        checkpoint_schedules_planner("Revolve"),
    ),
    "cs-multistage": (
        "checkpoint_schedules Multistage",
        checkpoint_schedules_planner("MultistageCheckpointSchedule"),
    ),
    "ours-revolve": ("ours, revolve", our_planner("revolve")),
    "cs-mixed": (
        "checkpoint_schedules Mixed",
        checkpoint_schedules_planner("MixedCheckpointSchedule"),
    ),
    "ours-optimal": ("ours, optimal", our_planner("optimal")),
}


def measure(planner: Planner, num_steps: int, num_states: int) -> dict[str, float]:
    """Seconds until the first action and until the last, and how many steps they run."""
    begun = time.perf_counter()
    actions = planner(num_steps, num_states)
    executed = next(actions)
    first_seconds = time.perf_counter() - begun
    count = 1
    for steps in actions:
        executed += int(steps)  # numpy's integers too
        count += 1
    return {
        "executed_steps": int(executed),
        "actions": count,
        "first_action_seconds": first_seconds,
        "all_actions_seconds": time.perf_counter() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("planner", choices=PLANNERS)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--states", type=int, required=True)
    arguments = parser.parse_args()
    _, planner = PLANNERS[arguments.planner]
    planner(3, 1).__next__()  # imports, and what a just-in-time compiler makes
    print(json.dumps(measure(planner, arguments.steps, arguments.states)))


if __name__ == "__main__":
    main()
