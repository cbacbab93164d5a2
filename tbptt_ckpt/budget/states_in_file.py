"""What costs are where the states that a window keeps lie in a file."""

from __future__ import annotations

from dataclasses import replace

from tbptt_ckpt.executor.kept_states import Folder
from tbptt_ckpt.schedule.costs import Costs
from tbptt_ckpt.schedule.curves import Curve

_RECORD_BYTES = 256  # of Python's objects that know where a state is


def with_states_in(folder: Folder, costs: Costs) -> Costs:
    """The costs with kept states in a file of the folder, whose time is measured now.

    What is kept with a state, such as generators, stays in memory. Those that say so already, as
    the ones of a snapshot do, stay as they are: plans of a resumed run are the same.
    """
    if costs.kept_bytes is not None:
        return costs
    state_bytes = costs.state_bytes - costs.ambient_bytes

    def beside_a_state(curve: Curve) -> Curve:
        return curve.raised_by(state_bytes)

    found = costs.with_leaves(beside_a_state, beside_a_state)
    quiet = found.quiet
    return replace(
        found,
        advance_bytes=beside_a_state(found.advance_bytes),
        leaf_seconds=found.leaf_seconds.raised_by(folder.seconds(state_bytes)),
        quiet=quiet and replace(quiet, advance=beside_a_state(quiet.advance)),
        kept_bytes=costs.ambient_bytes,
        host_state_bytes=_RECORD_BYTES,
    )
