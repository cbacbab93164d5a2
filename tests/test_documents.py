"""README and the pages under `docs/`: their code runs as it is written, their links lead somewhere.

A page is one program: its blocks run in their order, in an empty folder. What a reader need not see
stands before them in a comment that begins with `<!-- python`. Sections of `STAND_ALONE` pages are
programs of their own, since readers copy one of them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tbptt_ckpt.cli.app import main

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md")
)
STAND_ALONE = {Path("docs/recipes.md")}
_BLOCK = re.compile(r"^(?:<!-- python|```python)\n(.*?)\n(?:-->|```)$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"\btbptt-ckpt (\w+)((?: +[^\s`|&]+)*)")
_LINK = re.compile(r"\[(?:[^]\[]|\[[^]]*\])*\]\(([^)\s]+)\)")


def programs() -> Iterator[pytest.ParameterSet]:
    """Every page with code, or every section of it, line numbers as in the page."""
    for page in PAGES:
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        heads = [n for n, line in enumerate(lines) if line.startswith("## ")]
        starts = [0, *heads] if page in STAND_ALONE else [0]
        for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
            if code := program("\n".join(lines[start:stop]), start):
                yield pytest.param(page, code, id=f"{page}:{start + 1}")


def program(text: str, start: int = 0) -> str:
    """The code of a text that begins after `start` lines, every line of it where it stands."""
    code = [""] * (start + text.count("\n") + 1)
    for block in _BLOCK.finditer(text):
        first = start + text[: block.start(1)].count("\n")
        found = block[1].split("\n")
        code[first : first + len(found)] = found
    return "\n".join(code).rstrip()


@pytest.mark.parametrize(("page", "code"), list(programs()))
def test_code_runs_as_written(
    page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, str(ROOT / page), "exec"), {"__name__": "__main__"})


def test_hidden_and_shown_code_is_found_and_other_code_is_not() -> None:
    text = "a\n<!-- python\nx = 1\n-->\n\n```sh\nls\n```\n```python\ny = x\n```\n<!-- b -->"
    assert program(text, 2) == "\n" * 4 + "x = 1" + "\n" * 7 + "y = x"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page, (ROOT / page).read_text(encoding="utf-8"))


def test_a_dead_link_is_found() -> None:
    text = (
        "[a](README.md) [b](docs/no.md) [c](#none) [![d](docs/no.png)](docs/planning.md#references)"
    )
    found = ["docs/no.md", "#none", "docs/no.png"]
    assert sorted(dead_links(Path("README.md"), text)) == sorted(found)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_have_the_options_that_are_named(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    text = (ROOT / page).read_text(encoding="utf-8")
    for command, rest in _COMMAND.findall(text):
        if options := re.findall(r"--[a-z][a-z0-9-]*", rest):
            assert main([command, "--help"]) == 0
            printed = capsys.readouterr().out
            for option in options:
                assert re.search(rf"{option}\b", printed), f"{command} {option}"


def test_the_readme_is_short_and_its_commands_are_found() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    for command in ("main job", "tests"):
        assert re.search(rf"^<!-- {command} -->\n```sh\npython3.11 .*\n```$", text, re.MULTILINE)


def test_a_package_index_shows_no_link_to_a_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    hooks = _project()["tool"]["hatch"]["metadata"]["hooks"]
    for rule in hooks["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not list(_links(text))


def test_what_is_cited_is_this_version() -> None:
    cited = (ROOT / "docs" / "CITATION.cff").read_text(encoding="utf-8")
    project = _project()["project"]
    for key in ("version", "license"):
        assert f"\n{key}: {project[key]}\n" in cited
    assert f'- name: "{project["authors"][0]["name"]}"' in cited


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links of a page to a file, or to a heading of it, that is not there."""
    found = []
    for link in _links(text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        names = anchors(target.read_text("utf-8")) if anchor and target.is_file() else {""}
        if not target.exists() or anchor not in names:
            found.append(link)
    return found


def _links(text: str) -> Iterator[str]:
    without_code = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for picture in (r"!\[[^]]*\]\(([^)\s]+)\)", _LINK):
        for link in re.findall(picture, without_code):
            if not link.startswith(("http://", "https://", "mailto:")):
                yield link


def anchors(text: str) -> set[str]:
    """The names by which the headings of a page are linked to."""
    heads = re.findall(r"^#{1,6} +(.*?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
