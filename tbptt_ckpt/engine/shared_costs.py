"""Costs that one rank measures for all that run the same steps: the slowest of them.

NOTE [Before a window]
Whether a window is planned from costs depends on its steps, so ranks ask each other before each
window until none has anything to measure any more. One that runs a window again does not ask again,
since the others wait for its vote then; nor does one begin anew with larger steps, later on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tbptt_ckpt.budget.growing import GrowingBudget, sizes_of
from tbptt_ckpt.budget.window_budget import Request, WindowBudget
from tbptt_ckpt.devices import device_of
from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.updates.ranks import RankGroup

P = TypeVar("P")
# What costs, and the form of steps that they are of, depend on beside the steps and their weights.
_SETTINGS = (
    *("strategy", "memory_budget", "executor", "time_batching", "compile", "autocast_dtype"),
    *("k1", "k2", "max_k2", "overlap", "deliver", "clip_grad_norm", "loss"),
)
_WIDTH, _TRIES = 256, 5  # of a product that tells how fast a device is


class SharedCosts:
    """Plans windows, where ranks share what they measure.

    Args:
        ranks: Those that train together; None where this process trains alone.
        budget: Plans the windows of this one.
        options: What the user asked for.
        weights: Of what is run.
    """

    def __init__(
        self,
        ranks: RankGroup | None,
        budget: WindowBudget,
        options: Options,
        weights: Sequence[Tensor],
    ) -> None:
        amount, self._device = options.parsed_budget(), device_of(weights)
        # Of what an allocator reserves a rank knows more than costs: what was there before.
        is_shared = options.costs is None and not (amount and amount.is_reserved)
        self._budget = budget if is_shared and isinstance(budget, GrowingBudget) else None
        self._ranks, self._votes = ranks, -1  # before the window that was asked about
        self._may_share = ranks is not None and ranks.count > 1
        given = {name: repr(getattr(options, name)) for name in _SETTINGS}
        self._settings = given, self._device.type, [(w.dtype, w.requires_grad) for w in weights]

    def plan(self, make: Callable[[], P], make_request: Callable[[], Request] | None = None) -> P:
        """What `make` returns, a plan, with the costs of the slowest rank of those that are alike.

        `make_request` tells of the window; None where it needs no plan here.

        Raises:
            RankError: A rank is gone.
        """
        ranks = self._ranks
        if not self._may_share or ranks is None or ranks.num_votes == self._votes:
            return make()
        self._votes = ranks.num_votes
        mine = self._facts(make_request)
        may = self._budget is not None and self._budget.may_measure
        told = ranks.exchange((may, mine, mine and self._seconds()))
        self._may_share = any(may and facts is None for may, facts, _ in told)
        alike = [(seconds, rank) for rank, (_, facts, seconds) in enumerate(told) if facts == mine]
        measures = mine is not None and max(alike)[1] == ranks.rank
        if not any(facts is not None for _, facts, _ in told):
            return make()
        try:
            planned = make() if measures else None
        finally:  # the others wait for it, whatever comes
            states = ranks.exchange(self._budget.measured() if self._budget and measures else None)
        if planned is not None:
            return planned
        if self._budget and mine is not None and (state := states[max(alike)[1]]):
            self._budget.take_measured(state)
        return make()

    def _facts(self, make_request: Callable[[], Request] | None) -> str | None:
        """What costs depend on, where they are to be measured now."""
        if self._budget is None or not self._budget.may_measure or make_request is None:
            return None
        request = make_request()
        sizes = sizes_of(request.blocks[0])
        if not sizes or not self._budget.plans_by_costs(request):
            return None
        return repr((sizes, request.fullest, request.runs_by_parts, self._settings))

    def _seconds(self) -> float:
        """How long a product takes here, at best."""
        matrix, taken = torch.ones(_WIDTH, _WIDTH, device=self._device), []
        for _ in range(_TRIES):
            begun = time.perf_counter()
            matrix @ matrix
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            taken.append(time.perf_counter() - begun)
        return min(taken)
