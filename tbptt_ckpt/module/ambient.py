"""What a step reads and changes besides its arguments: random generators and buffers.

Both belong to a boundary state: a step that runs again must draw the numbers it drew when
it was new and find the buffers it found then.

NOTE [Whose numbers]
Python's and numpy's global generators move between windows, as data is read and shuffled, for
modules too that never draw from them. That is kept with the states, but cuts no segment of a later
window until a run of the module has moved them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tbptt_ckpt.devices import accelerators, check_not_captured, default_generators
from tbptt_ckpt.errors import ArgumentError, SnapshotError, TbpttError
from tbptt_ckpt.module.buffers import BufferCensus, BufferValue, find_buffers
from tbptt_ckpt.module.generators import GLOBAL_PLACES, GeneratorState, generator_places
from tbptt_ckpt.module.inside import owner_of
from tbptt_ckpt.module.trees import bytes_of, checksum


@dataclass(frozen=True, slots=True, eq=False)
class AmbientState:
    """Generators and buffers at one step; what did not change is shared with other states."""

    cpu_random: Tensor
    device_random: tuple[Tensor, ...]
    buffers: tuple[BufferValue, ...]
    generators: tuple[GeneratorState, ...]  # Python's and numpy's global ones first
    drawn: tuple[bool, ...]  # from which of these a run has, up to here

    def digest(self) -> int:
        """A number that tells where the generators stand."""
        own = (state.digest for state in self.generators)
        return hash((*map(checksum, (self.cpu_random, *self.device_random)), *own))


class Ambient:
    """Captures and restores generators and buffers.

    The generators are torch's on the CPU and on the tensors' devices, Python's and numpy's global
    ones, and those that the modules hold.
    """

    def __init__(self, modules: Iterable[object], tensors: Iterable[Tensor]) -> None:
        roots = list(modules)
        self._buffers, self._census = find_buffers(roots), BufferCensus(roots)
        self._places = [*GLOBAL_PLACES, *generator_places(roots)]
        self._drawn = (False,) * len(self._places)  # from which of them a run has
        tensors = list(tensors)
        self._devices = accelerators(tensors)
        self._device_generators = default_generators(tensors)
        self._last: AmbientState | None = None

    def about_to_run(self) -> None:
        """Steps run from here on."""
        for buffer in self._buffers:
            buffer.about_to_run()

    def found(self) -> AmbientState:
        """The present state between windows, where others have drawn, or run the module."""
        for device in self._devices:
            check_not_captured(device)
        self.about_to_run()
        return self.capture(is_run=False)

    def capture(self, state: Sequence[Tensor] = (), *, is_run: bool = True) -> AmbientState:
        """The state after a run; the very object returned before where nothing has changed.

        Of `state`, the tensors that the module has just returned, a buffer may be a shadow.
        """
        cpu_random = torch.get_rng_state()
        device_random = tuple([each.get_state() for each in self._device_generators])
        buffers = tuple([buffer.capture(state) for buffer in self._buffers])
        generators = tuple([place.capture() for place in self._places])
        last = self._last
        if last is not None:
            if bytes_of(cpu_random) == bytes_of(last.cpu_random):
                cpu_random = last.cpu_random
            if device_random:
                device_random = tuple(map(_shared, device_random, last.device_random))
            if is_run and last.generators and generators != last.generators:
                pairs = zip(generators, last.generators, self._drawn, strict=False)
                self._drawn = tuple([new is not old or known for new, old, known in pairs])
            is_same = (  # tuples are of objects that equal themselves alone
                cpu_random is last.cpu_random
                and buffers == last.buffers
                and generators == last.generators
                and all(map(operator.is_, device_random, last.device_random))
            )
            if is_same:
                return last
        self._last = AmbientState(cpu_random, device_random, buffers, generators, self._drawn)
        return self._last

    def digest(self) -> int:
        """A number that tells where the generators stand now."""
        devices = [each.get_state() for each in self._device_generators]
        own = [place.capture().digest for place in self._places]
        return hash((*map(checksum, (torch.get_rng_state(), *devices)), *own))

    def changes(self, ambients: Mapping[int, AmbientState]) -> list[int]:
        """Steps, in order, that must find something else than the step before them."""
        found, last = [], None
        for step, ambient in ambients.items():
            if last is None or (ambient is not last and self._differ(ambient, last)):
                found.append(step)
            last = ambient
        return found

    def _differ(self, ambient: AmbientState, other: AmbientState) -> bool:
        parts, known = (
            (
                each.cpu_random,
                *each.device_random,
                *each.buffers,
                *(g for g, is_drawn in zip(each.generators, self._drawn, strict=False) if is_drawn),
            )
            for each in (ambient, other)
        )
        return any(new is not old for new, old in zip(parts, known, strict=False))

    def restore(self, state: AmbientState) -> None:
        """Put generators and buffers back to `state`."""
        torch.set_rng_state(state.cpu_random)
        for each, value in zip(self._device_generators, state.device_random, strict=False):
            if not torch.equal(each.get_state(), value):  # where it is set, cuDNN's dropout
                each.set_state(value)  # begins anew
        for place, generator in zip(self._places, state.generators, strict=False):
            place.restore(generator)
        self._restore_buffers(state)

    def check_fits(self, states: Iterable[AmbientState]) -> None:
        """Raise unless states from another process can be put back; all stays as it is.

        Raises:
            ArgumentError: There are other buffers or generators than here.
            SnapshotError: A buffer or a generator cannot be set to what one of them holds.
        """
        here = [place.capture() for place in self._places]
        tried: dict[int, tuple[torch.Generator, Tensor]] = {}
        try:
            for state in states:
                self._check_counts(state)
                for buffer, value in zip(self._buffers, state.buffers, strict=True):
                    buffer.check_fits(value)
                cpu = torch.Generator("cpu")
                tried |= {id(state.cpu_random): (cpu, state.cpu_random)}
                pairs = zip(self._device_generators, state.device_random, strict=False)
                tried |= {id(v): (torch.Generator(each.device), v) for each, v in pairs}
                for place, generator in zip(self._places, state.generators, strict=False):
                    place.restore(generator)
            for scratch, random in tried.values():
                scratch.set_state(random)
        except TbpttError:
            raise
        except Exception as error:  # any value can have been signed
            raise SnapshotError(
                "random generators cannot be put back to where it says that they stood at a step: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for place, generator in zip(self._places, here, strict=True):
                place.restore(generator)

    def _check_counts(self, state: AmbientState) -> None:
        if len(state.buffers) != len(self._buffers):
            raise ArgumentError(
                f"the module has {len(self._buffers)} buffers, the saved one had "
                f"{len(state.buffers)}; a saved run goes on with a module of the same buffers"
            )
        if state.generators and len(state.generators) != len(self._places):
            raise ArgumentError(
                f"the module holds {len(self._places) - len(GLOBAL_PLACES)} random generators, the "
                f"saved one held {len(state.generators) - len(GLOBAL_PLACES)}; a saved run goes on "
                "with a module of the same generators"
            )

    def adopt(self, state: AmbientState) -> None:
        """Put buffers back to `state`, and take the generators to be there already.

        They may since have been used to read the first steps, and then count as changed.
        """
        for place, generator in zip(self._places, state.generators, strict=False):
            place.adopt(generator)
        self._drawn = state.drawn or self._drawn  # older snapshots have none of both
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
    used = [*(p for module in modules for p in module.parameters()), *tensors]
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
