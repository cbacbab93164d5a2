"""Steps written as one forward, run by the parts that a trace finds, equal the same one by one."""

import itertools
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
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
from grids import later
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from traced_kinds import KINDS, Language, made

from tbptt_ckpt import TBPTT, TbpttWarning, TensorSequence
from tbptt_ckpt.executor import found_parts

WEIGHTS = (1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.0, 1.0)
SCALE = 1.0
IN_PARTS = "LSTMCell of all steps"


@pytest.fixture(autouse=True)
def _short_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_parts, "_LEAST_STEPS", 1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mean": F.mse_loss,
    "sum": nn.MSELoss(reduction="sum"),
    "pair": masked_loss,
    "of lanes together": lambda y, target: F.mse_loss(y - y.mean(0), target),
}


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gated", "mixing")])
def test_all_kinds_of_cells_are_found(kind: str) -> None:
    module, init = made(kind)
    tbptt = TBPTT(module, F.mse_loss, 9, 9, strategy="uniform:3")
    tbptt.train(TensorSequence(*random_data(9)), init)
    name = type(module.cell).__name__
    assert f"{name} of all steps" in [each.operation for each in tbptt.batched_operations]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_equal_plain_loops(kind: str) -> None:
    for case in cases()[len(kind) % 7 :: 307]:
        check_case(kind, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_every_window_equals_plain_loops(kind: str) -> None:
    for case in cases():
        check_case(kind, case)


def windows_of(
    module: nn.Module,
    change: Callable[[nn.Module, int], Any],
    batching: Any,
    k: int = 4,
    budget: int | None = None,
) -> tuple[list[Tensor], list[str]]:
    """Gradients after each of some windows, with a change before each, and what was batched."""
    inputs, targets = random_data(6 * k)
    options = {"time_batching": batching, "memory_budget": budget}
    tbptt = TBPTT(module, F.mse_loss, k, k, strategy=f"uniform:{k // 2}", **options)
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


def test_a_global_that_changes_is_seen_at_every_window() -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TbpttWarning)
            results.append(windows_of(OfGlobal().double(), set_global, batching))
        set_global(None, 0)
    (mine, batched), (its, _) = results
    assert relative_error(mine, its) <= 1e-12
    assert IN_PARTS in batched


# Within a budget a window is looked at twice.
@pytest.mark.parametrize(
    ("k", "budget"), [(200, None), (100, 10**9), later(200, 10**9), later(100, None)]
)
def test_what_no_look_sees_is_found_by_a_step_in_200(
    k: int, budget: int | None, monkeypatch: Any
) -> None:
    """Code that reads such things is not traced; if it were, a step would be compared."""
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TbpttWarning)
            if batching:
                monkeypatch.setattr(found_parts, "check_plain", lambda module: None)
            module = OfEnvironment().double()
            results.append(windows_of(module, set_environment, batching, k=k, budget=budget))
        set_environment(None, 0)
        told = [str(each.message) for each in caught if each.category is TbpttWarning]
        assert len(told) == (batching == "auto" and k == 100)
        assert all("module=OfEnvironment is not what it was" in each for each in told)
    (mine, batched), (its, _) = results
    is_right = relative_error(mine, its) <= 1e-12
    assert is_right == (k == 200) or (is_right and budget)  # which is looked at in other windows
    assert IN_PARTS in batched


def test_other_weights_are_no_other_module() -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", TbpttWarning)
            results.append(windows_of(Language().double(), set_weight, batching, k=100)[0])
    assert relative_error(*results) <= 1e-12


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
            return y * (1.0 + self.training), state

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


class Branching(Language):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        if isinstance(x, Tensor) and x[0, 0] > 0:
            y = 2 * y
        return y, state


class Catching(Language):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        with suppress(Exception):
            y = 2 * y if bool(x[0, 0] > 0) else y
        return y, state


class OfClass(Language):
    rate = 1.0

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return y * self.rate, state


class ByMethod(Language):
    def read(self, y: Tensor) -> Tensor:
        return 2 * y

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return self.read(y), state


class ByFunction(Language):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return doubled(y), state


def doubled(y: Tensor) -> Tensor:
    return 2 * y


class ByAnotherName(OfClass):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        me = self
        h, c = self.cell(self.encode(x), state)
        return self.out(self.norm(h)) * me.rate, (h, c)


class OfTensor(Language):
    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return y * self.mask, state


class Keeping(Language):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        self.calls = getattr(self, "calls", 0) + 1
        return y, state


class Printing(Language):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        print("a step")
        return super().forward(x, state)


LEFT = (
    *(Branching, Catching, OfClass, ByMethod, ByFunction, ByAnotherName, OfTensor, Keeping),
    Printing,
)


@pytest.mark.parametrize("make", LEFT)
def test_code_that_depends_on_more_is_called_step_by_step(make: Any, capsys: Any) -> None:
    results, seen = [], []
    for batching in ("auto", False):
        torch.manual_seed(0)
        module = make().double()
        grads, batched = windows_of(module, lambda *_: None, batching)
        results.append(grads)
        seen.append((getattr(module, "calls", 0), capsys.readouterr().out.count("a step")))
        assert IN_PARTS not in batched
    assert relative_error(*results) == 0
    assert seen[0] == seen[1]


class Masked(Language):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, WIDTH))
        self.bn = nn.BatchNorm1d(WIDTH)
        self.bn.eval()

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return self.bn(y * self.mask), state


def set_mask(module: Any, index: int) -> None:
    if index in (2, 4):
        module.mask = torch.rand(LANES if index == 2 else 1, WIDTH).double()


def drop_statistics(module: Any, index: int) -> None:
    if index == 3:
        module.bn.running_mean = module.bn.running_var = None


def drop_bias(module: Any, index: int) -> None:
    if index == 3:
        module.out.bias = None


def change_class(module: Any, index: int) -> None:
    if index == 3:
        module.__class__ = Wider


class Wider(Masked):
    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x, state)
        return 3 * y, state


@pytest.mark.parametrize("change", [set_mask, drop_statistics, drop_bias, change_class])
def test_what_a_module_is_made_of_may_change_between_windows(change: Any) -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        found, batched = windows_of(Masked().double(), change, batching)
        results.append(found)
        assert (IN_PARTS in batched) == (batching == "auto")
    assert relative_error(*results) <= 1e-12


def test_hooks_of_all_modules_and_modes_see_every_step() -> None:
    class Halving(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            return result / 2 if func is F.linear else result

    def hooked() -> Any:
        def hook(part: nn.Module, _: Any, result: Any) -> Any:
            return result / result.abs().max() if isinstance(part, nn.Linear) else None

        handle = nn.modules.module.register_module_forward_hook(hook)
        stack = ExitStack()
        stack.callback(handle.remove)
        return stack

    for watching in (Halving, hooked):
        results = []
        for batching in ("auto", False):
            torch.manual_seed(0)
            inputs, targets = random_data(16)
            module = Language().double()
            tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2", time_batching=batching)
            init = random_state(2), random_state(3)
            windows = tbptt.windows(TensorSequence(inputs, targets), init)
            next(windows)
            with watching():
                next(windows)
            results.append(gradients(list(module.parameters())))
        assert relative_error(*results) <= 1e-12


class OfKeys(Language):
    def forward(self, x: Any, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x["x"], state)
        return y * x.get("scale", 1.0), state


class OfRows(Language):
    def forward(self, x: Any, state: Any) -> tuple[Tensor, Any]:
        return super().forward(F.normalize(x, dim=-2).flatten(1)[:, :WIDTH_IN], state)


def test_sequences_of_another_kind_are_other_inputs() -> None:
    x, y = random_data(8)
    wide = torch.stack([x, x.flip(0), -x], 2)
    scale = torch.rand(8, LANES, 1, dtype=torch.float64)
    sequences = {
        OfKeys: [{"x": x}, {"x": x, "scale": scale}, {"x": x}],
        OfRows: [wide, x, wide[:, :, :2]],
    }
    for make, inputs in sequences.items():
        results = []
        for batching in ("auto", False):
            torch.manual_seed(0)
            module = make().double()
            tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2", time_batching=batching)
            for each in inputs:
                tbptt.train(TensorSequence(each, y), (random_state(2), random_state(3)))
            results.append(gradients(list(module.parameters())))
        assert relative_error(*results) <= 1e-12


def test_what_copies_itself_is_compared_as_it_is() -> None:
    class Shared(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    torch.manual_seed(0)
    module = Language()
    module.out = Shared(WIDTH, WIDTH)
    nn.init.zeros_(module.out.bias)
    inputs, targets = (each.float() for each in random_data(8))
    tbptt = TBPTT(module, F.mse_loss, 4, 4, strategy="uniform:2")
    tbptt.train(TensorSequence(inputs, targets), (torch.zeros(LANES, WIDTH),) * 2)
    assert module.out.weight.dtype is torch.float32
    assert not module.out.bias.any()


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, target: y.sub_(target).pow(2).mean(),
        lambda y, target: F.mse_loss(y.relu_(), target),
        lambda y, target: (y.register_hook(lambda grad: 2 * grad), F.mse_loss(y, target))[1],
    ],
)
def test_losses_may_write_into_outputs_and_put_hooks_on_them(loss: Any) -> None:
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        module, (inputs, targets) = Language().double(), random_data(8)
        tbptt = TBPTT(module, loss, 4, 4, strategy="retain", time_batching=batching)
        tbptt.train(TensorSequence(inputs, targets), (random_state(2), random_state(3)))
        results.append(gradients(list(module.parameters())))
    assert relative_error(*results) <= 1e-12


def test_a_number_that_a_loss_changes_counts_from_the_next_window() -> None:
    """One step by one it would count from the next step of a run, and depend on the strategy."""
    results = []
    for batching in ("auto", False):
        torch.manual_seed(0)
        module, (inputs, targets) = Language().double(), random_data(8)

        def loss(y: Tensor, target: Tensor, module: Any = module) -> Tensor:
            module.scale = 2.0
            return (y - target).pow(2).mean()

        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        tbptt = TBPTT(module, loss, 4, 4, optimizer, strategy="retain", time_batching=batching)
        windows = tbptt.windows(TensorSequence(inputs, targets), (random_state(2), random_state(3)))
        results.append([window.loss for window in windows])
    (first, _), (its_first, _) = results
    assert relative_error([first], [its_first]) > 1e-3
