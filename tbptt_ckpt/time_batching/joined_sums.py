"""Sums of products in the graph of a compiled block of steps, joined into one product each.

NOTE [What a compiler leaves apart]
The gradient of a weight is a sum over steps of `g.T @ x`, which no compiler joins: it is the
product of all `g` and all `x` below each other. That of a bias is the sum of all rows of `g`. What
is then left from step to step are the products with the state, and with the gradient that goes
back. Products of the inputs are left too: the parts of one result would be read at another offset
by each step, which would have machine code of its own to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_Operand = tuple[fx.Node, bool]  # a matrix, and whether it is meant transposed


def join_sums(graph: fx.Graph) -> None:
    """Rewrite a graph of ATen operations, forward and backward together, in place."""
    for total in list(_sums(graph)):
        _join_sum(graph, total)
    graph.eliminate_dead_code()
    graph.lint()


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _calls(node: object, *targets: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _is_transpose(node: fx.Node) -> bool:
    if _calls(node, _aten.t.default):
        return _value(node).dim() == 2
    if _calls(node, _aten.permute.default):
        return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    dims = node.args[1:3]
    return _calls(node, _aten.transpose.int) and {*dims} in ({0, 1}, {-2, -1})


def _without_transposes(node: fx.Node) -> _Operand:
    is_transposed = False
    while _is_transpose(node):
        (node, *_), is_transposed = node.args, not is_transposed  # type: ignore[assignment]
    return node, is_transposed


def _is_plain_sum(node: object) -> bool:
    """Whether a node adds two tensors of one shape."""
    if not (isinstance(node, fx.Node) and _calls(node, _aten.add.Tensor)) or node.kwargs:
        return False
    one, other = node.args[:2]
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return False
    return _value(one).shape == _value(other).shape


def _sums(graph: fx.Graph) -> Iterator[fx.Node]:
    """The sums that are part of no other."""
    for node in graph.nodes:
        if not _is_plain_sum(node):
            continue
        last = node
        while len(last.users) == 1 and _is_transpose(next(iter(last.users))):
            last = next(iter(last.users))
        if not (len(last.users) == 1 and _is_plain_sum(next(iter(last.users)))):
            yield node


def _terms(total: fx.Node) -> Iterator[_Operand]:
    """What a sum adds up, and whether transposed; what others need too is a term as it is."""
    left: list[_Operand] = [(each, False) for each in reversed(total.all_input_nodes)]
    if len(left) == 1:  # x + x
        left *= 2
    while left:
        node, is_transposed = left.pop()
        is_ours = len(node.users) == 1
        if is_ours and _is_transpose(node):
            left.append((node.all_input_nodes[0], not is_transposed))
        elif is_ours and _is_plain_sum(node) and len(node.all_input_nodes) == 2:
            left += [(each, is_transposed) for each in reversed(node.all_input_nodes)]
        else:
            yield node, is_transposed


def _join_sum(graph: fx.Graph, total: fx.Node) -> None:
    products: list[tuple[_Operand, _Operand]] = []
    summed: list[fx.Node] = []
    rest: list[_Operand] = []
    for node, is_transposed in _terms(total):
        rows = _summed_rows(node)
        if len(node.users) == 1 and _calls(node, _aten.mm.default):
            products.append(_operands(node, is_transposed))
        elif rows is not None and _value(total).dim() == 1:
            summed.append(rows)
        else:
            rest.append((node, is_transposed))
    if len(products) < 2 and len(summed) < 2:
        return
    with graph.inserting_before(total):
        parts = [_as_meant(graph, each) for each in rest]
        if products:
            left = [_as_meant(graph, (node, not flipped)) for (node, flipped), _ in products]
            right = [_as_meant(graph, each) for _, each in products]
            of_all = _new(graph, _aten.permute.default, _joined(graph, left), [1, 0])
            parts.append(_new(graph, _aten.mm.default, of_all, _joined(graph, right)))
        if summed:
            parts.append(_new(graph, _aten.sum.dim_IntList, _joined(graph, summed), [0]))
        made = parts[0]
        for part in parts[1:]:
            made = _new(graph, _aten.add.Tensor, made, part)
    total.replace_all_uses_with(made)


def _operands(product: fx.Node, is_transposed: bool) -> tuple[_Operand, _Operand]:
    """The two factors of a product, or of its transpose."""
    (a, a_flipped), (b, b_flipped) = (_without_transposes(each) for each in product.args)  # type: ignore[arg-type]
    if is_transposed:
        return (b, not b_flipped), (a, not a_flipped)
    return (a, a_flipped), (b, b_flipped)


def _summed_rows(node: fx.Node) -> fx.Node | None:
    """The matrix of whose rows a node is the sum; None of others."""
    if len(node.users) == 1 and _calls(node, _aten.view.default, _aten.reshape.default):
        node = node.all_input_nodes[0]
    if len(node.users) != 1 or not _calls(node, _aten.sum.dim_IntList) or node.kwargs:
        return None
    rows = node.all_input_nodes[0]
    return rows if list(node.args[1]) == [0] and _value(rows).dim() == 2 else None  # type: ignore[arg-type]


def _joined(graph: fx.Graph, rows: Sequence[fx.Node]) -> fx.Node:
    """Matrices below each other; the same for the same ones."""
    for user in rows[0].users:
        if _calls(user, _aten.cat.default) and [*user.args] == [[*rows], 0]:
            return user
    return rows[0] if len(rows) == 1 else _new(graph, _aten.cat.default, [*rows], 0)


def _as_meant(graph: fx.Graph, operand: _Operand) -> fx.Node:
    node, is_transposed = operand
    return _new(graph, _aten.permute.default, node, [1, 0]) if is_transposed else node


def _new(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, _value))
    return node
