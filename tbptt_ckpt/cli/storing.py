"""The option that says where the states of a window are kept, of several commands."""

from __future__ import annotations

from typing import Annotated

from tbptt_ckpt.cli.options import Default
from tbptt_ckpt.errors import ArgumentError

Offload = Annotated[
    str | None,
    "Where the states that a window keeps lie: host (pinned memory), or a folder on a disk.",
    Default("in memory"),
]


def check_offload(offload: str | None, executor: str) -> None:
    """Refuse a place for states that the executor does not keep by itself."""
    if offload is not None and executor != "replay":
        raise ArgumentError(
            f"--offload {offload} needs --executor replay: {executor} keeps what its graph holds"
        )
