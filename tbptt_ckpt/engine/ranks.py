"""The ranks that a run trains with, from what the user asked for."""

from __future__ import annotations

from typing import Any

from tbptt_ckpt.engine.options import Options
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.module.inside import owner_of
from tbptt_ckpt.updates.checksums import named_weights
from tbptt_ckpt.updates.ranks import RankGroup


def make_ranks(
    options: Options, module: object, loss_fn: object, optimizer: Any
) -> RankGroup | None:
    """The ranks that train together; None where this process trains alone.

    Raises:
        ArgumentError: They cannot, by what they were given.
        RankError: They were not given the same.
    """
    if (ranks := options.parsed_ranks()) is None:
        return None
    if not hasattr(optimizer, "param_groups"):
        raise ArgumentError(
            f"ranks={shown(options.ranks)} needs an optimizer, before whose step gradients are "
            f"reduced, and optimizer={shown(optimizer)}"
        )
    owners = [("module", owner_of(module)), ("loss_fn", owner_of(loss_fn))]
    others = [weight for group in optimizer.param_groups for weight in group["params"]]
    reach = ("k2", "max_k2", "k2_tolerance", "k2_window_tolerance")
    names = ("k1", *reach, "loss", "overlap", "reduction", "accumulate", "clip_grad_norm")
    settings = {name: getattr(options, name) for name in names}
    weights, sums = named_weights(owners, others), options.reduction == "sum"
    return RankGroup(ranks, weights, settings, sums=sums)
