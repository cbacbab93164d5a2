"""One update of the weights per window or group of windows: clip, unscale, step, schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, SupportsFloat
from weakref import ref

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError, shown
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.host import Number, Numbers, is_waited_for
from tbptt_ckpt.updates.accumulation import Accumulation
from tbptt_ckpt.updates.delivery import Deliveries
from tbptt_ckpt.updates.shards import by_kind, total_norm
from tbptt_ckpt.updates.undo import Aside, Update


class AnyOptimizer(Protocol):
    """One of torch's, or what another library wraps it in."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Its parameters, with their hyper-parameters."""

    def step(self) -> Any:
        """Update them."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget their gradients."""


class UpdateWatch:
    """Watches nothing and wants nothing; what others override."""

    wants_norm = False  # where nothing is clipped too
    wants_undo = False  # of updates that are cut short, as long as they have changed nothing
    wants_copies = False  # during each of those, so that it can be taken back in any case

    def takes_norm(self, norm: Number) -> None:
        """The norm of an update's gradients, before they are clipped."""


UNWATCHED = UpdateWatch()


class Updater:
    """Updates the weights after windows; without an optimizer, lets gradients accumulate.

    `parameters` are those whose gradients are cleared before a window besides the optimizer's,
    `group` is the windows of an update, one by default; `deliveries` hands them gradients.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Iterable[nn.Parameter],
        clip_grad_norm: float | None,
        scaler: Any,
        scheduler: Any,
        group: Accumulation | None = None,
        deliveries: Deliveries | None = None,
    ) -> None:
        self._check(optimizer, clip_grad_norm, scaler, scheduler)
        self.group = Accumulation(1, averages=True) if group is None else group
        self.deliveries = Deliveries() if deliveries is None else deliveries
        self.optimizer, self.scaler, self.scheduler = optimizer, scaler, scheduler
        self._clip, self._cleared = clip_grad_norm, list(parameters)
        self._scale: float | Tensor = 1.0
        self.aside_bytes = 0  # of gradients that are copied while a window runs
        self._aside: Callable[[], Aside | None] = lambda: None  # while somebody needs it
        self._update: Update | None = None  # while one is going on
        self.grad_norm: Number | None = None  # the last one
        self._known_norm: tuple[Tensor, Number] | None = None  # of a window's gradients

    @property
    def learning_rate(self) -> float:
        """That of the optimizer's first group; 0.0 without one."""
        return float(self.optimizer.param_groups[0].get("lr", 0.0)) if self.optimizer else 0.0

    @property
    def clears_gradients(self) -> bool:
        """Whether every window begins without gradients."""
        return self.optimizer is not None and self.group.num_windows == 1

    def like(self, optimizer: Any) -> Updater:
        """Updates other weights in the same way; no scaler, no schedule."""
        return Updater(optimizer, (), self._clip, None, None)

    def optimized(self) -> list[Tensor]:
        """The optimizer's parameters."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def begin_sequence(self) -> None:
        """No window of it has begun."""
        self.group.begin()
        self.deliveries.begin_sequence()

    def clear(self, init_state_leaves: Iterable[Tensor]) -> None:
        """Forget all gradients, unless they accumulate."""
        self._known_norm = None
        if self.optimizer is None or self.group.pending:
            return
        tensors = (*self._cleared, *init_state_leaves, *self.deliveries.gathered)
        if getattr(self.optimizer.zero_grad, "__func__", None) is torch.optim.Optimizer.zero_grad:
            tensors += tuple(self.optimized())  # the same, without an entry for profilers
        else:
            self.optimizer.zero_grad(set_to_none=True)
        for tensor in tensors:
            tensor.grad = None

    def grad_scale(self, device: torch.device) -> float | Tensor:
        """The factor on gradients of this window; a tensor where a device has it."""
        if self.scaler is not None:
            # The scaler makes its scale when it first scales a tensor.
            scale = self.scaler.scale(torch.ones((), device=device))
            self._scale = scale if is_waited_for(scale) else float(scale)
        return self._scale

    @property
    def _is_scaled(self) -> bool:
        return isinstance(self._scale, Tensor) or self._scale != 1.0

    def ask_norm(
        self, numbers: Numbers, init_state_leaves: Sequence[Tensor], watch: UpdateWatch = UNWATCHED
    ) -> None:
        """A window's gradients are complete: ask for their norm, if no update finds others."""
        if not self._needs_norm(watch) or not self.clears_gradients or self.scaler is not None:
            return
        optimized = {id(tensor) for tensor in self.optimized()} if init_state_leaves else set()
        adds = any(id(leaf) in optimized for leaf in init_state_leaves)
        if not adds and not self.deliveries.any_waits(self._changed(init_state_leaves)):
            self._known_norm = self._norm(numbers)

    def add(self, loss: Tensor, number: Number) -> None:
        """A window has added its gradients; `number` is its loss for the host."""
        if self.optimizer is not None:
            self.group.add(loss, number)

    def update(
        self,
        is_last: bool,
        init_state_leaves: Iterable[Tensor],
        watch: UpdateWatch = UNWATCHED,
    ) -> bool:
        """Update the weights if a group of windows is complete, or ends with its sequence.

        False where a scaler skipped the update, or none was due.
        """
        if self.optimizer is None or not self.group.is_due(is_last):
            return False
        if (ranks := self.deliveries.ranks) is not None:
            self.deliveries.reduce(ranks, self._changed(init_state_leaves))
        if self.group.pending > 1 or self._is_scaled:
            owned = {id(tensor) for tensor in self.optimized()}
            for tensor in self._changed(init_state_leaves):
                if tensor.grad is not None:
                    self.group.average(tensor.grad)
                    if id(tensor) not in owned and self._is_scaled:
                        tensor.grad.div_(self._scale)  # from the others the scaler takes it
        return self.step(self.group.end(), watch)

    def step(self, loss: SupportsFloat, watch: UpdateWatch = UNWATCHED) -> bool:
        """Update the weights from the gradients at hand; False where a scaler skipped it."""
        self._measure_and_clip(watch)
        if watch.wants_undo:
            copies = watch.wants_copies
            self._update = Update(self.optimizer, self.scheduler, self.scaler, copies)
        updated = self._step_optimizer()
        if updated and isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(float(loss))
        elif updated and self.scheduler is not None:
            self.scheduler.step()
        self._update = None
        return updated

    @property
    def accumulates(self) -> bool:
        """Whether the gradients that a window finds belong to the result."""
        return self.optimizer is None or self.group.pending > 0

    def set_aside(
        self, init_state_leaves: Iterable[Tensor], *, keeps: bool = True
    ) -> Callable[[], None]:
        """Copy the gradients that a window must not lose; what is returned puts them back, once.

        Without `keeps` those that accumulate are not copied, and stay as the window left them.
        """
        self.aside_bytes = 0
        if self.accumulates and not keeps:
            return lambda: None
        tensors, aside = self._changed(init_state_leaves), self._aside()
        if aside is None or not self.accumulates or not aside.is_of(tensors):
            aside = Aside(tensors, keeps=self.accumulates)
        self._aside, self.aside_bytes = ref(aside), tensor_bytes(aside.grads)
        return aside.put_back

    def mark(self, init_state_leaves: Iterable[Tensor], device: torch.device) -> Callable[[], None]:
        """Copy the gradients that a window must not lose.

        What is returned forgets, once, what a window did that was cut short: its gradients, its
        unfinished update. It raises `TbpttError` where some weights were updated already, and no
        copy was taken.
        """
        put_back, group = self.set_aside(init_state_leaves), self.group.state_dict()

        def rewind() -> None:
            self.group.load_state_dict(group)
            put_back()
            update, self._update = self._update, None
            if update is not None:
                update.take_back()
            if self.scaler is not None and self.scaler.is_enabled():
                # The one public way to forget that gradients were unscaled; the scale stays.
                self.scaler.update(new_scale=float(self.grad_scale(device)))

        return rewind

    def _changed(self, init_state_leaves: Iterable[Tensor]) -> list[Tensor]:
        """All tensors whose gradients a window changes."""
        own = (*self._cleared, *init_state_leaves, *self.optimized())
        return list(dict.fromkeys((*own, *self.deliveries.gathered)))

    def _measure_and_clip(self, watch: UpdateWatch) -> None:
        if not self._needs_norm(watch):
            return
        has_grads = any(p.grad is not None for p in self.optimized())
        if self.scaler is not None and has_grads:
            self.scaler.unscale_(self.optimizer)
        known, self._known_norm = self._known_norm, None
        norm, self.grad_norm = known or self._norm(Numbers())
        watch.takes_norm(self.grad_norm)
        if self._clip is not None:
            for alike in by_kind(self.optimized()):
                torch.nn.utils.clip_grads_with_norm_(alike, self._clip, norm)

    def _needs_norm(self, watch: UpdateWatch) -> bool:
        return self._clip is not None or watch.wants_norm

    def _norm(self, numbers: Numbers) -> tuple[Tensor, Number]:
        found = [p.grad for p in self.optimized() if p.grad is not None]
        # torch has no norm of sparse ones, such as of `nn.Embedding(sparse=True)`.
        grads = [grad.coalesce().values() if grad.is_sparse else grad for grad in found]
        norm = total_norm(grads).detach()
        return norm, numbers.ask(norm)

    def _step_optimizer(self) -> bool:
        if self.scaler is None or all(p.grad is None for p in self.optimized()):
            # A scaler raises where there is no gradient at all.
            self.optimizer.step()
            return True
        if isinstance(self._scale, Tensor) and _tells_of_steps(self.optimizer):
            steps: list[bool] = []
            with self.optimizer.register_step_post_hook(lambda *_: steps.append(True)):
                self.scaler.step(self.optimizer)
            self.scaler.update()
            return bool(steps)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return bool(self.scaler.get_scale() >= scale)  # a skipped step lowers the scale

    @staticmethod
    def _check(optimizer: Any, clip: float | None, scaler: Any, scheduler: Any) -> None:
        if optimizer is None:
            for name, value in (("clip_grad_norm", clip), ("scheduler", scheduler)):
                if value is not None:
                    raise ArgumentError(
                        f"{name} needs an optimizer; with optimizer=None gradients accumulate, "
                        "and what happens to them is up to you"
                    )
        elif not (hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")):
            raise ArgumentError(
                f"optimizer={shown(optimizer)} is not a torch.optim.Optimizer; pass one, or None"
            )
        elif isinstance(optimizer, torch.optim.LBFGS):
            raise ArgumentError(
                "optimizer=LBFGS evaluates the loss several times per step, which a window "
                "cannot; use a first-order optimizer"
            )
        if scaler is not None and not (hasattr(scaler, "scale") and hasattr(scaler, "unscale_")):
            raise ArgumentError(f"scaler={shown(scaler)} is not a torch.amp.GradScaler")
        if scheduler is not None and not hasattr(scheduler, "step"):
            raise ArgumentError(f"scheduler={shown(scheduler)} has no step(); pass a LRScheduler")


def _tells_of_steps(optimizer: Any) -> bool:
    """Whether a hook of it runs after each step, and no step that a scaler skips is begun."""
    is_hooked = getattr(type(optimizer).step, "hooked", False)
    return is_hooked and not getattr(optimizer, "_step_supports_amp_scaling", False)
