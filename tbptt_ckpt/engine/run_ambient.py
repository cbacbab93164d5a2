"""Generators and buffers that the steps of a run find: put back where it goes on, or is undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.engine.initial_state import InitialState
from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.module.ambient import Ambient, AmbientState
from tbptt_ckpt.module.trees import tensors_of


class RunAmbient:
    """Those of one run; on which devices they are is known with its first steps."""

    def __init__(self, parts: Parts, initial: InitialState) -> None:
        self._parts, self._initial = parts, initial
        self._ambient: Ambient | None = None
        self._found: AmbientState | None = None  # to start from, once devices are known
        self._first: AmbientState | None = None

    def of(self, blocks: Sequence[StepBlock]) -> Ambient:
        """What such steps find."""
        if self._ambient is None:
            tensors = [*self._parts.parameters, *tensors_of(self._initial.state)]
            tensors += tensors_of(blocks[0].inputs)
            self._ambient = Ambient([self._parts.recurrence.module], tensors)
            if self._found is not None:
                self._ambient.adopt(self._found)
            self._first = self._ambient.capture()
        return self._ambient

    def present(self) -> AmbientState | None:
        """As they are now; None before devices are known."""
        return self._found if self._ambient is None else self._ambient.found()

    def go_on(self, found: AmbientState | None) -> None:
        """Begin with what an earlier process has found."""
        assert self._ambient is None, "the run has not begun"
        self._found = found

    def check_complete(self) -> None:
        """The run has ended: see that nothing else has changed."""
        if self._ambient is not None:
            self._ambient.check_complete(searches=True)

    def mark(self) -> Callable[[], None]:
        """What is returned puts back what is here now."""
        marked = self.present()
        anywhere = Ambient((), ())
        random = anywhere.found() if marked is None else None

        def put_back() -> None:
            ambient = marked or self._first
            if self._ambient is not None and ambient is not None:
                self._ambient.restore(ambient)
            if random is not None:
                anywhere.restore(random)

        return put_back
