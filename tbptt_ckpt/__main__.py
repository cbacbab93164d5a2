"""`python -m tbptt_ckpt` is the command `tbptt-ckpt`."""

from __future__ import annotations

import sys

from tbptt_ckpt.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
