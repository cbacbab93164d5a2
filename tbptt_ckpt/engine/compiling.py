"""Who runs a window, and how: its plan, and what it needs compiled, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from tbptt_ckpt.budget.window_budget import PlannedWindow, Request
from tbptt_ckpt.data.window_reader import WindowReader
from tbptt_ckpt.engine.open_window import OpenWindow
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.executor.block_forms import Wanted


def plan_opened(
    parts: Parts,
    opened: OpenWindow,
    reader: WindowReader,
    held: Callable[[], tuple[object, ...]],
    waiting: Sequence[Tensor],
    *,
    copies_weights: bool,
) -> PlannedWindow | None:
    """The plan of a window; what it may run by is compiled before it is measured.

    None without a loss.
    `held` gives what is live between windows, `waiting` what has hooks that see nothing of it;
    `copies_weights` if the update copies what it changes.
    """
    compiled = parts.runner.compiled
    if not opened.has_loss():
        return parts.shared_costs.plan(lambda: None)

    def make_request() -> Request:
        request = opened.request(reader, held(), copies_weights)
        ahead = partial(_look, parts, opened, waiting, None)
        return replace(request, compile_ahead=ahead if compiled.may_be_taken() else None)

    def make() -> PlannedWindow:
        return parts.budget.plan(opened.draw.window, opened.joints(), make_request)

    return parts.shared_costs.plan(make, make_request)


def compile_planned(
    parts: Parts, opened: OpenWindow, planned: PlannedWindow | None, waiting: Sequence[Tensor]
) -> None:
    """Compile what a window with a plan runs by, and let it: unless forms were weighed."""
    is_decided = parts.budget.has_measured and not parts.runner.time_batching.is_compiled
    if planned is None or is_decided or not parts.runner.compiled.may_be_taken():
        return
    if _look(parts, opened, waiting, planned.plan.longest_leaf):
        parts.runner.time_batching.decide("compiled")


def _look(
    parts: Parts,
    opened: OpenWindow,
    waiting: Sequence[Tensor],
    longest_leaf: int | None,
    room_bytes: float = float("inf"),
) -> bool | None:
    runner, window = parts.runner, opened.draw.window
    blocks, state, num_steps = opened.begins_with()
    if runner.compiled.may_be_taken():
        runner.parts.look(blocks, window.first, state, ahead=True)
        if runner.parts.have_cell and runner.time_batching.takes_parts():
            runner.compiled.leave("one of torch's cells, which runs all steps at once, is faster")
    differentiated = window.stop - window.start
    weighs = parts.loss_function.weighs_itself
    # Before there is a plan nobody knows whether it recomputes.
    recomputes = longest_leaf is None or longest_leaf < differentiated
    wanted = Wanted(
        leaf_steps=longest_leaf or differentiated,
        advances=recomputes and not (parts.executor.one_graph or weighs),
        weighs=window.first < window.start or (recomputes and weighs),
        run_steps=(num_steps or window.stop) // window.num_new_steps * differentiated,
        room_bytes=room_bytes,
    )
    with parts.updater.deliveries.of(waiting):
        return runner.compiled.look(blocks, window.first, state, wanted)
