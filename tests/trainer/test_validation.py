"""Validation in a run: what it sees, what it keeps, when it ends, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tbptt_ckpt import TBPTT, ArgumentError, Batches, Snapshots, TensorSequence, Trainer, Validation
from tbptt_ckpt.trainer import JsonLines, TrainerResult

STEPS, LANES, WIDTH, K1 = 24, 2, 4, 3
# Losses on the other data, whatever the weights are: a dip, and then no progress.
COURSE = (3.0, 2.0, 2.5, 1.0, 1.5, 1.25, 4.0, 4.0)


def data(seed: int = 0) -> TensorSequence:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(STEPS, LANES, WIDTH, generator=generator).double() for _ in range(2))
    return TensorSequence(x, y)


class Drops(nn.Module):
    """Draws numbers, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        self.calls += 1
        return nn.functional.dropout(h, 0.3, self.training), h


class Course:
    """A source whose loss at the n-th look is the n-th of the course: its targets are far off."""

    def __init__(self) -> None:
        self.looks = 0

    def __len__(self) -> int:
        return 1

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        level = 1000 + 1000 * COURSE[self.looks % len(COURSE)]
        self.looks += 1
        return torch.zeros(1, LANES, WIDTH).double(), torch.full((1, LANES, WIDTH), level).double()


def trainer(validation: Validation | None, path: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    module = Drops()
    tbptt = TBPTT(
        module, mse_loss, K1, 6, torch.optim.Adam(module.parameters(), 0.01), strategy="sqrt"
    )
    snapshots = None if path is None else Snapshots(directory=path, every_steps=K1, keep=99)
    return Trainer(tbptt, data(), snapshots=snapshots, validation=validation, **options)


def weights(made: Trainer) -> list[Tensor]:
    return [weight.detach().clone() for weight in made.tbptt.parts.weights()]


def test_it_is_the_evaluation_of_the_weights_of_that_moment() -> None:
    other, told = data(1), []
    plain = trainer(None)
    for count, _ in enumerate(plain.windows(), 1):
        if count % 2 == 0:
            told.append(plain.tbptt.evaluate(other).loss)
    looking = trainer(Validation(source=other, every_windows=2))
    result = looking.train()
    assert all(map(torch.equal, weights(looking), weights(plain)))
    assert result.best_loss == min(told)
    assert result.best_steps == 2 * K1 * (1 + told.index(min(told)))
    assert plain.result().best_loss is None


def test_the_best_state_is_kept_and_training_ends_without_progress(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log")
    validation = Validation(source=Course(), every_windows=1, patience=2)
    made = trainer(validation, tmp_path / "a", events=[log])
    seen = [(window.stop, weights(made)) for window in made.windows()]
    result = made.result()
    assert [stop for stop, _ in seen] == [3, 6, 9, 12, 15, 18]
    assert (result.num_steps, result.best_steps) == (18, 12)
    assert [path.name for path in (tmp_path / "a" / "best").glob("step-*")] == ["step-12"]
    assert (tmp_path / "log").read_text().count('"validated"') == 6
    again = trainer(validation, tmp_path / "a")
    assert again.resume(best=True)
    assert all(map(torch.equal, weights(again), dict(seen)[12]))
    assert again.resume()
    assert again.train().num_steps == 18, "it had ended"


@pytest.mark.parametrize(
    "steps", [6, *(pytest.param(steps, marks=pytest.mark.exhaustive) for steps in (3, 12, 15))]
)
def test_a_resumed_run_ends_where_the_one_never_stopped_ends(tmp_path: Path, steps: int) -> None:
    def validation() -> Validation:
        return Validation(
            source=Batches([(data(1).inputs, data(1).targets)], time_dim=0),
            every_windows=2,
            patience=1,
        )

    def figures(result: TrainerResult) -> tuple[Any, ...]:
        return result.best_loss, result.best_steps, result.num_steps

    whole = trainer(validation())
    expected = figures(whole.train())
    stopped = trainer(validation(), tmp_path, max_steps=steps)
    stopped.train()
    resumed = trainer(validation(), tmp_path)
    assert resumed.resume()
    assert figures(resumed.train()) == expected
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_a_run_without_progress_in_numbers_ends_too() -> None:
    nan = TensorSequence(data().inputs, torch.full((STEPS, LANES, WIDTH), float("nan")).double())
    result = trainer(Validation(source=nan, every_windows=1, patience=3)).train()
    assert (result.num_windows, result.best_loss) == (3, None)


def test_what_cannot_work_is_one_clear_error(tmp_path: Path) -> None:
    nothing = Validation(source=TensorSequence(data().inputs), every_windows=1)
    with pytest.raises(ArgumentError, match=r"validation\.source has no step with a target"):
        trainer(nothing).train()
    with pytest.raises(ArgumentError, match="extra has 'validation'"):
        trainer(nothing, extra={"validation": nn.Linear(1, 1)})
    with pytest.raises(ArgumentError, match="needs snapshots"):
        trainer(nothing).resume(best=True)
    with pytest.raises(ArgumentError, match="can be read once only"):
        Validation(source=iter([(data().inputs[0], None)]))
    with pytest.raises(ArgumentError, match="sequence is a Tensor of shape"):
        Validation(source=data().inputs)
    with pytest.raises(ArgumentError, match="every_windows=0"):
        Validation(source=data(), every_windows=0)
    assert not trainer(nothing, tmp_path).resume(best=True)
