"""torch's losses as users call them: a window is one call over its loss steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from cases import LANES, WIDTH, gradients, lstm, random_data, relative_error, tanh_cell
from grids import covering
from models_for_tests import moving
from runs_of_data import batch_first_lstm
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, ArgumentError, TensorSequence, evaluate, run_window, verify
from tbptt_ckpt.data.blocks import StepBlock
from tbptt_ckpt.executor.loss_sum import LossSum
from tbptt_ckpt.executor.losses import LossFunction
from tbptt_ckpt.executor.torch_losses import Counting
from tbptt_ckpt.memory import peak_memory

NUM_STEPS, K1, K2 = 14, 3, 7
IGNORED = -100
CLASS_WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
MODULES = {"cell": tanh_cell, "lstm": lstm, "batch_first": batch_first_lstm}


def classes(first_padded: int | None = None) -> Tensor:
    """[T, B] with ignored targets, in some lanes and in whole steps; steps 6 to 8 have none."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(WIDTH, (NUM_STEPS, LANES), generator=generator)
    targets[1] = targets[4, 0] = targets[10, 1] = targets[13, 0] = IGNORED
    targets[6:9] = IGNORED
    return targets


def flat(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return y.reshape(-1, y.shape[-1]), target.reshape(-1)


class OwnLoss(nn.Module):
    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(reduction=reduction)

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        return self.criterion(*flat(y, target))


def masked_mse(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        mask = target[..., 0] < 0.3
        return F.mse_loss(y[mask], target[mask], reduction=reduction)

    return loss_fn


def written(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Ignores targets that the source does not."""

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        target = target.clone()
        target[target == 1] = IGNORED
        return F.cross_entropy(*flat(y, target), reduction=reduction)

    return loss_fn


def guarded(reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        mask = target != IGNORED
        if not mask.any():
            return y.sum() * 0.0
        return F.cross_entropy(y[mask], target[mask], reduction=reduction)

    return loss_fn


def by_class(**options: Any) -> Callable[[str], Callable[[Tensor, Tensor], Tensor]]:
    return lambda reduction: (
        lambda y, t: F.cross_entropy(*flat(y, t), reduction=reduction, **options)
    )


# name: the loss by its reduction, whether targets are classes
LOSSES: dict[str, tuple[Callable[[str], Any], bool]] = {
    "mse": (lambda r: nn.MSELoss(reduction=r), False),
    "l1_function": (lambda r: lambda y, t: F.l1_loss(y, t, reduction=r), False),
    "masked_mse": (masked_mse, False),
    "cross_entropy": (by_class(), True),
    "cross_entropy_float": (
        lambda r: lambda y, t: F.cross_entropy(*flat(y, t), reduction=r).double(),
        True,
    ),
    "class_weights": (by_class(weight=CLASS_WEIGHT), True),
    "smoothed": (by_class(label_smoothing=0.1, weight=CLASS_WEIGHT), True),
    "ignore_0": (by_class(ignore_index=0), True),
    "own_module": (OwnLoss, True),
    "guarded": (guarded, True),
    "written": (written, True),
    "nll": (
        lambda r: (
            lambda y, t: F.nll_loss(F.log_softmax(flat(y, t)[0], -1), t.flatten(), reduction=r)
        ),
        True,
    ),
}


def data_of(loss: str) -> tuple[Tensor, Tensor]:
    inputs, targets = random_data(NUM_STEPS)
    if not LOSSES[loss][1]:
        return inputs, targets
    known = classes()
    return inputs, known.clamp(min=0) if loss == "ignore_0" else known


def sequence_of(kind: str, inputs: Tensor, targets: Tensor) -> TensorSequence:
    if kind == "batch_first":
        return TensorSequence(inputs.movedim(0, 1), targets.movedim(0, 1), time_dim=1)
    return TensorSequence(inputs, targets)


def outputs_of(kind: str, module: nn.Module, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    """[T, B, ...], step by step or in one call."""
    if kind == "cell":
        found = []
        for x in inputs:
            y, state = module(x, state)
            found.append(y)
        return torch.stack(found), state
    dim = int(kind == "batch_first")
    y, state = module(inputs.movedim(0, dim), state)
    return y.movedim(dim, 0), state


def reference(
    kind: str, loss: str, torch_reduction: str, reduction: str, k1: int = K1, k2: int | None = K2
) -> list[tuple[Tensor | None, list[Tensor | None]]]:
    """Each window by hand: everything retained, one call of the loss over all its loss steps."""
    module, loss_fn = MODULES[kind](), LOSSES[loss][0](torch_reduction)
    inputs, targets = data_of(loss)
    optimizer, found = moving(module), []
    states: dict[int, Any] = {0: None}
    for start, new_start, stop in naive.windows(NUM_STEPS, k1, k2):
        module.zero_grad()
        state, outputs = states[start], []
        for t in range(start, stop):
            y, state = outputs_of(kind, module, inputs[t : t + 1], state)
            states[t + 1] = naive.mapped(Tensor.detach, state)
            outputs.append(y)
        whole = torch.cat(outputs)[new_start - start :]
        value = loss_fn(whole, targets[new_start:stop])
        steps = stop - new_start
        if kind == "cell" and torch_reduction == "sum":
            value = value / steps  # the mean over steps of their sums
        if reduction == "sum":
            value = value * steps
        # What torch calls a mean of nothing is nan; a sum of nothing is zero.
        counts = bool(value.isfinite()) and bool(value)
        if counts:
            value.backward()
            grads = gradients(list(module.parameters()))
            optimizer.step()
        found.append((value.detach(), grads) if counts else (None, []))
    return found


@covering(
    kind=MODULES,
    loss=LOSSES,
    torch_reduction=["mean", "sum"],
    reduction=["mean", "sum"],
    strategy=["uniform:2", "retain", "uniform:3"],
)
@pytest.mark.filterwarnings("ignore:loss_fn calls")
def test_a_window_is_one_call_over_its_loss_steps(
    kind: str, loss: str, torch_reduction: str, reduction: str, strategy: str
) -> None:
    module, loss_fn = MODULES[kind](), LOSSES[loss][0](torch_reduction)
    expected = reference(kind, loss, torch_reduction, reduction)
    tbptt = TBPTT(module, loss_fn, K1, K2, moving(module), reduction=reduction, strategy=strategy)
    windows = tbptt.windows(sequence_of(kind, *data_of(loss)))
    for window, (value, grads) in zip(windows, expected, strict=True):
        assert (window.loss is None) == (value is None)
        assert window.updated == (value is not None)
        if value is not None:
            assert relative_error([window.loss], [value]) <= 1e-12
            assert relative_error(gradients(list(module.parameters())), grads) <= 1e-12


def of_positions(y: Tensor, target: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Losses and counts, both [T, B]."""
    if loss == "mse":
        return (y - target).square().sum(-1), torch.full(y.shape[:2], float(WIDTH))
    weight = CLASS_WEIGHT if loss == "class_weights" else None
    losses = F.cross_entropy(y.movedim(-1, 1), target, reduction="none", weight=weight)
    kept = target != IGNORED
    counts = torch.ones(3) if weight is None else weight
    return losses, counts[target.clamp(min=0)] * kept


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("torch_reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "class_weights"])
@pytest.mark.parametrize("kind", MODULES)
def test_weights_multiply_sums_and_counts_alike(
    kind: str, loss: str, torch_reduction: str, reduction: str, lanes: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_STEPS, LANES) if lanes else (NUM_STEPS, 1)
    weight = torch.randint(3, shape, generator=generator, dtype=torch.float64) / 2
    inputs, targets = data_of(loss)
    module = MODULES[kind]()
    outputs, _ = outputs_of(kind, module, inputs, None)
    losses, counts = of_positions(outputs, targets, loss)
    steps = weight.sum()
    expected = (weight * losses).sum()
    if torch_reduction == "mean":
        expected = expected / (weight * counts).sum()
    elif kind == "cell":  # the mean over steps, weighed, of the steps' sums
        expected = expected / steps * (LANES if lanes else 1)
    expected = expected * steps if reduction == "sum" else expected
    expected.backward()
    grads = gradients(list(module.parameters()))
    module.zero_grad()
    window = run_window(
        module,
        LOSSES[loss][0](torch_reduction),
        inputs.movedim(0, 1) if kind == "batch_first" else inputs,
        targets.movedim(0, 1) if kind == "batch_first" else targets,
        weight=weight if lanes else weight[:, 0],
        reduction=reduction,
        strategy="uniform:3",
    )
    assert relative_error([window.loss], [expected]) <= 1e-12
    assert relative_error(gradients(list(module.parameters())), grads) <= 1e-12


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "guarded"])
@pytest.mark.filterwarnings("ignore:loss_fn calls")
def test_evaluation_and_verification_count_alike(kind: str, loss: str) -> None:
    module, loss_fn = MODULES[kind](), LOSSES[loss][0]("mean")
    inputs, targets = data_of(loss)
    expected = float(loss_fn(outputs_of(kind, module, inputs, None)[0], targets).detach())
    for segment_steps in (3, 64):
        found = evaluate(
            module, loss_fn, sequence_of(kind, inputs, targets), segment_steps=segment_steps
        )
        assert abs(found.loss - expected) <= 1e-12 * expected
    if kind == "batch_first":
        inputs, targets = inputs.movedim(0, 1), targets.movedim(0, 1)
    assert verify(module, loss_fn, inputs, targets, strategy="uniform:3", tolerance=1e-10).ok


@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("executor", ["replay", "checkpoint"])
@pytest.mark.parametrize("loss", ["cross_entropy", "guarded"])
@pytest.mark.filterwarnings("ignore:loss_fn calls")
def test_segments_count_what_the_steps_do(loss: str, executor: str, overlap: str) -> None:
    """Also where new steps before the reach are constants, since k2 < k1."""
    seen = []
    for k1, k2 in ((3, 7), (4, 2)):
        for strategy in ("retain", "uniform:2"):
            module = lstm()
            tbptt = TBPTT(
                module,
                LOSSES[loss][0]("mean"),
                k1,
                k2,
                moving(module),
                executor=executor,
                overlap=overlap,
                strategy=strategy,
            )
            tbptt.train(TensorSequence(*data_of(loss)))
            seen.append([p.detach().clone() for p in module.parameters()])
        assert relative_error(seen[-1], seen[-2]) <= 1e-12


def test_targets_that_are_counted_ahead_leave_advances_without_a_loss() -> None:
    calls = []

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        calls.append(len(y))
        return F.cross_entropy(*flat(y, target))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tbptt = TBPTT(lstm(), loss_fn, 6, 6, strategy="uniform:2")
        tbptt.train(TensorSequence(*data_of("cross_entropy")))
    # The first advance shows how the loss counts; steps 6 to 8 are ignored, and still called.
    assert calls == [2] * (3 + 2 + 3 + 1 - 1)


def test_a_loss_whose_count_only_it_knows_says_so_once() -> None:
    with pytest.warns(UserWarning, match="loss_fn calls mse_loss on other targets") as caught:
        TBPTT(lstm(), masked_mse("mean"), 3, 7, strategy="uniform:2").train(
            TensorSequence(*random_data(NUM_STEPS))
        )
    assert len(caught) == 1


@pytest.mark.parametrize(
    "second",
    [
        lambda y, t: F.cross_entropy(*flat(y, t), ignore_index=0),
        lambda y, t: F.cross_entropy(*flat(y, t), reduction="sum"),
        lambda y, t: F.cross_entropy(*flat(y, t * 1)),
        lambda y, t: F.cross_entropy(*flat(y, t), weight=CLASS_WEIGHT),
        lambda y, t: F.cross_entropy(*flat(y, t)) * 2.0,
    ],
)
def test_a_loss_that_counts_in_another_way_later_is_refused(second: Any) -> None:
    calls = []

    def loss_fn(y: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(*flat(y, target)) if len(calls) < 4 else second(y, target)

    inputs, targets = random_data(NUM_STEPS)[0], classes().clamp(min=0)
    with pytest.raises(ArgumentError, match=r"^loss_fn .*return \(loss_sum, weight\)"):
        TBPTT(tanh_cell(), loss_fn, 3, 7).train(TensorSequence(inputs, targets))


def test_what_is_known_of_a_loss_is_part_of_a_run() -> None:
    known, loss_fn = LossFunction(by_class(weight=CLASS_WEIGHT)("mean")), by_class()("mean")
    _, targets = data_of("cross_entropy")
    known.add_segment(
        LossSum(), torch.zeros(NUM_STEPS, LANES, 3).double(), targets, None, NUM_STEPS, 0
    )
    other = LossFunction(loss_fn)
    other.load_state_dict(known.state_dict())
    assert other.counting.counts_like(known.counting)
    assert other.counting.unit == known.counting.unit
    assert not other.may_weigh_itself


@pytest.mark.parametrize("strategy", ["retain", "uniform:3"])
def test_padding_that_begins_late_is_counted(strategy: str) -> None:
    """Windows in which all positions count are looked at once; the next one may be padded."""
    steps, lanes, width, k1 = 18, 3, 5, 6
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(steps, lanes, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(width, (steps, lanes), generator=generator)
    targets[14:, 1:] = -100
    targets[17] = -100
    torch.manual_seed(1)
    module = nn.RNNCell(4, width).double()

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, -2), target.flatten())

    tbptt = TBPTT(module, loss, k1, k1, strategy=strategy)
    windows = list(tbptt.windows(TensorSequence(inputs, targets)))
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    state = torch.zeros(lanes, width, dtype=torch.float64)
    for window, begin in zip(windows, range(0, steps, k1), strict=True):
        outputs = []
        state = state.detach()
        for step in range(begin, begin + k1):
            state = module(inputs[step], state)
            outputs.append(state)
        whole = loss(torch.cat(outputs), targets[begin : begin + k1])
        whole.backward()
        torch.testing.assert_close(window.loss, whole.detach(), rtol=1e-12, atol=0)
    for mine, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["classes", "weighed classes"])
@pytest.mark.parametrize("shape", [None, (5000,), (5000, 8)], ids=["whole", "steps", "lanes"])
def test_what_a_window_counts_takes_no_memory_that_grows_with_it(
    shape: tuple[int, ...] | None, class_weight: Tensor | None
) -> None:
    """Near a smallest budget a long window was above it before its first action."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(-1, 3, (5000, 8), generator=generator)
    weight = None if shape is None else torch.randint(3, shape, generator=generator).double()
    block = StepBlock(0, 5000, torch.zeros(5000, 8), targets, weight, 0)
    counting = Counting("cross_entropy", "mean", 8.0, True, 0, -1, class_weight)
    with peak_memory(held=(), rss=False) as meter:
        found = counting.foretell([block], 0, 5000)
    counted = torch.ones(3) if class_weight is None else class_weight
    each = torch.where(targets >= 0, counted.double()[targets.clamp(min=0)], 0.0)
    rows = torch.ones(5000, 1) if weight is None else weight.reshape(5000, -1)
    assert found == pytest.approx(float((each * rows).sum()) / 8.0, rel=1e-12)
    assert meter.peak_bytes < targets.nbytes / 5
