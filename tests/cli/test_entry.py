"""The way in: quick help, the version, what is missing, and what a bug report needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tbptt_ckpt.cli.app import main

NO_TORCH = """
import contextlib, io, sys
from tbptt_ckpt.cli.app import main
with contextlib.redirect_stdout(io.StringIO()):
    for words in (["--help"], ["--version"], *([name, "--help"] for name in sys.argv[1:])):
        assert main(words) == 0, words
print(*sorted({"torch", "numpy", "psutil", "matplotlib"} & set(sys.modules)))
"""
COMMANDS = ("train", "plan", "profile", "snapshots", "init", "doctor")


def test_help_and_version_need_no_torch() -> None:
    command = [sys.executable, "-c", NO_TORCH, *COMMANDS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", [["typer"], ["rich"], ["typer", "rich"]])
def test_without_the_extra_one_line_says_how_to_get_it(missing: list[str]) -> None:
    script = f"""
    import sys
    class Hidden:
        def find_spec(self, name, *_):
            if name in {missing!r}:
                raise ModuleNotFoundError(name)
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name in {missing!r} else found(name)
    sys.meta_path.insert(0, Hidden())
    from tbptt_ckpt.cli.entry import main
    sys.exit(main())
    """
    lines = "\n".join(line.removeprefix("    ") for line in script.splitlines())
    run = subprocess.run(
        [sys.executable, "-c", lines, "train"], capture_output=True, text=True, check=False
    )
    needed = " and ".join(missing)
    line = f"tbptt-ckpt: the command line needs {needed}: pip install 'tbptt-ckpt[cli]'\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", line)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tbptt-ckpt {version('tbptt-ckpt')}\n"


def test_from_a_tree_that_is_not_installed_all_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", find)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "tbptt-ckpt unknown: it is not installed\n"
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tbptt_ckpt"], found["torch"]) == ("unknown", torch.__version__)


def test_a_doctor_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert 0 < found["devices"][0]["free_bytes"] <= found["memory_available_bytes"]
    assert found["missing_of_extras"]["cli"] == []
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for words in (torch.__version__, found["processor"], "free on cpu", "extra plots"):
        assert words in printed


def test_shells_are_offered_completion(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out


def test_tables_have_no_colour_where_none_is_wanted_and_80_columns_without_a_terminal(
    tmp_path: Path,
) -> None:
    by_hand = ["--state-bytes", "64KiB", "--step-bytes", "230KB", "--budget", "4MiB"]
    command = [sys.executable, "-m", "tbptt_ckpt", "plan", *by_hand]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"NO_COLOR": "1", "PATH": ""}
    )
    assert "\x1b" not in run.stdout + run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_a_resumed_run_says_from_where_and_a_finished_one_that_it_was(
    capsys: pytest.CaptureFixture[str], small: list[str], tmp_path: Path
) -> None:
    words = [*small, "--snapshot-dir", str(tmp_path / "runs"), "--snapshot-every", "32"]
    words += ["--tensorboard", str(tmp_path / "tb")] if has_tensorboard() else []
    assert main([*words, "--max-steps", "32"]) == 0
    assert " at step " not in capsys.readouterr().out
    assert main([*words, "--max-steps", "64", "--resume"]) == 0
    assert re.search("resumed +at step 32 of 64", capsys.readouterr().out)
    assert main([*words, "--max-steps", "64", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_step"] == 64
    assert main([*words, "--max-steps", "64", "--resume"]) == 0
    assert "at step 64, finished before" in capsys.readouterr().out
    if has_tensorboard():
        assert list((tmp_path / "tb").glob("events.out*"))


def has_tensorboard() -> bool:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True
