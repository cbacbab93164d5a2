"""What a symbolic trace of a step would lose: effects, and modes that operations run in."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules import module as torchs_module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from tbptt_ckpt.module.inside import is_compiled
from tbptt_ckpt.module.replaced import ReplacedFunctions
from tbptt_ckpt.module.trees import Tree, tensors_of

_OTHERS = tuple(f"{Path(str(file)).parent}/" for file in (torch.__file__, Path(__file__).parent))
_PYTHONS = f"{Path(threading.__file__).parent}/"
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"),
    "_global_backward_pre_hooks",
)
_PARALLEL = ("torch.nn.parallel", "torch.distributed")
_HOOKING = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_HAS_EFFECT = (*_HOOKING, "backward", "__set__")


class NoPartsError(Exception):
    """A step whose parts are not found; the message says why, and at which line."""


def users_line() -> str:
    """The line of the user's that runs now."""
    frame = sys._getframe(1)
    while frame is not None and is_others_file(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "its forward" if frame is None else _line(frame.f_code.co_filename, frame.f_lineno)


def line_of(error: BaseException) -> str:
    """The line of the user's that an error came through last."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not is_others_file(frame.filename):
            return _line(frame.filename, frame.lineno)
    return "its forward"


def _line(file: str, number: int | None) -> str:
    return f"{Path(file).name}:{number}"


def is_others_file(file: str) -> bool:
    """Whether a file is torch's, Python's or this package's, or none."""
    is_pythons = file.startswith(_PYTHONS) and "site-packages" not in file
    return file.startswith(_OTHERS) or file.startswith("<") or is_pythons


def check_traceable(module: object, tensors: Sequence[Tensor]) -> None:
    """Raise `NoPartsError` for a module, or tensors, that a trace would not see as they are."""
    if not isinstance(module, nn.Module):
        raise NoPartsError(f"{type(module).__name__} is no nn.Module")
    if is_compiled(module):
        raise NoPartsError("it is compiled")
    if any(getattr(torchs_module, name, None) for name in _HOOKS):
        raise NoPartsError("hooks on all modules are registered")
    for path, part in module.named_modules():
        name = f"{path or type(module).__name__}"
        if isinstance(part, torch.jit.ScriptModule) or hasattr(part, "_orig_mod"):
            raise NoPartsError(f"{name} is scripted or compiled")
        if type(part).__module__.startswith(_PARALLEL):
            raise NoPartsError(f"{name} is {type(part).__name__}, which wants each of its calls")
        if any(getattr(part, hooks, None) for hooks in _HOOKS):
            raise NoPartsError(f"{name} has hooks")
        if parametrize.is_parametrized(part):
            raise NoPartsError(f"{name} has parametrized weights")
        is_own = type(part).__call__ is not nn.Module.__call__
        if is_own or {"forward", "__call__", "_call_impl"} & vars(part).keys():
            raise NoPartsError(f"{name} is called by a function put in place of its forward")
    for tensor in (*tensors, *module.parameters(), *module.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter) or is_lazy(tensor):
            raise NoPartsError(f"it holds a {type(tensor).__name__}")
        if tensor.is_complex() or tensor.layout is not torch.strided or tensor.is_inference():
            raise NoPartsError("it holds complex or sparse tensors, or some made in inference mode")


class _Thread(threading.local):
    watch: Watch | None = None


class Watch(TorchFunctionMode):
    """While entered, an operation that a trace would not keep raises `NoPartsError`.

    Those are operations in place, those that register hooks or draw from a generator of their
    own, and those in another grad mode or autocast than that of the caller. A custom function's
    forward runs without gradients, and so is one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._modes: tuple[bool, ...] = ()
        self.reason: str | None = None

    def __enter__(self) -> Watch:
        _contexts.open()
        _thread.watch, self._modes = self, _modes()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _thread.watch = None
        _contexts.close()

    def refuse(self, what: str) -> None:
        """Raise, and say so later too, should the step catch it."""
        self.reason = self.reason or f"{users_line()} {what}"
        raise NoPartsError(self.reason)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self.refuse("enters a grad mode")
        if _modes() != self._modes:
            self.refuse("runs in a grad mode or autocast of its own, or an autograd.Function")
        if getattr(func, "__name__", "") in _HAS_EFFECT:
            self.refuse(f"calls {func.__name__}")
        given = [*args, *kwargs.values()]
        if any(isinstance(each, torch.Generator) for each in given):
            self.refuse("draws random numbers")
        tensors = [t for t in tensors_of(given) if not t.is_inference()]
        versions = [tensor._version for tensor in tensors]
        result = func(*args, **kwargs)
        if any(t._version != v for t, v in zip(tensors, versions, strict=True)):
            self.refuse("writes into a tensor in place")
        return result


def _modes() -> tuple[bool, ...]:
    device = torch.accelerator.current_accelerator(check_available=True)
    names = ["cpu"] if device is None else ["cpu", device.type]
    autocast = [torch.is_autocast_enabled(name) for name in names]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _noticed(original: Callable[..., Any]) -> Callable[..., Any]:
    def enter(self: Any, *args: Any) -> Any:
        if _thread.watch is not None:
            _thread.watch.refuse("enters autocast, inference mode or hooks on saved tensors")
        return original(self, *args)

    return enter


def _answered(original: Callable[..., Any]) -> Callable[..., Any]:
    def ask(*args: Any) -> Any:
        is_users = not is_others_file(sys._getframe(1).f_code.co_filename)
        if _thread.watch is not None and is_users:  # the answer of the trace would stay
            _thread.watch.refuse("asks for a grad mode or autocast")
        return original(*args)

    return ask


_thread = _Thread()
_kinds = (torch.autocast, torch.inference_mode, torch.autograd.graph.saved_tensors_hooks)
_questions = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
_contexts = ReplacedFunctions(
    {
        **{(kind, "__enter__"): _noticed for kind in _kinds},
        **{(torch, name): _answered for name in _questions},
    }
)


def check_graph(results: Tree) -> None:
    """Raise `NoPartsError` for results that came through an `autograd.Function`."""
    left = [t.grad_fn for t in tensors_of(results) if t.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        if isinstance(node, BackwardCFunction):
            raise NoPartsError(f"it applies the autograd.Function {type(node).__name__}")
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        left += new
