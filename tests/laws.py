"""What breaks a law of the house, found in source text with `ast`.

Imports inside functions and under `TYPE_CHECKING` count as well.
"""

from __future__ import annotations

import ast
import graphlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from torch.utils._device import _device_constructors

import tbptt_ckpt

PACKAGE = Path(tbptt_ckpt.__file__).parent
NAME = PACKAGE.name
MODULE_LINES, FUNCTION_LINES, TEST_LINES, ROOT_NAMES = 300, 60, 600, 40

# Rooms from the ground up. A room is a module or a package of this name; it imports from
# floors below its own only, so that rooms of one floor do not know each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("arguments", "devices"),
    ("schedule", "memory", "module"),
    ("planner", "data", "updates", "snapshot", "time_batching"),
    ("executor",),
    ("budget",),
    ("engine",),
    ("trainer", "profiling"),
    (NAME,),  # the package itself: its public names
    ("integrations",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Integers and floats in, plain data out.
PURE = ("errors", "arguments", "schedule", "planner")
# Gives an account of its own of what is planned; `fastest` alone knows both.
SIMULATOR, BOTH = f"{NAME}.schedule.simulator", f"{NAME}.planner.fastest"
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "base"}

# Attributes that others mean to be assigned from outside.
GIVEN_OUT = {
    *("grad", "requires_grad", "training", "data", "_metadata"),  # torch's tensors and modules
    "deterministic",  # torch.backends.cudnn
    *("restype", "argtypes"),  # functions of ctypes
    "showwarning",  # of `warnings`
    "default_map",  # of a command's context
    "output",  # of an Ignite engine's state
}
# What a default device (`torch.set_default_device`) changes.
MAKERS = {f"torch.{function.__name__}" for function in _device_constructors()}
# `ctx` carries values from forward to backward; a thread's own is its module's.
OWN = {"self", "cls", "ctx", "_thread", "_this_thread"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def text_of(module: str) -> str:
    return modules()[module].read_text(encoding="utf-8")


@cache
def imports_of(module: str) -> frozenset[str]:
    """Dotted names of the modules that a module imports, the package's and all others."""
    is_package = modules()[module].name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    return frozenset(imports_in(text_of(module), package))


def imports_in(text: str, package: str) -> Iterator[str]:
    """The modules that a text inside a package imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = package.split(".")
                anchor = ".".join(parts for parts in parents[: len(parents) - node.level + 1])
                origin = f"{anchor}.{origin}" if origin else anchor
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if name in modules() else origin


def room(module: str) -> str:
    """`tbptt_ckpt.executor.spans` is in the room `executor`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_ours(module: str) -> bool:
    return module.split(".")[0] == NAME


def upward(module: str, imports: Iterable[str]) -> list[str]:
    """Imports of another room that is not on a floor below."""
    own = room(module)
    others = {i for i in imports if is_ours(i) and room(i) != own}
    return sorted(i for i in others if FLOOR_OF[room(i)] >= FLOOR_OF[own])


def impure(imports: Iterable[str]) -> list[str]:
    """Imports that arithmetic does without: torch, and rooms that are not pure."""
    return sorted(i for i in imports if i.split(".")[0] == "torch" or _leaves_arithmetic(i))


def _leaves_arithmetic(imported: str) -> bool:
    return is_ours(imported) and room(imported) not in PURE


def acquainted(imports: Mapping[str, Collection[str]]) -> list[str]:
    """Modules of planner and simulator that know the other one."""
    return sorted(
        module
        for module, imported in imports.items()
        if (room(module) == "planner" and module != BOTH and SIMULATOR in imported)
        or (module == SIMULATOR and any(room(i) == "planner" for i in imported))
    )


def check_no_circle(imports: Mapping[str, Collection[str]]) -> None:
    """Raise CycleError, which shows the circle."""
    graphlib.TopologicalSorter(imports).prepare()


def long_functions(text: str, *, is_command: bool = False) -> list[str]:
    """Functions above the limit; a docstring does not count, nor a command's signature."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            lines = node.end_lineno - node.lineno + 1
            if is_command:
                lines -= first.lineno - node.lineno
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(node.name)
    return found


def outside_assignments(text: str) -> set[str]:
    """Attributes that are assigned on another object than `self` or `cls`, in any way."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            if ast.unparse(node.value) not in OWN and node.attr not in GIVEN_OUT:
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and _sets_attribute(node):
            found.add(ast.unparse(node))
    return found


def without_device(text: str) -> list[str]:
    """Tensors that are made on whatever device is the user's default."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in MAKERS
        and all(keyword.arg != "device" for keyword in node.keywords)
    ]


def _sets_attribute(call: ast.Call) -> bool:
    name = ast.unparse(call.func).rpartition(".")[2]
    if name not in {"setattr", "delattr", "__setattr__", "__delattr__"}:
        return False
    return not call.args or ast.unparse(call.args[0]) not in OWN


def misplaced_tests(tests: Iterable[Path]) -> list[str]:
    """Test files, relative to `tests/`, in no folder of a room; those beside them test it all."""
    return [str(p) for p in tests if len(p.parts) > 1 and p.parts[0] not in {*FLOOR_OF, "visits"}]


def ruff_order(name: str) -> tuple[int, str]:
    """RUF022 sorts as isort does: CONSTANTS, then Classes, then functions."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


def is_in_order(names: Iterable[str]) -> bool:
    """Whether names are sorted, each of them once."""
    return list(names) == sorted(set(names), key=ruff_order)


def undocumented(item: object, name: str) -> list[str]:
    """The item and its public members, as far as they say nothing."""
    found = [] if _own_doc(item) else [name]
    members = vars(item).items() if inspect.isclass(item) else ()
    for member, value in members:
        is_code = inspect.isfunction(value) or isinstance(
            value, property | classmethod | staticmethod
        )
        if is_code and not member.startswith("_") and not inspect.getdoc(value):
            found.append(f"{name}.{member}")
    return found


def _own_doc(item: object) -> str | None:
    """The docstring, unless a dataclass made it up from the signature."""
    doc = vars(item).get("__doc__") if inspect.isclass(item) else item.__doc__
    generated = inspect.isclass(item) and (doc or "").startswith(f"{item.__name__}(")
    return None if generated else doc


def promised_to_checkers(module: ModuleType) -> dict[str, str]:
    """Names that type checkers see, and the module that each comes from."""
    (block,) = [
        node
        for node in ast.parse(text_of(module.__name__)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {alias.name: str(node.module) for node in block.body for alias in node.names}
