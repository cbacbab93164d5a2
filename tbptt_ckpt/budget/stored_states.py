"""What costs are where the states that a window keeps lie elsewhere, or in fewer bits."""

from __future__ import annotations

from dataclasses import replace

import torch

from tbptt_ckpt.executor.storage import Storage
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import Curve

_RECORD_BYTES = 256  # of Python's objects that know where a state is


def with_stored_states(
    storage: Storage, costs: Costs, device: torch.device, saved_bytes: int = 0
) -> Costs:
    """The costs with a device's kept states as they are stored, `saved_bytes` smaller in few bits.

    The time of a file, or of copies to the host, is measured now. What is kept with a state, such
    as generators, stays in memory. Costs that say so already, as those of a snapshot do, stay as
    they are: plans of a resumed run are the same.
    """
    if storage.is_plain(device) or costs.kept_bytes is not None:
        return costs
    state_bytes, place = costs.state_bytes - costs.ambient_bytes, storage.place_for(device)
    stored_bytes = max(0, state_bytes - saved_bytes)

    def beside_a_state(curve: Curve) -> Curve:
        return curve.raised_by(state_bytes)

    found = costs.with_leaves(beside_a_state, beside_a_state)
    quiet = found.quiet
    found = replace(
        found,
        advance_bytes=beside_a_state(found.advance_bytes),
        quiet=quiet and replace(quiet, advance=beside_a_state(quiet.advance)),
        kept_bytes=costs.ambient_bytes + stored_bytes,
    )
    if place is None:
        return found
    seconds = place.seconds(stored_bytes, device)
    return replace(
        found,
        leaf_seconds=found.leaf_seconds.raised_by(seconds),
        store_seconds=seconds,
        kept_bytes=costs.ambient_bytes,
        host_state_bytes=_RECORD_BYTES + (stored_bytes if place.is_memory else 0),
    )
