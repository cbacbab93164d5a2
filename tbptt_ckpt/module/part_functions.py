"""The parts of a traced step as functions, which read weights and attributes at each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, fx

from tbptt_ckpt.module.trees import Tree, replace_tensors, tensors_of


def part_of(
    graph: fx.Graph, given: Sequence[fx.Node], wanted: Sequence[fx.Node]
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of values of some nodes that gives the values of others."""
    needed, left = set(given), list(wanted)
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    part, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        made[node] = part.placeholder(node.name)
    for node in graph.nodes:
        if node in needed and node not in made:
            made[node] = part.node_copy(node, made.__getitem__)
    part.output(tuple(made[node] for node in wanted))
    code = part.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<traced step>", "exec"), space)
    function: Callable[..., tuple[Tensor, ...]] = space["forward"]
    return function


@dataclass(frozen=True, slots=True)
class Encode:
    """`StepParts.encode`: a function of a namespace with the module, and of tensors."""

    function: Callable[..., tuple[Tensor, ...]]
    step: SimpleNamespace

    def __call__(self, inputs: Tree) -> Tree:
        """Tensors of so many steps."""
        return _one_or_all(self.function(self.step, *tensors_of(inputs)))


@dataclass(frozen=True, slots=True)
class Transition:
    """`StepParts.transition`."""

    function: Callable[..., tuple[Tensor, ...]]
    step: SimpleNamespace
    num_features: int
    template: Tree

    def __call__(self, encoded: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Features, and the state after one step."""
        values = self.function(self.step, *tensors_of(encoded), *tensors_of(state))
        count = self.num_features
        return _one_or_all(values[:count]), replace_tensors(self.template, list(values[count:]))


@dataclass(frozen=True, slots=True)
class Readout:
    """`StepParts.readout`."""

    function: Callable[..., tuple[Tensor, ...]]
    step: SimpleNamespace
    template: Tree

    def __call__(self, features: Tree, encoded: Tree) -> Any:
        """The outputs of so many steps."""
        values = self.function(self.step, *tensors_of(features), *tensors_of(encoded))
        return replace_tensors(self.template, list(values))


def _one_or_all(values: tuple[Tensor, ...]) -> Tree:
    return values[0] if len(values) == 1 else values
