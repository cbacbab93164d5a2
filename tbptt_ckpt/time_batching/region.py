"""One run of steps with time batching: which operations take part, and what they share.

NOTE [What is proved for an operation]
The weight is a leaf tensor of the plain type that learns, or an `nn.Parameter`: it cannot
have been computed in the step. Its version is looked at in every call. An input counts as a
row of the segment's inputs if it is the very tensor that the step was given and nobody wrote
into it. Whatever else comes is left to the plain operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.module.trees import Tree, map_tensors, replace_tensors, tensors_of
from tbptt_ckpt.time_batching.cell_calls import CellCalls
from tbptt_ckpt.time_batching.linear import TappedLinear, whole_linear
from tbptt_ckpt.time_batching.operations import Embedding, Operation, Product, TappedOperation
from tbptt_ckpt.time_batching.products import multiply
from tbptt_ckpt.time_batching.report import SMALL, Tally
from tbptt_ckpt.time_batching.rows import Row, Rows, is_plain, is_stable, transposed_weight
from tbptt_ckpt.time_batching.taps import Versions

# Rows of one product over time: more gain little and take memory.
_ROWS_OF_LEAF, _ROWS_OF_ADVANCE = 2048, 256
_FEWEST_STEPS, _MOST_STEPS = 8, 256  # a view of a step costs host memory


class Region:
    """Operations of one run of steps.

    Args:
        num_steps: Of the run.
        tally: Counts what was batched and what not.
        pays: Whether a call of so many rows with a weight of so many elements gains time.
    """

    def __init__(self, num_steps: int, tally: Tally, pays: Callable[[int, int], bool]) -> None:
        self.tally, self.pays = tally, pays
        self.chooses = not pays(1, 1)  # rather than batching all that can be
        self._rows: dict[int, Row] = {}
        self._operations: dict[Any, tuple[TappedOperation, Tensor]] = {}
        self._linears: dict[Any, tuple[TappedLinear, Versions, Tensor]] = {}
        self.cells = CellCalls(num_steps, pays, tally, self.row)

    def step_inputs(self, inputs: Tree, time_dim: int) -> Iterator[Any] | None:
        """The input of each step, known as rows of the whole while its step runs.

        Args:
            inputs: Nested tensors with time on `time_dim`.
            time_dim: Where time is.

        Returns:
            None where the inputs cannot be rows.
        """
        tensors = tensors_of(inputs)
        if not tensors or any(t.is_inference() for t in tensors):
            return None
        return self._rows_of(inputs, time_dim)

    def _rows_of(self, inputs: Tree, time_dim: int) -> Iterator[Any]:
        first = tensors_of(inputs)[0]
        num_steps, length = first.shape[time_dim], self._chunk_steps(first, time_dim)
        for begin in range(0, num_steps, length):
            size = min(length, num_steps - begin)
            yield from self._chunk_inputs(_narrow(inputs, time_dim, begin, size), time_dim)
        self._rows.clear()

    def _chunk_steps(self, first: Tensor, time_dim: int) -> int:
        lanes = first.shape[1 - min(time_dim, 1)] if first.dim() > 1 else 1
        rows = _ROWS_OF_LEAF if torch.is_grad_enabled() else _ROWS_OF_ADVANCE
        return min(max(_FEWEST_STEPS, rows // max(lanes, 1)), _MOST_STEPS)

    def _chunk_inputs(self, inputs: Tree, time_dim: int) -> Iterator[Any]:
        tensors = tensors_of(inputs)
        wholes = [Rows(t.movedim(time_dim, 0) if t.dim() else t) for t in tensors]
        columns = [whole.whole.unbind(0) for whole in wholes]
        is_tensor = isinstance(inputs, Tensor)
        for index, leaves in enumerate(zip(*columns, strict=True)):
            self._rows = {
                id(leaf): Row(rows, index, leaf, rows.version)
                for leaf, rows in zip(leaves, wholes, strict=True)
            }
            yield leaves[0] if is_tensor else replace_tensors(inputs, list(leaves))

    def row(self, x: Tensor) -> Row | None:
        """The row that x is, if it is one."""
        row = self._rows.get(id(x))
        return row if row is not None and row.is_untouched() else None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """`F.linear`, or None where the plain operation is to do it."""
        if not is_plain(x) or not is_stable(weight) or (bias is not None and not is_stable(bias)):
            self.tally.left("linear", "a weight or input that is computed in the step")
            return None
        if torch.is_autocast_enabled(x.device.type):
            return self._linear_under_autocast(x, weight, bias)
        if x.dim() == 0 or x.dtype != weight.dtype or x.shape[-1] != weight.shape[-1]:
            self.tally.left("linear", "dtypes or shapes that differ")
            return None
        if not self.pays(x.numel() // max(x.shape[-1], 1), weight.numel()):
            self.tally.left("linear", SMALL)
            return None
        row = self.row(x)
        if row is not None:
            output = self._linear_of_row(row, weight, bias)
            if output is not None:
                return output
        if not torch.is_grad_enabled():
            return multiply(x, weight, bias) if x.dim() == 2 else None
        if not weight.requires_grad:
            self.tally.left("linear", "a frozen weight")
            return None
        return self._recorded_linear(x, weight, bias)

    def _linear_under_autocast(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [x, weight] if bias is None else [x, weight, bias]
        if not all(t.dtype in (torch.float32, dtype) for t in tensors):
            self.tally.left("linear", "dtypes that autocast leaves alone")
            return None
        if not torch.is_grad_enabled() or not weight.requires_grad:
            return None
        if not self.pays(x.numel() // max(x.shape[-1], 1), weight.numel()):
            self.tally.left("linear", SMALL)
            return None
        return self._recorded_linear(x.to(dtype), weight, bias, dtype)

    def _recorded_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        key = (id(weight), id(bias), dtype)
        found = self._linears.get(key)
        if found is None:
            # Cast once per leaf; the gradient passes the cast back once, too.
            low = [w if w is None or dtype is None else w.to(dtype) for w in (weight, bias)]
            assert low[0] is not None
            linear = TappedLinear(low[0], low[1])
            found = self._linears[key] = (linear, Versions(weight, bias), weight)
            self.tally.batched("linear", tuple(weight.shape))
        linear, versions, _ = found
        if versions.moved():
            self.tally.left("linear", "a weight that changed within the segment")
            return None
        return linear(x)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """`x @ weight + bias`, or None where the plain operation is to do it.

        Args:
            x: [..., K].
            weight: [K, M], a weight or the transpose of one.
            bias: [M], or None.
        """
        if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or weight.dim() != 2:
            return None
        transposed = transposed_weight(weight)
        if transposed is not None:
            return self.linear(x, transposed, bias)
        if not self._may_record("matmul", (x,), weight, bias) or x.dim() < 2:
            return None
        if x.shape[-1] != weight.shape[0]:
            return None
        flat = self.recorded("matmul", Product, (x.reshape(-1, x.shape[-1]),), weight, bias)
        return None if flat is None else flat.view(*x.shape[:-1], weight.shape[1])

    def embedding(self, indices: Tensor, weight: Tensor, padding_idx: int) -> Tensor | None:
        """`F.embedding`, or None where the plain operation is to do it."""
        row = self.row(indices)
        pays = self.pays(indices.numel(), weight.numel())
        if pays and row is not None and is_stable(weight) and is_plain(indices):
            return self._embedding_of_row(row, weight, padding_idx)
        if not self._may_record("embedding", (indices,), weight, None) or not indices.dim():
            return None

        def make(weight: Tensor, _bias: Tensor | None) -> Embedding:
            return Embedding(weight, padding_idx)

        flat = self.recorded("embedding", make, (indices.reshape(-1),), weight, None, padding_idx)
        return None if flat is None else flat.view(*indices.shape, weight.shape[1])

    def _embedding_of_row(self, row: Row, weight: Tensor, padding_idx: int) -> Tensor | None:
        key = ("embedding", id(weight), padding_idx, torch.is_grad_enabled())
        made = row.rows.made.get(key)
        if made is None:
            whole = torch.embedding(weight, row.rows.whole, padding_idx, False, False)
            made = row.rows.made[key] = _MadeRows(whole, weight)
            self.tally.batched("embedding of inputs", tuple(weight.shape))
        return self._take(made, row)

    def recorded(
        self,
        name: str,
        make: Callable[[Tensor, Tensor | None], Operation],
        inputs: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor | None:
        """An operation that leaves its weight gradient to the tap; None if it must not.

        Args:
            name: For the report.
            make: Makes the operation of a weight and bias without a graph.
            inputs: Its inputs; calls may differ in their first dimension only.
            weight: Its weight.
            bias: Its bias, or None.
            options: What else tells it from others of the same weight.
        """
        if not self._may_record(name, inputs, weight, bias):
            return None
        shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        key = (name, id(weight), id(bias), options, shapes)
        found = self._operations.get(key)
        if found is None:
            operation = make(weight.detach(), None if bias is None else bias.detach())
            # The weight is held, so that its id stays its own.
            found = self._operations[key] = (TappedOperation(operation, weight, bias), weight)
            self.tally.batched(name, tuple(weight.shape))
        tapped, _ = found
        if tapped.record.versions.moved():
            self.tally.left(name, "a weight that changed within the segment")
            return None
        return tapped(*inputs)

    def _may_record(
        self, name: str, inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None
    ) -> bool:
        """Whether a call may leave its weight gradient to a tap."""
        if not torch.is_grad_enabled():
            return False
        if not is_stable(weight) or (bias is not None and not is_stable(bias)):
            self.tally.left(name, "a weight that is computed in the step")
            return False
        if not weight.requires_grad:
            self.tally.left(name, "a frozen weight")
            return False
        fit = all(is_plain(x) and x.dim() for x in inputs)
        same = all(x.dtype == weight.dtype for x in inputs if x.is_floating_point())
        if not fit or not same or torch.is_autocast_enabled(weight.device.type):
            self.tally.left(name, "autocast, or types or dtypes that differ")
            return False
        if not self.pays(inputs[0].shape[0], weight.numel()):
            self.tally.left(name, SMALL)
            return False
        return True

    def _linear_of_row(self, row: Row, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        key = ("linear", id(weight), id(bias), torch.is_grad_enabled())
        made = row.rows.made.get(key)
        if made is None:
            made = row.rows.made[key] = _MadeRows(
                whole_linear(row.rows.whole, weight, bias), weight, bias
            )
            self.tally.batched("linear of inputs", tuple(weight.shape))
        return self._take(made, row)

    def _take(self, made: _MadeRows, row: Row) -> Tensor | None:
        output = made.take(row.index)
        if output is not None:
            self._rows[id(output)] = Row(made.rows, row.index, output, output._version)
        return output

    def close(self) -> None:
        """The steps are done."""
        self._rows.clear()
        self.cells.close()


def _narrow(inputs: Tree, time_dim: int, begin: int, size: int) -> Tree:
    """Some of the steps, as views; the very tensors where these are all."""
    return map_tensors(
        lambda t: t if size == t.shape[time_dim] else t.narrow(time_dim, begin, size), inputs
    )


class _MadeRows:
    """What an operation made of the inputs of all steps; each entry is given out once."""

    def __init__(self, whole: Tensor, *weights: Tensor | None) -> None:
        self.rows = Rows(whole)
        self._versions, self._weights = Versions(*weights), weights
        self._entries: list[Tensor | None] = list(whole.unbind(0))

    def take(self, index: int) -> Tensor | None:
        """One step's entry, to do with as the module likes; None if there is none."""
        entry = self._entries[index]
        if entry is None or self._versions.moved():
            return None
        self._entries[index] = None
        # An entry is one of several views, which autograd lets nobody write into.
        return entry.clone() if entry.requires_grad else entry.data
