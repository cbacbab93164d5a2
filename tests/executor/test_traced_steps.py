"""Steps written as one forward, run by the parts that a trace finds, equal the same one by one."""

import itertools
import os
import warnings
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import (
    LANES,
    OVERLAPS,
    STRATEGIES,
    WIDTH,
    WIDTH_IN,
    check_window,
    engine_sequence,
    gradients,
    masked_loss,
    naive_problem,
    random_data,
    random_state,
    relative_error,
)
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TbpttWarning, TensorSequence

WEIGHTS = (1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.0, 1.0)
SCALE = 1.0
IN_PARTS = "LSTMCell of all steps"


class Language(nn.Module):
    """Encoder, LSTMCell, norm and readout, as most would write them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.cell = nn.Linear(WIDTH_IN, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = 1.0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            state = (x.new_zeros(len(x), WIDTH),) * 2
        h, c = self.cell(torch.tanh(self.encode(x)), state)
        return self.out(torch.tanh(self.norm(h))) * self.scale, (h, c)


class InDict(Language):
    """Its state is a dict in another order, and its readout looks back at the input."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        encoded = self.encode(x)
        h, c = self.cell(encoded, (state["h"], state["c"]))
        return self.out(self.norm(h) + encoded), {"c": c, "h": h}


class Gated(nn.Module):
    """No cell of torch's, whose steps are left as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.gate = nn.Linear(WIDTH_IN, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.new, self.out = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.encode(x), h], 1)
        z = torch.sigmoid(self.gate(both))
        h = z * h + (1 - z) * torch.tanh(F.linear(both, self.new.weight, self.new.bias))
        return torch.softmax(self.out(h), -1), h


class Mixing(Language):
    """Its readout knows of other lanes, so that it is part of the transition."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = self.cell(self.encode(x), state)
        return self.out(h - h.mean(0)), (h, c)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "language": (Language, lambda: (random_state(2), random_state(3))),
    "from none": (Language, lambda: None),
    "in a dict": (InDict, lambda: {"c": random_state(3), "h": random_state(2)}),
    "gated": (Gated, lambda: random_state(2)),
    "mixing": (Mixing, lambda: (random_state(2), random_state(3))),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mean": F.mse_loss,
    "sum": nn.MSELoss(reduction="sum"),
    "pair": masked_loss,
    "of lanes together": lambda y, target: F.mse_loss(y - y.mean(0), target),
}


def made(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, begin = KINDS[kind]
    return make().double(), begin()


def check(kind: str, loss: str, overlap: str, weights: Any, **how: Any) -> None:
    (module, init), (inputs, targets) = made(kind), random_data(9)
    problem = naive_problem(module, inputs, targets, init, loss_fn=LOSSES[loss], weights=weights)
    problem.step = module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    expected = list(naive.OVERLAPS[overlap](problem, how["k1"], how["k2"], optimizer=optimizer))
    module, init = made(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tbptt = TBPTT(module, LOSSES[loss], optimizer=optimizer, overlap=overlap, **how)
    sequence = engine_sequence(inputs, targets, weights=weights)
    for result, window in zip(tbptt.windows(sequence, init), expected, strict=True):
        grads = gradients(list(module.parameters()))
        check_window((kind, loss, how), result, grads, window, bitwise_state=False)


def cases() -> list[tuple[Any, ...]]:
    windows = ((3, 7), (4, 4), (2, None), (9, 9), (1, 4), (5, 2))
    forms = ((True, "replay"), ("auto", "replay"), ("auto", "checkpoint"))
    return list(itertools.product(LOSSES, OVERLAPS, (None, WEIGHTS), windows, STRATEGIES, forms))


def check_case(kind: str, case: tuple[Any, ...]) -> None:
    loss, overlap, weights, (k1, k2), strategy, (batching, executor) = case
    how = {"k1": k1, "k2": k2, "strategy": strategy, "time_batching": batching}
    check(kind, loss, overlap, weights, executor=executor, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_equal_plain_loops(kind: str) -> None:
    for case in cases()[len(kind) % 7 :: 101]:
        check_case(kind, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_every_window_equals_plain_loops(kind: str) -> None:
    for case in cases():
        check_case(kind, case)


def windows_of(
    module: nn.Module, change: Callable[[nn.Module, int], Any], batching: Any, k: int = 4
) -> tuple[list[Tensor], list[str]]:
    """Gradients after each of some windows, with a change before each, and what was batched."""
    inputs, targets = random_data(6 * k)
    tbptt = TBPTT(module, F.mse_loss, k, k, strategy=f"uniform:{k // 2}", time_batching=batching)
    found = list[Tensor]()
    windows = tbptt.windows(TensorSequence(inputs, targets), (random_state(2), random_state(3)))
    for index in range(6):
        change(module, index)
        next(windows)
        found += [grad.clone() for grad in gradients(list(module.parameters()))]
    return found, [each.operation for each in tbptt.batched_operations if not each.reason]


def set_attribute(module: nn.Module, index: int) -> None:
    module.scale = 1.0 + index


def set_weight(module: nn.Module, index: int) -> None:
    module.out.weight = nn.Parameter(module.out.weight.detach() * (1 + index))


def set_layer(module: nn.Module, index: int) -> None:
    if index == 2:
        module.norm = nn.Identity()


def set_forward(module: nn.Module, index: int) -> None:
    if index == 3:
        module.forward = lambda x, state: (x @ x.T @ state[0], state)


def hook(module: nn.Module, index: int) -> None:
    if index == 1:
        module.norm.register_forward_hook(lambda _, __, result: 2 * result)


def patch_cell(module: nn.Module, index: int) -> None:
    if index == 2:
        module.cell.forward = lambda x, state: (state[0] + x, state[1])


def set_mode(module: nn.Module, index: int) -> None:
    module.train(index % 2 == 0)


CHANGES = (set_attribute, set_weight, set_layer, set_forward, hook, patch_cell, set_mode)


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_changes_between_windows_is_seen_as_it_is(change: Any) -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        results.append(windows_of(Language().double(), change, batching))
    (mine, batched), (its, _) = results
    assert relative_error(mine, its) <= 1e-12
    assert IN_PARTS in batched  # as long as it was one


class OfGlobal(Language):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return y * SCALE, state


def set_global(module: nn.Module, index: int) -> None:
    globals()["SCALE"] = 1.0 if index < 3 else 3.0


class OfEnvironment(Language):
    """What it reads is in no attribute, global or container that a look knows of."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return y * float(os.environ.get("SCALE_OF_A_TEST", "1")), state


def set_environment(module: nn.Module, index: int) -> None:
    os.environ["SCALE_OF_A_TEST"] = "1" if index < 3 else "3"


OUTSIDE = [(OfGlobal, set_global), (OfEnvironment, set_environment)]


@pytest.mark.parametrize(("make", "change"), OUTSIDE)
def test_what_changes_outside_is_seen_at_a_long_windows_begin(make: Any, change: Any) -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TbpttWarning)
            results.append(windows_of(make().double(), change, batching, k=200))
        change(None, 0)
    (mine, _), (its, _) = results
    assert relative_error(mine, its) <= 1e-12


def test_other_weights_are_no_other_module() -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TbpttWarning)
            results.append(windows_of(Language().double(), set_weight, batching, k=100)[0])
    assert relative_error(*results) <= 1e-12


@pytest.mark.parametrize(("make", "change"), OUTSIDE)
def test_what_changed_within_short_windows_is_told(make: Any, change: Any) -> None:
    torch.manual_seed(0)
    with pytest.warns(TbpttWarning, match=f"module={make.__name__} is not what it was .* anew"):
        windows_of(make().double(), change, "auto", k=100)
    change(None, 0)


def test_a_module_that_keeps_changing_is_run_as_it_is() -> None:
    inputs, targets = random_data(60)
    module = Language().double()
    tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2")
    windows = tbptt.windows(TensorSequence(inputs, targets), (random_state(2), random_state(3)))
    for index, _ in enumerate(windows):
        module.scale = 1.0 + index
    assert "keep changing" in tbptt.batched_operations[-1].reason


def test_evaluation_sees_the_module_in_its_mode() -> None:
    class Dropping(Language):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state = super().forward(x, state)
            return y * (1.0 if self.training else 2.0), state

    inputs, targets = random_data(40)
    init = random_state(2), random_state(3)
    sequence, losses = TensorSequence(inputs, targets), []
    for batching in ("auto", False):
        torch.manual_seed(0)
        module = Dropping().double()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        tbptt = TBPTT(
            module, F.mse_loss, 8, 8, optimizer, strategy="uniform:4", time_batching=batching
        )
        for _ in range(2):
            before = tbptt.evaluate(sequence, init).loss
            losses.append([before, tbptt.train(sequence, init).loss])
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("autocast", ["of ours", "around"])
def test_autocast_sees_every_step(autocast: str) -> None:
    inputs, targets = (each.float() for each in random_data(8))
    init = random_state(2).float(), random_state(3).float()
    module = Language()
    dtype = torch.bfloat16 if autocast == "of ours" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2", autocast_dtype=dtype)
        tbptt.train(TensorSequence(inputs, targets), init)
    assert not any(each.operation == IN_PARTS for each in tbptt.batched_operations)


def test_a_wrapper_for_several_devices_is_called() -> None:
    inputs, targets = random_data(8)
    tbptt = TBPTT(nn.DataParallel(Language().double()), F.mse_loss, 4, 4, strategy="uniform:2")
    assert tbptt.train(TensorSequence(inputs, targets), (random_state(2), random_state(3)))
    assert not any(each.operation == IN_PARTS for each in tbptt.batched_operations)


def test_outputs_without_lanes_or_state_are_left() -> None:
    class Pooled(Language):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state = super().forward(x, state)
            return y.mean(0, keepdim=True).expand(LANES, -1), state

    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        results.append(windows_of(Pooled().double(), lambda *_: None, batching)[0])
    assert relative_error(*results) <= 1e-12
