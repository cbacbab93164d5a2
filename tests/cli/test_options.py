"""Options of commands: each stands once, in a configuration, and arrives as it is written."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from tbptt_ckpt.arguments import check_positive_int
from tbptt_ckpt.cli.options import SIZE, WHOLE_NUMBERS, Command, Configuration, Default
from tbptt_ckpt.cli.plan.config import PlanningConfig
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Options(Configuration):
    """One of each kind."""

    where: Annotated[Path | None, "A file.", Default("nowhere")] = None
    num_steps: Annotated[int, "Steps.", check_positive_int] = 3
    sizes: Annotated[tuple[int, ...], "Sizes.", WHOLE_NUMBERS, check_positive_int] = (1,)
    most: Annotated[int | None, "A size.", SIZE] = None
    quick: Annotated[bool, "Be quick."] = False


def run(configuration: type[Any], words: list[str]) -> list[Any]:
    """What the command is called with."""
    called: list[Any] = []

    def act(config: Any, *, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        """Note the call."""
        called.extend([config, loud])

    app = typer.Typer(add_completion=False)
    app.command("act")(Command(configuration, act))
    typer.main.get_command(app).main(words, standalone_mode=False)
    return called


def test_an_empty_path_is_none_and_not_the_working_directory() -> None:
    from tbptt_ckpt.cli.app import app

    command: Any = typer.main.get_command(app)
    told, paths = 0, ("PATH", "DIRECTORY", "FILE")
    for name, each in command.commands.items():
        required = [p for p in each.params if p.param_type_name == "argument" and p.required]
        for parameter in (p for p in each.params if p.metavar in paths):
            words = ["" if p is parameter else "x" for p in required]
            words += [] if parameter in required else [parameter.opts[0], ""]
            with pytest.raises(Exception, match="it is empty; write the path") as caught:
                each.make_context(name, words)
            assert caught.value.exit_code == 2  # type: ignore[attr-defined]
            assert caught.value.param is parameter  # type: ignore[attr-defined]
            told += 1
    assert told >= 12
    assert run(Options, ["--where", "."])[0].where == Path()


@pytest.mark.parametrize("configuration", [Options, TrainingConfig, PlanningConfig, ProfileConfig])
def test_without_options_a_configuration_has_its_defaults(configuration: type[Any]) -> None:
    assert run(configuration, []) == [configuration(), False]


def test_options_arrive_beside_the_commands_own() -> None:
    words = [
        "--where",
        "f",
        "--num-steps",
        "5",
        "--sizes",
        "7,8",
        "--most",
        "2KiB",
        "--quick",
        "--loud",
    ]
    expected = Options(where=Path("f"), num_steps=5, sizes=(7, 8), most=2048, quick=True)
    assert run(Options, words) == [expected, True]


@pytest.mark.parametrize("configuration", [TrainingConfig, PlanningConfig, ProfileConfig])
def test_help_names_every_option_with_its_text(
    configuration: type[Any], capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    run(configuration, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    for field in fields(configuration):
        if field.name == "given":
            continue
        name = f"--{field.name.replace('_', '-')}"
        assert any(name in line and "." in line for line in lines), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sizes 7,none", "--sizes 7,none is no list of whole numbers"),
        ("--sizes ,", "--sizes names nothing"),
        ("--most lots", "--most='lots' is not a size"),
    ],
)
def test_text_that_cannot_be_read_names_its_option(words: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(Options, words.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"num_steps": 0}, "--num-steps=0 must be"), ({"sizes": (2, 0)}, "--sizes=0 must be")],
)
def test_values_that_cannot_work_name_their_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Options(**given).check()
    Options().check()
