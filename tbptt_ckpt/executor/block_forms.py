"""Which compiled blocks a window wants, and which of them are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from tbptt_ckpt.executor.step_blocks import Block

Kind = tuple[bool, bool]  # with a graph; with outputs
LEAF, ADVANCE, WEIGHED = (True, True), (False, False), (False, True)
NAMES = {True: "compiled block of a leaf", False: "compiled block of an advance"}


@dataclass(slots=True)
class Made:
    """What was compiled for one shape of inputs and state."""

    kinds: dict[Kind, Block] = field(default_factory=dict)
    times: int = 0

    def add(self, kind: Kind, block: Block) -> None:
        """A kind of it has been compiled."""
        self.kinds[kind] = block
        self.times += kind == LEAF

    def find(self, kind: Kind) -> Block | None:
        """The block of a kind, or one that gives outputs, too."""
        found = self.kinds.get(kind)
        return self.kinds.get(WEIGHED) if found is None and kind == ADVANCE else found


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a window runs steps.

    Attributes:
        leaf_steps: Of its longest leaf.
        advances: Whether some are run without a graph.
        weighs: Whether the outputs of some of these are wanted too.
        run_steps: Of all windows of the sequence, as far as it is known.
        room_bytes: What holding a block against its steps may take.
    """

    leaf_steps: int
    advances: bool = False
    weighs: bool = False
    run_steps: int = 0
    room_bytes: float = float("inf")

    def kinds(self) -> list[Kind]:
        """With a graph or not, with outputs or not."""
        return [LEAF, *[ADVANCE] * self.advances, *[WEIGHED] * self.weighs]
