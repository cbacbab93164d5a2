"""The same schedules as nested `torch.utils.checkpoint` calls and one backward per window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint, noop_context_fn

from tbptt_ckpt.arguments import checked
from tbptt_ckpt.errors import ArgumentError, ReplayMismatchError, shown
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.executor.guard import Differentiating
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.replay_check import UNCHECKED, ReplayCheck, WindowCheck
from tbptt_ckpt.executor.sinks import LossSink, Sink
from tbptt_ckpt.executor.spans import Span, parse_spans
from tbptt_ckpt.executor.window_pass import Route, StateGrads, WindowPass, differentiate
from tbptt_ckpt.module.ambient import AmbientState
from tbptt_ckpt.module.hooks import SilenceableHooks, silent_hooks
from tbptt_ckpt.module.trees import (
    Tree,
    copy_containers,
    map_tensors,
    replace_tensors,
    tensors_of,
)
from tbptt_ckpt.module.tripwires import KeptGraphs
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep

ContextFn = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


class CheckpointExecutor:
    """Runs a schedule's levels as nested checkpoints.

    The gradient is bitwise that of plain BPTT for per-step modules. It records the graph of
    every step, 12-20 KiB of host memory each in a loop over cells: choose it for segment
    modules of few operations, or where one autograd graph is needed.

    Args:
        context_fn: Passed to `torch.utils.checkpoint`, for selective recomputation.
    """

    one_graph = True

    @checked
    def __init__(self, context_fn: ContextFn = noop_context_fn) -> None:
        self._context_fn, self._checks = context_fn, ReplayCheck(in_graph=True)

    def run(self, window: WindowPass, route: Route, first: Boundary) -> StateGrads | None:
        """Differentiate a window; see `Executor.run`."""
        boundary = first
        window.runner.parts.look(window.blocks, first.step, first.state)
        with SilenceableHooks():
            while boundary.step < window.start:  # new steps that the gradient does not reach
                advance = route.next_action()
                assert isinstance(advance, Advance), "the schedule was checked"
                window.observer.begins(advance)
                boundary = window.advance(boundary, advance.stop, route.advance_steps)
        actions: list[Action] = list(iter(route.next_action, None))
        boundary.check_untouched()
        window.ambient.restore(boundary.ambient)
        first_run: list[LossSink] = []

        def new_sink() -> LossSink:
            sink = window.sink(graph=True)
            if not in_backward:  # what recomputations make must not outlive them
                first_run.append(sink)
            return sink

        in_backward = False
        check = self._checks.of(window, boundary)
        spans = CheckpointedSpans(window, new_sink, self._context_fn, check)
        if actions and actions[0] == Keep(window.start):
            spans.keep(window.start)
        state = window.first_state(boundary)
        leaves = tensors_of(state)  # before the run: a module may write into the containers
        with Differentiating(window.guard, window.inputs, window.stop):
            totals, _ = spans.run(parse_spans(actions, window.start, window.stop), state)
            if window.loss.is_known_empty():
                return None
            # A module that differentiates inside may have had steps recomputed already.
            losses_of = {id(sink.losses.total): sink.losses for sink in first_run}
            parts = [losses_of[id(total)] for total in totals]
            in_backward = True
            first_run.clear()
            _differentiate(window, parts)
        spans.finish()
        window.observer.ends()
        for losses in parts:
            window.loss.add(losses)
        window.completed()
        with SilenceableHooks():
            check.settle()
        return [leaf.grad for leaf in leaves]

    def __repr__(self) -> str:
        return "checkpoint"


class CheckpointedSpans:
    """Runs a tree of spans in one autograd graph.

    Generators and buffers are kept and restored here rather than by
    `torch.utils.checkpoint`, which knows nothing of buffers.
    """

    def __init__(
        self,
        window: WindowPass,
        new_sink: Callable[[], Sink],
        context_fn: ContextFn = noop_context_fn,
        check: WindowCheck = UNCHECKED,
    ) -> None:
        self._window, self._new_sink, self._context_fn = window, new_sink, context_fn
        self._check = check
        module = window.runner.recurrence.module
        modules = module.modules() if isinstance(module, nn.Module) else ()
        self._is_scripted = any(isinstance(part, torch.jit.ScriptModule) for part in modules)
        self.ambient = window.ambient
        self.kept_graphs = KeptGraphs(window.runner.recurrence.module)
        self._kept: list[int] = []
        self._advancing = 0

    def advance(self, span: Span, state: Tree) -> tuple[list[Tensor], Tree]:
        """Run a span for its results; what it nests is not worth noting, and not kept."""
        self._note(Advance(span.start, span.stop))
        self._advancing += 1
        try:
            return self.run(span, state)
        finally:
            self._advancing -= 1

    def recompute(self, span: Span, state: Tree) -> tuple[list[Tensor], Tree]:
        """Run a span again, since its part of the graph is about to be differentiated."""
        self._window.guard.check(self._window.stop)
        self._drop_after(span.start)
        return self.run(span, state)

    def keep(self, step: int) -> None:
        """Note that the state at `step` is kept."""
        if not self._advancing:
            self._kept.append(step)
            self._note(Keep(step))

    def run(self, span: Span, state: Tree) -> tuple[list[Tensor], Tree]:
        """Run a span; the tensors its sinks made, and the state at its end."""
        if not span.parts:
            self._note(Differentiate(span.start, span.stop))
            try:
                return self._run_plain(span, state)
            finally:
                if not self._advancing:
                    self._window.observer.differentiates()
        collected: list[Tensor] = []
        for part in span.parts[:-1]:
            state = self._window.rejoin(part.start, state) if part is not span.parts[0] else state
            if part.start != span.start:
                self.keep(part.start)
            tensors, state = self._run_checkpointed(part, state)
            collected += tensors
        last = span.parts[-1]
        tensors, state = self.run(last, self._window.rejoin(last.start, state))
        return collected + tensors, state

    def run_again_as_a_whole(self, span: Span, state: Tree) -> tuple[list[Tensor], Tree]:
        """The same, with nothing kept but the first state: the backward runs the span again."""
        return self._run_checkpointed(span, state)

    def finish(self) -> None:
        """Note that no state is kept any longer."""
        self._drop_after(-1)

    def _run_plain(self, span: Span, state: Tree) -> tuple[list[Tensor], Tree]:
        sink = self._new_sink()
        with self._scripts_alike():
            state = self._window.run(span.start, span.stop, state, sink)
        told = self._check.ran if self._advancing else self._check.replayed
        told(span.start, span.stop, state, sink.tensors())
        return sink.tensors(), state

    def _scripts_alike(self) -> AbstractContextManager[Any]:
        """TorchScript keeps other tensors in its first calls than in later ones, unless told."""
        if not self._is_scripted:
            return nullcontext()
        plainly: AbstractContextManager[Any] = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        return plainly

    def _run_checkpointed(self, span: Span, state: Tree) -> tuple[list[Tensor], Tree]:
        region = _Region(self, span, state)
        results = checkpoint(
            region,
            *tensors_of(state),
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=self._contexts,
            # The end must be reached to be compared; and not every caller lets an exception pass
            # that ends a recomputation in its middle, TorchScript's interpreter for one.
            early_stop=False,
        )
        return region.split(results)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        made = self._context_fn()
        if not (isinstance(made, tuple | list) and len(made) == 2):
            raise ArgumentError(f"context_fn returned {shown(made)}, not two context managers")
        return made

    def _note(self, action: Action) -> None:
        if not self._advancing:
            self._window.observer.begins(action)

    def _drop_after(self, step: int) -> None:
        while self._kept and self._kept[-1] > step:
            self._note(Drop(self._kept.pop()))


class _Region:
    """A span as a function of its state's tensors: called to advance, and again to recompute.

    `state`, at the steps' start, is there for its structure.
    """

    def __init__(self, spans: CheckpointedSpans, span: Span, state: Tree) -> None:
        self._spans, self._span = spans, span
        # The tensors of the state are arguments, not attributes, so that an enclosing
        # checkpoint can drop them.
        self._frame = _without_tensors(state)
        self._ambient: AmbientState | None = None
        self._num_collected, self._final_frame = 0, None

    def __call__(self, *state_tensors: Tensor) -> tuple[Tensor, ...]:
        state = replace_tensors(copy_containers(self._frame), list(state_tensors))
        ambient = self._spans.ambient
        if self._ambient is None:
            self._ambient = ambient.capture(state_tensors)
            collected, state = self._spans.advance(self._span, state)
            self._spans.kept_graphs.wire()  # a recomputation finds other tensors there
            self._num_collected, self._final_frame = len(collected), _without_tensors(state)
            return (*collected, *tensors_of(state))
        before = ambient.capture()
        ambient.restore(self._ambient)
        try:
            # No gradient passes through what is recomputed: the first run has registered hooks.
            with SilenceableHooks(), silent_hooks():
                collected, state = self._spans.recompute(self._span, state)
        finally:
            ambient.restore(before)
        return (*collected, *tensors_of(state))

    def split(self, results: Sequence[Tensor]) -> tuple[list[Tensor], Tree]:
        """Collected tensors and final state of what a call returned."""
        collected, state = results[: self._num_collected], results[self._num_collected :]
        return list(collected), replace_tensors(self._final_frame, list(state))


def _differentiate(window: WindowPass, parts: Sequence[LossSum]) -> None:
    """Differentiate a window's loss; what torch finds in a recomputation is explained."""
    try:
        differentiate(window.roots(parts))
    except CheckpointError as error:
        window.inputs.check(window.first, window.stop)
        raise ReplayMismatchError(
            f"steps of [{window.start}, {window.stop}) ran again and made other tensors than at "
            "first: the module keeps something outside of its state, such as a tensor on self, "
            f"or acts otherwise from call to call ({str(error).splitlines()[0]})",
            start=window.start,
            stop=window.stop,
            difference=0.0,
        ) from error


_NO_TENSOR = torch.empty(0, device="cpu")


def _without_tensors(state: Tree) -> Tree:
    return copy_containers(map_tensors(lambda _: _NO_TENSOR, state))
