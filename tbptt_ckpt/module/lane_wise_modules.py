"""Which modules of torch's treat every lane by itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from tbptt_ckpt.module.lane_wise import are_trailing
from tbptt_ckpt.module.step_values import Call, Value

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.LeakyReLU),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardtanh),
    *(nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Tanhshrink, nn.Threshold, nn.Identity),
)
_RANKS: dict[type, int] = {
    getattr(nn, f"{name}{n}d"): n + 2
    for n in (1, 2, 3)
    for name in ("Conv", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
}


def is_lane_wise_module(module: nn.Module, call: Call) -> bool:
    """Whether a module of torch's treats every lane by itself, as it is now."""
    kind = type(module)
    is_torchs = getattr(nn, kind.__name__, None) is kind
    if not is_torchs or not isinstance(call.first, Value):
        return False
    if kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        states = call.values[1:]
        return (
            call.first.rank == 2
            and all(v.has_lanes and v.rank == 2 for v in call.values)
            and (len(states) == (2 if kind is nn.LSTMCell else 1))
        )
    return call.only_first and call.first.rank > 0 and _takes(module, call.first.rank)


def _takes(module: Any, rank: int) -> bool:
    match module:
        case nn.Embedding():
            plain = not (module.sparse or module.scale_grad_by_freq)
            answer = plain and module.max_norm is None
        case nn.LayerNorm() | nn.RMSNorm():
            answer = len(module.normalized_shape) < rank
        case nn.Softmax() | nn.LogSoftmax() | nn.Softmin() | nn.GLU():
            answer = are_trailing(module.dim, rank)
        case nn.Flatten():
            answer = are_trailing((module.start_dim, module.end_dim), rank)
        case nn.Unflatten():
            answer = are_trailing(module.dim, rank)
        case nn.Dropout():
            answer = not module.training or module.p == 0
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            answer = not module.training and module.running_mean is not None and rank > 1
        case nn.Linear() | nn.GroupNorm() | nn.PReLU():
            answer = rank > 1
        case _:
            answer = type(module) in _ACTIVATIONS or rank == _RANKS.get(type(module))
    return answer
