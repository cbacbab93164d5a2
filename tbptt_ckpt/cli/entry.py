"""The way in: the command line, or one line that says what it needs."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> int:
    """Run `tbptt-ckpt`, or say how to get what it is made with."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        line = f"tbptt-ckpt: the command line needs {needed}: pip install 'tbptt-ckpt[cli]'"
        print(line, file=sys.stderr)
        return 2
    from tbptt_ckpt.cli.app import main as run

    return run()
