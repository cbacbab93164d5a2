"""Losses as PyTorch users write them (kinds of section 1)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .carriers import LANES, MSE, carried
from .case import Case, Dice, Loss

CLASSES = 5
PAD = -100


def flat(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1])


def cross_entropy(dice: Dice, **options: Any) -> Loss:
    """torch's cross-entropy in one of the ways it is called; `options` are torch's."""
    way = dice.choice(("function", "permuted", "module", "nll"))
    reduction = options.get("reduction", "mean")
    module = nn.CrossEntropyLoss(**options)

    def function(y: Tensor, t: Tensor) -> Tensor:
        if way == "module":
            return module(flat(y), t.flatten())
        if way == "nll":
            return F.nll_loss(F.log_softmax(flat(y), -1), t.flatten(), **options)
        if way == "permuted" and y.ndim == 3:
            return F.cross_entropy(y.permute(0, 2, 1), t, **options)
        return F.cross_entropy(flat(y), t.flatten(), **options)

    ignored = options.get("ignore_index", PAD)
    weight = options.get("weight")

    def count(y: Tensor, t: Tensor) -> Tensor:
        kept = t[t != ignored]
        return torch.tensor(float(kept.numel())) if weight is None else weight[kept].sum()

    summed = {**options, "reduction": "sum"}
    return Loss(
        function=function,
        total=lambda y, t: F.cross_entropy(flat(y), t.flatten(), **summed),
        count=count,
        form=reduction,
    )


def classified(dice: Dice, loss: Loss, **given: Any) -> Case:
    return carried(dice, loss=loss, outputs=CLASSES, classes=True, **given)


def mean(dice: Dice) -> Case:
    """Any of torch's mean losses."""
    if dice.maybe(0.4):
        return classified(dice, cross_entropy(dice))
    name, total = dice.choice(
        (
            ("mse_loss", lambda y, t: (y - t).pow(2).sum()),
            ("l1_loss", lambda y, t: (y - t).abs().sum()),
            ("smooth_l1_loss", lambda y, t: F.smooth_l1_loss(y, t, reduction="sum")),
            ("huber_loss", lambda y, t: F.huber_loss(y, t, reduction="sum")),
        )
    )
    function = getattr(F, name)
    shape = dice.choice(("whole", "flat", "scaled"))
    factor = 3.0 if shape == "scaled" else 1.0

    def loss(y: Tensor, t: Tensor) -> Tensor:
        if shape == "flat":
            return function(y.flatten(), t.flatten())
        return function(y, t) if shape == "whole" else function(y, t) * factor

    made = Loss(function=loss, total=lambda y, t: total(y, t) * factor, count=MSE.count)
    return carried(dice, loss=made)


def summed(dice: Dice) -> Case:
    """`reduction="sum"`, as a function, a lambda or a module."""
    if dice.maybe(0.4):
        return classified(dice, cross_entropy(dice, reduction="sum"))
    way = dice.choice((nn.MSELoss(reduction="sum"), lambda y, t: F.mse_loss(y, t, reduction="sum")))
    return carried(dice, loss=Loss(function=way, total=MSE.total, count=MSE.count, form="sum"))


def padded(case: Case, dice: Dice, part: float, ignored: int = PAD) -> Case:
    case.targets[torch.rand(case.targets.shape) < part] = ignored
    if dice.maybe(0.5):  # padding that begins late, as at the end of sequences
        case.targets[: case.k1] = case.targets[: case.k1].clamp(min=0)
    return case


def ignored(dice: Dice) -> Case:
    """Targets with padding, under a default or an own `ignore_index`."""
    index = dice.choice((PAD, PAD, 0, -1))
    case = classified(dice, cross_entropy(dice, ignore_index=index))
    return padded(case, dice, dice.choice((0.2, 0.6)), index)


def ignored_sum(dice: Dice) -> Case:
    """Padding under `reduction="sum"`."""
    return padded(classified(dice, cross_entropy(dice, reduction="sum")), dice, 0.4)


def ignored_stretch(dice: Dice) -> Case:
    """Whole steps, and so whole segments or windows, whose targets are all ignored."""
    case = classified(dice, cross_entropy(dice))
    first = dice.randrange(case.num_steps)
    case.targets[first : first + dice.randint(1, 2 * case.k1)] = PAD
    return case


def class_weights(dice: Dice) -> Case:
    """Class weights, which are in numerator and denominator, with padding at times."""
    weight = torch.rand(CLASSES) + 0.2
    case = classified(dice, cross_entropy(dice, weight=weight))
    return padded(case, dice, dice.choice((0.0, 0.4)))


def own_mean(dice: Dice) -> Case:
    """A loss by hand that is a mean over its positions."""
    total = dice.choice(
        (
            lambda y, t: torch.log(torch.cosh(y - t)).sum(),
            lambda y, t: ((y - t).pow(4) + 0.1 * y.pow(2)).sum(),
            lambda y, t: (y * t).sum(),  # signed
        )
    )
    made = Loss(
        function=lambda y, t: total(y, t) / y.numel(), total=total, count=lambda y, t: y.numel()
    )
    case = carried(dice, loss=made)
    if dice.maybe(0.5):  # late, what in other losses marks padding
        late = case.targets[case.num_steps // 2 :]
        late[torch.rand(late.shape) < 0.3] = dice.choice((0.0, -1.0))
    return case


def own_sum(dice: Dice) -> Case:
    """By hand, a sum, or a mean of what is not marked: of a step fine, of a segment no mean."""
    return _marked_late(dice) if dice.maybe(0.4) else _summed_by_hand(dice)


def _summed_by_hand(dice: Dice) -> Case:
    def total(y: Tensor, t: Tensor) -> Tensor:
        return torch.log(torch.cosh(y - t)).sum()

    loss = Loss(function=total, total=total, count=MSE.count, form="sum")
    if dice.maybe(0.4):
        return carried(dice, loss=loss, segment=False)
    strategy = dice.choice(("retain", "uniform:5", "uniform:3"))
    case = _in_known_segments(dice, loss, strategy)
    first = [cut for cut in _cuts(case) if cut <= case.k1]
    longest = max(b - a for a, b in itertools.pairwise(first))
    if longest < (2 if strategy == "retain" else 3):  # whether some call has several steps
        return carried(dice, loss=loss, segment=False)
    case.refused = "a segment's loss by hand is a sum, not a mean of its positions"
    case.names = ("no mean",)
    return case


def _in_known_segments(dice: Dice, loss: Loss, strategy: str) -> Case:
    """A segment module; of a stream, windows end where nobody knows beforehand."""
    options = {"loss": "new", "strategy": strategy}
    source = dice.choice(("tensors", "reader"))
    return carried(dice, loss=loss, segment=True, options=options, source=source)


def _marked_late(dice: Dice) -> Case:
    """A mean over the targets that bear no mark, which one of a late window does."""
    mark = dice.choice((0.0, -1.0, -100.0, float("nan")))

    def function(y: Tensor, t: Tensor) -> Tensor:
        kept = t == t if mark != mark else t != mark
        return (y[kept] - t[kept]).pow(2).mean()

    loss = Loss(function=function, total=function, count=lambda y, t: 1.0)
    case = _in_known_segments(dice, loss, "retain")
    shortest = min(b - a for a, b in itertools.pairwise(_cuts(case)))
    if case.num_steps <= case.k1 or shortest < 2 or dice.maybe(0.2):
        case = carried(dice, loss=loss, segment=False)
    else:
        case.refused = "a mean of what is not marked, over a segment"
        case.names = ("no mean",)
    case.targets[dice.randrange(min(case.k1, case.num_steps - 1), case.num_steps), 0, 0] = mark
    return case


def pair_loss(*, masked: bool) -> Loss:
    def kept(t: Tensor) -> Tensor:
        return (t > -0.5).to(t.dtype) if masked else torch.ones_like(t)

    def total(y: Tensor, t: Tensor) -> Tensor:
        return ((y - t).pow(2) * kept(t)).sum()

    def function(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return total(y, t), kept(t).sum()

    return Loss(function=function, total=total, count=lambda y, t: kept(t).sum(), form="pair")


def pair(dice: Dice) -> Case:
    """`(loss_sum, weight)`, whose weight may follow from the targets."""
    return carried(dice, loss=pair_loss(masked=dice.maybe(0.5)))


def coupled(dice: Dice) -> Case:
    """A segment's loss that couples neighbouring steps: right where a window is one leaf."""

    def function(y: Tensor, t: Tensor) -> Tensor:
        rough = (y[1:] - y[:-1]).pow(2).mean() if len(y) > 1 else y.sum() * 0
        return F.mse_loss(y, t) + rough

    made = Loss(function=function, total=MSE.total, count=MSE.count, window=function)
    strategy = dice.choice(("retain", "uniform:2", "uniform:3"))
    case = _in_known_segments(dice, made, strategy)
    longest = int(strategy[-1]) if strategy != "retain" else 0
    if not longest and case.k2 >= case.k1 and not _cuts_losses(case):
        return case
    first = [cut for cut in _cuts(case) if cut <= case.k1]
    if longest and max(b - a for a, b in itertools.pairwise(first)) > longest:
        case.refused = "a segment's loss couples neighbouring steps"
        case.names = ("couples neighbouring",)
        return case
    return carried(dice, segment=True)


def _cuts(case: Case) -> list[int]:
    """Where segments are cut under every strategy, or more often."""
    return sorted({cut for window in case.windows() for cut in window})


def _cuts_losses(case: Case) -> bool:
    """Whether a cut may lie within the loss steps of a window."""
    return any(new < cut < stop for _, new, stop in case.windows() for cut in _cuts(case))


def masked(dice: Dice) -> Case:
    """`y[mask]`, `t[mask]`: the loss sees another number of positions in each call."""
    outputs, lanes = CLASSES, LANES

    def keep(t: Tensor) -> Tensor:
        return t != PAD

    def function(y: Tensor, t: Tensor) -> Tensor:
        kept = keep(t)
        return F.cross_entropy(y[kept], t[kept])

    made = Loss(
        function=function,
        total=lambda y, t: F.cross_entropy(y[keep(t)], t[keep(t)], reduction="sum"),
        count=lambda y, t: float(keep(t).sum()),
    )
    case = carried(dice, loss=made, outputs=outputs, classes=True)
    case.targets[:, : lanes - 1][torch.rand(case.num_steps, lanes - 1) < 0.4] = PAD
    return case


def weighted(dice: Dice) -> Case:
    """Weights of steps or lanes, which multiply sums and counts alike."""
    way = dice.choice(("steps", "absent", "lanes"))
    choices = [lambda: carried(dice, segment=False, source="tensors")]
    if way != "lanes":
        choices.append(
            lambda: classified(dice, cross_entropy(dice), segment=False, source="tensors")
        )
        choices.append(
            lambda: carried(
                dice,
                segment=False,
                source="tensors",
                loss=Loss(
                    function=nn.MSELoss(reduction="sum"),
                    total=MSE.total,
                    count=MSE.count,
                    form="sum",
                ),
            )
        )
    case = dice.choice(choices)()
    steps = case.num_steps
    case.weight = torch.rand(steps) + 0.1
    if way == "absent":
        case.weight = (torch.rand(steps) < 0.6).double()
    elif way == "lanes":
        case.weight = (torch.rand(steps, LANES) < 0.7).double()
    elif case.targets.ndim == 2 and dice.maybe(0.5):
        padded(case, dice, 0.3)
    return case


class OwnLoss(nn.Module):
    """A loss that calls torch's somewhere inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(ignore_index=PAD)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return self.inner(flat(y), t.flatten())


def in_module(dice: Dice) -> Case:
    """An own loss module around torch's loss, over padded targets."""
    made = cross_entropy(dice)
    own = Loss(function=OwnLoss(), total=made.total, count=made.count)
    return padded(classified(dice, own), dice, 0.3)


KINDS = {
    "loss.mean": mean,
    "loss.sum": summed,
    "loss.ignored": ignored,
    "loss.ignored_sum": ignored_sum,
    "loss.ignored_stretch": ignored_stretch,
    "loss.class_weights": class_weights,
    "loss.own_mean": own_mean,
    "loss.own_sum": own_sum,
    "loss.pair": pair,
    "loss.coupled": coupled,
    "loss.masked": masked,
    "loss.weighted": weighted,
    "loss.in_module": in_module,
}
