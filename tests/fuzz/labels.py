"""What decides a label beforehand: whether steps run again, and how a window is cut."""

from __future__ import annotations

from .case import Case


def leaf_steps(case: Case) -> int:
    """Steps of the longest leaf that a strategy allows; for labels from these strategies only."""
    strategy = case.options["strategy"]
    if strategy == "retain":
        return case.num_steps
    return 1 if strategy == "step" else int(strategy.partition(":")[2])


PLAIN_STRATEGIES = ("retain", "step", "uniform:2", "uniform:3")  # whose leaves are known


def overlaps(case: Case) -> bool:
    """Whether a window runs steps that were new in another one."""
    return any(start < new for start, new, _ in case.windows())


def is_cut(case: Case) -> bool:
    """Whether a window has more than one leaf, so that steps run again within it."""
    length = leaf_steps(case)
    return any(stop - max(start, 0) > length for start, _, stop in case.windows())


def runs_again(case: Case) -> bool:
    """Whether any step runs more than once."""
    return overlaps(case) or is_cut(case)
