"""A module's call as a graph, where nothing is lost in a trace of it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from tbptt_ckpt.module.ambient import Ambient, untouched
from tbptt_ckpt.module.attributes import Attributes
from tbptt_ckpt.module.outputs import OutputsNeeded
from tbptt_ckpt.module.step_effects import (
    NoPartsError,
    Watch,
    check_graph,
    check_traceable,
    line_of,
)
from tbptt_ckpt.module.step_trace import StepTrace, trace_step
from tbptt_ckpt.module.trees import (
    Tree,
    iterate_leaves,
    map_tensors,
    state_as_leaves,
    tensors_of,
)


def looked_through(
    module: nn.Module, inputs: Tree, state: Tree, other: tuple[Tree, Tree] | None = None
) -> StepTrace:
    """The graph of `module(inputs, state)`; `other` as for `trace_step`.

    Raises:
        NoPartsError: What would be lost prevents it.
    """
    check_traceable(module, [*tensors_of(inputs), *tensors_of(state)])
    strange = [leaf for leaf in iterate_leaves((inputs, state)) if leaf is not None]
    if others := [type(leaf).__name__ for leaf in strange if not isinstance(leaf, Tensor)]:
        raise NoPartsError(f"inputs and state hold a {others[0]} beside tensors")
    attributes = Attributes(module)
    try:
        _check_effects(module, inputs, state, attributes)
        with OutputsNeeded(True):
            trace = trace_step(module, inputs, state, other)
        if (name := attributes.changed()) is not None:
            raise NoPartsError(f"a step changes {name}")
    finally:
        attributes.put_back()
    return trace


def _check_effects(module: nn.Module, inputs: Tree, state: Tree, attributes: Attributes) -> None:
    """Run a step, and raise `NoPartsError` for what it does besides returning its results."""
    given = tensors_of((inputs, state))
    ambient, watch = Ambient([module], given), Watch()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            untouched(module, tensors=given, ambient=ambient),
            OutputsNeeded(True),
        ):
            found = ambient.capture()
            ambient.about_to_run()
            fresh = map_tensors(lambda t: t.detach().clone(), inputs)
            mine = (fresh, map_tensors(Tensor.clone, state_as_leaves(state)))
            with watch:
                results = module(*mine)
            changed = attributes.changed()
            has_drawn = ambient.capture() is not found
            check_graph(results)
    except NoPartsError:
        raise
    except Exception as error:
        raise NoPartsError(f"{line_of(error)} fails on the example: {error}") from error
    if changed is not None:
        raise NoPartsError(f"a step changes {changed}")
    if has_drawn:
        raise NoPartsError("a step draws random numbers or changes buffers")
    if watch.reason is not None:
        raise NoPartsError(watch.reason)


def template_of(tree: Tree) -> Tree:
    """Containers with tensors of nothing in place of nodes."""
    return map_tensors(lambda _: torch.empty(0, device="meta"), tree, fx.Node)
