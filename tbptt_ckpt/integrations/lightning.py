"""Training by windows inside of Lightning's automatic optimization: every batch is one window.

NOTE [Whose turn it is]
Lightning fetches batches ahead of time, and hands them on as they are. So the places of chunks in
their sequences wait in a row, and the hook that Lightning calls before each `training_step` takes
the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.arguments import check_positive_int
from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.integrations.windowed import Windowed
from tbptt_ckpt.module.recurrence import recognise
from tbptt_ckpt.module.trees import Tree, map_tensors, tensors_of
from tbptt_ckpt.schedule.strategies import AnyStrategy

__all__ = ["WindowedTraining"]

_NO_WINDOWS = (
    "Trainer.fit was given batches as they are; give it the loader as model.windows(loader)"
)
_OPTIONS = ("k1", "k2", "strategy", "time_dim", "recurrent_name")


class WindowedTraining:
    """A mix-in for a `LightningModule`, named before it among the bases, with `k1` and `k2`.

    Give `trainer.fit` the loader as `model.windows(loader)`. Then a batch of Lightning's is `k1`
    steps of the loader's, and `training_step` is as it was for those. What its one call of the
    recurrent module returns reaches back over the last `k2` steps; a state that it is given is the
    one at the first step of the loader's batch.

    Attributes:
        k1: Steps of a batch of Lightning's; the last one of a sequence may have fewer.
        k2: As for `Windowed`. All of these are keywords of the class, or attributes.
        strategy: As for `Windowed`.
        time_dim: Where batches have time; by default 1 where the module has `batch_first`, else 0.
        recurrent_name: Where the module is that takes chunks, `(x, state) -> (y, state)`.
    """

    k1: int
    k2: int | None
    strategy: AnyStrategy = "auto"
    time_dim: int | None = None
    recurrent_name: str = "recurrent"

    def __init_subclass__(cls, **keywords: Any) -> None:
        given = {name: keywords.pop(name) for name in _OPTIONS if name in keywords}
        super().__init_subclass__(**keywords)
        for name, value in given.items():
            setattr(cls, name, value)

    def num_steps(self, batch: Any) -> int:
        """Steps of a batch of the loader; by default those of its first tensor."""
        dim, tensors = self._time_of_batches(), tensors_of(batch)
        if not tensors or tensors[0].dim() <= dim:
            raise ArgumentError(
                f"batch={shown(batch)} must begin with a tensor that has time on dimension {dim}, "
                "or num_steps(batch) and chunk(batch, start, stop) say how it is read"
            )
        return tensors[0].shape[dim]

    def chunk(self, batch: Any, start: int, stop: int) -> Any:
        """Steps of a batch; by default of all its tensors with as many as `num_steps`."""
        dim, num_steps = self._time_of_batches(), self.num_steps(batch)

        def steps(tensor: Tensor) -> Tensor:
            has_time = tensor.dim() > dim and tensor.shape[dim] == num_steps
            return tensor.narrow(dim, start, stop - start) if has_time else tensor

        return map_tensors(steps, batch)

    def windows(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The loader's batches, `k1` steps at a time, for `trainer.fit`.

        The recurrent module is in a `Windowed` from here on, whose weights are saved under the
        names that they had.
        """
        name = type(self).__name__
        if not (hasattr(self, "k1") and hasattr(self, "k2")):
            raise ArgumentError(
                f"{name} has no k1 and k2: give them to the class, as in "
                f"class {name}(WindowedTraining, LightningModule, k1=20, k2=60)"
            )
        check_positive_int("k1", self.k1)
        options: dict[str, Any] = {"strategy": self.strategy, "time_dim": self.time_dim}
        carried = _Carried(self._recurrent(), self.k2, **options)
        self.set_submodule(self.recurrent_name, carried)  # type: ignore[attr-defined]
        return _Windows(loader, self, carried)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Called by Lightning; a method of yours with this name calls `super()`'s, too."""
        if (world_size := self.trainer.world_size) > 1:  # type: ignore[attr-defined]
            raise ArgumentError(
                f"Trainer(devices=...): windows are trained in one process, not in {world_size}; "
                "use devices=1"
            )
        module = self._carried()
        if module is None:
            raise ArgumentError(_NO_WINDOWS)
        module.take_turn()
        return super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called by Lightning; a method of yours with this name calls `super()`'s, too."""
        if (module := self._carried()) is not None:
            module.end_turn()
        super().on_train_batch_end(outputs, batch, batch_idx)  # type: ignore[misc]

    def _carried(self) -> _Carried | None:
        module: Any = self.get_submodule(self.recurrent_name)  # type: ignore[attr-defined]
        return module if isinstance(module, _Carried) else None

    def _recurrent(self) -> Any:
        module: Any = self.get_submodule(self.recurrent_name)  # type: ignore[attr-defined]
        return module.module if isinstance(module, _Carried) else module

    def _time_of_batches(self) -> int:
        return recognise(self._recurrent(), False, self.time_dim).time_dim


class _Carried(Windowed):
    """Goes on where the chunk before ended, in the steps that a loader of windows has told of."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._coming = deque[tuple[int, int]]()  # first step, and steps of the sequence
        self._turn: tuple[int, int] | None = None
        self._is_done = False

    def line_up(self) -> deque[tuple[int, int]]:
        """A new row, in which the places of chunks wait."""
        self._coming = deque()
        return self._coming

    def take_turn(self) -> None:
        """The chunk that comes next is trained now."""
        if not self._coming:
            raise ArgumentError(_NO_WINDOWS)
        self._turn, self._is_done = self._coming.popleft(), False

    def end_turn(self) -> None:
        """What comes until the next turn is none of a window."""
        self._turn = None

    def forward(self, inputs: Tree, state: Tree = None) -> tuple[Any, Any]:
        """The outputs of the chunk whose turn it is, and the state after it."""
        has_grad = torch.is_grad_enabled()
        if self._turn is None and self._coming and self.training and has_grad:
            raise ArgumentError(
                "on_train_batch_start of the LightningModule must call "
                "super().on_train_batch_start(batch, batch_idx): WindowedTraining counts windows"
            )
        if self._turn is None or not has_grad:
            return self.module(inputs, state)  # type: ignore[no-any-return]
        start, num_steps = self._turn
        if self._is_done:
            raise ArgumentError(
                f"the recurrent module was called twice for the steps from {start} on; "
                "training_step calls it once, and an optimizer that calls its closure again, such "
                "as LBFGS, cannot be used"
            )
        if start == 0:
            self.begin(num_steps)
        elif (last := self._chunks.last) is None or last.step != start:
            raise ArgumentError(
                f"the recurrent module was not called for the steps before {start}; every "
                "training_step calls it once"
            )
        self._is_done = True
        return self._chunks.run(inputs, state)


class _Windows:
    """Can be iterated as often as the loader."""

    def __init__(self, loader: Iterable[Any], model: WindowedTraining, carried: _Carried) -> None:
        self._loader, self._model, self._carried = loader, model, carried

    def __iter__(self) -> Iterator[Any]:
        model, coming = self._model, self._carried.line_up()
        try:
            for batch in self._loader:
                num_steps = model.num_steps(batch)
                for start in range(0, num_steps, model.k1):
                    coming.append((start, num_steps))
                    yield model.chunk(batch, start, min(start + model.k1, num_steps))
        except GeneratorExit:  # what was fetched is not trained
            coming.clear()
            raise
