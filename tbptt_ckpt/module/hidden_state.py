"""Which of what a module keeps on itself is its state, found by running a few steps.

NOTE [What is read]
A step reads what was left in a place if an operation has it among its arguments, if it is
returned, or if it moves to another place. That is seen of tensors, as memory, so that no value
hides it: a spike that is not fired now may be fired for another input. What Python reads of a
number is not seen. A number that changes is therefore refused, whether it matters or not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.module.inside import name_of
from tbptt_ckpt.module.places import ABSENT, Held, Place, record
from tbptt_ckpt.module.trees import Tree, is_differentiable, map_tensors, tensors_of

_NUM_STEPS = 4  # a value that waits for a step before it is read is seen as well
_NOTHING = Held(ABSENT)


@dataclass(frozen=True, slots=True)
class HiddenState:
    """What was found.

    Attributes:
        state: Places whose tensors pass from step to step with their gradient.
        written: Those of them that a step writes into.
        scratch: Places that a step writes and no step reads, with a graph perhaps.
        flags: Places that a first step sets from one truth value to another.
    """

    state: list[Place] = field(default_factory=list)
    written: set[Place] = field(default_factory=set)
    scratch: list[Place] = field(default_factory=list)
    flags: dict[Place, bool] = field(default_factory=dict)

    @property
    def places(self) -> list[Place]:
        """All that a call fills, and puts back."""
        return [*self.state, *self.scratch, *self.flags]


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The memory of all tensors that operations are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be left out of it takes seconds: all of the compiler is imported

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = arg_tree_leaves(*args, **(kwargs or {}))
        self.memory |= {_memory_of(each) for each in given if isinstance(each, Tensor)}
        return func(*args, **(kwargs or {}))


def _memory_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def with_gradient(inputs: Tree) -> Tree:
    """Copies of inputs through which a gradient passes: a state may depend on them alone."""

    def copied(tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        return (detached.requires_grad_() if is_differentiable(tensor) else detached).clone()

    return map_tensors(copied, inputs)


def find_hidden_state(module: nn.Module, inputs: Tree, leave: Collection[str]) -> HiddenState:
    """Run a few steps, and tell what is left in the module apart.

    Raises:
        ArgumentError: Something changes that is no state, or there is none.
    """
    records, reads = _run(module, inputs)
    places = dict.fromkeys(place for each in records for place in each)
    weights = {_memory_of(weight) for weight in module.parameters()}
    found = HiddenState()
    for place in [place for place in places if str(place) not in leave]:
        held = [each.get(place, _NOTHING) for each in records]
        if all(map(Held.is_same, held, held[1:])):
            continue
        is_read = _is_read(place, records, reads, weights)
        if any(t.requires_grad for each in held for t in each.tensors):
            (found.state if is_read else found.scratch).append(place)
            if any(map(Held.is_rewritten_in, held, held[1:])):
                found.written.add(place)
        elif place.is_buffer:
            continue  # windows put buffers back
        elif any(each.tensors for each in held) and not is_read:
            found.scratch.append(place)
        elif all(map(Held.is_same, held[1:], held[2:])) and isinstance(held[1].value, bool):
            found.flags[place] = held[1].value
        else:
            raise _no_state(module, place, held[-1].value)
    if not found.state:
        raise ArgumentError(
            f"module={name_of(module)} keeps no state from step to step; for a module without "
            "one write lambda input, state: (module(input), state)"
        )
    return found


def _run(module: nn.Module, inputs: Tree) -> tuple[list[dict[Place, Held]], list[set[int]]]:
    """What all places hold before and after each step, and the memory that the step reads."""
    records, reads = [record(module)], [set[int]()]
    for _ in range(_NUM_STEPS):
        with _Reads() as read:
            outputs = module(with_gradient(inputs))
        records.append(record(module))
        reads.append(read.memory | {_memory_of(tensor) for tensor in tensors_of(outputs)})
    return records, reads


def _is_read(
    place: Place, records: list[dict[Place, Held]], reads: list[set[int]], weights: set[int]
) -> bool:
    """Whether some step reads what the one before it has left there."""
    for step in range(2, len(records)):
        before, after = records[step - 1], records[step]
        memory = {_memory_of(t) for t in before.get(place, _NOTHING).tensors} - weights
        if memory & reads[step]:
            return True
        for other, held in after.items():
            known = {id(tensor) for tensor in before.get(other, _NOTHING).tensors}
            moved = (_memory_of(t) for t in held.tensors if id(t) not in known)
            if other != place and not memory.isdisjoint(moved):
                return True
    return False


def _no_state(module: nn.Module, place: Place, value: object) -> ArgumentError:
    return ArgumentError(
        f"module={name_of(module)}: {place} ({type(value).__name__}) changes from step to step, "
        "and no gradient passes through it, so that it is no state: a step that runs again would "
        "find what a later one has left. Make it a buffer, which is put back, or give "
        f"leave=[{str(place)!r}] if no result depends on it"
    )
