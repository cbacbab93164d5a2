"""Everything of a training run but its windows, as plain data and back."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tbptt_ckpt.engine.parts import Parts
from tbptt_ckpt.errors import ArgumentError, SnapshotError
from tbptt_ckpt.module.generators import GeneratorPlace, GeneratorState, generator_places
from tbptt_ckpt.module.inside import owner_of
from tbptt_ckpt.module.trees import Tree, replace_tensors, tensors_of
from tbptt_ckpt.trainer.schema import check_alike
from tbptt_ckpt.updates.rehearsal import step_rehearsal
from tbptt_ckpt.updates.shards import local_part
from tbptt_ckpt.updates.undo import copied, copy_on_host
from tbptt_ckpt.updates.updater import Updater

# Of a run's state what `load_learning_state` copies to where it belongs, all but the optimizer's.
COPIED = tuple(("learning", name) for name in ("modules", "loose", "grads"))


def modules_of(parts: Parts) -> dict[str, nn.Module]:
    """The modules whose weights are trained or whose buffers change."""
    owners = {
        "module": parts.recurrence.module,
        "loss": owner_of(parts.loss_function.loss_fn),
    }
    return {name: alone(owner) for name, owner in owners.items() if isinstance(owner, nn.Module)}


def alone(module: nn.Module) -> nn.Module:
    """What one process calls, and several may wrap."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def learning_state(parts: Parts) -> dict[str, Any]:
    """Weights, buffers, optimizer, schedule and scale; the tensors are the run's own."""
    updater, modules = parts.updater, modules_of(parts)
    grad_of = updater.deliveries.wrappers.shards.grad_of
    state: dict[str, Any] = {
        "modules": {name: _module_state(module) for name, module in modules.items()},
        "loose": [parameter.detach() for parameter in _loose_parameters(parts, modules)],
        "grads": [grad_of(p) for p in _parameters(parts)] if updater.accumulates else None,
        "generators": [place.capture().values for place in _generators(parts)],
    }
    for name in ("optimizer", "scheduler", "scaler"):
        owner = getattr(updater, name)
        state[name] = None if owner is None else owner.state_dict()
    return state


def load_learning_state(
    parts: Parts, state: Mapping[str, Any], accepted: Collection[str] = ()
) -> None:
    """Put back what `learning_state` gave, but for what was accepted to be another.

    An optimizer begins anew then, with its schedule, and so does another schedule or scaler; a
    hyper-parameter is this run's.

    Raises:
        ArgumentError: It belongs to other modules.
        SnapshotError: Its weights are of no use.
    """
    modules, loose = modules_of(parts), _loose_parameters(parts, modules_of(parts))
    for name, module in modules.items():
        _check_fits(name, module, state["modules"].get(name))
    places, stood = _generators(parts), state.get("generators")
    if stood is not None and len(stood) != len(places):
        raise ArgumentError(
            f"the module and the loss hold {len(places)} random generators, those of the snapshot "
            f"{len(stood)}; go on with ones of the same generators"
        )
    for place, values in zip(places, stood or (), strict=False):
        try:
            place.restore(GeneratorState(None, values))
        except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ArgumentError(f"the snapshot is of another random generator: {error}") from error
    for name, module in modules.items():
        _load_module(module, state["modules"][name], parts.device)
    with torch.no_grad():
        for parameter, tensor in zip(loose, state["loose"], strict=True):
            parameter.copy_(tensor)
    updater = parts.updater
    if updater.optimizer is not None and "optimizer" not in accepted:
        kept = updater.optimizer.param_groups
        if "scheduler" in accepted:
            accepted = {*accepted, *(name for group in kept for name in group if name != "params")}
        problem_of_a_step = step_rehearsal(updater.optimizer)
        updater.optimizer.load_state_dict(state["optimizer"])
        if problem := problem_of_a_step():
            raise SnapshotError(
                f"the optimizer's state is none of this {type(updater.optimizer).__name__}, which "
                f"could take no step from it: {problem}"
            )
        with_schedule = updater.scheduler is not None and "scheduler" not in accepted
        if with_schedule:
            schedule = state["scheduler"]
            if "lr" in accepted and "base_lrs" in schedule:
                schedule = {**schedule, "base_lrs": [group["initial_lr"] for group in kept]}
            _load_alike(updater.scheduler, schedule, "the schedule's state")
        _take_own(updater, kept, accepted, with_schedule)
    if updater.scaler is not None and "scaler" not in accepted:
        _load_alike(updater.scaler, state["scaler"], "the scaler's state")
    if state["grads"] is not None:
        for parameter, grad in zip(_parameters(parts), state["grads"], strict=True):
            there = None if grad is None else grad.to(parameter.device)
            updater.deliveries.wrappers.shards.set_grad(parameter, there)
    if problem := poisoned(parts.weights()):
        raise SnapshotError(problem)


def _load_alike(owner: Any, state: Mapping[str, Any], name: str) -> None:
    """Load what torch takes without a look; classes of others' may hold what they like."""
    if type(owner).__module__.startswith("torch."):
        check_alike(state, owner.state_dict(), name)
    owner.load_state_dict(state)


def poisoned(weights: list[Tensor]) -> str:
    """What is to be said of learned weights that are not finite, of the parts that are here."""
    learned = [local_part(w) for w in weights if w.requires_grad and local_part(w).numel()]
    if not learned or bool(torch.isfinite(torch.nn.utils.get_total_norm(learned, math.inf))):
        return ""
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(weight, math.inf) for weight in learned]
    bad = [w for w, norm in zip(learned, norms, strict=True) if not bool(torch.isfinite(norm))]
    shapes = ", ".join(str(tuple(weight.shape)) for weight in bad[:3])
    return f"{len(bad)} weights hold NaN or infinity, such as those of shape {shapes}"


def _take_own(
    updater: Updater, own: Sequence[Mapping[str, Any]], accepted: Collection[str], scheduled: bool
) -> None:
    """Let accepted hyper-parameters be this run's; a scheduled rate keeps its place there."""
    for group, mine in zip(updater.optimizer.param_groups, own, strict=True):
        for name in accepted:
            if name != "lr" and name in mine:
                group[name] = mine[name]
        if "lr" in accepted and "lr" in mine:
            first = group.get("initial_lr")
            if scheduled and first:
                group["lr"] = group["lr"] * (mine["initial_lr"] / first)
                group["initial_lr"] = mine["initial_lr"]
            else:
                group["lr"] = mine["lr"]


def copied_learning_state(parts: Parts) -> Callable[[], None]:
    """Copy what `load_learning_state` changes to the host; what is returned puts it back."""
    updater, modules = parts.updater, list(modules_of(parts).values())
    owners = [owner for module in modules for owner in module.modules()]
    buffers = [
        (owner._buffers, name, tensor, None if tensor is None else copy_on_host(tensor))
        for owner in owners
        for name, tensor in owner._buffers.items()
    ]
    # What a module's state holds beside tensors.
    states = [module.state_dict().items() for module in modules]
    others = [copy.deepcopy({k: v for k, v in s if not isinstance(v, Tensor)}) for s in states]
    generators = [(place, place.capture()) for place in _generators(parts)]
    shards = updater.deliveries.wrappers.shards
    grads = [(weight, shards.grad_of(weight)) for weight in parts.weights()]
    optimized = {id(weight) for weight in updater.optimized()}
    weights = [(w, copy_on_host(w)) for w in parts.weights() if id(w) not in optimized]
    put_update_back = (
        copied(updater.optimizer, updater.scheduler, updater.scaler, copy_tensor=copy_on_host)
        if updater.optimizer is not None
        else lambda: None
    )

    def put_back() -> None:
        put_update_back()
        for place, state in generators:
            place.restore(state)
        with torch.no_grad():
            for weight, values in weights:
                weight.copy_(values)
            for stored, name, tensor, held in buffers:
                stored[name] = tensor
                if tensor is not None and held is not None:
                    tensor.copy_(held)
        for weight, grad in grads:
            shards.set_grad(weight, grad)
        for module, held_state in zip(modules, others, strict=True):
            if held_state:
                module.load_state_dict(held_state, strict=False)

    return put_back


def _generators(parts: Parts) -> list[GeneratorPlace]:
    """Those that the module and the loss hold."""
    return generator_places([parts.recurrence.module, owner_of(parts.loss_function.loss_fn)])


def stored_state(state: Tree) -> list[dict[str, Tensor | None]]:
    """The tensors of a first state, and their gradients, as `restored_state` takes them."""
    return [{"value": t.detach(), "grad": t.grad if t.is_leaf else None} for t in tensors_of(state)]


def restored_state(state: Tree, saved: Sequence[Mapping[str, Any]]) -> Tree:
    """The first state of a pass with the values it had; its own learned tensors are kept.

    Raises:
        ArgumentError: It has other tensors than the one that was saved.
    """
    tensors = tensors_of(state)
    if [t.shape for t in tensors] != [item["value"].shape for item in saved]:
        raise ArgumentError(
            f"init_state has tensors {[tuple(t.shape) for t in tensors]}, that of the snapshot "
            f"{[tuple(item['value'].shape) for item in saved]}"
        )
    restored = []
    for tensor, item in zip(tensors, saved, strict=True):
        if tensor.requires_grad and tensor.is_leaf:
            with torch.no_grad():
                tensor.copy_(item["value"])
            tensor.grad = None if item["grad"] is None else item["grad"].to(tensor.device)
        restored.append(tensor if tensor.requires_grad else item["value"].to(tensor.device))
    return replace_tensors(state, restored)


def _parameters(parts: Parts) -> list[Tensor]:
    return [*parts.parameters, *_loose_parameters(parts, modules_of(parts))]


def _loose_parameters(parts: Parts, modules: Mapping[str, nn.Module]) -> list[Tensor]:
    """The optimizer's parameters that belong to no module."""
    owned = {id(p) for module in modules.values() for p in module.parameters()}
    return [p for p in parts.updater.optimized() if id(p) not in owned]


def _module_state(module: nn.Module) -> dict[str, Any]:
    state = module.state_dict()
    others = {name: b for name, b in module.named_buffers() if name not in state}
    metadata = getattr(state, "_metadata", {})
    return {"state": dict(state), "metadata": dict(metadata), "other_buffers": others}


def _check_fits(name: str, module: nn.Module, stored: Mapping[str, Any] | None) -> None:
    here = {key: _shape(value) for key, value in module.state_dict().items()}
    there = None
    if stored is not None:  # a buffer that is None here is set by a step, and was there
        unset = _unset_buffers(module)
        there = {k: _shape(v) for k, v in stored["state"].items() if k not in unset}
    if here != there:
        different = sorted(set(here.items()) ^ set((there or {}).items()), key=str)[:3]
        raise ArgumentError(
            f"the snapshot is of another {name}: they differ in "
            + ", ".join(f"{key} {shape}" for key, shape in different)
        )


def _shape(value: Any) -> object:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return tuple(value.shape), str(value.dtype).removeprefix("torch.")


def _load_module(module: nn.Module, stored: Mapping[str, Any], device: torch.device) -> None:
    state = OrderedDict(stored["state"])
    state._metadata = stored["metadata"]  # type: ignore[attr-defined]
    values = {**state, **stored["other_buffers"]}
    for path, (owner, name) in _unset_buffers(module).items():
        if path in values:
            owner._buffers[name] = values[path].to(device, copy=True)
    module.load_state_dict(state)
    buffers = dict(module.named_buffers())
    for name, value in stored["other_buffers"].items():
        buffers[name].copy_(value)


def _unset_buffers(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The buffers that are None, by their full names."""
    return {
        f"{path}.{name}" if path else name: (owner, name)
        for path, owner in module.named_modules()
        for name, tensor in owner._buffers.items()
        if tensor is None
    }
