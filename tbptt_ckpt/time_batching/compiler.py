"""How blocks of steps are compiled: `torch.compile` with a backend, and when it may be."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import fx

from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.time_batching.joined_sums import join_sums

_KEYS = ("backend", "mode", "options")
_KNOWN = ("inductor", "aot_eager", "eager")
_WHAT_WORKS = (
    "True, False, 'auto', the name of a backend of torch.compile such as 'inductor', or a dict "
    f"with some of {', '.join(map(repr, _KEYS))} as torch.compile takes them"
)


class NotCompiledError(Exception):
    """What is called was not compiled for what it is given, and may not be now."""


def check_compile(name: str, value: object, alternative: str | None = None) -> None:
    """Raise `ArgumentError` unless `value` says how to compile."""
    if isinstance(value, bool) or (isinstance(value, str) and value == "auto"):
        return
    given = value if isinstance(value, Mapping) else {"backend": value}
    backend = given.get("backend", "inductor")
    if not set(given) <= {*_KEYS} or not isinstance(backend, str):
        raise ArgumentError(f"{name}={shown(value)} must be {_WHAT_WORKS}")
    if backend not in _KNOWN and backend not in torch._dynamo.list_backends(()):
        known = ", ".join(map(repr, torch._dynamo.list_backends(())))
        raise ArgumentError(f"{name}={shown(value)} names no backend of torch.compile: {known}")
    if (others := set(given) - {"backend"}) and (backend != "inductor" or len(others) > 1):
        raise ArgumentError(
            f"{name}={shown(value)} has {' and '.join(sorted(others))}; the backend 'inductor' "
            "takes one of mode and options"
        )
    try:
        _inductor_config(given)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ArgumentError(f"{name}={shown(value)} cannot be used: {error}") from None


# A bool, "auto", a backend's name, or what torch.compile takes.
CompileChoice = Annotated[bool | str | Mapping[str, Any], check_compile]


def _inductor_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """What Inductor is told beside its defaults."""
    mode, options = given.get("mode"), given.get("options")
    if mode is None and options is None:
        return {}
    wrapper = torch._TorchCompileInductorWrapper(mode, options, False)  # type: ignore[no-untyped-call]
    return dict(wrapper.config)


class Compiler:
    """Compiles functions as a choice says, and nothing while it is not open.

    Args:
        choice: As checked by `check_compile`; neither False nor "auto".
    """

    def __init__(self, choice: bool | str | Mapping[str, Any]) -> None:
        given = choice if isinstance(choice, Mapping) else {"backend": choice}
        backend = given.get("backend", "inductor")
        self.backend = "inductor" if backend is True else str(backend)
        self._config = _inductor_config(given) if isinstance(choice, Mapping) else {}
        self._is_open = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """While entered, what is called is compiled for what it is given."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which raises what torch raises, or `NotCompiledError`'s cause, if closed.

        It has code of its own: torch counts compilations by code, and makes eight at most.
        """
        assert isinstance(function, types.FunctionType), "it has code to be compiled"
        code = function.__code__.replace()
        own = types.FunctionType(
            code, function.__globals__, function.__name__, None, function.__closure__
        )
        made: Callable[..., Any] = torch.compile(
            own, backend=self._make, fullgraph=True, dynamic=False
        )
        return made

    def _make(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """The backend that torch.compile calls."""
        if not self._is_open:
            raise NotCompiledError
        if self.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            config = {**self._config, "joint_custom_post_pass": _inductor_pass()}
            made: Any = compile_fx(module, inputs, config_patches=config)
            return made  # type: ignore[no-any-return]
        if self.backend == "aot_eager":
            return _aot_eager()(module, inputs)  # type: ignore[no-any-return]
        return torch._dynamo.lookup_backend(self.backend)(module, inputs)


def has_compiler(device: torch.device) -> bool:
    """Whether what Inductor needs to compile for a device is there."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return False
    return True


@functools.cache
def _inductor_pass() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    from tbptt_ckpt.time_batching import joined_sums

    class JoinSums(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            join_sums(graph)

        def uuid(self) -> Any:  # by which what is compiled is found on disk
            return get_hash_for_files((joined_sums.__file__,))

    return JoinSums()


@functools.cache
def _aot_eager() -> Any:
    """As torch's own, with the same rewriting as before Inductor."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: fx.GraphModule, inputs: Any, **how: Any) -> Any:
        join_sums(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **how)

    return aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
