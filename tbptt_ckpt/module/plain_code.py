"""Whether a step's code says all that it depends on, so that a trace of it loses nothing.

What is traced runs the branches of the trace, and reads what is no tensor once. So a step may
be traced unasked only if its code is an expression of its arguments and of the module: it calls
layers, functions of torch and methods of tensors, and branches on what is None or a container.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from tbptt_ckpt.module.step_effects import NoPartsError

_NUMBERS = (int, float, bool, str, type(None))
_CONTAINERS = frozenset({"tuple", "list", "dict"})
_BUILTINS = _CONTAINERS | {"len"}
_STATEMENTS = (ast.Return, ast.Assign, ast.AnnAssign, ast.If, ast.Expr, ast.Pass)
_EXPRESSIONS = (
    *(ast.Tuple, ast.List, ast.Dict, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.IfExp),
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.Call, ast.Starred, ast.Compare),
)


def check_plain(module: nn.Module) -> None:
    """Raise `NoPartsError` for the first line that depends on more than is seen in it."""
    for part in module.modules():
        for owner in type(part).__mro__:
            if owner.__module__.startswith("torch."):
                break
            forward = vars(owner).get("forward")
            if forward is not None:
                _Checked(part, forward).check()


class _Checked:
    """One forward of one module."""

    def __init__(self, part: nn.Module, forward: object) -> None:
        if not isinstance(forward, FunctionType):
            raise NoPartsError(f"forward of {type(part).__name__} is no plain function")
        self._part, self._forward = part, forward
        try:
            (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
        except (OSError, SyntaxError, TypeError, ValueError) as error:
            raise NoPartsError(f"forward of {type(part).__name__} has no source") from error
        if not isinstance(function, ast.FunctionDef) or function.decorator_list:
            raise NoPartsError(f"forward of {type(part).__name__} is decorated, or none of a class")
        self._function, arguments = function, function.args
        names = [*arguments.posonlyargs, *arguments.args]
        is_simple = not (arguments.vararg or arguments.kwarg or arguments.kwonlyargs)
        self._self, self._locals = names[0].arg, {each.arg for each in names[1:]}
        if not is_simple or not all(isinstance(d, ast.Constant) for d in arguments.defaults):
            self._refuse(function, "takes more than positional arguments")

    def check(self) -> None:
        self._check_all(self._function.body)

    def _refuse(self, node: ast.stmt | ast.expr, what: str) -> None:
        code = self._forward.__code__
        line = code.co_firstlineno + node.lineno - 1
        raise NoPartsError(f"{Path(code.co_filename).name}:{line} {what}")

    def _check_all(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if not isinstance(statement, _STATEMENTS):
                self._refuse(statement, "is more than assignments of expressions")
            if isinstance(statement, ast.If):
                self._check_test(statement.test)
                self._check_all(statement.body)
                self._check_all(statement.orelse)
                continue
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and not isinstance(value, ast.Constant):
                self._refuse(statement, "calls something for its effect")
            if value is not None:
                self._check_expression(value)
            for name in _targets_of(statement):
                if not isinstance(name, ast.Name):
                    self._refuse(statement, "assigns to more than names")
                else:
                    self._locals.add(name.id)

    def _check_test(self, test: ast.expr) -> None:
        """A branch on whether an argument or what was made of it is None, or a container."""
        match test:
            case ast.Compare(ast.Name(name), [ast.Is() | ast.IsNot()], [ast.Constant()]):
                is_plain = name in self._locals
            case ast.Call(ast.Name("isinstance"), [ast.Name(name), ast.Name(kind)], []):
                is_plain = name in self._locals and kind in _CONTAINERS
            case _:
                is_plain = False
        if not is_plain:
            self._refuse(test, "branches on more than None and containers")

    def _check_expression(self, node: ast.expr) -> None:
        if not isinstance(node, _EXPRESSIONS):
            self._refuse(node, f"has a {type(node).__name__.lower()}")
        if isinstance(node, ast.IfExp):
            self._check_test(node.test)
            inner: list[ast.expr] = [node.body, node.orelse]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "super().forward":
            inner = [*node.args, *(each.value for each in node.keywords)]
        elif isinstance(node, ast.Name | ast.Attribute) and self._begins_outside(node):
            self._check_outside(node, is_called=False)
            return
        else:
            inner = [each for each in _inside(node) if isinstance(each, ast.expr)]
            if isinstance(node, ast.Call) and self._begins_outside(node.func):
                self._check_outside(node.func, is_called=True)
                inner.remove(node.func)
        for each in inner:
            self._check_expression(each)

    def _begins_outside(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id not in self._locals

    def _check_outside(self, node: ast.expr, *, is_called: bool) -> None:
        """A name that is no local one, with the attributes that are taken of it.

        Under another name a module's attributes would not be seen, so that it is only called.
        """
        whole, path = node, list[str]()
        while isinstance(node, ast.Attribute):
            path.insert(0, node.attr)
            node = node.value
        assert isinstance(node, ast.Name), "it begins with a name"
        if node.id == self._self:
            found: Any = self._part
        elif node.id in self._forward.__globals__:
            found = self._forward.__globals__[node.id]
            is_torchs = isinstance(found, ModuleType) and found.__name__.split(".")[0] == "torch"
            if not is_torchs and not isinstance(found, _NUMBERS):
                self._refuse(node, f"uses {node.id}, which is no module of torch and no number")
        elif node.id in _BUILTINS and not path:
            return
        else:
            self._refuse(node, f"uses {node.id}")
        for name in path:
            found = self._taken(node, found, name)
            if found is None or isinstance(found, Tensor):
                return
        if isinstance(found, nn.Module) and not (is_called and path):
            self._refuse(whole, "gives a module another name, or to somebody else")

    def _taken(self, node: ast.expr, owner: Any, name: str) -> Any:
        if isinstance(owner, ModuleType):
            found = getattr(owner, name, None)
            return found if isinstance(found, ModuleType) else None
        if not isinstance(owner, nn.Module):
            return None
        for held in (owner._modules, owner._parameters, owner._buffers):
            if name in held:
                return held[name]
        if not isinstance(vars(owner).get(name, owner), _NUMBERS):
            self._refuse(node, f"uses {name}, which is no layer, weight, buffer or number of it")
        return None


def _targets_of(statement: ast.stmt) -> Iterator[ast.expr]:
    left = list[ast.expr]()
    if isinstance(statement, ast.Assign):
        left += statement.targets
    elif isinstance(statement, ast.AnnAssign):
        left.append(statement.target)
    for target in left:  # grows
        if isinstance(target, ast.Tuple | ast.List):
            left += target.elts
        else:
            yield target


def _inside(node: ast.expr) -> Iterator[ast.AST]:
    for each in ast.iter_child_nodes(node):
        yield each.value if isinstance(each, ast.keyword) else each
