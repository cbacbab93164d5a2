"""Steps that run by compiled blocks equal the same one by one, or are left as they are."""

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    EXECUTORS,
    LANES,
    OVERLAPS,
    STRATEGIES,
    WIDTH,
    gradients,
    random_data,
    relative_error,
)
from compiled_kinds import ADVANCE, KINDS, LEAF, LOSSES, WEIGHTS, check, names, normed
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TbpttWarning, TensorSequence, run_window, unroll
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor import compiled_steps
from tbptt_ckpt.executor.held_blocks import bytes_to_hold, hold_block
from tbptt_ckpt.executor.step_blocks import block_function, run_block
from tbptt_ckpt.memory import peak_memory
from tbptt_ckpt.time_batching.compiler import Compiler


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "BLOCK_STEPS", 2)


@pytest.mark.parametrize(
    ("kind", "backend", "executor", "overlap", "strategy", "loss", "weights"),
    [
        ("normed", "aot_eager", "replay", "refresh", "uniform:3", "mean", None),
        ("normed", "eager", "checkpoint", "stale", "sqrt", "pair", WEIGHTS),
        ("from None", "eager", "replay", "stale", "uniform:2", "pair", WEIGHTS),
        ("in parts", "eager", "replay", "refresh", "retain", "mean", None),
    ],
)
def test_gradients_are_those_of_a_plain_loop(
    kind: str, backend: str, executor: str, overlap: str, strategy: Any, loss: str, weights: Any
) -> None:
    how = {"strategy": strategy, "compile": backend, "executor": executor}
    tbptt = check(kind, loss, weights, overlap, k1=3, k2=7, **how)
    advances = executor == "replay" and strategy != "retain"
    assert names(tbptt) >= ({LEAF, ADVANCE} if advances else {LEAF})


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_are_those_of_a_plain_loop_in_every_window(kind: str, executor: str) -> None:
    windows = ((3, 7), (4, 4), (2, None), (9, 9), (1, 4), (5, 2))
    for loss, overlap, (k1, k2), strategy in itertools.product(
        LOSSES, OVERLAPS, windows, STRATEGIES
    ):
        weights = WEIGHTS if (k1, k2) != (4, 4) else None
        how = {"strategy": strategy, "compile": "aot_eager", "executor": executor}
        check(kind, loss, weights, overlap, k1=k1, k2=k2, **how)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what it imports
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_inductor_are_those_of_a_plain_loop(kind: str) -> None:
    tbptt = check(kind, "mean", WEIGHTS, "refresh", k1=3, k2=7, strategy="uniform:3", compile=True)
    assert names(tbptt) >= {LEAF, ADVANCE}


def test_lanes_that_begin_anew_within_a_window() -> None:
    inputs, targets = random_data(12)
    resets = torch.zeros(12, LANES, dtype=torch.bool)
    resets[3, 0] = resets[4, 1] = resets[9, 0] = True
    found = []
    for choice in (False, "eager"):
        module, init = normed()
        tbptt = TBPTT(module, F.mse_loss, 12, None, strategy="uniform:5", compile=choice)
        tbptt.train(TensorSequence(inputs, targets, resets=resets), init)
        found.append(gradients(list(module.parameters())))
    assert LEAF in names(tbptt)
    assert relative_error(found[1], found[0]) < 1e-10


def test_single_windows_and_unrolled_outputs() -> None:
    inputs, targets = random_data(9)
    (module, init), found = normed(), []
    for choice in (False, "eager"):
        module.zero_grad()
        start = tuple(each.clone().requires_grad_() for each in init)
        run_window(module, F.mse_loss, inputs, targets, start, strategy="uniform:4", compile=choice)
        outputs, last = unroll(module, inputs, start, strategy="uniform:4", compile=choice)
        ((outputs - targets).square().sum() + last[1].sum()).backward()
        found.append([*gradients(list(module.parameters())), *(each.grad for each in start)])
    assert relative_error(found[1], found[0]) < 1e-10


def of_another_gradient(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A backend whose outputs are right, and whose gradients are 0.1 % too large."""

    def make(self: Compiler, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*given: Tensor) -> Any:
            return tuple(t + (t - t.detach()) * 1e-3 for t in module(*given))

        return run

    return make


def of_another_state(plain: Callable[..., Any]) -> Callable[..., Any]:
    def make(self: Compiler, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return lambda *given: tuple(t * (1 + 1e-6) for t in module(*given))

    return make


@pytest.mark.parametrize("wrong", [of_another_gradient, of_another_state])
def test_a_wrong_block_never_trains(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "_make", wrong(Compiler._make))
    with pytest.warns(TbpttWarning, match="compiled by eager its .* differ by .* two uncompiled"):
        tbptt = check("normed", "mean", None, "refresh", k1=3, k2=7, compile="eager")
    assert LEAF not in names(tbptt)


@pytest.mark.exhaustive
def test_states_that_a_rounding_changes_much_are_no_wrong_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A steep map of the state: what another order of a sum changes grows by 4 at each step."""

    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.99))

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.weight * h * (1 - h)
            return h, h

    inputs, targets = torch.zeros(40, 1, 1), torch.zeros(40, 1, 1)
    monkeypatch.setattr(compiled_steps, "BLOCK_STEPS", 12)
    tbptt = TBPTT(Chaotic(), F.mse_loss, 40, None, strategy="retain", compile="aot_eager")
    tbptt.train(TensorSequence(inputs, targets), torch.full((1, 1), 0.3))
    assert LEAF in names(tbptt)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h


class Reading(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * 2 if float(h.sum()) > 0 else h


class Averaging(nn.Module):
    """A running mean in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.5).add_(h.mean(0))
        return h + self.mean


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, given, output: output * 2)

    def forward(self, h: Tensor) -> Tensor:
        return h


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (lambda: nn.Dropout(0.5), "draws random numbers or changes buffers"),
        (Averaging, "draws random numbers or changes buffers"),
        (Counting, "a step changes Counting"),
        (Hooked, "it has hooks"),
        (lambda: nn.DataParallel(nn.Identity()), "it is a DataParallel"),
        (Reading, "it cannot be compiled"),
    ],
)
def test_what_would_not_be_right_runs_uncompiled_and_one_line_says_why(
    more: Any, reason: str
) -> None:
    inputs, targets = random_data(9)
    found = []
    for choice in (False, "eager"):
        module, init = normed(more())
        torch.manual_seed(3)
        tbptt = TBPTT(module, F.mse_loss, 4, 8, strategy="uniform:4", compile=choice)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            tbptt.train(TensorSequence(inputs, targets), init)
        found.append(gradients(list(module.parameters())))
    (told,) = [str(w.message) for w in seen if issubclass(w.category, TbpttWarning)]
    assert reason in told
    (left,) = [each for each in tbptt.batched_operations if each.operation == "compiled steps"]
    assert left.reason in told
    assert relative_error(found[1], found[0]) == 0.0


def test_half_precision_and_autocast_are_left() -> None:
    for dtype, autocast in ((torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        module, _ = normed()
        module, zeros = module.to(dtype), torch.zeros(LANES, WIDTH, dtype=dtype)
        data = TensorSequence(*(each.to(dtype) for each in random_data(6)))
        tbptt = TBPTT(
            module, F.mse_loss, 6, None, strategy="sqrt", compile="eager", autocast_dtype=autocast
        )
        with pytest.warns(TbpttWarning, match="runs uncompiled: (it computes in|autocast)"):
            tbptt.train(data, (zeros, zeros))


def test_an_attribute_that_changes_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window in which it has changed runs step by step, the next one is compiled anew."""
    inputs, targets = random_data(24)
    found = []
    for choice in (False, "eager"):
        module, init = normed()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        how: dict[str, Any] = {"strategy": "retain", "compile": choice}
        tbptt = TBPTT(module, F.mse_loss, 4, None if choice is None else 4, optimizer, **how)
        compiled = []
        for window in tbptt.windows(TensorSequence(inputs, targets), init):
            compiled.append(window.compile_seconds > 0)
            if window.index == 1:
                module.factor = 0.5
        found.append(list(module.parameters()))
    assert relative_error(found[1], found[0]) < 1e-10
    assert compiled.count(True) >= 2
    blocks = [each.count for each in tbptt.batched_operations if each.operation == LEAF]
    assert blocks == [2 * 5]  # all windows but one


@pytest.mark.exhaustive
def test_what_keeps_changing_is_not_compiled_for_ever() -> None:
    inputs, targets = random_data(48)
    module, init = normed()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, F.mse_loss, 4, 4, optimizer, strategy="retain", compile="eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for window in tbptt.windows(TensorSequence(inputs, targets), init):
            module.factor = 1 / (2 + window.index)
    (told,) = [str(w.message) for w in seen if issubclass(w.category, TbpttWarning)]
    assert "keeps changing" in told


def test_compiling_counts_in_no_window(caplog: pytest.LogCaptureFixture) -> None:
    inputs, targets = random_data(12)
    module, init = normed()
    how: dict[str, Any] = {"strategy": "uniform:4", "compile": "eager", "measure_memory": True}
    with caplog.at_level("INFO", "tbptt_ckpt"):
        tbptt = TBPTT(module, F.mse_loss, 4, 8, **how)
        first, *_ = tbptt.windows(TensorSequence(inputs, targets), init)
    assert first.compile_seconds > first.seconds
    assert [message.split()[0] for message in caplog.messages].count("compiled") == 2


def test_hooks_on_weights_see_windows_and_no_comparison() -> None:
    inputs, targets = random_data(8)
    module, init = normed()
    seen: list[Tensor] = []
    module.state.weight.register_hook(lambda grad: seen.append(grad))
    module.state.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    tbptt = TBPTT(module, F.mse_loss, 4, 8, strategy="uniform:2", compile="eager")
    tbptt.train(TensorSequence(inputs, targets), init)
    assert LEAF in names(tbptt)
    assert len(seen) == 2 * 2


@pytest.fixture
def _auto_earns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_steps, "_EARNED_STEPS", 9 * 2)
    monkeypatch.setattr(compiled_steps, "Compiler", lambda choice: Compiler("eager"))


@pytest.mark.usefixtures("_auto_earns")
def test_auto_compiles_where_a_run_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"compile": "auto", "strategy": "uniform:3"}
    for k1, k2, is_compiled in ((9, 9, False), (3, 6, True), (3, None, True)):
        tbptt = check("normed", "mean", None, "refresh", k1=k1, k2=k2, **how)
        assert (LEAF in names(tbptt)) == is_compiled, (k1, k2)
    for name, value in (("_MOST_PRODUCTS", 1), ("has_compiler", lambda device: False)):
        with monkeypatch.context() as patch:
            patch.setattr(compiled_steps, name, value)
            tbptt = check("normed", "mean", None, "refresh", k1=3, k2=6, **how)
        (left,) = [e.reason for e in tbptt.batched_operations if e.operation == "compiled steps"]
        assert left in (
            "its products are so large that compiling saves little",
            "there is no compiler",
        )


def test_what_cannot_be_asked_for_is_one_error() -> None:
    module, _ = normed()
    wrong: list[tuple[Any, str]] = [
        ({"compile": "nobody"}, "names no backend"),
        ({"compile": {"backend": "eager", "mode": "default"}}, "takes one of mode and options"),
        ({"compile": {"dynamic": True}}, "must be True, False"),
        ({"compile": {"options": {"nothing": 1}}}, "cannot be used"),
    ]
    for how, words in wrong:
        with pytest.raises(ArgumentError, match=words):
            TBPTT(module, F.mse_loss, 2, 4, **how)
    with pytest.raises(ArgumentError, match="takes segments; give it compiled"):
        TBPTT(nn.LSTM(2, 3), F.mse_loss, 2, 4, compile=True)


def test_comparing_a_block_takes_no_more_than_was_said() -> None:
    torch.manual_seed(0)
    cell, state = nn.GRUCell(32, 32), torch.zeros(8, 32)
    steps, inputs = (
        block_function(lambda x, h: 2 * (cell(x, h),), wants=True),
        torch.randn(16, 8, 32),
    )
    block = partial(run_block, steps, graph=True)
    weights = list(cell.parameters())
    said = bytes_to_hold(lambda: block(inputs[:1], state), 16, weights)
    with peak_memory(rss=False) as memory:
        hold_block(block, block, inputs, state, weights)
    assert 0.5 * said < memory.peak_bytes <= said
