"""The explicit replay: one leaf's graph at a time, its gradients handed on by hand.

NOTE [Why not torch.utils.checkpoint]
A non-reentrant checkpoint drops what operations saved but still records the graph of every
step of the window, 12-20 KiB of host memory per step. Here a leaf is run, differentiated
and freed before the next one is built, so that host memory does not grow with the window.

NOTE [Why a kept state is copied]
A run leaves its last state in the middle of what it took and is giving back. On the CPU that
splits the heap: the next run's blocks do not fit into the pieces, it takes new ones, and a
million steps of a small `nn.LSTM` came to hold up to 209 MiB where 6 were live. A copy made when
the run's memory is free lies among other small blocks. An accelerator's allocator has small blocks
in pools of their own, and gives a block back whole: there a state is copied only where it is part
of more. What a run handed on unchanged, such as an
encoder's memory, is no part of what it took, and is kept once for all states that have it.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.arguments import AnyPath, checked
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.guard import Differentiating
from tbptt_ckpt.executor.kept_states import KeptStates
from tbptt_ckpt.executor.replay_check import ReplayCheck, WindowCheck
from tbptt_ckpt.executor.storage import Storage, place_of
from tbptt_ckpt.executor.window_pass import Route, StateGrads, WindowPass, differentiate
from tbptt_ckpt.module.hooks import SilenceableHooks
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep


class ReplayExecutor:
    """Runs a schedule action by action.

    Args:
        offload: Where the states that a window keeps lie, which are then in no budget: a folder
            on a disk, for a file without a name that is gone with its window, or "host", for the
            host's pinned memory where they are an accelerator's (a folder of that name is
            "./host"). None keeps them where steps leave them. Gradients are the same bit by bit.
        state_dtype: `torch.bfloat16` or `torch.float32`, in which wider floating tensors of these
            states are kept: leaves begin at rounded states then, and the gradient is another one.
            `verify` and profiles say how far off it is. None keeps every bit.

    Raises:
        ArgumentError: A folder in which no file can be made; another dtype.
    """

    one_graph = False

    @checked
    def __init__(
        self, offload: AnyPath | None = None, state_dtype: torch.dtype | None = None
    ) -> None:
        if state_dtype not in (None, torch.bfloat16, torch.float32):
            raise ArgumentError(
                f"state_dtype={state_dtype} must be torch.bfloat16 or torch.float32, or None: "
                "others are no floating numbers, or would overflow where float32 does not"
            )
        self._offload = offload
        self._storage = Storage(place_of("offload", offload), state_dtype)
        self._checks = ReplayCheck()

    @property
    def storage(self) -> Storage:
        """How the states of a window are kept."""
        return self._storage

    def exact(self) -> ReplayExecutor:
        """One that keeps states in the same place, and all of their bits."""
        return ReplayExecutor(self._offload)

    def run(self, window: WindowPass, route: Route, first: Boundary) -> StateGrads | None:
        """Differentiate a window; see `Executor.run`."""
        window.runner.parts.look(window.blocks, first.step, first.state)
        check = self._checks.of(window, first)
        kept = self._storage.new()
        replay = _Replay(window, first, check, kept)
        with closing(kept), SilenceableHooks():
            while (action := route.next_action()) is not None:
                window.observer.begins(action)
                if not replay.take(action, route.advance_steps):
                    return None
            window.observer.ends()
            window.completed()
            check.settle()
        return replay.state_grads

    def __repr__(self) -> str:
        return f"replay, with states{stored}" if (stored := str(self._storage)) else "replay"


def storage_of(executor: object) -> Storage:
    """How an executor, or one by its name, keeps the states of a window."""
    return executor.storage if isinstance(executor, ReplayExecutor) else Storage()


class _Replay:
    """The states and gradients at hand while a schedule is run."""

    def __init__(
        self, window: WindowPass, first: Boundary, check: WindowCheck, kept: KeptStates
    ) -> None:
        self._window, self._check, self._kept = window, check, kept
        self._given = {**window.joints, first.step: first}
        self._working: Boundary | None = first
        self._handed_on: dict[int, int] = {}  # by the last advance; holds no memory
        self.state_grads: StateGrads = []
        self._hooks: list[list[Any]] = []

    def take(self, action: Action, longest: int) -> bool:
        """Do one action; False if the window has no loss, so that nothing else is to do."""
        match action:
            case Advance(start, stop):
                origin = self._state_at(start)
                sink = self._window.sink(graph=False, looks_at=self._check.looks_at(stop))
                self._working = self._window.advance(origin, stop, longest, sink)
                self._handed_on = self._working.handed_on(origin)
                if self._is_exact(start):
                    self._check.advanced(start, self._working, longest, sink.take_seen())
            case Keep(step):
                self._working = self._kept.keep(self._state_at(step), self._handed_on)
            case Differentiate(start, stop):
                boundary, self._working = self._state_at(start), None
                return self._differentiate(boundary, stop)
            case Drop(step):
                self._kept.drop(step)
        return True

    def _state_at(self, step: int) -> Boundary:
        if self._working is not None and self._working.step == step:
            return self._working
        return self._kept.find(step) if step in self._kept else self._given[step]

    def _is_exact(self, step: int) -> bool:
        """Whether each run from a step begins at the same state, and can be compared."""
        return step in self._given or not self._kept.rounds

    def _differentiate(self, boundary: Boundary, stop: int) -> bool:
        window = self._window
        boundary.check_untouched()
        state = window.first_state(boundary)
        leaves = tensors_of(state)  # before the run: a module may write into the containers
        sink = window.sink(graph=True, looks_at=self._check.looks_at(stop))
        with Differentiating(window.guard, window.inputs, window.stop):
            state_out = window.run(boundary.step, stop, state, sink, found=boundary.ambient)
            if stop == window.stop and window.loss.is_known_empty():
                return False
            if self._is_exact(boundary.step):
                self._check.replayed(boundary.step, stop, state_out, sink.take_seen())
            window.observer.differentiates()
            states = tensors_of(state_out)
            is_fresh = boundary.step == window.start or boundary.step in window.joints
            self._move_hooks(states, [] if is_fresh else leaves)
            grads_out = self.state_grads or [None] * len(states)
            roots = window.roots([sink.losses])
            ends = zip(states, grads_out, strict=True)
            roots += [(end, grad) for end, grad in ends if grad is not None and end.requires_grad]
            differentiate(roots)
        window.loss.add(sink.losses)
        self.state_grads = [leaf.grad for leaf in leaves]
        window.observer.reaches(boundary.step, self.state_grads)
        return True

    def _move_hooks(self, states: list[Tensor], leaves: list[Tensor]) -> None:
        """Have hooks on the state that a leaf begins with run where the leaf before ends.

        There all of its gradient is known: it may be an output too, which has a loss.
        """
        if not self._hooks and not any(leaf._backward_hooks for leaf in leaves):
            return
        for end, hooks in zip(states, self._hooks, strict=False):
            for hook in hooks if end.requires_grad else ():
                end.register_hook(hook)  # type: ignore[no-untyped-call]
        found = [leaf._backward_hooks or {} for leaf in leaves]
        self._hooks = [list(hooks.values()) for hooks in found] if any(found) else []
        for moved in found:
            moved.clear()
