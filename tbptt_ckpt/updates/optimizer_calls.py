"""What an optimizer's methods do, without what torch does around them where nobody sees it.

NOTE [A step without a profiler entry]
torch wraps `step` and `zero_grad` of every optimizer so that a profiler sees them. Between two
large kernels, which push everything else out of the caches, that wrapper takes 0.1 ms: as long
as the whole update of a small model. It is left out only where it is torch's own, as it is known
here, and there is neither a profiler nor a hook to be told.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeGuard

from torch.autograd import profiler
from torch.optim import Optimizer

# All that the wrapper refers to. One that does anything else, in another torch, is called.
_KNOWN_NAMES = {
    "Optimizer",
    "RuntimeError",
    "__class__",
    "__name__",
    "_global_optimizer_post_hooks",
    "_global_optimizer_pre_hooks",
    "_optimizer_step_code",
    "_optimizer_step_post_hooks",
    "_optimizer_step_pre_hooks",
    "autograd",
    "cast",
    "chain",
    "isinstance",
    "len",
    "profiler",
    "record_function",
    "torch",
    "tuple",
    "values",
}


def _known_wrapper() -> FunctionType | None:
    """The wrapper that torch makes; None if it is not as it is known here."""
    wrap = getattr(Optimizer, "profile_hook_step", None)
    wrapper = None if wrap is None else wrap(print)
    is_known = isinstance(wrapper, FunctionType) and set(wrapper.__code__.co_names) == _KNOWN_NAMES
    return wrapper if is_known else None


_WRAPPER = _known_wrapper()


def step(optimizer: Any) -> None:
    """`optimizer.step()`."""
    method = optimizer.step
    function = getattr(method, "__func__", None)
    if _is_torchs_wrapper(function) and not _is_seen(optimizer):
        function.__wrapped__(optimizer)
    else:
        method()


def _is_torchs_wrapper(function: Any) -> TypeGuard[Any]:
    return _WRAPPER is not None and getattr(function, "__code__", None) is _WRAPPER.__code__


def _is_seen(optimizer: Any) -> bool:
    """Whether a profiler or a hook is to be told of a step."""
    assert _WRAPPER is not None
    around = _WRAPPER.__globals__
    return bool(
        getattr(profiler, "_is_profiler_enabled", True)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or around["_global_optimizer_pre_hooks"]
        or around["_global_optimizer_post_hooks"]
    )


def clears_as_torch_does(optimizer: Any) -> bool:
    """Whether `zero_grad(set_to_none=True)` does no more than to forget gradients."""
    return getattr(optimizer.zero_grad, "__func__", None) is Optimizer.zero_grad
