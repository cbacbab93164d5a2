"""Which operations treat every lane by itself, so that many steps' lanes are one call.

An allow-list, with the dimensions of each: what is not in it is taken to mix lanes, which are
dimension 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbptt_ckpt.module.step_values import Call, Value

Rule = Callable[[Call], bool]


def _elementwise(call: Call) -> bool:
    """Tensors of lanes are of one rank, and constants reach no further than after."""
    ranks = {value.rank for value in call.values if value.has_lanes}
    given = [*call.args, *call.kwargs.values()]
    is_nested = sum(isinstance(each, Value) for each in given) != len(call.values)
    if is_nested or len(ranks) != 1 or call.kwargs.keys() & {"generator", "out"}:
        return False
    rank = ranks.pop()
    return rank > 0 and all(v.has_lanes or _spares_lanes(v, rank) for v in call.values)


def _spares_lanes(value: Value, rank: int) -> bool:
    shape = value.shape
    return value.is_constant and (
        shape is None or len(shape) < rank or (len(shape) == rank and shape[0] == 1)
    )


def are_trailing(dims: Any, rank: int) -> bool:
    """Whether these are dimensions after the lanes."""
    every = dims if isinstance(dims, list | tuple) else (dims,)
    whole = all(isinstance(d, int) and not isinstance(d, bool) for d in every)
    return whole and bool(every) and all(0 < (d + rank if d < 0 else d) < rank for d in every)


def _over(position: int, name: str = "dim", default: Any = None, extra: int = 0) -> Rule:
    """Over dimensions after the lanes that are named; `extra` where the result has more."""

    def rule(call: Call) -> bool:
        dims = call.get(position, name, default)
        return call.only_first and are_trailing(dims, call.first.rank + extra)

    return rule


def _over_all_given(start: int = 1, name: str = "dims") -> Rule:
    """Dimensions one by one, or in one sequence."""

    def rule(call: Call) -> bool:
        given = call.args[start:] or (call.kwargs.get(name),)
        dims = given[0] if len(given) == 1 else given
        return call.only_first and are_trailing(dims, call.first.rank)

    return rule


def _two_dims(call: Call) -> bool:
    dims = (call.get(1, "dim0"), call.get(2, "dim1"))
    return call.only_first and are_trailing(dims, call.first.rank)


def _permute(call: Call) -> bool:
    given = call.args[1:] or (call.kwargs.get("dims"),)
    dims = given[0] if len(given) == 1 else given
    is_one = call.only_first and isinstance(dims, list | tuple) and bool(dims)
    return is_one and dims[0] == 0 and are_trailing(dims[1:], call.first.rank)


def _flatten(call: Call) -> bool:
    dims = (call.get(1, "start_dim", 0), call.get(2, "end_dim", -1))
    return call.only_first and are_trailing(dims, call.first.rank)


def _join(extra: int) -> Rule:
    def rule(call: Call) -> bool:
        tensors = call.get(0, "tensors")
        if not isinstance(tensors, list | tuple) or len(call.values) != len(tensors):
            return False
        same = all(v.has_lanes and v.rank == call.values[0].rank for v in call.values)
        return same and are_trailing(call.get(1, "dim", 0), call.values[0].rank + extra)

    return rule


def _index(call: Call) -> bool:
    if not isinstance(call.first, Value) or len(call.args) != 2:
        return False
    if call.first.items:  # one of several results
        return isinstance(call.args[1], int)
    parts = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if not call.only_first or not parts:
        return False
    used = sum(part is not None and part is not Ellipsis for part in parts)
    plain = all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts)
    from_lanes = parts[0] == slice(None) or (parts[0] is Ellipsis and used < call.first.rank)
    return plain and from_lanes


def _gather(call: Call) -> bool:
    dim, index = call.get(1, "dim"), call.get(2, "index")
    both = [call.first, index]
    if len(call.values) != 2 or not all(isinstance(v, Value) and v.has_lanes for v in both):
        return False
    return bool(call.first.rank == index.rank and are_trailing(dim, index.rank))


def _weighted(position: int, rank: int | None = None) -> Rule:
    """With a weight and a bias that are constant; `rank` where lanes have one of that alone."""

    def rule(call: Call) -> bool:
        is_constant = call.are_constant((position, "weight"), (position + 1, "bias"))
        return is_constant and (call.first.rank > 1 if rank is None else call.first.rank == rank)

    return rule


def _matmul(call: Call) -> bool:
    other = call.get(1, "other", call.kwargs.get("mat2"))
    if not isinstance(other, Value) or not isinstance(call.first, Value) or len(call.values) != 2:
        return False
    if other.is_constant:
        return call.first.has_lanes and call.first.rank > 1 and other.rank in (1, 2)
    both = call.first.has_lanes and other.has_lanes
    return both and call.first.rank == other.rank > 2  # a product for each lane


def _addmm(call: Call) -> bool:
    bias, x, weight = (call.get(i, n) for i, n in enumerate(("input", "mat1", "mat2")))
    if len(call.values) != 3 or not all(isinstance(v, Value) for v in (bias, x, weight)):
        return False
    return x.has_lanes and weight.is_constant and (bias.has_lanes or _spares_lanes(bias, 2))


def _embedding(call: Call) -> bool:
    writes_or_counts = (
        call.get(3, "max_norm") is not None or call.get(5, "scale_grad_by_freq") is True
    )
    is_sparse = call.get(6, "sparse") is True
    return call.are_constant((1, "weight")) and not writes_or_counts and not is_sparse


def _one_hot(call: Call) -> bool:
    classes = call.get(1, "num_classes", -1)
    return call.only_first and isinstance(classes, int) and classes > 0


def _layer_norm(call: Call) -> bool:
    shape = call.get(1, "normalized_shape")
    known = isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape)
    return known and call.are_constant((2, "weight"), (3, "bias")) and len(shape) < call.first.rank


def _pooling(dims: int) -> Rule:
    return lambda call: call.only_first and call.first.rank == dims + 2


def _dropout(call: Call) -> bool:
    quiet = call.get(1, "p", 0.5) == 0 or call.get(2, "training", True) is False
    return call.only_first and call.first.rank > 0 and quiet


def _pad(call: Call) -> bool:
    pad = call.get(1, "pad")
    known = isinstance(pad, list | tuple) and all(isinstance(n, int) for n in pad)
    return known and call.only_first and len(pad) <= 2 * (call.first.rank - 1)


def _cast(call: Call) -> bool:
    return isinstance(call.first, Value) and call.first.has_lanes and _elementwise(call)


def _where(call: Call) -> bool:
    return len(call.args) + len(call.kwargs) == 3 and _elementwise(call)  # of one it finds places


def _extreme(call: Call) -> bool:
    """`max` and `min`: of two tensors, or over a dimension."""
    other = call.get(1, "dim", call.kwargs.get("other"))
    is_one = isinstance(other, Value) and other.rank > 0
    return _elementwise(call) if is_one else _over(1)(call)


_ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul and_ arccos arccosh arcsin arcsinh arctan
    arctan2 arctanh asin asinh atan atan2 atanh bfloat16 bitwise_and bitwise_not bitwise_or
    bitwise_xor bool ceil celu clamp clamp_max clamp_min clip clone contiguous copysign cos cosh
    detach digamma div divide double elu eq erf erfc erfinv exp exp2 expm1 float floor
    floor_divide floordiv fmax fmin fmod frac ge gelu greater greater_equal gt half hardshrink
    hardsigmoid hardswish hardtanh heaviside hypot int inv invert isfinite isinf isnan ldexp le
    leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and
    logical_not logical_or logical_xor logit logsigmoid long lt masked_fill maximum minimum mish
    mod mul multiply nan_to_num ne neg negative nextafter not_equal ones_like or_ pos positive
    pow reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign sin sinc sinh
    softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold
    true_divide truediv trunc xlogy xor zeros_like
""".split()  # noqa: SIM905
_DIMENSIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["sum", "mean", "amax", "amin", "logsumexp", "prod", "all", "any"], (1,)),
    **dict.fromkeys(["std", "var", "argmax", "argmin", "softmax", "log_softmax", "softmin"], (1,)),
    **dict.fromkeys(["cumsum", "cumprod", "logcumsumexp"], (1,)),
    **dict.fromkeys(["narrow", "select", "unbind", "unflatten"], (1,)),
    **dict.fromkeys(["chunk", "split", "tensor_split", "norm"], (2,)),
    **dict.fromkeys(["sort", "argsort", "glu"], (1, "dim", -1)),
    **{"topk": (2, "dim", -1), "normalize": (2, "dim", 1), "unsqueeze": (1, "dim", None, 1)},
    "roll": (2, "dims"),
}
_BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **{name: _over(*dims) for name, dims in _DIMENSIONS.items()},
    **{
        "max": _extreme,
        "min": _extreme,
        "flip": _over_all_given(),
        "squeeze": _over_all_given(1, "dim"),
        "permute": _permute,
        "where": _where,
    },
    **dict.fromkeys(["transpose", "swapaxes", "swapdims"], _two_dims),
    **{"flatten": _flatten, "cat": _join(0), "concat": _join(0), "stack": _join(1)},
    **dict.fromkeys(["gather", "take_along_dim"], _gather),
    **{"getitem": _index, "linear": _weighted(1), "addmm": _addmm, "embedding": _embedding},
    **dict.fromkeys(["matmul", "mm", "bmm"], _matmul),
    **{"one_hot": _one_hot, "layer_norm": _layer_norm, "group_norm": _weighted(2)},
    **{
        "to": _cast,
        "type_as": _cast,
        "rms_norm": _layer_norm,
        "dropout": _dropout,
        "pad": _pad,
        "prelu": _elementwise,
    },
    **{f"conv{n}d": _weighted(1, n + 2) for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": _pooling(n) for n in (1, 2, 3) for kind in ("max", "avg")},
    **{f"adaptive_{kind}_pool{n}d": _pooling(n) for n in (1, 2, 3) for kind in ("max", "avg")},
}
_OWNERS: tuple[Any, ...] = (operator, torch, F, Tensor, torch.special)
_BY_FUNCTION: dict[Any, Rule] = {
    getattr(owner, name): rule
    for name, rule in _BY_NAME.items()
    for owner in _OWNERS
    if callable(getattr(owner, name, None))
}
del _BY_FUNCTION[torch.embedding]  # whose weight is the first argument


def is_lane_wise_function(target: object, call: Call) -> bool:
    """Whether a call of a function, or of a method by its name, treats every lane by itself."""
    rule = _BY_NAME.get(target) if isinstance(target, str) else _BY_FUNCTION.get(target)
    return rule is not None and rule(call)
