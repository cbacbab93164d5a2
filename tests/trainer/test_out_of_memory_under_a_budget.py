"""Missing memory under a memory budget: plans shrink, and what was promised still holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from training_jobs import ROUNDING, Injected, Job, assert_equal

from tbptt_ckpt import Costs, OutOfMemoryError
from tbptt_ckpt.executor.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")

BUDGET = 64 << 10
# Given, so that plans are the same on every machine; a budget holds them against short segments.
COSTS = Costs.linear(state_bytes=64, step_bytes=400, step_seconds=1e-3)
# A strategy, and the longest leaf there is memory for.
CASES = [("optimal", 40), ("uniform:32", 20)]


def job(strategy: str, costs: Costs | None = COSTS) -> Job:
    options = {"strategy": strategy, "memory_budget": BUDGET, "measure_memory": True}
    options["costs"] = costs
    return Job(num_steps=256, k1=64, k2=128, module=cases.TanhCell, engine=options)


@pytest.fixture
def fail_above(monkeypatch: pytest.MonkeyPatch, injected: Injected) -> Callable[..., None]:
    """Have leaves of more than so many steps find no memory, from some step on."""
    run = Runner.run

    def arm(fits: int, start: int = 0) -> None:
        def run_or_fail(
            self: Runner, blocks: Any, resets: Any, begin: int, end: int, *args: Any
        ) -> Any:
            if torch.is_grad_enabled() and end - begin > fits and begin >= start:
                injected("out of memory on the device")
                raise MemoryError
            return run(self, blocks, resets, begin, end, *args)

        monkeypatch.setattr(Runner, "run", run_or_fail)

    return arm


@pytest.mark.parametrize(("strategy", "fits"), CASES)
def test_a_promised_budget_holds_after_a_retry(
    strategy: str, fits: int, fail_above: Callable[..., None]
) -> None:
    expected = job(strategy).undisturbed()
    trainer, _, listener = job(strategy).build()
    fail_above(fits, start=64)  # measuring, before, found memory
    windows = list(trainer.windows())
    assert "out_of_memory" in listener.kinds()
    assert all(window.peak_bytes <= BUDGET for window in windows)
    assert all(window.plan.longest_leaf <= fits for window in windows[1:])
    assert trainer.tbptt.parts.budget.budget_bytes == BUDGET
    messages = [n.message for n in listener.notices if n.kind == "out_of_memory"]
    assert not any("memory_budget is not looked at" in message for message in messages)
    assert_equal(job(strategy).account(trainer, listener), expected, ROUNDING)


def test_the_notice_says_where_a_budget_is_not_looked_at_any_more(
    fail_above: Callable[..., None],
) -> None:
    """There is no memory to measure what windows take."""
    trainer, _, listener = job("optimal", costs=None).build()
    fail_above(0)
    with pytest.raises(OutOfMemoryError, match="window 0, steps 0 to 64, does not fit"):
        trainer.train()
    messages = [n.message for n in listener.notices if n.kind == "out_of_memory"]
    assert "memory_budget is not looked at any more" in messages[0]


@pytest.mark.parametrize(("strategy", "fits"), CASES)
def test_a_resumed_run_keeps_the_smaller_plan(
    strategy: str, fits: int, fail_above: Callable[..., None]
) -> None:
    trainer, _, listener = job(strategy).build()
    fail_above(fits, start=64)
    windows = trainer.windows()
    first = [next(windows) for _ in range(2)]
    assert "out_of_memory" in listener.kinds()
    state = trainer.state_dict()
    resumed, _, others = job(strategy).build()
    resumed.load_state_dict(state)
    rest = list(resumed.windows())
    assert [window.index for window in (*first, *rest)] == [0, 1, 2, 3]
    assert all(window.plan.longest_leaf <= fits for window in rest)
    assert "out_of_memory" not in others.kinds()
