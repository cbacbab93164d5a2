"""A window waits for a device once, whatever it is to know: counted on a device that is simulated.

Everything is held against the same run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import LANES, WIDTH, lstm, lstm_cell, masked_loss, random_data, tanh_cell
from simulated_device import DEVICE, OnDevice, SimulatedWaits, on_device, on_host
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    ArraySequence,
    LaneSource,
    NonFiniteError,
    TensorSequence,
    Trainer,
    evaluate,
    unroll,
)
from tbptt_ckpt.cli.lanes import EqualLanes
from tbptt_ckpt.errors import ReplayMismatchError
from tbptt_ckpt.executor import additivity
from tbptt_ckpt.module import host
from tbptt_ckpt.schedule import Roulette

NUM_STEPS, K1, WARM = 19, 3, 4  # windows after which modules and losses are known
INPUTS, TARGETS = random_data(NUM_STEPS)
CLASSES = torch.randint(WIDTH, (NUM_STEPS, LANES), generator=torch.Generator().manual_seed(1))
CLASSES[::2, 0] = CLASSES[5 * K1 : 6 * K1] = -100  # nothing counts in a window
RESETS = torch.zeros(NUM_STEPS, LANES, dtype=torch.bool)
RESETS[1::3, 1] = True
WEIGHT = torch.ones(NUM_STEPS, LANES, dtype=torch.float64)
WEIGHT[::2, 0] = 0.0
WEIGHT[1::5, 1] = 0.5

Put = Callable[[Any], Any]


def tensors(targets: Tensor = TARGETS, **rows: Any) -> Callable[[Put], Any]:
    return lambda put: TensorSequence(put(INPUTS), put(targets), **rows)


def array(put: Put) -> Any:
    device = DEVICE if put is on_device else "cpu"
    return ArraySequence(INPUTS.numpy(), np.asarray(TARGETS), device=device)


def lanes(put: Put) -> Any:
    device = DEVICE if put is on_device else "cpu"
    parts = [slice(0, 9), slice(9, 22), slice(22, 30), slice(30, 2 * NUM_STEPS)]
    x, y = (t.transpose(0, 1).flatten(0, 1) for t in (INPUTS, TARGETS))
    return LaneSource([TensorSequence(x[p], y[p]) for p in parts], LANES, device=device)


def classes(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y, target)


def summed(y: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, -2), target.flatten(), reduction="sum")


def large(y: Tensor, target: Tensor) -> Tensor:
    return 100 * F.mse_loss(y, target)


def own_mean(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).abs().mean()


# name: module, loss, data, options; "k2" in units of k1
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Put], Any], dict[str, Any]]] = {
    "refresh": (lstm_cell, F.mse_loss, tensors(), {"k2": 4}),
    "no_overlap": (lstm_cell, F.mse_loss, tensors(), {"k2": 1}),
    "far": (tanh_cell, F.mse_loss, tensors(), {"k2": 8, "strategy": "revolve:2"}),
    "drawn": (lstm_cell, F.mse_loss, tensors(), {"k2": 4, "truncation": Roulette(0.9)}),
    "stale": (lstm_cell, F.mse_loss, tensors(), {"k2": 4, "overlap": "stale"}),
    "stale_far": (tanh_cell, F.mse_loss, tensors(), {"k2": 8, "overlap": "stale"}),
    "stale_segments": (lstm, F.mse_loss, tensors(), {"k2": 4, "overlap": "stale"}),
    "segments": (lstm, F.mse_loss, tensors(), {"k2": 4}),
    "one_graph": (lstm_cell, F.mse_loss, tensors(), {"k2": 2, "executor": "checkpoint"}),
    "unchecked": (lstm_cell, F.mse_loss, tensors(), {"k2": 2, "check_replays": False}),
    "clipped": (lstm_cell, F.mse_loss, tensors(), {"k2": 2, "clip_grad_norm": 0.1}),
    "classes": (tanh_cell, classes, tensors(CLASSES), {"k2": 2}),
    "masked_window": (tanh_cell, classes, tensors(CLASSES), {"k2": 1}),
    "summed_classes": (lstm, summed, tensors(CLASSES), {"k2": 1, "executor": "checkpoint"}),
    "pairs": (tanh_cell, masked_loss, tensors(), {"k2": 2}),
    "own_mean": (lstm, own_mean, tensors(), {"k2": 2}),
    "resets": (tanh_cell, F.mse_loss, tensors(resets=RESETS), {"k2": 2}),
    "weights": (tanh_cell, F.mse_loss, tensors(weight=WEIGHT), {"k2": 2}),
    "weighed_segments": (lstm, F.mse_loss, tensors(weight=WEIGHT), {"k2": 2}),
    "weighed_classes": (tanh_cell, classes, tensors(CLASSES, weight=WEIGHT[:, 0]), {"k2": 2}),
    "array": (tanh_cell, F.mse_loss, array, {"k2": 2}),
    "lanes": (tanh_cell, F.mse_loss, lanes, {"k2": 2}),
    "plateau": (tanh_cell, F.mse_loss, tensors(), {"k2": 2}),
    "group": (tanh_cell, F.mse_loss, tensors(), {"k2": 2, "accumulate": 2}),
}
# Those that are run each time, with what `Trainer` asks for besides.
CHOSEN = {
    "clipped": True,
    "drawn": True,
    "plateau": False,
    "masked_window": False,
    "resets": False,
    "stale_far": True,
    "weights": False,
}


def ran(name: str, put: Put, waits: SimulatedWaits, *, trainer: bool) -> tuple[list[int], Any]:
    """Waits for each window, and what came out."""
    make, loss_fn, data, options = CASES[name]
    # A kernel for the steps of a segment is the CPU's alone.
    options = {"strategy": "sqrt", "time_batching": False, **options}
    module = put(make())
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    if name == "plateau":
        options["scheduler"] = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    k2 = K1 * options.pop("k2")
    tbptt = TBPTT(module, loss_fn, K1, k2, optimizer, **options)
    windows = Trainer(tbptt, data(put)).windows() if trainer else tbptt.windows(data(put))
    counts, results, before = [], [], 0
    for window in windows:
        counts.append(waits.total - before)
        results.append(window)
        before = waits.total
    seen = [(w.loss, w.state, w.loss_value, w.drift, w.updated, w.num_tokens) for w in results]
    return counts, on_host((seen, list(module.parameters())))


@pytest.mark.parametrize(("name", "trainer"), CHOSEN.items())
def test_a_window_waits_once(name: str, trainer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, monkeypatch, trainer=trainer)


@pytest.mark.exhaustive
@pytest.mark.parametrize("trainer", [False, True])
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_window_waits_once(name: str, trainer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, monkeypatch, trainer=trainer)


def check(name: str, monkeypatch: pytest.MonkeyPatch, *, trainer: bool) -> None:
    monkeypatch.setattr(additivity, "_SHARE", 1e-9)  # a check that is due now and then is not,
    monkeypatch.setattr(additivity, "_AT_ONCE", 2)  # after the first ones
    _, expected = ran(name, lambda tree: tree, SimulatedWaits(), trainer=trainer)
    with SimulatedWaits() as waits:
        counts, found = ran(name, on_device, waits, trainer=trainer)
    more = int(trainer and "accumulate" in CASES[name][3])  # a norm that is known in the update
    assert 1 <= max(counts[WARM:]) <= 1 + more, waits.found
    # On a device a mean is a sum divided by what counts; and segments are other kernels there.
    apart = 1e-12 if "classes" in name or CASES[name][0] is lstm else 0.0
    torch.testing.assert_close(found, expected, rtol=apart, atol=apart / 10, equal_nan=True)


def test_a_scaler_is_waited_for_once_more() -> None:
    """By itself: it skips steps whose gradients overflow, here the first ones."""

    def run(put: Put, waits: SimulatedWaits) -> tuple[list[int], Any]:
        module = put(tanh_cell().float())
        optimizer = torch.optim.SGD(module.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
        data = TensorSequence(put(INPUTS.float()), put(TARGETS.float()))
        options: dict[str, Any] = {"scaler": scaler, "clip_grad_norm": 1.0, "strategy": "sqrt"}
        counts, seen, before = [], [], 0
        for window in TBPTT(module, large, K1, K1, optimizer, **options).windows(data):
            counts.append(waits.total - before)
            seen.append((window.loss, window.updated))
            before = waits.total
        return counts, on_host((seen, scaler.get_scale(), list(module.parameters())))

    _, expected = run(lambda tree: tree, SimulatedWaits())
    with SimulatedWaits() as waits:
        counts, found = run(on_device, waits)
    assert set(counts[WARM:]) == {2}, waits.found
    assert {updated for _, updated in found[0]} == {False, True}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Counts(nn.Module):
    """Keeps a number outside of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.calls, self.errs = tanh_cell(), 0, True

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls += self.errs
        y, h = self.cell(x, h)
        return y, h + 0.01 * self.calls


def test_a_replay_that_differs_is_found_before_the_update() -> None:
    module = on_device(Counts())
    before = on_host(list(module.parameters()))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    tbptt = TBPTT(module, F.mse_loss, 8, 16, optimizer, strategy="uniform:4")
    with SimulatedWaits(), pytest.raises(ReplayMismatchError):
        list(tbptt.windows(tensors()(on_device)))
    assert all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(on_host(list(module.parameters())), before, rtol=0, atol=0)


READS = {
    "arrays": array,
    "lanes": lanes,
    "equal lanes": lambda _: EqualLanes(INPUTS.numpy(), None, device=DEVICE),
    "bytes": lambda _: EqualLanes(np.arange(60, dtype=np.uint8), LANES, device=DEVICE),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_is_sent_ahead(name: str) -> None:
    with SimulatedWaits() as waits:
        inputs, targets = READS[name](on_device).read(2, 9)[:2]
    assert not waits.total, waits.found
    assert isinstance(inputs, OnDevice)
    assert isinstance(targets, OnDevice)


@pytest.mark.parametrize("where", ["loss", "state", "gradient"])
def test_what_is_not_finite_is_found_before_the_update(where: str) -> None:
    bad = {"loss": 0.0, "state": torch.inf, "gradient": 1e200}[where]
    inputs, targets = F.pad(INPUTS, (0, 1)), TARGETS.clone()
    inputs[14, 0, -1] = bad
    targets[14] = torch.nan if where == "loss" else 0.0

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = tanh_cell()

        def forward(self, x: Tensor, h: Any) -> tuple[Tensor, Any]:
            y, new = self.cell(x[:, :-1], None if h is None else h[0])
            if where == "gradient":
                y = y + (y - y.detach()) * x[:, -1:]
            return y, (new, x[:, -1])

    module = on_device(Cell())
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    tbptt = TBPTT(module, lambda y, t: (y - t).abs().mean(), K1, 2 * K1, optimizer)
    told = {"loss": "the loss is nan", "state": r"state, \(2,\)", "gradient": "norm of the grad"}
    trainer = Trainer(tbptt, TensorSequence(on_device(inputs), on_device(targets)))
    with SimulatedWaits(), pytest.raises(NonFiniteError, match=f"window 4, .*{told[where]}"):
        trainer.train()
    assert trainer.num_updates == 4


def test_an_evaluation_waits_once_a_piece() -> None:
    module = on_device(tanh_cell())
    with SimulatedWaits() as waits:
        found = evaluate(module, masked_loss, tensors()(on_device), segment_steps=8)
    assert waits.total == -(-NUM_STEPS // 8)
    expected = evaluate(tanh_cell(), masked_loss, tensors()(lambda tree: tree), segment_steps=8)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)


def test_an_unrolled_module_waits_once_in_its_backward() -> None:
    module, inputs = on_device(tanh_cell()), on_device(INPUTS)
    with SimulatedWaits() as waits:
        outputs, _ = unroll(module, inputs, strategy="uniform:4")
        assert not waits.total
        outputs.square().sum().backward()
    assert waits.total == 1, waits.found


ASKED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "number": lambda t, _: float(t[0]),
    "truth": lambda t, _: bool(t[0] > 0),
    "list": lambda t, _: t.tolist(),
    "copy": lambda t, _: t.cpu(),
    "places": lambda t, _: t.nonzero(),
    "mask": lambda t, _: t[t > 0],
    "equal": lambda t, _: torch.equal(t, t),
    "into": lambda t, rows: rows.copy_(t),
    "rows": lambda t, rows: t + rows.to(DEVICE),
    "pageable": lambda t, rows: t + rows.to(DEVICE, non_blocking=True),
    "indices": lambda t, rows: t[rows.long()],
}
FREE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pinned": lambda t, rows: t + host.sent(rows, DEVICE),
    "where": lambda t, _: torch.where(t > 0, t, 1),
    "host": lambda _, rows: rows.tolist(),
    "made": lambda t, _: t + torch.ones((), device=DEVICE),
}


@pytest.mark.parametrize("name", [*ASKED, *FREE])
def test_what_waits_is_counted(name: str) -> None:
    tensor = on_device(torch.tensor([1.0, -1.0]))
    with SimulatedWaits() as waits:
        {**ASKED, **FREE}[name](tensor, torch.zeros(2))
    assert waits.total == (name in ASKED)


def test_numbers_of_all_kinds_are_read_together() -> None:
    given = [
        torch.tensor(True),
        torch.tensor([[0.1, torch.nan], [torch.inf, -0.0]]),
        torch.tensor(2**62 + 1),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor([1.5, 2.5, 3.5], dtype=torch.bfloat16),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).t(),
        torch.tensor([1 + 2j]).conj(),
        torch.zeros(0),
    ]
    numbers = host.Numbers()
    with SimulatedWaits() as waits:
        asked = [numbers.ask(on_device(tensor)) for tensor in given]
        found = [number.value for number in asked]
    assert waits.total == 1
    assert str(found) == str([tensor.tolist() for tensor in given])  # NaN is NaN
