"""What the allow-list admits treats every lane by itself: any call, against lanes one by one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt.module import lane_wise
from tbptt_ckpt.module.lane_wise import is_lane_wise_function
from tbptt_ckpt.module.lane_wise_modules import is_lane_wise_module
from tbptt_ckpt.module.step_values import Call, Value
from tbptt_ckpt.module.trees import map_tensors, tensors_of

LANES = 4  # as many as other dimensions have, so that what mixes them fits
SHAPES = [(), (4,), (1,), (4, 4), (1, 4), (4, 1), (4, 4, 4), (1, 4, 4), (2, 4, 4), (4, 2, 4, 4)]
NAMED = [*lane_wise._BY_NAME.items()]
FUNCTIONS: list[Any] = [*lane_wise._BY_FUNCTION]


def drawn(draw: random.Random, lanes: dict[int, Tensor], constants: dict[int, Tensor]) -> Any:
    """An argument: of lanes, constant, or literal."""
    kind = draw.choice(["lanes", "lanes", "lanes", "constant", "int", "int", "other", "list"])
    if kind in ("lanes", "constant"):
        wanted = [s for s in SHAPES if kind == "constant" or s[:1] == (LANES,)]
        shape = draw.choice(wanted)
        tensor = torch.rand(shape) if draw.random() < 0.8 else torch.randint(0, 2, shape)
        (lanes if kind == "lanes" else constants)[id(tensor)] = tensor
        return tensor
    if kind == "int":
        return draw.randint(-3, 3)
    if kind == "list":
        number = draw.randint(1, 3)
        if draw.random() < 0.3:
            shape = draw.choice([(4, 4), (4, 1, 4)])
            same = [torch.rand(shape) for _ in range(2)]
            lanes.update((id(each), each) for each in same)
            return same
        if draw.random() < 0.5:
            return [draw.randint(-3, 3) for _ in range(number)]
        return tuple(drawn(draw, lanes, constants) for _ in range(number))
    others = [None, 0.5, True, False, slice(None), slice(1, 3), Ellipsis, torch.float64]
    return draw.choice(others)


def check(call: Callable[..., Any], target: Any, draw: random.Random) -> bool:
    """Whether a call that was drawn is admitted, and works; then it is lane-wise."""
    lanes: dict[int, Tensor] = {}
    constants: dict[int, Tensor] = {}
    args = [drawn(draw, lanes, constants) for _ in range(draw.randint(1, 4))]
    kwargs = {"dim": draw.randint(-3, 3)} if draw.random() < 0.2 else {}

    def known(tensor: Tensor) -> Value:
        is_lanes = id(tensor) in lanes
        return Value(tuple(tensor.shape), is_lanes, not is_lanes)

    def values(tree: Any) -> Any:
        if isinstance(tree, list | tuple):
            return tuple(map(values, tree))
        return known(tree) if isinstance(tree, Tensor) else tree

    if not is_lane_wise_function(target, Call(values(tuple(args)), kwargs)):
        return False
    try:
        whole = call(*args, **kwargs)
    except Exception:  # it is no such call
        return False
    lane = []
    for i in range(LANES):
        own = map_tensors(lambda t, i=i: t[i : i + 1] if id(t) in lanes else t, args)
        try:
            lane.append(tensors_of(call(*own, **kwargs)))
        except ValueError as error:
            if "more than 1 value" in str(error):  # a norm of one number
                return False
            raise
    for got, *parts in zip(tensors_of(whole), *lane, strict=True):
        assert torch.allclose(got, torch.cat(parts), equal_nan=True), (target, args, kwargs)
    return True


def admitted(call: Callable[..., Any], target: Any, number: int) -> int:
    torch.manual_seed(0)
    draw = random.Random(getattr(target, "__name__", target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(check(call, target, draw) for _ in range(number))


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: getattr(f, "__name__", str(f)))
def test_functions_that_are_admitted_are_lane_wise(function: Any) -> None:
    admitted(function, function, 1500)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [n for n, _ in NAMED if hasattr(Tensor, n)])
def test_methods_that_are_admitted_are_lane_wise(name: str) -> None:
    admitted(getattr(Tensor, name), name, 1500)


def test_calls_are_admitted_and_lane_wise() -> None:
    for name in ("add", "softmax", "matmul", "max", "sum", "clamp"):
        target: Any = getattr(torch, name)
        assert admitted(target, target, 3000), name


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lane_wise._BY_FUNCTION, torch.cumsum, lambda call: call.only_first)
    with pytest.raises(AssertionError):
        admitted(torch.cumsum, torch.cumsum, 400)


MODULES: list[tuple[nn.Module, tuple[int, ...], bool]] = [
    (nn.Linear(4, 2), (4, 4), True),
    (nn.Linear(4, 2), (4,), False),
    (nn.LayerNorm(4), (4, 4), True),
    (nn.LayerNorm((4, 4)), (4, 4), False),
    (nn.RMSNorm(4), (4, 2, 4), True),
    (nn.GroupNorm(2, 4), (4, 4), True),
    (nn.Softmax(-1), (4, 4), True),
    (nn.Softmax(0), (4, 4), False),
    (nn.LogSoftmax(1), (4, 4), True),
    (nn.GLU(), (4, 4), True),
    (nn.GLU(0), (4, 4), False),
    (nn.PReLU(4), (4, 4), True),
    (nn.Flatten(), (4, 2, 4), True),
    (nn.Flatten(0), (4, 2), False),
    (nn.Unflatten(1, (2, 2)), (4, 4), True),
    (nn.Conv1d(4, 2, 1), (4, 4, 4), True),
    (nn.Conv1d(4, 2, 1), (4, 4), False),  # is one sample of four channels
    (nn.Conv2d(4, 2, 1), (4, 4, 4, 4), True),
    (nn.MaxPool1d(2), (4, 4, 4), True),
    (nn.MaxPool1d(2), (4, 4), False),
    (nn.AdaptiveAvgPool2d(1), (4, 2, 4, 4), True),
    (nn.BatchNorm1d(4).eval(), (4, 4), True),
    (nn.BatchNorm1d(4), (4, 4), False),
    (nn.BatchNorm1d(4, track_running_stats=False).eval(), (4, 4), False),
    (nn.Dropout(0.5), (4, 4), False),
    (nn.Dropout(0.5).eval(), (4, 4), True),
    (nn.Dropout(0.0), (4, 4), True),
    (nn.GELU(), (4,), True),
    (nn.Identity(), (4, 4), True),
    (nn.AlphaDropout(0.5).eval(), (4, 4), False),
    (nn.InstanceNorm1d(4), (4, 4, 4), False),
    (nn.TransformerEncoderLayer(4, 2), (4, 4), False),
]


@pytest.mark.parametrize(("module", "shape", "is_folded"), MODULES)
def test_modules(module: nn.Module, shape: tuple[int, ...], is_folded: bool) -> None:
    assert is_lane_wise_module(module, Call((Value(shape, has_lanes=True),), {})) == is_folded
    assert not is_lane_wise_module(module, Call((Value(shape),), {}))
    if is_folded:
        x = torch.rand(shape)
        lanes = torch.cat([module(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(module(x), lanes)


def test_a_subclass_is_not_what_it_derives_from() -> None:
    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    call = Call((Value((4, 4), has_lanes=True),), {})
    assert is_lane_wise_module(nn.Linear(4, 4), call)
    assert not is_lane_wise_module(Mixing(4, 4), call)
