"""Which states are compared with the ones that a replay reaches.

NOTE [What to compare takes]
Some 0.3 ms on a CPU for a state of two tensors, whatever its steps take: what is called between
the large operations of two leaves is cold. So the first states are all compared, and later ones in
turns: one in so many steps that this is little, and the first of each window. The steps of a large
state take longer, so that more of these are compared. It hangs on numbers alone, never on a clock.
"""

from __future__ import annotations

from tbptt_ckpt.module.trees import Tree, tensors_of

FIRST_COMPARED = 64  # after which fewer are
# One state is compared in so many steps that are run, and each where leaves are as long: at first,
# and then of states of few and of many numbers.
STEPS_AT_FIRST, STEPS_OF_SMALL, STEPS_OF_LARGE = 8, 512, 32
LARGE = 8192  # numbers
_TURN = 37  # steps by which each window begins later in them; no factor of theirs divides it


class ComparedStates:
    """Says of each state that the windows of an engine reach first whether it is compared.

    Where windows run the same steps in the same order, a state that ends L steps is compared in L
    of `STEPS_OF_SMALL` windows, or of `STEPS_OF_LARGE`, and in each where L is as large.
    """

    def __init__(self) -> None:
        self._compared = self._windows = 0
        self._every = self._steps = 0  # one state in so many steps, and those run so far
        self._is_first, self._all = True, False

    def begin_window(self) -> None:
        """The states to come are another window's."""
        self._steps, self._windows = self._windows * _TURN, self._windows + 1
        self._is_first = True

    def compare_all(self) -> None:
        """Two runs have differed, if by rounding alone: compare as many as at first from now on."""
        self._all = True

    def takes(self, state: Tree, num_steps: int) -> bool:
        """Whether to compare a state to which so many steps have been run."""
        self._steps += num_steps
        if not self._is_first and self._steps < self._every:
            return False
        self._is_first = False
        self._compared += 1
        self._every = self._interval(state)
        self._steps %= self._every
        return True

    def _interval(self, state: Tree) -> int:
        if self._all or self._compared <= FIRST_COMPARED:
            return STEPS_AT_FIRST
        is_large = sum(tensor.numel() for tensor in tensors_of(state)) >= LARGE
        return STEPS_OF_LARGE if is_large else STEPS_OF_SMALL
