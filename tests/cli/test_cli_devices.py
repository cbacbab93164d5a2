"""What commands ask of a device before anything runs there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tbptt_ckpt.cli import models
from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.devices import ask_for_equal_bits, find_device


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_equal_bits_are_asked_for_on_cuda(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, "")  # which is put back
    monkeypatch.delenv(name) if given is None else monkeypatch.setenv(name, given)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    ask_for_equal_bits(torch.device("cpu"))
    assert os.environ.get(name) == given
    assert not torch.backends.cudnn.deterministic
    ask_for_equal_bits(torch.device("cuda"))
    assert os.environ.get(name) == (given or ":4096:8")
    assert torch.backends.cudnn.deterministic


@pytest.mark.parametrize("command", ["train", "plan", "profile"])
def test_every_command_asks_before_a_model_is_made(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Enough(Exception):
        """The model would be made now."""

    def build(*_: Any, **__: Any) -> None:
        raise Enough

    monkeypatch.setattr(models, "ask_for_equal_bits", asked.append)
    monkeypatch.setattr(models, "build_model", build)
    in_process = "tbptt_ckpt.cli.profile.job.ProcessBench"
    monkeypatch.setattr(in_process, lambda make, _: make())
    with pytest.raises(Enough):
        main([command])
    assert asked == [find_device(None)]
