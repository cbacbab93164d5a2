"""What a window needs compiled, before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tbptt_ckpt.budget.window_budget import PlannedWindow
from tbptt_ckpt.engine.open_window import OpenWindow
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.executor.compiled_steps import Wanted
from tbptt_ckpt.schedule.windows import Window


def compile_window(
    parts: Parts,
    window: Window,
    opened: OpenWindow,
    planned: PlannedWindow | None,
    waiting: Sequence[Tensor],
) -> float:
    """Compile what a window runs by, unseen by hooks of what is `waiting`; the seconds it took."""
    compiled = parts.runner.compiled
    if planned is None or not compiled.may_be_taken():
        return 0.0
    blocks, state, num_steps = opened.begins_with()
    differentiated, leaf = window.stop - window.start, planned.plan.longest_leaf
    recomputes, weighs = leaf < differentiated, parts.loss_function.weighs_itself
    wanted = Wanted(
        leaf_steps=leaf,
        advances=recomputes and not (parts.executor.one_graph or weighs),
        weighs=window.first < window.start or (recomputes and weighs),
        run_steps=(num_steps or window.stop) // window.num_new_steps * differentiated,
    )
    with parts.updater.deliveries.of(waiting):
        return compiled.look(blocks, window.first, state, wanted)
