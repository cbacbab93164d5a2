"""What a symbolic trace of a step would lose: effects, and modes that operations run in."""

from __future__ import annotations

import copy
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
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
from tbptt_ckpt.module.trees import Tree, slots_of, tensors_of

_OTHERS = tuple(f"{Path(str(file)).parent}/" for file in (torch.__file__, Path(__file__).parent))
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"),
    "_global_backward_pre_hooks",
)
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_SEARCHED = 1000  # containers and objects, and items of one; longer ones hold data
_HAS_EFFECT = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward")


class NoPartsError(Exception):
    """A step whose parts are not found; the message says why, and at which line."""


def users_line() -> str:
    """The line of the user's that runs now."""
    frame = sys._getframe(1)
    while frame is not None and _is_others(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return "its forward" if frame is None else _line(frame.f_code.co_filename, frame.f_lineno)


def line_of(error: BaseException) -> str:
    """The line of the user's that an error came through last."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_others(frame.filename):
            return _line(frame.filename, frame.lineno)
    return "its forward"


def _line(file: str, number: int | None) -> str:
    return f"{Path(file).name}:{number}"


def _is_others(file: str) -> bool:
    return file.startswith(_OTHERS) or file.startswith("<")


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


_thread = _Thread()
_kinds = (torch.autocast, torch.inference_mode, torch.autograd.graph.saved_tensors_hooks)
_contexts = ReplacedFunctions({(kind, "__enter__"): _noticed for kind in _kinds})


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


class Attributes:
    """What a module's attributes hold, and the names and containers its functions use.

    Containers and objects in them are looked through. What has changed can be named and put back.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names = list(_names_used(module))
        starts = [(type(part).__name__, vars(part)) for part in module.modules()]
        named = [(name, {name: space[name]}) for space, name, _ in self._names]
        self._held = [(name, each, copy.copy(each)) for name, each in _holders([*starts, *named])]
        self._buffers = {id(part._buffers) for part in module.modules()}

    def changed(self) -> str | None:
        """What does not hold what it did; None where everything does."""
        for space, name, value in self._names:
            if not _is_same(space.get(name), value):
                return name
        return next((n for n, now, then in self._held if not _is_same_holder(now, then)), None)

    def put_back(self) -> None:
        """As everything was, but buffers, which are the business of others."""
        for space, name, value in self._names:
            space[name] = value
        for _, now, then in self._held:
            if id(now) not in self._buffers and not _is_same_holder(now, then):
                now.clear()
                (now.extend if isinstance(now, list | deque) else now.update)(then)


def _is_same_holder(now: Any, then: Any) -> bool:
    if len(now) != len(then) or isinstance(now, set):
        return bool(now == then)
    if isinstance(now, dict):
        return now.keys() == then.keys() and all(_is_same(now[key], then[key]) for key in then)
    return all(map(_is_same, now, then))


def _is_same(now: object, then: object) -> bool:
    return now is then or (type(now) is type(then) and type(now) in _PLAIN and now == then)


def _holders(starts: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    left, seen = list(starts), set[int]()
    for name, holder in left:  # grows
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        yield name, holder
        if len(seen) > _SEARCHED or len(holder) > _SEARCHED:
            continue
        items = holder.items() if isinstance(holder, dict) else ((None, each) for each in holder)
        for key, item in items:
            path = f"{name}.{key}" if isinstance(key, str) else name
            for each in item if type(item) is tuple else (item,):
                if isinstance(each, list | dict | set | deque):
                    left.append((path, each))
                elif not isinstance(each, nn.Module | type | ModuleType | Tensor | FunctionType):
                    inside = getattr(each, "__dict__", None)
                    left += [(path, inside)] if isinstance(inside, dict) else []
                    left += [(path, o) for o in slots_of(each) if isinstance(o, list | dict | set)]


def _names_used(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Namespace, name and value of whatever the functions of a module's classes use by name."""
    left: list[tuple[nn.Module, Any]] = []
    for part in module.modules():
        own = [each for each in vars(part).values() if isinstance(each, FunctionType)]
        left += [(part, function) for function in (type(part).forward, *own)]
    seen = set[Any]()
    for part, function in left:  # grows
        code = getattr(function, "__code__", None)
        if code is None or code in seen or _is_others(code.co_filename):
            continue
        seen.add(code)
        space = function.__globals__
        for name in _names_in(code):
            if name not in space or isinstance(space[name], ModuleType | type):
                left.append((part, getattr(type(part), name, None)))
            elif isinstance(space[name], FunctionType):
                left.append((part, space[name]))
            else:
                yield space, name, space[name]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            try:
                value = cell.cell_contents
            except ValueError:  # not set yet
                continue
            left.append((part, value))
            if not isinstance(value, FunctionType | type):
                yield {name: value}, name, value


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)
