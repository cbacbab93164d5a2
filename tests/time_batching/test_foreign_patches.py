"""Time batching beside others who replace torch's functions, and beside other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_situations import LANES, OPERATIONS, STEPS, WIDTH, WORDS, Situated, plain
from cases import bitwise, relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

PLACES: dict[str, tuple[Any, str]] = {
    "linear": (F, "linear"),
    "embedding": (F, "embedding"),
    "bilinear": (F, "bilinear"),
    "conv1d": (F, "conv1d"),
    "conv2d": (F, "conv2d"),
    "matmul": (torch, "matmul"),
    "mm": (torch, "mm"),
    "addmm": (torch, "addmm"),
    "at": (Tensor, "__matmul__"),
    "lstm": (nn.LSTMCell, "forward"),
    "gru": (nn.GRUCell, "forward"),
    "tanh": (nn.RNNCell, "forward"),
}
TORCHS_OWN = {place: getattr(*place) for place in PLACES.values()}


class Patch:
    """What a library puts in the place of a function of torch: it calls what it found."""

    def __init__(self, place: tuple[Any, str], scale: float = 1.0) -> None:
        self.place, self.found, self.count = place, getattr(*place), 0

        def patch(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            result = self.found(*args, **kwargs)
            if isinstance(result, tuple):
                return result[0] * scale, *result[1:]
            return result * scale

        self.function = patch
        setattr(*place, patch)

    @property
    def stands(self) -> bool:
        return getattr(*self.place) is self.function

    def end(self) -> None:
        setattr(*self.place, self.found)


@pytest.fixture(autouse=True)
def _torchs_own_functions_in_the_end() -> Iterator[None]:
    yield
    assert {place: getattr(*place) for place in TORCHS_OWN} == TORCHS_OWN


def make(operation: str, step: Callable[..., Any] = plain, seed: int = 0) -> Situated:
    torch.manual_seed(seed)
    return Situated(operation, "state", step).double()


def data(seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, STEPS, LANES, WIDTH, generator=generator, dtype=torch.float64)
    words = torch.randint(WORDS, (STEPS, LANES), generator=generator)
    return (x, words), y, x[0] * 0.1


def by_hand(module: nn.Module, seed: int = 0) -> list[Tensor]:
    (x, words), targets, state = data(seed)
    losses = []
    for inputs, target in zip(zip(x, words, strict=True), targets, strict=True):
        y, state = module(inputs, state)
        losses.append(F.mse_loss(y, target))
    torch.stack(losses).mean().backward()
    return [p.grad for p in module.parameters() if p.grad is not None]


def by_window(module: nn.Module, seed: int = 0) -> tuple[list[Tensor], dict[str, str]]:
    """The gradients, and what was batched or why not."""
    inputs, targets, state = data(seed)
    tbptt = TBPTT(module, F.mse_loss, STEPS, None, strategy="uniform:3", time_batching=True)
    tbptt.train(TensorSequence(inputs, targets), state)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return grads, {o.operation: o.reason for o in tbptt.batched_operations}


def is_batched(operation: str, report: dict[str, str]) -> bool:
    return report.get(OPERATIONS[operation][2]) == ""


@pytest.mark.parametrize("operation", PLACES)
def test_a_patch_that_was_there_before(operation: str) -> None:
    patch = Patch(PLACES[operation], scale=0.5)
    try:
        expected = by_hand(make(operation))
        patch.count = 0
        found, report = by_window(make(operation))
        assert patch.stands
    finally:
        patch.end()
    assert patch.count >= STEPS
    assert relative_error(found, expected) <= 1e-12
    owner, name = PLACES[operation]
    assert "others" in report[f"{owner.__name__}.{name}"]
    assert is_batched(operation, by_window(make(operation))[1])


@pytest.mark.parametrize("operation", PLACES)
def test_a_patch_that_is_made_within_a_step(operation: str) -> None:
    """It finds a replacement, and puts that back when it ends: nothing of ours stays."""
    patches: list[Patch] = []

    def step(m: Situated, inputs: Any, h: Tensor) -> Any:
        if not patches:
            patches.append(Patch(PLACES[operation]))
        return plain(m, inputs, h)

    expected = by_hand(make(operation))
    assert relative_error(by_window(make(operation, step))[0], expected) <= 1e-12
    (patch,) = patches
    assert patch.stands
    patch.count = 0
    found, report = by_window(make(operation))
    assert patch.count >= STEPS
    assert relative_error(found, expected) <= 1e-12
    assert is_batched(operation, report)  # the patch calls what it found
    patch.end()
    found, report = by_window(make(operation))
    assert relative_error(found, expected) <= 1e-12
    assert is_batched(operation, report)


@pytest.mark.parametrize("operation", PLACES)
def test_a_patch_that_is_made_after_a_window(operation: str) -> None:
    by_window(make(operation))
    patch = Patch(PLACES[operation], scale=0.5)
    try:
        expected = by_hand(make(operation))
        assert relative_error(by_window(make(operation))[0], expected) <= 1e-12
        assert patch.stands
    finally:
        patch.end()


@pytest.mark.parametrize("operation", ["linear", "at", "lstm"])
def test_a_patch_of_one_thread_while_another_runs_a_window(operation: str) -> None:
    """It is made while one region is open, lives through a second, and ends after both."""
    entered, go_on, results = threading.Event(), threading.Event(), []

    def step(m: Situated, inputs: Any, h: Tensor) -> Any:
        entered.set()
        go_on.wait(30)
        return plain(m, inputs, h)

    expected = by_hand(make(operation))
    thread = threading.Thread(target=lambda: results.append(by_window(make(operation, step))[0]))
    thread.start()
    entered.wait(30)
    patch = Patch(PLACES[operation])
    try:
        assert relative_error(by_window(make(operation))[0], expected) <= 1e-12
        assert patch.count >= STEPS
        assert relative_error(by_hand(make(operation)), expected) == 0  # outside of any region
        go_on.set()
        thread.join()
        assert relative_error(results[0], expected) <= 1e-12
        assert patch.stands
    finally:
        go_on.set()
        thread.join()
        patch.end()
    assert is_batched(operation, by_window(make(operation))[1])


def test_windows_of_many_threads() -> None:
    """Their modules are made before: torch's generator belongs to all of them."""
    modules = {operation: make(operation) for operation in ("linear", "at", "lstm", "embedding")}
    expected = {o: [g.clone() for g in by_window(m)[0]] for o, m in modules.items()}
    wrong: list[str] = []

    def work(operation: str) -> None:
        for _ in range(5):
            modules[operation].zero_grad()
            if not bitwise(by_window(modules[operation])[0], expected[operation]):
                wrong.append(operation)

    threads = [threading.Thread(target=work, args=(operation,)) for operation in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
