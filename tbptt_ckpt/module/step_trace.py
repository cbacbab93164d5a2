"""One step as a graph, by symbolic trace, with what is known of every value in it.

While a step is traced, each of its operations is run for two numbers of lanes. What differs between
the two is a number of lanes, and stays symbolic; all other sizes are plain numbers.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH
from torch.overrides import TorchFunctionMode

from tbptt_ckpt.module.step_effects import NoPartsError, line_of, users_line
from tbptt_ckpt.module.step_values import Value, known_value
from tbptt_ckpt.module.trees import Tree, iterate_leaves, map_tensors, replace_tensors, tensors_of

_FACTORIES = (torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye)
_MAKES_TENSOR = (*_FACTORIES, torch.tensor, torch.scalar_tensor)
_tracing = threading.Lock()  # torch's modules are patched meanwhile, for all threads


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A step as a graph.

    Attributes:
        graph: Its last node has the leaves of outputs and state in one tuple.
        inputs: Nodes of the tensors of the inputs.
        state: Nodes of the tensors of the state.
        outputs: The outputs, with nodes for tensors.
        new_state: The state that is returned, with nodes for tensors.
        root: What names in the graph begin at.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    state: tuple[fx.Node, ...]
    outputs: Tree
    new_state: Tree
    root: nn.Module


def value_of(node: fx.Node) -> Value:
    """What is known of the value of a node."""
    value: Value = node.meta["value"]
    return value


def line_at(node: fx.Node) -> str:
    """Where it was called."""
    return str(node.meta["line"])


def trace_step(
    module: nn.Module, inputs: Tree, state: Tree, other: tuple[Tree, Tree] | None = None
) -> StepTrace:
    """Trace `module(inputs, state)`, one step with lanes on dimension 0.

    With `other`, a call that differs in the sizes that stay symbolic, it may be any call.

    Raises:
        NoPartsError: What prevents it, with the line.
    """
    root = _Step(module, inputs, state)
    given = tensors_of((inputs, state)), tensors_of(other)
    tracer = _Tracer(given if other else _examples(tensors_of(inputs), tensors_of(state)))
    try:
        with _tracing, torch.enable_grad(), _Concrete(tracer):
            placed: Any = (PH,) * tracer.num_leaves
            graph = tracer.trace(root, concrete_args=placed)
    except NoPartsError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise NoPartsError(f"{line_of(error)} cannot be traced: {text}") from error
    leaves = [node for node in graph.nodes if node.op == "placeholder"]
    count = len(tensors_of(inputs))
    outputs, new_state = (
        map_tensors(lambda proxy: proxy.node, tree, fx.Proxy) for tree in root.returned
    )
    for node in graph.nodes:
        node.meta.pop("examples", None)
    return StepTrace(graph, tuple(leaves[:count]), tuple(leaves[count:]), outputs, new_state, root)


def _examples(
    inputs: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves of a step, and the same with one lane more."""
    lanes = {t.shape[:1] for t in inputs} | {t.shape[:1] for t in state if t.dim()}
    if len(lanes) != 1 or not inputs or not state or lanes <= {torch.Size([]), torch.Size([0])}:
        raise NoPartsError("inputs and state are not all of so many lanes on dimension 0")
    given = [t.detach().clone() for t in (*inputs, *state)]
    return given, [torch.cat([t, t[:1]]) if t.dim() else t.clone() for t in given]


class _Step(nn.Module):
    """Calls a module as its user does, with the leaves of inputs and state one by one."""

    def __init__(self, module: nn.Module, inputs: Tree, state: Tree) -> None:
        super().__init__()
        self.step = module
        self.given = (inputs, state)
        self.returned: tuple[Any, Any] = (None, None)

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        result = self.step(*replace_tensors(self.given, list(leaves)))
        if isinstance(self.step, nn.RNNCellBase):  # its state is all that it returns
            result = _opened(result)
            result = (result[0] if isinstance(result, tuple) else result, result)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise NoPartsError("it does not return (output, state)")
        outputs, state = (map_tensors(_opened, each, fx.Proxy) for each in result)
        flat = [leaf for leaf in iterate_leaves((outputs, state)) if leaf is not None]
        if strange := [leaf for leaf in flat if not isinstance(leaf, fx.Proxy)]:
            raise NoPartsError(f"it returns a {type(strange[0]).__name__} that no input decides")
        self.returned = (outputs, state)
        return tuple(flat)


def _opened(proxy: Any) -> Any:
    """What stands for a tuple as a tuple."""
    items = value_of(proxy.node).items
    return tuple(_opened(proxy[i]) for i in range(len(items))) if items else proxy


class _Proxy(fx.Proxy):
    """A value whose sizes are numbers, unless they are numbers of lanes."""

    @property
    def shape(self) -> Any:
        return self.size()

    @property
    def ndim(self) -> Any:
        return self.dim()

    def __len__(self) -> int:
        if items := value_of(self.node).items:
            return len(items)
        length = self.size(0)
        if not isinstance(length, int):
            raise NoPartsError(f"{users_line()} asks for the number of lanes by len()")
        return length

    def dim(self) -> Any:
        return len(self._sizes()[0])

    def size(self, dim: int | None = None) -> Any:
        first, second = self._sizes()
        dims = range(len(first)) if dim is None else [dim]
        method = "call_method"
        sizes = [
            first[d]
            if first[d] == second[d]
            else self.tracer.create_proxy(method, "size", (self, d), {})
            for d in dims
        ]
        return tuple(sizes) if dim is None else sizes[0]

    def _sizes(self) -> list[tuple[int, ...]]:
        if value_of(self.node).shape is None:
            raise NoPartsError(f"{users_line()} asks for the size of what is no tensor")
        sizes: list[tuple[int, ...]] = self.node.meta["sizes"]
        return sizes

    def __str__(self) -> str:
        raise NoPartsError(f"{users_line()} makes a text of a value")

    def __format__(self, spec: str) -> str:
        return str(self)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is computed of a buffer is computed again at each call

    def __init__(self, examples: tuple[list[Tensor], list[Tensor]]) -> None:
        super().__init__()
        self._examples, self.num_leaves = examples, len(examples[0])
        self._num_placed, self._lanes = 0, len(examples[0][0])
        self._thread = threading.get_ident()
        self.is_evaluating = False

    def is_others(self) -> bool:
        """Whether the call that arrived is none of the step that is traced."""
        return self.is_evaluating or threading.get_ident() != self._thread

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **m: Any
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *more, **m)
        node.meta["line"] = users_line()
        if kind != "output":
            self.is_evaluating = True
            try:
                node.meta["examples"] = first, second = self._evaluated(node)
                node.meta["value"] = known_value(first, second, _is_constant(node), self._lanes)
                node.meta["sizes"] = [tuple(getattr(each, "shape", ())) for each in (first, second)]
            finally:
                self.is_evaluating = False
        return node

    def _evaluated(self, node: fx.Node) -> tuple[Any, Any]:
        if node.op == "placeholder":
            self._num_placed += 1
            first, second = (each[self._num_placed - 1] for each in self._examples)
            return first, second
        found = []
        for which in (0, 1):
            example: Any = functools.partial(_example, which=which)
            args, kwargs = (fx.node.map_arg(each, example) for each in (node.args, node.kwargs))
            try:
                found.append(self._run(node, args, kwargs))
            except Exception as error:
                text = " ".join(str(error).split())[:200]
                why = "another number of lanes: " if which else ""
                raise NoPartsError(f"{line_at(node)} fails for {why}{text}") from error
        return found[0], found[1]

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        owner: Any = self.root
        for name in str(node.target).split("."):
            owner = getattr(owner, name)
        return owner(*args, **kwargs) if node.op == "call_module" else owner

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_others():
            return forward(*args, **kwargs)
        result = super().call_module(m, forward, args, kwargs)
        return _opened(result) if isinstance(result, fx.Proxy) else result  # a tuple is one

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.is_others():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if items := value_of(obj.node).items:
            item: Any = obj
            return iter([item[i] for i in range(len(items))])
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        is_equality = obj.node.target in (operator.eq, operator.ne)
        sizes = [[n.meta["examples"][which] for n in obj.node.all_input_nodes] for which in (0, 1)]
        # Two numbers of lanes that are equal for both are so for any.
        if is_equality and all(len(s) == 2 and type(s[0]) is int and s[0] == s[1] for s in sizes):
            return obj.node.target is operator.eq
        return super().to_bool(obj)


class _Concrete(TorchFunctionMode):
    """While entered, computing with tensors that are not traced raises `NoPartsError`."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (args, kwargs)
        is_inside = self._tracer.is_evaluating or getattr(func, "__name__", "") == "__hash__"
        if is_inside or any(isinstance(leaf, fx.Proxy) for leaf in iterate_leaves(given)):
            return func(*args, **kwargs)
        if func in _MAKES_TENSOR and not tensors_of(given):
            return self._tracer.create_proxy("call_function", func, args, kwargs)
        name = getattr(func, "__name__", func)
        raise NoPartsError(
            f"{users_line()} calls {name} on a tensor that the trace does not follow"
        )


def _example(node: fx.Node, which: int) -> Any:
    return node.meta["examples"][which]


def _is_constant(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return False
    if node.target is getattr and node.args[1] in ("dtype", "device"):
        return True
    return all(value_of(each).is_constant for each in node.all_input_nodes)
