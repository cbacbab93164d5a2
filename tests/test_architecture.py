"""The tree of the package: who may import whom, what is pure, what is public.

Read from the source with `ast`, so that imports inside functions and under `TYPE_CHECKING`
count as well.
"""

from __future__ import annotations

import ast
import graphlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tbptt_ckpt

PACKAGE = Path(tbptt_ckpt.__file__).parent

# Rooms from the ground up. A room is a module or a package of this name; it imports from
# layers below its own only, so that rooms of one layer do not know each other. Some are yet to
# be built.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    (
        "windows",
        "schedule",
        "costs",
        "state",
        "hooks",
        "report",
        "environment",
        "optimizer_calls",
        "outputs",
    ),
    ("nesting", "simulator", "trace", "plots"),
    ("fixed_schedules", "predictions", "accumulation"),
    ("planner", "snapshot", "randomness"),
    ("undo",),
    ("modules", "losses", "sources", "buffers", "updates", "memory"),
    ("strategies", "ambient", "blocks"),
    ("resets",),
    ("plans", "packing", "task", "stored_blocks"),
    ("planning", "shrinking", "events"),
    ("budget_ladder",),
    ("results", "readers", "records", "sinks"),
    ("time_batching",),
    ("runner", "reading", "record_storage"),
    ("executor",),
    ("initial_state", "calibration", "window_meter", "budget"),
    ("window_plans",),
    ("settings",),
    ("passage", "evaluation"),
    ("sequence_run",),
    ("engine", "single_window", "measured_costs"),
    ("verification", "trainer", "profiling"),
    ("tbptt_ckpt",),  # the package itself: its public names
    ("cli",),
    ("__main__",),
)
LAYER_OF = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Integers and floats in, plain data out.
PURE = (
    *("errors", "windows", "schedule", "fixed_schedules", "strategies", "plans"),
    *("nesting", "predictions", "planner", "simulator", "planning", "budget_ladder", "costs"),
    *("report", "trace"),
)
# Rooms that give two independent accounts of one thing.
STRANGERS = (("planner", "simulator"), ("predictions", "simulator"))
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "base"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports_of(module: str) -> frozenset[str]:
    """Dotted names of the modules that a module imports, the package's and all others."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(_imported_from(node, package))
    return frozenset(found)


def _imported_from(node: ast.ImportFrom, package: str) -> Iterator[str]:
    origin = node.module or ""
    if node.level:
        parents = package.split(".")
        anchor = ".".join(parents[: len(parents) - node.level + 1])
        origin = f"{anchor}.{origin}" if origin else anchor
    for alias in node.names:
        name = f"{origin}.{alias.name}"
        yield name if name in modules() else origin


def room(module: str) -> str:
    """`tbptt_ckpt.executor.spans` is in the room `executor`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "tbptt_ckpt"


def room_imports() -> set[tuple[str, str]]:
    """All pairs (importing room, imported room)."""
    return {
        (room(module), room(imported))
        for module in modules()
        for imported in imports_of(module)
        if is_ours(imported) and room(imported) != room(module)
    }


def test_every_room_has_a_layer() -> None:
    rooms = {room(module) for module in modules()}
    assert sum(map(len, LAYERS)) == len(LAYER_OF), "a room stands in two layers"
    assert rooms - set(LAYER_OF) == set(), "say in LAYERS what they may import"


def test_imports_go_only_downwards() -> None:
    known = {(a, b) for a, b in room_imports() if {a, b} <= LAYER_OF.keys()}
    upwards = {(a, b) for a, b in known if LAYER_OF[b] >= LAYER_OF[a]}
    assert not upwards, f"(importing, imported): {sorted(upwards)}"


def test_modules_do_not_import_in_circles() -> None:
    graph = {module: imports_of(module) & modules().keys() for module in modules()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and shows the circle


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms_know_no_torch_and_only_pure_rooms(name: str) -> None:
    for module in [m for m in modules() if room(m) == name]:
        outside = {i.split(".")[0] for i in imports_of(module) if not is_ours(i)}
        assert "torch" not in outside, module
        ours = {room(i) for i in imports_of(module) if is_ours(i)}
        assert ours <= set(PURE), module


def test_rooms_that_check_each_other_do_not_import_each_other() -> None:
    for one, other in STRANGERS:
        assert not {(one, other), (other, one)} & room_imports()


def test_nothing_imports_the_command_line() -> None:
    assert {a for a, b in room_imports() if b == "cli"} <= {"__main__"}


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {part for module in modules() for part in module.split(".")}
    assert not names & NAMELESS


def ruff_order(name: str) -> tuple[int, str]:
    """RUF022 sorts as isort does: CONSTANTS, then Classes, then functions."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


def test_all_is_sorted_and_names_things_once() -> None:
    public = tbptt_ckpt.__all__
    assert list(public) == sorted(set(public), key=ruff_order)


def test_all_is_what_the_package_imports_into_its_own_namespace() -> None:
    namespace = {
        name
        for name, value in vars(tbptt_ckpt).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert namespace == set(tbptt_ckpt.__all__)


@pytest.mark.parametrize("name", tbptt_ckpt.__all__)
def test_public_names_are_documented(name: str) -> None:
    item = getattr(tbptt_ckpt, name)
    assert inspect.isclass(item) or inspect.isfunction(item)
    assert _own_doc(item), f"{name} has no docstring of its own"
    members = vars(item).items() if inspect.isclass(item) else ()
    for member, value in members:
        if member.startswith("_"):
            continue
        if inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod):
            assert inspect.getdoc(value), f"{name}.{member} has no docstring"


def _own_doc(item: object) -> str | None:
    """The docstring, unless a dataclass made it up from the signature."""
    doc = vars(item).get("__doc__") if inspect.isclass(item) else item.__doc__
    generated = inspect.isclass(item) and (doc or "").startswith(f"{item.__name__}(")
    return None if generated else doc


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_says_its_job(module: str) -> None:
    assert ast.get_docstring(ast.parse(modules()[module].read_text(encoding="utf-8")))


def test_the_package_ships_its_types() -> None:
    assert (PACKAGE / "py.typed").is_file()
