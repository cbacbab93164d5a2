"""Pages of the site that are made when it is built (`mkdocs build -f .mkdocs.yml`).

README, changelog and benchmarks lie beside `docs/` and are pages too; the commands are what
`--help` prints; the API is what each room's `__all__` names; every example has a page.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import posixpath
import re
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
BESIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}  # and all of benchmarks/
# Whose names users may import, from what most programs use to what few do.
ROOMS = (
    *("engine", "data", "trainer", "profiling", "schedule", "planner"),
    *("budget", "memory", "module", "executor", "snapshot", "errors"),
)
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> None:
    """A page that nobody gave a place stands at the end."""
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    further = [page for page in pages if f"'{page}'" not in str(config.nav)]
    config.nav.extend([{"Further": further}] if further else [])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies beside `docs/`, and what is made."""
    for source, page in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    records = (ROOT / "benchmarks" / "results").iterdir()
    for path in (ROOT / "LICENSE", ROOT / "benchmarks" / "README.md", *records):
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    made = {"commands.md": commands(), "api/index.md": root_names()}
    for room in ROOMS:
        made[f"api/{room}.md"] = room_page(room)
    for path in sorted((ROOT / "docs" / "examples").glob("*.py")):
        code = path.read_text("utf-8")
        made[f"examples/{path.stem}.md"] = f"# {path.stem}\n\n````python\n{code}````\n"
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages."""
    here = page.file.src_uri
    source = {page: source for source, page in BESIDE.items()}.get(here)
    folder = posixpath.dirname(
        source or (here if here.startswith("benchmarks/") else f"docs/{here}")
    )

    def there(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1])).removeprefix("docs/")
        target = BESIDE.get(target, target)
        if target.startswith("examples/"):
            target = target.removesuffix(".py") + ".md"
        if target == "benchmarks/results":
            target = "benchmarks/README.md"
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return markdown if here.startswith("api/") else _LINK.sub(there, markdown)


def commands() -> str:
    """What `--help` prints, command by command."""
    from tbptt_ckpt.cli.app import app, main  # the only page that runs the package

    names = [command.name or "" for command in app.registered_commands]
    text = ["# Commands", "Errors are one line on the standard error, and the exit code is 2."]
    for arguments in ([], *([name] for name in names)):
        printed = io.StringIO()
        plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "TERMINAL_WIDTH": "100"}
        with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(printed):
            main([*arguments, "--help"])
        shown = "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())
        text += [f"## {' '.join(['tbptt-ckpt', *arguments])}", f"```text\n{shown}\n```"]
    return "\n\n".join(text)


def public_names(room: str) -> list[str]:
    """The `__all__` of a room, or of the root, without importing it."""
    package = ROOT / "tbptt_ckpt" / room
    path = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return list(ast.literal_eval(statement.value))
    return []


def room_page(room: str) -> str:
    """A page for the public names of a room."""
    names = (f"::: tbptt_ckpt.{room}.{name}" for name in public_names(room))
    return "\n\n".join([f"# tbptt_ckpt.{room}", *names])


def root_names() -> str:
    """The names at the root, by the room that describes them."""
    root = set(public_names(""))
    text = "# API\n\nWhat `from tbptt_ckpt import ...` offers, by the room where it lives. "
    text += (
        "The page of a room has its other names too: `from tbptt_ckpt.data import map_file`.\n\n"
    )
    for room in ROOMS:
        names = [name for name in public_names(room) if name in root]
        links = ", ".join(f"[`{name}`][tbptt_ckpt.{room}.{name}]" for name in names)
        text += f"- [`tbptt_ckpt.{room}`]({room}.md){': ' if links else ''}{links}\n"
        root -= set(names)
    if root:
        raise ValueError(f"no room describes {sorted(root)}")
    return text
