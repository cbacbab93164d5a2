"""Every file under `docs/examples/` prints what stands at its top, as near as it says there."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGE = ROOT / "docs" / "examples.md"
QUICK = {"forum", "xlstm_layer"}  # the others take up to a minute
_TOP = re.compile(r"^    \$ python docs/examples/(\w+)\.py\n((?:    .*\n)+)", re.MULTILINE)
_NOISE = re.compile(r"^Elsewhere within (\d+) %", re.MULTILINE)
_EXTRA = re.compile(r"^    \$ pip install (\w+)$", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


@pytest.mark.filterwarnings("default")  # those of the libraries that examples use
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.exhaustive)
        for path in EXAMPLES
    ],
)
def test_prints_what_stands_at_its_top(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text(encoding="utf-8")
    for library in _EXTRA.findall(text):
        pytest.importorskip(library, reason=f"needs {library}, of tbptt-ckpt[examples]")
    runpy.run_path(str(path), run_name="__main__")
    assert agree(expected(text), capsys.readouterr().out, noise(text))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_says_what_it_prints_and_has_its_row(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rows = [
        row
        for row in PAGE.read_text("utf-8").splitlines()
        if f"]({path.parent.name}/{path.name})" in row
    ]
    assert [name for name, _ in _TOP.findall(text)] == [path.stem]
    assert 0 < noise(text) <= 30
    assert len(rows) == 1
    assert expected(text) in rows[0]
    assert "tbptt_ckpt._" not in text


def test_the_page_names_no_other_file() -> None:
    named = re.findall(r"\]\(examples/(\w+\.py)\)", PAGE.read_text("utf-8"))
    assert sorted(named) == [path.name for path in EXAMPLES]


@pytest.mark.parametrize(
    ("printed", "do_agree"),
    [
        ("loss 0.52 after 10 steps", True),
        ("loss 0.56 after 10 steps", False),
        ("loss 0.50 after 12 steps", False),
        ("loss nan after 10 steps", False),
        ("error 0.50 after 10 steps", False),
        ("loss 0.50", False),
    ],
)
def test_other_words_and_other_numbers_are_found(printed: str, do_agree: bool) -> None:
    assert agree("loss 0.50 after 10 steps", printed, 10) == do_agree


def expected(text: str) -> str:
    """The line that stands under the command at an example's top."""
    ((_, lines),) = _TOP.findall(text)
    return " ".join(lines.split())


def noise(text: str) -> int:
    """How many percent the numbers of an example may be off."""
    (percent,) = _NOISE.findall(text)
    return int(percent)


def agree(expected: str, printed: str, percent: int) -> bool:
    """Whether two lines have the same words, and numbers that are as near as that."""
    lines = [" ".join(line.split()) for line in (expected, printed)]
    words = [_NUMBER.sub("#", line) for line in lines]
    numbers = [[float(n.replace(",", "")) for n in _NUMBER.findall(line)] for line in lines]
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=percent / 100) for a, b in zip(*numbers, strict=True)
    )
