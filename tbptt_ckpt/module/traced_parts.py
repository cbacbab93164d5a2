"""The parts of a step that is written as one forward, found by symbolic trace.

Encode is what depends on the input alone and treats lanes by themselves; the transition what the
next state needs of the state, and whatever mixes lanes; the readout is the rest. See
`step_effects.py` for what is left as it is, and `lane_wise.py` for what is folded.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx, nn

from tbptt_ckpt.module.lane_wise import is_lane_wise_function
from tbptt_ckpt.module.lane_wise_modules import is_lane_wise_module
from tbptt_ckpt.module.looked_through import looked_through, template_of
from tbptt_ckpt.module.part_functions import Encode, Readout, Transition, part_of
from tbptt_ckpt.module.step_effects import NoPartsError
from tbptt_ckpt.module.step_parts import BareCell, StepParts, bare_cell
from tbptt_ckpt.module.step_trace import StepTrace, line_at, value_of
from tbptt_ckpt.module.step_values import Call
from tbptt_ckpt.module.trees import (
    Tree,
    iterate_leaves,
    replace_tensors,
    structure,
    tensors_of,
)

Nodes = list[fx.Node]


@dataclass(frozen=True, slots=True)
class FoundParts:
    """The parts of a step, with the names of what is in each, in the order of the calls."""

    parts: StepParts
    encode: tuple[str, ...]
    transition: tuple[str, ...]
    readout: tuple[str, ...]


def traced_parts(module: nn.Module, inputs: Tree, state: Tree) -> StepParts:
    """The parts of `module(inputs, state)`, one step with lanes on dimension 0.

    What is encoded, and the features, are a tensor or a tuple of several; the input of a bare
    cell is the first. Weights, buffers and attributes are those of the module, read at each call.

    Raises:
        NoPartsError: There are none worth having, or what is lost in a trace prevents it.
    """
    return find_parts(module, inputs, state).parts


def find_parts(module: nn.Module, inputs: Tree, state: Tree) -> FoundParts:
    """`traced_parts`, described."""
    try:
        return _found(module, inputs, state)
    except NoPartsError:
        raise
    except Exception as error:  # whatever a module of the user's may do
        raise NoPartsError(f"it cannot be looked through: {error!r}") from error


def _found(module: nn.Module, inputs: Tree, state: Tree) -> FoundParts:
    trace = looked_through(module, inputs, state)
    if structure(template_of(trace.new_state)) != structure(state):
        raise NoPartsError(
            "the state that it returns is nested in another way than the one it takes"
        )
    return _Split(trace).found(module)


class _Split:
    """Which node of a graph is in which part."""

    def __init__(self, trace: StepTrace) -> None:
        self._trace, self._root = trace, trace.root
        self._nodes: Nodes = [n for n in trace.graph.nodes if n.op != "output"]
        self._returned = [n for n in iterate_leaves(trace.outputs) if n is not None]
        self._new_state = [n for n in iterate_leaves(trace.new_state) if n is not None]
        self._encode = set(trace.inputs)
        for node in self._nodes:
            inner = self._inner(node)
            if inner and self._encode.issuperset(inner) and self._folds(node):
                self._encode.add(node)
        self._transition = set(trace.state)
        self._take(self._new_state)
        needed = self._reached(self._returned, self._encode | self._transition)
        for node in self._nodes:
            if node in needed and node not in self._transition and not self._folds(node):
                self._take([node])
        for node in self._nodes:  # items of what is in the transition are made there
            if node in needed and set(node.all_input_nodes) & self._transition and _is_item(node):
                self._take([node])
        self._readout = needed - self._transition - self._encode
        self._check()
        self._encoded, self._features = self._crossing()

    def _folds(self, node: fx.Node) -> bool:
        known: Any = value_of
        args: Any = fx.node.map_arg(node.args, known)
        kwargs: Any = fx.node.map_arg(node.kwargs, known)
        call = Call(args, kwargs)
        if node.op == "call_module":
            return is_lane_wise_module(self._root.get_submodule(str(node.target)), call)
        is_call = node.op in ("call_function", "call_method")
        return _is_item(node) or (is_call and is_lane_wise_function(node.target, call))

    def _reached(self, starts: Iterable[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
        """What the starts are computed from, up to what is known, without constants."""
        left, found = list(starts), set[fx.Node]()
        while left:
            node = left.pop()
            if node in found or node in known or value_of(node).is_constant:
                continue
            found.add(node)
            left += self._inner(node)
        return found

    def _take(self, nodes: Iterable[fx.Node]) -> None:
        self._transition |= self._reached(nodes, self._encode | self._transition)

    def _check(self) -> None:
        for node in self._returned:
            if not value_of(node).has_lanes:
                raise NoPartsError(f"{line_at(node)}: an output is not one row for each lane")
        for node in self._nodes:
            name = str(getattr(node.target, "__name__", node.target))
            is_in_place = name.endswith("_") and not name.endswith("__")
            if node.op == "call_method" and is_in_place:
                raise NoPartsError(f"{line_at(node)} calls {name}, which works in place")

    def _crossing(self) -> tuple[Nodes, Nodes]:
        """What of the encoded values, and of the transition's, other parts need."""
        later = self._transition | self._readout
        seen = [n for node in later for n in self._inner(node)]
        wanted = {*seen, *self._returned, *self._new_state}
        encoded = [n for n in self._nodes if n in self._encode and n in wanted]
        read = {*self._returned, *(n for node in self._readout for n in self._inner(node))}
        features = [n for n in self._nodes if n in self._transition and n in read]
        for node in (*encoded, *features):
            if not value_of(node).has_lanes:
                raise NoPartsError(f"{line_at(node)}: its result is not one tensor of lanes")
        return encoded, features

    def _inner(self, node: fx.Node) -> Nodes:
        """What a node needs that is not constant, also of constants that are made of it."""
        found = list[fx.Node]()
        for each in node.all_input_nodes:
            found += self._inner(each) if value_of(each).is_constant else [each]
        return found

    def found(self, module: nn.Module) -> FoundParts:
        """The parts, where they are worth having."""
        cell, first = self._bare_cell()
        self._encoded.sort(key=lambda node: node is not first)
        names = [self._names(part) for part in (self._encode, self._transition, self._readout)]
        if not names[0] and not names[2] and cell is None:
            raise NoPartsError("all of it is needed by the next state, or mixes lanes")
        trace, encoded, features = self._trace, self._encoded, self._features
        step = SimpleNamespace(step=module)
        run = part_of(trace.graph, [*encoded, *trace.state], [*features, *self._new_state])
        read = part_of(trace.graph, [*features, *encoded], self._returned)
        parts = StepParts(
            Encode(part_of(trace.graph, trace.inputs, encoded), step),
            Transition(run, step, len(features), template_of(trace.new_state)),
            Readout(read, step, template_of(trace.outputs)),
            None if cell is None else self._described(cell),
        )
        return FoundParts(parts, *names)

    def _names(self, part: set[fx.Node]) -> tuple[str, ...]:
        nodes = [n for n in self._nodes if n in part and n.op != "placeholder" and not _is_item(n)]
        return tuple(
            str(n.target).removeprefix("step.").removeprefix("step") or "itself"
            if n.op == "call_module"
            else str(getattr(n.target, "__name__", n.target))
            for n in nodes
        )

    def _bare_cell(self) -> tuple[fx.Node | None, fx.Node | None]:
        """The one node of the transition, if it is a bare cell, and its input."""
        state = self._trace.state
        calls = [n for n in self._nodes if n in self._transition and n not in state]
        cells = [n for n in calls if n.op == "call_module"]
        if len(cells) != 1:
            return None, None
        cell, items = cells[0], [n for n in calls if n is not cells[0]]
        module = self._root.get_submodule(str(cell.target))
        if bare_cell(module) is None or len(cell.args) + len(cell.kwargs) != 2:
            return None, None
        x, given = (*cell.args, *cell.kwargs.values())
        before = list(given) if isinstance(given, tuple | list) else [given]
        after = [_result_of(cell, node) for node in self._new_state]
        is_bare = (
            len(before) == len(state) == len(self._new_state)
            and all(_result_of(cell, node) is not None for node in items)
            and after == [before.index(s) if s in before else None for s in state]
            and [_result_of(cell, node) for node in self._features] == [0]
            and list(cell.kwargs) in ([], ["hx"])
            and x in self._encoded
        )
        return (cell, x) if is_bare and isinstance(x, fx.Node) else (None, None)

    def _described(self, cell: fx.Node) -> BareCell:
        module: Any = self._root.get_submodule(str(cell.target))
        order: list[Any] = [_result_of(cell, node) for node in self._new_state]
        template = template_of(self._trace.new_state)

        def split(state: Tree) -> tuple[Tensor, ...]:
            leaves = tensors_of(state)
            return tuple(leaves[order.index(result)] for result in range(len(order)))

        def join(*results: Tensor) -> Tree:
            return replace_tensors(template, [results[result] for result in order])

        return BareCell(module, split, join)


def _result_of(cell: fx.Node, node: fx.Node) -> int | None:
    """Which result of a cell a node is: 0 for h, 1 for c; None if it is something else."""
    if node is cell:
        return None if value_of(cell).items else 0
    result = node.args[1] if _is_item(node) and node.args[0] is cell else None
    return result if isinstance(result, int) else None


def _is_item(node: fx.Node) -> bool:
    """Whether it is one of several results of a node."""
    is_taken = node.target in (operator.getitem, getattr)
    return is_taken and bool(value_of(node.all_input_nodes[0]).items)
