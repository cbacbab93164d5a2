"""The explicit replay: one leaf's graph at a time, its gradients handed on by hand.

NOTE [Why not torch.utils.checkpoint]
A non-reentrant checkpoint drops what operations saved but still records the graph of every
step of the window, 12-20 KiB of host memory per step. Here a leaf is run, differentiated
and freed before the next one is built, so that host memory does not grow with the window.

NOTE [Why a kept state is copied]
A run leaves its last state in the middle of what it took and is giving back. On the CPU that
splits the heap: the next run's blocks do not fit into the pieces, it takes new ones, and a
million steps of a small `nn.LSTM` came to hold up to 209 MiB where 6 were live. A copy made when
the run's memory is free lies among other small blocks.
"""

from __future__ import annotations

from tbptt_ckpt.executor.sinks import LossSink
from tbptt_ckpt.executor.task import Boundary
from tbptt_ckpt.executor.window_run import StateGrads, WindowRun, differentiate
from tbptt_ckpt.module.hooks import SilenceableHooks
from tbptt_ckpt.module.trees import tensors_of
from tbptt_ckpt.schedule.actions import Action, Advance, Differentiate, Drop, Keep, Schedule


class ReplayExecutor:
    """Runs a schedule action by action."""

    def run(self, work: WindowRun, schedule: Schedule, first: Boundary) -> StateGrads | None:
        """Differentiate a window; see `Executor.run`."""
        replay = _Replay(work, first)
        with SilenceableHooks():
            for action in schedule:
                work.note(action)
                if not replay.take(action):
                    return None
        work.observer.ends()
        return replay.state_grads


class _Replay:
    """The states and gradients at hand while a schedule is run."""

    def __init__(self, work: WindowRun, first: Boundary) -> None:
        self.work = work
        self.given = {**work.task.joints, first.step: first}
        self.kept: dict[int, Boundary] = {}
        self.working: Boundary | None = first
        self.state_grads: StateGrads = []

    def take(self, action: Action) -> bool:
        """Do one action; False if the window has no loss, so that nothing else is to do."""
        match action:
            case Advance(start, stop):
                self.working = self.work.advance(self._state_at(start), stop)
            case Keep(step):
                self.kept[step] = self.working = self._state_at(step).copied()
            case Differentiate(start, stop):
                boundary, self.working = self._state_at(start), None
                return self._differentiate(boundary, stop)
            case Drop(step):
                del self.kept[step]
        return True

    def _state_at(self, step: int) -> Boundary:
        if self.working is not None and self.working.step == step:
            return self.working
        return self.kept[step] if step in self.kept else self.given[step]

    def _differentiate(self, boundary: Boundary, stop: int) -> bool:
        work, task = self.work, self.work.task
        boundary.check_untouched()
        state = task.first_state(boundary)
        leaves = tensors_of(state)  # before the run: a module may write into the containers
        task.ambient.restore(boundary.ambient)
        sink = LossSink(task, work.loss, graph=True)
        with work.differentiating():
            state_out = work.runner.run(task, boundary.step, stop, state, sink)
            if stop == task.stop and work.loss.is_empty():
                return False
            work.observer.differentiates()
            states = tensors_of(state_out)
            grads_out = self.state_grads or [None] * len(states)
            roots = work.roots([sink.losses])
            ends = zip(states, grads_out, strict=True)
            roots += [(end, grad) for end, grad in ends if grad is not None and end.requires_grad]
            differentiate(roots)
        work.loss.add(sink.losses)
        self.state_grads = [leaf.grad for leaf in leaves]
        return True
