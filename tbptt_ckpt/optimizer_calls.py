"""What an optimizer's methods do, without what torch does around them where nobody sees it.

NOTE [A step without a profiler entry]
torch wraps `step` and `zero_grad` of every optimizer so that a profiler sees them. Between two
large kernels, which push everything else out of the caches, that wrapper takes 0.1 ms: as long
as the whole update of a small model. It is left out only where it is torch's own, as it is known
here, and there is neither a profiler nor a hook to be told.
"""

from __future__ import annotations

from types import CodeType
from typing import Any, TypeGuard

import torch
from torch.autograd import profiler
from torch.optim.optimizer import (
    Optimizer,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

# Everything that the wrapper refers to. One that does more, in a torch to come, is called.
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


def _known_wrapper() -> CodeType | None:
    """The code of torch's wrapper around `step`; None if it is not as it is known here."""
    wrap = getattr(Optimizer, "profile_hook_step", None)
    code: CodeType | None = None if wrap is None else getattr(wrap(print), "__code__", None)
    return code if code is not None and set(code.co_names) <= _KNOWN_NAMES else None


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
    return _WRAPPER is not None and getattr(function, "__code__", None) is _WRAPPER


def _is_seen(optimizer: Any) -> bool:
    """Whether a profiler or a hook is to be told of a step."""
    return bool(
        profiler._is_profiler_enabled
        or torch.compiler.is_compiling()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def clears_as_torch_does(optimizer: Any) -> bool:
    """Whether `zero_grad(set_to_none=True)` does no more than to forget gradients."""
    return getattr(optimizer.zero_grad, "__func__", None) is Optimizer.zero_grad
