"""What a newcomer is told where a first try cannot work; what the message names, works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    ArraySequence,
    LaneSource,
    TensorSequence,
    Trainer,
    evaluate,
    run_window,
)
from tbptt_ckpt.data import map_file

T, B, WIDTH = 12, 4, 4


def inputs() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(T, B, WIDTH)


@pytest.mark.parametrize("classes", [7, B])  # with B torch takes one for the other
@pytest.mark.parametrize("strategy", ["auto", "sqrt", "retain"])
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
@pytest.mark.times_the_module
def test_a_loss_over_classes_says_where_they_go(classes: int, strategy: Any, loss: str) -> None:
    lstm, targets = nn.LSTM(WIDTH, classes), torch.randint(0, classes, (T, B))
    sequence, loss_fn = TensorSequence(inputs(), targets), getattr(F, loss)
    with pytest.raises(ArgumentError, match=f"{classes} classes on the last dimension") as caught:
        TBPTT(lstm, loss_fn, 6, 12, strategy=strategy).train(sequence)
    remedy = eval(str(caught.value).partition("loss_fn=")[2], {"F": F})
    result = TBPTT(lstm, remedy, 6, 12, strategy=strategy).train(sequence)
    plain = loss_fn(lstm(inputs())[0].flatten(0, 1), targets.flatten())
    assert result.loss == pytest.approx(plain.item(), rel=1e-5)


def test_classes_where_torch_wants_them_are_left_alone() -> None:
    lstm, targets = nn.LSTM(WIDTH, B), torch.randint(0, B, (T, B))
    window = run_window(lstm, lambda y, t: F.cross_entropy(y.movedim(2, 1), t), inputs(), targets)
    plain = F.cross_entropy(lstm(inputs())[0].flatten(0, 1), targets.flatten())
    assert float(window.loss) == pytest.approx(plain.item(), rel=1e-5)


def test_a_loss_that_fails_says_what_it_was_given() -> None:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError("of the user's")

    with pytest.raises(ZeroDivisionError, match="of the user's") as caught:
        run_window(nn.LSTM(WIDTH, WIDTH), loss_fn, inputs(), inputs())
    assert "cut into segments" in caught.value.__notes__[0]


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_one_label_for_each_lane_says_the_two_ways(time_dim: int, shape: tuple[int, ...]) -> None:
    x, label = inputs().movedim(0, time_dim), torch.randn(B, *shape)
    with pytest.raises(ArgumentError, match="one label for each of 4 lanes") as caught:
        TensorSequence(x, label, time_dim=time_dim)
    found = re.search(
        r"repeat them, (.*), and .* weight=(.*); or .* TBPTT\((.*)\)$", str(caught.value)
    )
    assert found is not None
    known = {"torch": torch, "label": label}
    repeated, weight, options = (
        eval(f"dict({part})" if "loss" in part else part, known) for part in found.groups()
    )
    lstm = nn.LSTM(WIDTH, 3, batch_first=time_dim == 1)
    head = nn.Linear(3, 3 if shape else 1)

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(head(y) if shape else head(y).squeeze(-1), target)

    plain = loss_fn(lstm(x)[0].select(time_dim, -1), label).item()
    weighed = TensorSequence(x, repeated, time_dim=time_dim, weight=weight)
    last = TensorSequence(x, repeated, time_dim=time_dim)
    for sequence, further in ((weighed, {"k1": 5}), (last, options)):
        result = TBPTT(lstm, loss_fn, k2=None, strategy="sqrt", **further).train(sequence)
        assert result.loss == pytest.approx(plain, rel=1e-5)


def test_a_file_of_float64_without_features_says_both() -> None:
    signal, lstm = np.zeros(200), nn.LSTM(1, 1)
    tbptt = TBPTT(lstm, F.mse_loss, 5, 5, strategy="sqrt")
    with pytest.raises(ValueError, match="dtype") as caught:
        tbptt.train(LaneSource(ArraySequence(signal, next_step=True), lanes=32))
    notes = " ".join(caught.value.__notes__)
    assert "ArraySequence(..., dtype=...)" in notes
    assert "array[:, None]" in notes
    steps = ArraySequence(signal[:, None], next_step=True, dtype=torch.float32)
    assert tbptt.train(LaneSource(steps, lanes=32)).num_steps == 7


def test_a_header_is_passed_over_and_belongs_to_raw_files(tmp_path: Path) -> None:
    rows = np.arange(12, dtype="<i2").reshape(6, 2)
    path = tmp_path / "rows"
    path.write_bytes(b"header!" + rows.tobytes())
    assert np.array_equal(map_file(path, "<i2", step_shape=(2,), offset=7), rows)
    inputs, _ = ArraySequence(map_file(path, "<i2", step_shape=(2,), offset=11)).read(0, 5)
    assert inputs.tolist() == rows[1:].tolist()
    for offset in (8, 31, 40):
        with pytest.raises(ArgumentError, match=f"from offset={offset} on are no multiple"):
            map_file(path, "<i2", step_shape=(2,), offset=offset)
    np.save(path.with_suffix(".npy"), rows)
    with pytest.raises(ArgumentError, match=r"offset=7 .* are of raw files"):
        map_file(path.with_suffix(".npy"), offset=7)


def test_a_sequence_without_inputs_is_a_list_of_pairs() -> None:
    targets = inputs()
    with pytest.raises(ArgumentError, match=r"\[\(None, target\) for target in targets\]"):
        TensorSequence(None, targets)


class Own(nn.Module):
    """A first own cell, which cannot begin from None."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(WIDTH, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        h, c = state
        h, c = self.cell(x, (h, c))
        return self.out(h), (h, c)


@pytest.mark.parametrize("strategy", ["auto", "sqrt"])
@pytest.mark.times_the_module
def test_a_first_state_that_is_missing_is_named(strategy: Any) -> None:
    own = Own()
    tbptt = TBPTT(own, F.mse_loss, 5, 10, strategy=strategy)
    sequence = TensorSequence(inputs(), torch.randn(T, B, 1))
    for _ in range(2):  # windows that began from a state change nothing
        with pytest.raises(ArgumentError, match=r"^init_state=None, and module=Own cannot begin"):
            tbptt.train(sequence)
        assert tbptt.train(sequence, init_state=(torch.zeros(B, 8),) * 2).num_steps == T


def test_what_is_read_once_is_no_source_of_two_passes() -> None:
    tbptt = TBPTT(nn.GRUCell(WIDTH, WIDTH), F.mse_loss, 5, 10, strategy="sqrt")

    def steps() -> Any:
        return ((x, x) for x in inputs())

    with pytest.raises(ArgumentError, match=r"can be read once only, and epochs=2"):
        Trainer(tbptt, steps(), epochs=2)
    assert Trainer(tbptt, lambda epoch: steps(), epochs=2).train().num_steps == 2 * T
    once = steps()
    assert Trainer(tbptt, once).train().num_steps == T
    with pytest.raises(ArgumentError, match=r"is empty once it has been read"):
        tbptt.train(once)


@pytest.mark.parametrize("sequence", ["x", 3, torch.zeros(3)])
def test_what_is_no_sequence_is_told_as_such(sequence: Any) -> None:
    with pytest.raises(ArgumentError, match=r"TensorSequence"):
        evaluate(nn.GRUCell(WIDTH, WIDTH), F.mse_loss, sequence)
