"""First visits: what a newcomer types, from README and docs alone, runs at once and is right.

The expected weights come from plain loops over what a script had made before the package's part.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import naive_lanes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from tbptt_ckpt import TBPTT, Costs, InfeasibleBudgetError, TensorSequence, WindowResult
from tbptt_ckpt.cli.app import main
from tbptt_ckpt.profiling import StrategyReport

SCRIPTS = Path(__file__).parent / "scripts"
Made = dict[str, Any]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the scripts leave to torch is float64, so that they can be held against loops."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def begun(name: str) -> Made:
    """What a script has made before it comes to the package's part."""
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    made: Made = {}
    torch.manual_seed(0)
    exec(text.partition("\ntbptt = ")[0].partition("\ndef training_step")[0], made)
    return made


def done(name: str) -> Made:
    """What it has made in the end."""
    torch.manual_seed(0)
    return runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def check(name: str, train: Callable[[Made], None], tolerance: float = 1e-9) -> Made:
    """The script leaves the weights that `train` leaves, which are other than before."""
    made = begun(name)
    before = [weight.detach().clone() for weight in made["module"].parameters()]
    train(made)
    found = done(name)
    pairs = zip(found["module"].parameters(), made["module"].parameters(), before, strict=True)
    for ours, theirs, old in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert not torch.equal(theirs, old), "something was learned"
    return found


def windows(made: Made, k1: int, k2: int | None, steps: Any = None, **options: Any) -> None:
    """Updates after every window, one step after the other."""
    module, (inputs, targets) = made["module"], steps or (made["inputs"], made["targets"])

    def of_segments(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = module(x[None], state)
        return y[0], state

    problem = naive.Problem(
        step=of_segments if options.get("segments") else module,
        loss_fn=mse_loss,
        inputs=list(inputs),
        targets=list(targets),
        init_state=made.get("first"),
        parameters=list(module.parameters()),
    )
    for _ in naive.refresh(problem, k1, k2, optimizer=made["optimizer"]):
        pass


def once(made: Made, loss: Tensor) -> None:
    made["optimizer"].zero_grad()
    loss.backward()
    made["optimizer"].step()


def test_1_an_own_cell() -> None:
    check("own_cell", lambda made: windows(made, 50, 100))


def test_2_a_loader_of_whole_sequences() -> None:
    def train(made: Made) -> None:
        made["module"].batch_first = False
        for batch in [*made["loader"]] * 2:
            steps = [part.movedim(1, 0) for part in batch]
            windows(made, 20, 40, steps, segments=True)

    assert check("loader_of_sequences", train)["result"].num_epochs == 2


def test_3_a_training_step_of_a_framework() -> None:
    def train(made: Made) -> None:
        for _ in range(2):
            once(made, mse_loss(made["module"](made["inputs"])[0], made["targets"]))

    check("own_training_step", train)


def answer(capsys: pytest.CaptureFixture[str]) -> Made:
    """How far back the model in `mine.py` reaches within 300 KiB."""
    torch.set_default_dtype(torch.float32)
    model = f"{SCRIPTS / 'mine.py'}:make"
    assert main(["plan", "--model", model, "--budget", "300KiB", "--json"]) == 0
    found: Made = json.loads(capsys.readouterr().out)
    rows = found["reaches"][0]["rows"]
    longest = {row["longest_at_extra_forwards"]: row["k2"] for row in rows}
    return {**found, "longest": longest}


def test_4_how_far_back_fits_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    longest = answer(capsys)["longest"]
    assert longest[0] < longest[1] < longest[2]


@pytest.mark.exhaustive
def test_4_what_is_said_to_fit_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found, budget = answer(capsys), 300 << 10
    made = runpy.run_path(str(SCRIPTS / "mine.py"))["make"]()

    def window_of(k2: int) -> WindowResult:
        x, y = torch.randn(k2, 4, 8), torch.randn(k2, 4, 1)
        adam = torch.optim.Adam(made.module.parameters())
        costs = Costs.from_dict(found["costs"])
        options: dict[str, Any] = {"memory_budget": budget, "costs": costs, "measure_memory": True}
        tbptt = TBPTT(made.module, made.loss_fn, k2, k2, adam, **options)
        return next(tbptt.windows(TensorSequence(x, y), made.init_state))

    for extra in (0, 1, 2):
        assert (window_of(found["longest"][extra]).peak_bytes or budget + 1) <= budget
    with pytest.raises(InfeasibleBudgetError):
        window_of(2 * found["longest"][2])


def test_8_a_table_a_picture_and_plain_data(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    torch.set_default_dtype(torch.float32)
    report = done("profile_from_code")["report"]
    assert [row.strategy for row in report.rows] == ["retain", "sqrt"]
    assert report.rows[1].peak_bytes < report.rows[0].peak_bytes
    again = StrategyReport.from_json(Path("report.json").read_text(encoding="utf-8"))
    assert again.to_csv() == report.to_csv()
    assert {"retain", "sqrt"} <= set(capsys.readouterr().out.split())
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")


def test_5_a_long_file() -> None:
    torch.set_default_dtype(torch.float32)
    rows = np.sin(np.arange(32 * 300 + 1) / 7)
    np.save("signal.npy", rows)

    def train(made: Made) -> None:
        steps = torch.from_numpy(rows).float()
        lanes = [part.unfold(0, 300, 300).T[..., None] for part in (steps[:-1], steps[1:])]
        windows(made, 50, 100, lanes, segments=True)

    assert check("large_file", train, 1e-5)["result"].num_steps == 300


def test_6_episodes_and_a_reset_inside_of_one() -> None:
    def train(made: Made) -> None:
        begins = made["episodes"][0][0][25]

        def step(x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
            state = made["module"](x, None if torch.equal(x[0], begins) else state)
            return state, state

        problem = naive_lanes.LaneProblem(
            step=step,
            loss_fn=mse_loss,
            sequences=made["episodes"],
            initial=lambda _: None,
            parameters=list(made["module"].parameters()),
        )
        for _ in naive_lanes.train(problem, 3, 10, 20, optimizer=made["optimizer"]):
            pass

    check("episodes", train)


def test_7_the_forums_script() -> None:
    check("forum_pairs", lambda made: windows(made, 5, 9))


def test_7_output_that_is_fed_back() -> None:
    check("forum_feedback", lambda made: windows(made, 60, None))


def test_7_one_label_for_each_sequence() -> None:
    def train(made: Made) -> None:
        outputs, _ = made["module"](made["inputs"], None)
        once(made, cross_entropy(outputs[-1], made["label"]))

    check("forum_label", train)
