"""The command `tbptt-ckpt`: finds the subcommand, and turns errors into one line."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tbptt_ckpt.cli.commands import GIVEN, doctor, explain, init, plan, profile, snapshots, train
from tbptt_ckpt.cli.explain.config import ExplainConfig
from tbptt_ckpt.cli.options import Command
from tbptt_ckpt.cli.plan.config import PlanningConfig
from tbptt_ckpt.cli.profile.config import ProfileConfig
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.errors import TbpttError, TbpttWarning

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(name="tbptt-ckpt")
app.command("train")(Command(TrainingConfig, train))
app.command("plan")(Command(PlanningConfig, plan))
app.command("explain")(Command(ExplainConfig, explain))
app.command("snapshots")(snapshots)
app.command("profile")(Command(ProfileConfig, profile))
app.command("init")(init)
app.command("doctor")(doctor)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        own = "unknown: it is not installed"
        with suppress(PackageNotFoundError):
            own = version("tbptt-ckpt")
        typer.echo(f"tbptt-ckpt {own}")
        raise typer.Exit


@app.callback()
def about(
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Say the version."),
    ] = False,
) -> None:
    """Truncated backpropagation through time, recomputed from boundary states."""


@contextmanager
def usable_streams() -> Iterator[None]:
    """Let streams escape what they cannot show, and one that was closed lead nowhere.

    Its number would go to the next file that is opened, a snapshot too.
    """
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is None:
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect(nowhere))
            elif isinstance(stream, TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        yield


@usable_streams()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: `snapshots` found a broken one; 2: an error the user can mend, in one line on
    the standard error; 130 and 143: stopped by SIGINT or SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    GIVEN.set(given)
    try:
        with interruptible(), warnings_in_one_line():
            command = typer.main.get_command(app)
            code = command.main(given or ["--help"], prog_name="tbptt-ckpt", standalone_mode=False)
    except SystemExit as stopped:
        if not hasattr(stopped, "signum"):  # it is no signal that was heeded after a window
            raise
        print(f"tbptt-ckpt: {stopped}", file=sys.stderr)
        return int(stopped.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        message = describe(error)
        if message is None:
            raise
        # Options are wrong on all ranks alike; what else ends a run `as_rank` has told once.
        if not hasattr(error, "format_message") or os.environ.get("RANK", "0") == "0":
            print(f"tbptt-ckpt: {' '.join(message.split())}", file=sys.stderr)
        return USER_ERROR
    if code == INTERRUPTED:
        print("tbptt-ckpt: interrupted", file=sys.stderr)
    return int(code or 0)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print warnings as the command's own messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TbpttWarning)
        show = warnings.showwarning

        def print_line(message: Warning | str, *others: Any, **named: Any) -> None:
            if isinstance(message, TbpttWarning):
                print(f"tbptt-ckpt: warning: {' '.join(str(message).split())}", file=sys.stderr)
            else:
                show(message, *others, **named)

        warnings.showwarning = print_line
        yield


class Interrupted(KeyboardInterrupt):
    """SIGINT arrived.

    A plain KeyboardInterrupt that passes through code run by `exec`, as there is in torch's
    lazy imports, makes Python kill itself with SIGINT at the end, whoever caught it and
    whatever the exit code; a subclass does not.
    """


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT raise `Interrupted` while the context is open.

    So does an error that follows it: torch may be in the middle of an import, whose other parts
    then fail in ways of their own. Where it does not raise KeyboardInterrupt, it is left as it is:
    jobs in the background ignore it, and threads other than the main one never see it.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is not signal.default_int_handler:
        yield
        return

    arrived: list[object] = []

    def interrupt(number: int, _: object) -> NoReturn:
        arrived.append(number)
        raise Interrupted

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if arrived:
            raise Interrupted from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def describe(error: Exception) -> str | None:
    """What to tell the user; None for a defect, whose traceback is wanted."""
    if isinstance(error, TbpttError | OSError):
        return str(error)
    # Typer's errors about options: which package defines them depends on its version.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        return str(format_message()).replace("Value error, ", "")
    from tbptt_ckpt.memory.exhausted import is_out_of_memory  # which needs torch

    if is_out_of_memory(error):
        return "out of memory; a smaller --hidden, fewer --lanes or shorter leaves take less"
    return None
