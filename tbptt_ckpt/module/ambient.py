"""What a step reads and changes besides its arguments: random generators and buffers.

Both belong to a boundary state: a step that runs again must draw the numbers it drew when
it was new and find the buffers it found then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.buffers import BufferCensus, BufferValue, find_buffers
from tbptt_ckpt.module.inside import owner_of
from tbptt_ckpt.module.recurrence import parameters_of
from tbptt_ckpt.module.trees import checksum


@dataclass(frozen=True, slots=True, eq=False)
class AmbientState:
    """Generators and buffers at one step; what did not change is shared with other states."""

    cpu_random: Tensor
    device_random: tuple[Tensor, ...]
    buffers: tuple[BufferValue, ...]

    def digest(self) -> int:
        """A number that tells where the generators stand."""
        return _digest(self.cpu_random, *self.device_random)


class Ambient:
    """Captures and restores the CPU's generator, those of the tensors' devices, and buffers."""

    def __init__(self, modules: Iterable[object], tensors: Iterable[Tensor]) -> None:
        roots = list(modules)
        self._buffers, self._census = find_buffers(roots), BufferCensus(roots)
        # A tensor on each accelerator, to name those whose generators count.
        found = {t.device: t for t in tensors if t.device.type not in ("cpu", "meta")}
        self._examples = list(found.values())
        self._device_ids = [tensor.get_device() for tensor in self._examples]
        self._last: AmbientState | None = None

    def about_to_run(self) -> None:
        """Steps run from here on."""
        for buffer in self._buffers:
            buffer.about_to_run()

    def capture(self, state: Sequence[Tensor] = ()) -> AmbientState:
        """The present state; the very object returned before where nothing has changed.

        Of `state`, the tensors that the module has just returned, a buffer may be a shadow.
        """
        cpu_random = torch.get_rng_state()
        device_random = tuple(get_device_states(*self._examples)[1]) if self._examples else ()
        buffers = tuple(buffer.capture(state) for buffer in self._buffers)
        last = self._last
        if last is not None:
            cpu_random = _shared(cpu_random, last.cpu_random)
            device_random = tuple(map(_shared, device_random, last.device_random))
            parts = (cpu_random, *device_random, *buffers)
            known = (last.cpu_random, *last.device_random, *last.buffers)
            if all(new is old for new, old in zip(parts, known, strict=True)):
                return last
        self._last = AmbientState(cpu_random, device_random, buffers)
        return self._last

    def digest(self) -> int:
        """A number that tells where the generators stand now."""
        devices = get_device_states(*self._examples)[1] if self._examples else ()
        return _digest(torch.get_rng_state(), *devices)

    def restore(self, state: AmbientState) -> None:
        """Put generators and buffers back to `state`."""
        torch.set_rng_state(state.cpu_random)
        if self._examples:
            kind = self._examples[0].device.type
            set_device_states(self._device_ids, list(state.device_random), device_type=kind)
        self._restore_buffers(state)

    def adopt(self, state: AmbientState) -> None:
        """Put buffers back to `state`, and take the generators to be there already.

        They may since have been used to read the first steps, and then count as changed.
        """
        if len(state.buffers) != len(self._buffers):
            raise ArgumentError(
                f"the module has {len(self._buffers)} buffers, the saved one had "
                f"{len(state.buffers)}; a saved run goes on with a module of the same buffers"
            )
        self._restore_buffers(state)

    def check_complete(self, *, searches: bool = False) -> None:
        """Raise `ArgumentError` if a module has registered a buffer since this was made.

        Nothing is known of what such a buffer held when its steps were new. With `searches`
        it is looked for everywhere, whatever the modules that are known say.
        """
        if new := self._census.new_buffers(searches=searches):
            raise ArgumentError(
                f"module buffer {new[0]!r} was registered while the module ran, so that what it "
                "held at earlier steps is not known; register it in __init__, as None if its "
                "value comes later"
            )

    def _restore_buffers(self, state: AmbientState) -> None:
        for buffer, value in zip(self._buffers, state.buffers, strict=True):
            buffer.restore(value)
        self._last = state


def _digest(*states: Tensor) -> int:
    return hash(tuple(map(checksum, states)))


def _shared(new: Tensor, old: Tensor) -> Tensor:
    return old if torch.equal(new, old) else new


@contextmanager
def in_eval_mode(*owners: object) -> Iterator[None]:
    """Modules in eval mode; everything that is `untouched` is put back, whatever happens."""
    with untouched(*owners):
        for owner in map(owner_of, owners):
            if isinstance(owner, nn.Module):
                owner.eval()
        yield


@contextmanager
def untouched(
    *owners: object, tensors: Iterable[Tensor] = (), ambient: Ambient | None = None
) -> Iterator[Callable[[], None]]:
    """Leave modes, buffers, gradients and random generators as they were, whatever happens inside.

    There are no gradients at the beginning: those that were there are neither read nor added to.
    Owners are modules or their methods, and anything else is passed over; `tensors` are others
    whose gradients, and whose devices' generators, count; `ambient` keeps buffers and
    generators, if there is one. What is yielded puts everything back at any time.
    """
    modules = [owner for owner in map(owner_of, owners) if isinstance(owner, nn.Module)]
    used = [*parameters_of(*modules), *tensors]
    ambient = Ambient(modules, used) if ambient is None else ambient
    modes = [(part, part.training) for module in modules for part in module.modules()]
    # Leaves by identity: one that is named twice has no gradient any more the second time.
    grads = [(t, t.grad) for t in {id(t): t for t in used if t.is_leaf}.values()]
    before = ambient.capture()

    def start_over() -> None:
        for part, training in modes:
            part.training = training
        for leaf, _ in grads:
            leaf.grad = None
        ambient.restore(before)
        ambient.about_to_run()

    try:
        start_over()
        yield start_over
    finally:
        try:
            start_over()
        finally:
            for leaf, grad in grads:
                leaf.grad = grad
    ambient.check_complete()
