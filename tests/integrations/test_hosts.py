"""The libraries of others are imported where they are used, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.integrations.hosts import imported

IMPORTS = """
import sys
import tbptt_ckpt.integrations.ignite, tbptt_ckpt.integrations.lightning
import tbptt_ckpt.integrations.torchrl, tbptt_ckpt.integrations.trackers
import tbptt_ckpt.integrations.windowed
hosts = {"ignite", "lightning", "lightning_fabric", "pytorch_lightning", "accelerate", "wandb"}
hosts |= {"mlflow", "snntorch", "spikingjelly", "tensordict", "torchrl"}
print(sorted(hosts & {*sys.modules}))
"""


def test_adapters_import_no_library_before_it_is_used() -> None:
    printed = subprocess.check_output([sys.executable, "-c", IMPORTS], text=True, timeout=120)
    assert printed.strip() == "[]"


def test_a_library_that_is_missing_is_told_with_its_extra() -> None:
    with pytest.raises(ArgumentError, match=r"nohost is missing: pip install 'tbptt-ckpt\[more\]'"):
        imported("nohost.inside", "more")


def test_what_a_library_lacks_itself_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halfhost.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        imported("halfhost", "halfhost")
