"""`tbptt-ckpt explain`: one page, the same as JSON, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_lines import outcome_of

from tbptt_ckpt import Costs, plan
from tbptt_ckpt.cli.app import main

SMALL = ["explain", "--model", "lstmcell", "--hidden", "12", "--lanes", "2", "--k1", "4"]
SMALL += ["--k2", "16", "--device", "cpu"]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(97, 123)) * 40)
    return ["--data", str(file)]


def test_the_json_holds_what_was_measured_and_what_it_costs(
    capsys: pytest.CaptureFixture[str], text: list[str]
) -> None:
    assert main([*SMALL, *text, "--json", "--windows", "1", "--tolerance", "0.01,0.5"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["k1"], found["k2"], len(found["decays"])) == (4, 16, 1)
    assert [reach["tolerance"] for reach in found["reaches"]] == [0.5, 0.01]
    lengths = [setting["k2"] for setting in found["settings"]]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == 16
    enough = {reach["within"]: reach["tolerance"] for reach in found["reaches"]}
    costs = Costs.from_dict(found["costs"])
    for setting in found["settings"]:
        if setting["tolerance"] is not None:
            assert setting["k2"] % 4 == 0
            assert any(
                tolerance == setting["tolerance"] and 0 <= setting["k2"] - within < 4
                for within, tolerance in enough.items()
                if within is not None
            )
        planned = plan(setting["k2"], costs, budget_bytes=found["budget_bytes"], new_steps=4)
        assert setting["predicted_peak_bytes"] == planned.predicted_peak_bytes
        assert setting["predicted_seconds"] == planned.predicted_seconds
        retained = plan(setting["k2"], costs, strategy="retain", new_steps=4)
        assert setting["retained_peak_bytes"] == retained.predicted_peak_bytes


def test_windows_are_priced_with_states_as_they_are_stored_and_reach_as_far(
    capsys: pytest.CaptureFixture[str],
    text: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tbptt_ckpt.cli.plan.job._MEASURING_SECONDS", 0.1)
    words = [*SMALL, *text, "--json", "--windows", "1"]
    stored = ["--offload", str(tmp_path), "--state-dtype", "bfloat16"]
    plain, found = (outcome_of(capsys, [*words, *more]) for more in ([], stored))
    assert plain["costs"]["kept_bytes"] is None
    assert (found["costs"]["kept_bytes"], found["costs"]["store_seconds"] > 0) == (0, True)
    assert found["decays"] == plain["decays"]  # of exact states, bit by bit
    assert found["what"] == f"{plain['what']}, with states in {tmp_path} in bfloat16"


def test_the_page_says_it_in_words_and_draws_it(
    capsys: pytest.CaptureFixture[str], text: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "reach.svg"
    assert main([*SMALL, *text, "--plot", str(picture)]) == 0
    page = capsys.readouterr().out
    for words in ("It reaches back", "Settings worth trying", "plain BPTT", "0.001"):
        assert words in page
    assert "steps back, and k2" in picture.read_text()
    assert main([*SMALL, *text, "--plot", str(picture)]) == 2
    assert "exists; add --force" in capsys.readouterr().err


EXPLODING = """
import torch
from torch import nn
from tbptt_ckpt import Workload


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1.3 * torch.linalg.qr(torch.randn(6, 6))[0])

    def forward(self, x, h):
        h = x + h @ self.weight.T
        return h, h


def make():
    x = 1e-3 * torch.randn(200, 2, 6)
    return Workload(Cell(), nn.functional.mse_loss, inputs=x, targets=x, init_state=x[0])
"""


def test_a_gradient_that_grows_is_called_exploding(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "exploding.py"
    file.write_text(EXPLODING)
    assert main(["explain", "--model", f"{file}:make", "--k1", "2", "--k2", "24"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "more than" in page
    assert "--k2 48 looks further back" in page
    assert "exploding gradients. No k2 is enough; what helps is clip_grad_norm" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k2", "3"], "--k2 3 is below --k1 4"),
        (["--tolerance", "0"], "--tolerance=0.0 must be a positive number"),
        (["--tolerance", "x"], "--tolerance x is no list"),
        (["--plot", "x.bmp"], "--plot x.bmp must end in .png or .svg"),
        (["--offload", "/absent"], "offload='/absent' must be a folder in which files can be"),
        (["--state-dtype", "int8"], "--state-dtype int8 is not one of bfloat16, float32"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_measured(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err
