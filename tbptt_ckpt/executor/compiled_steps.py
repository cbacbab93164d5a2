"""Steps of a module, run by blocks of a fixed length that are compiled.

NOTE [What is compiled, and when]
A block is a function of the inputs of so many steps and of a state. It is compiled at the begin of
a window, never within one: a checkpoint may be recording what runs, and no window's seconds or
bytes are those of a compiler. It is compiled for steps with a graph, and for those without, whose
outputs nobody wants unless losses weigh themselves. Attributes and globals that a step reads are
what they were then: torch looks at them before each call. Where they are not, steps run one by one
until the next window.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from tbptt_ckpt.data.blocks import Column, StepBlock, narrow_blocks
from tbptt_ckpt.data.packing import join_blocks
from tbptt_ckpt.errors import ArgumentError, TbpttWarning, shown
from tbptt_ckpt.executor.block_forms import LEAF, NAMES, Kind, Made, Wanted
from tbptt_ckpt.executor.compilable import LeftError, check_module, check_room, check_step
from tbptt_ckpt.executor.held_blocks import (
    BlockDiffersError,
    NotFiniteError,
    hold_block,
)
from tbptt_ckpt.executor.step_blocks import (
    block_function,
    first_line,
    is_watched,
    key_of,
    run_block,
)
from tbptt_ckpt.module.ambient import Ambient, untouched
from tbptt_ckpt.module.attributes import Attributes
from tbptt_ckpt.module.inside import name_of
from tbptt_ckpt.module.outputs import OutputsNeeded
from tbptt_ckpt.module.recurrence import Recurrence
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of
from tbptt_ckpt.time_batching.compiler import CompileChoice, Compiler, has_compiler
from tbptt_ckpt.time_batching.policy import TimeBatching

_log = logging.getLogger("tbptt_ckpt")

# Longer blocks have less to do between them, and take longer to compile.
BLOCK_STEPS = 16
_MOST_SHAPES = 4  # of inputs and states that are compiled for; others run step by step
_MOST_TIMES = 3  # that a block is compiled for one shape, as what it reads changes
# "auto": steps of all windows of a sequence from which on compiling earns back its time; and most
# products of a step, beyond which it saves too little.
_EARNED_STEPS = 150_000
_MOST_PRODUCTS = 4_000_000


class CompiledSteps:
    """Compiled blocks of a module's steps, or none.

    Args:
        recurrence: A module of one step.
        choice: See `TBPTT`.
        batching: Takes note of what is compiled, and what is not and why.
        in_half: Whether steps run under autocast.

    Attributes:
        is_there: Whether leaves of the window that was looked at last can be run by blocks.

    Raises:
        ArgumentError: A module of segments that is to be compiled whatever the run.
    """

    def __init__(
        self,
        recurrence: Recurrence,
        choice: CompileChoice,
        batching: TimeBatching,
        *,
        in_half: bool = False,
    ) -> None:
        if choice not in (False, "auto") and not recurrence.per_step:
            raise ArgumentError(
                f"compile={shown(choice)} is for modules of one step, and module="
                f"{name_of(recurrence.module)} takes segments; give it compiled, as "
                "torch.compile(module, dynamic=False)"
            )
        self._in_half = in_half
        self._recurrence, self._batching, self._choice = recurrence, batching, choice
        self._compiler = None if choice is False else Compiler(True if choice == "auto" else choice)
        self._is_left = self._compiler is None or not recurrence.per_step
        self._made: dict[object, Made] = {}
        self._seconds, self.is_there = 0.0, False

    def may_be_taken(self) -> bool:
        """Whether steps are run by blocks, or may be."""
        return not self._is_left

    @property
    def is_asked(self) -> bool:
        """Whether blocks are to be taken whatever the run."""
        return self._choice not in (False, "auto")

    @property
    def block_steps(self) -> int:
        """Steps that run as one; 1 where they run one by one."""
        return BLOCK_STEPS if self.are_in_force() else 1

    def are_in_force(self) -> bool:
        """Whether steps are run by blocks, as far as there are such."""
        return self._batching.is_compiled and any(made.kinds for made in self._made.values())

    def take_seconds(self) -> float:
        """What compiling took since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def look(
        self, blocks: Sequence[StepBlock], begin: int, state: Tree, wanted: Wanted
    ) -> bool | None:
        """A window begins: compile what it wants, unless it is there.

        Args:
            blocks: The window's steps.
            begin: The first that is run.
            state: The state there.
            wanted: How it runs steps.

        Returns:
            Whether its leaves can be run by blocks; None where they are too short for one.
        """
        self.is_there = False
        if self._is_left or wanted.leaf_steps < BLOCK_STEPS:
            return False if self._is_left else None
        try:
            if self._choice != "auto" or self._batching.is_compiled or self._pays(blocks, wanted):
                self.is_there = self._compile(blocks, begin, state, wanted)
        except LeftError as error:
            self.leave(str(error))
        return self.is_there

    def run(
        self,
        blocks: Sequence[StepBlock],
        state: Tree,
        first_wanted: int,
        give: Callable[[Tree, StepBlock], None],
    ) -> tuple[int, Tree]:
        """Run the first of these steps, as many as blocks of them have; where they end, the state.

        `give` takes the outputs, with time first, from the step `first_wanted` on.
        """
        step, stop = blocks[0].start, blocks[-1].stop
        if stop - step < BLOCK_STEPS or any(isinstance(b.inputs, Column) for b in blocks):
            return step, state
        whole = join_blocks(blocks).with_time_first()
        while stop - step >= BLOCK_STEPS:
            part = whole.part(step, step + BLOCK_STEPS)
            found = self._run_one(part.inputs, state, wants=first_wanted < part.stop)
            if found is None:
                break
            outputs, state = found
            if first_wanted < part.stop:
                first = max(first_wanted, step)
                give(_from(first - step, outputs), part.part(first, part.stop))
            step = part.stop
        return step, state

    def _run_one(self, inputs: Tree, state: Tree, *, wants: bool) -> tuple[Tree, Tree] | None:
        """Outputs of one block and the state after it; None where it is not compiled for these."""
        kind = LEAF if torch.is_grad_enabled() else (False, wants)
        made = self._made.get(key_of(inputs, state))
        call = None if made is None else made.find(kind)
        if made is None or call is None or is_watched():
            return None
        try:
            found = run_block(call, inputs, state, graph=kind[0])
        except torch._dynamo.exc.TorchDynamoException:  # what it reads is not what it was
            made.kinds.clear()
            return None
        self._batching.made(NAMES[kind[0]])
        return found

    def _pays(self, blocks: Sequence[StepBlock], wanted: Wanted) -> bool:
        weights = self._recurrence.parameters
        products = max((w.numel() for w in weights), default=0) * blocks[0].num_lanes()
        if products > _MOST_PRODUCTS:
            raise LeftError("its products are so large that compiling saves little")
        if weights and not has_compiler(weights[0].device):
            raise LeftError("there is no compiler")
        return wanted.run_steps >= _EARNED_STEPS

    def _compile(
        self, blocks: Sequence[StepBlock], begin: int, state: Tree, wanted: Wanted
    ) -> bool:
        """Whether a leaf has its block, in the end."""
        if self._in_half:
            raise LeftError("autocast is on")
        module = check_module(self._recurrence.module)
        few = list(narrow_blocks(blocks, begin, min(begin + BLOCK_STEPS, blocks[-1].stop)))
        if any(isinstance(block.inputs, Column) for block in few):
            raise LeftError("the inputs of its steps are not tensors of one shape")
        block = join_blocks(few).with_time_first()
        if block.stop - block.start < BLOCK_STEPS or is_watched():
            return False
        tensors = tensors_of((block.inputs, state))
        if tensors_of(state) and not self._missing(key_of(block.inputs, state), wanted):
            return self._has_leaf(key_of(block.inputs, state))
        ambient = Ambient([module], [*self._recurrence.parameters, *tensors])
        attributes = Attributes(module)
        with (
            self._timed(),
            torch.enable_grad(),
            untouched(module, tensors=tensors, ambient=ambient),
            OutputsNeeded(True),
        ):
            try:
                state = check_step(self._recurrence, block.inputs, state, ambient, attributes)
            except LeftError:
                raise
            except Exception:  # the window itself says better what is wrong
                return False
            finally:
                attributes.put_back()
            try:
                key = key_of(block.inputs, state)
                if missing := self._missing(key, wanted):
                    check_room(
                        self._recurrence, block.inputs, state, BLOCK_STEPS, wanted.room_bytes
                    )
                for kind in missing:
                    self._make(key, kind, module, block.inputs, state)
            finally:
                attributes.put_back()
        return self._has_leaf(key)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - begun

    def _has_leaf(self, key: object) -> bool:
        return key in self._made and LEAF in self._made[key].kinds

    def _missing(self, key: object, wanted: Wanted) -> list[Kind]:
        """What a window of some shape is to have and has not."""
        made = self._made.get(key, Made())
        missing = [kind for kind in wanted.kinds() if kind not in made.kinds]
        if not missing or (key not in self._made and len(self._made) == _MOST_SHAPES):
            return []
        if LEAF in missing and made.times == _MOST_TIMES:
            raise LeftError("what its steps read beside inputs and states keeps changing")
        return missing

    def _make(self, key: object, kind: Kind, module: nn.Module, inputs: Tree, state: Tree) -> None:
        assert self._compiler is not None
        begun, (graph, wants) = time.perf_counter(), kind
        block = block_function(self._recurrence.call, wants=wants)
        made = self._compiler.compiled(block)
        plain, compiled = (partial(run_block, each, graph=graph) for each in (block, made))
        what = f"{BLOCK_STEPS} steps {'with' if graph else 'without'} a graph"
        _log.info("compiling %s of %s (%s)", what, name_of(module), self._compiler.backend)
        weights = [w for w in self._recurrence.parameters if w.requires_grad]
        try:
            with torch.set_grad_enabled(graph), self._compiler.open():
                hold_block(plain, compiled, inputs, state, weights)
        except NotFiniteError:
            return  # another window may have numbers
        except BlockDiffersError as error:
            raise LeftError(f"compiled by {self._compiler.backend} {error}") from None
        except Exception as error:  # of a compiler, or of a step that cannot be compiled
            raise LeftError(f"it cannot be compiled: {first_line(error)}") from error
        self._made.setdefault(key, Made()).add(kind, made)
        seconds = time.perf_counter() - begun
        _log.info("compiled %s of %s in %.1f s", what, name_of(module), seconds)

    def leave(self, reason: str) -> None:
        """Run no steps by blocks from here on, and say why."""
        if self._is_left:
            return
        self._is_left = True
        self._made.clear()
        self._batching.do_not_compile()
        self._batching.leave("compiled steps", reason)
        told = f"module={name_of(self._recurrence.module)} runs uncompiled: {reason}"
        if self._choice == "auto":
            _log.info(told)
        else:
            warnings.warn(told, TbpttWarning, stacklevel=2)


def _from(first: int, outputs: Tree) -> Tree:
    return map_tensors(lambda t: t[first:], outputs) if first else outputs
