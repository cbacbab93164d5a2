"""One update of the weights per window or group of windows: clip, unscale, step, schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.updates.accumulation import Accumulation
from tbptt_ckpt.updates.undo import Update


class UpdateWatch:
    """Watches nothing and wants nothing; what others override.

    Attributes:
        wants_norm: Whether the norm of the gradients is measured where nothing is clipped.
        wants_undo: Whether an update that is cut short may be taken back, as long as it has
            changed nothing.
        wants_copies: Whether a copy is taken during each of those, so that it can be taken back
            in any case.
    """

    wants_norm = wants_undo = wants_copies = False

    def takes_norm(self, norm: Tensor) -> None:
        """The norm of an update's gradients, before they are clipped."""


UNWATCHED = UpdateWatch()


@dataclass(frozen=True, slots=True, eq=False)
class UpdaterMark:
    """Where an updater stood between two windows."""

    grads: list[tuple[Tensor, Tensor | None]]
    group: dict[str, Any]


class Updater:
    """Updates the weights after windows; without an optimizer, lets gradients accumulate.

    Args:
        optimizer: Steps once per group of windows; None leaves gradients and weights alone.
        parameters: Whose gradients are cleared before a window, besides the optimizer's.
        clip_grad_norm: Largest norm of the optimizer's gradients together.
        scaler: A `torch.amp.GradScaler`.
        scheduler: A learning-rate scheduler, stepped after each update.
        group: The windows of an update; one by default.

    Attributes:
        grad_norm: The last norm.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Iterable[nn.Parameter],
        clip_grad_norm: float | None,
        scaler: Any,
        scheduler: Any,
        group: Accumulation | None = None,
    ) -> None:
        self._check(optimizer, clip_grad_norm, scaler, scheduler)
        self.group = Accumulation(1, averages=True) if group is None else group
        self._scale = 1.0
        self.optimizer, self._clip = optimizer, clip_grad_norm
        self._scaler, self._scheduler = scaler, scheduler
        self._cleared = list(parameters)
        self._update: Update | None = None  # while one is going on
        self.grad_norm: Tensor | None = None

    @property
    def scheduler(self) -> Any:
        """The learning-rate scheduler, or None."""
        return self._scheduler

    @property
    def scaler(self) -> Any:
        """The `torch.amp.GradScaler`, or None."""
        return self._scaler

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

    def clear(self, init_state_leaves: Iterable[Tensor]) -> None:
        """Forget all gradients, unless they accumulate."""
        if self.optimizer is None or self.group.pending:
            return
        tensors = (*self._cleared, *init_state_leaves)
        if getattr(self.optimizer.zero_grad, "__func__", None) is torch.optim.Optimizer.zero_grad:
            tensors += tuple(self.optimized())  # the same, without an entry for profilers
        else:
            self.optimizer.zero_grad(set_to_none=True)
        for tensor in tensors:
            tensor.grad = None

    def grad_scale(self, device: torch.device) -> float:
        """The factor on gradients of this window."""
        if self._scaler is not None:
            # The scaler makes its scale when it first scales a tensor.
            self._scale = float(self._scaler.scale(torch.ones((), device=device)))
        return self._scale

    def add(self, loss: Tensor) -> None:
        """A window has added its gradients."""
        if self.optimizer is not None:
            self.group.add(loss)

    def update(
        self,
        is_last: bool,
        init_state_leaves: Iterable[Tensor],
        watch: UpdateWatch = UNWATCHED,
    ) -> bool:
        """Update the weights if a group of windows is complete.

        Args:
            is_last: Whether the sequence ends, so that the group stays short.
            init_state_leaves: Learned tensors of the initial state.
            watch: Watches the update.

        Returns:
            False where a scaler skipped the update, or none was due.
        """
        if self.optimizer is None or not self.group.is_due(is_last):
            return False
        if self.group.pending > 1 or self._scale != 1.0:
            tensors = self._with_gradients(init_state_leaves)
            self.group.average(tensors)
            self._unscale_others(tensors)
        loss = self.group.mean_loss()
        self.group.begin()
        return self.step(loss, watch)

    def _unscale_others(self, tensors: Iterable[Tensor]) -> None:
        """Take a scaler's factor from gradients that the optimizer does not own."""
        if self._scale == 1.0:
            return
        owned = {id(tensor) for tensor in self.optimized()}
        for tensor in tensors:
            if id(tensor) not in owned and tensor.grad is not None:
                tensor.grad.div_(self._scale)

    def step(self, loss: Tensor, watch: UpdateWatch = UNWATCHED) -> bool:
        """Update the weights from the gradients at hand; False where a scaler skipped it."""
        self._measure_and_clip(watch)
        if watch.wants_undo:
            self._update = Update(self.optimizer, self._scheduler, self._scaler)
            if watch.wants_copies:
                self._update.copy()
        updated = self._step_optimizer()
        if updated and self._scheduler is not None:
            self._step_scheduler(loss)
        self._update = None
        return updated

    @property
    def accumulates(self) -> bool:
        """Whether the gradients that a window finds belong to the result."""
        return self.optimizer is None or self.group.pending > 0

    def mark(self, init_state_leaves: Iterable[Tensor]) -> UpdaterMark:
        """Where the group stands, with copies of the gradients that a window must not lose."""
        tensors = self._with_gradients(init_state_leaves) if self.accumulates else []
        grads = [(t, None if t.grad is None else t.grad.clone()) for t in tensors]
        return UpdaterMark(grads, self.group.state_dict())

    def rewind(
        self, mark: UpdaterMark, init_state_leaves: Iterable[Tensor], device: torch.device
    ) -> None:
        """Forget what a window did that was cut short: its gradients, its unfinished update.

        Raises:
            TbpttError: Some weights were updated already, and no copy was taken.
        """
        self.group.load_state_dict(mark.group)
        for tensor in self._with_gradients(init_state_leaves):
            tensor.grad = None
        for tensor, grad in mark.grads:
            tensor.grad = grad
        update, self._update = self._update, None
        if update is not None:
            update.take_back()
        if self._scaler is not None and self._scaler.is_enabled():
            # The one public way to forget that gradients were unscaled; the scale stays.
            self._scaler.update(new_scale=self.grad_scale(device))

    def _with_gradients(self, init_state_leaves: Iterable[Tensor]) -> list[Tensor]:
        """All tensors whose gradients a window changes."""
        tensors = (*self._cleared, *init_state_leaves, *self.optimized())
        return list({id(tensor): tensor for tensor in tensors}.values())

    def _measure_and_clip(self, watch: UpdateWatch) -> None:
        if self._clip is None and not watch.wants_norm:
            return
        has_grads = any(p.grad is not None for p in self.optimized())
        if self._scaler is not None and has_grads:
            self._scaler.unscale_(self.optimizer)
        if self._clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.optimized(), self._clip)
        else:
            grads = [p.grad for p in self.optimized() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        self.grad_norm = norm.detach()
        watch.takes_norm(self.grad_norm)

    def _step_optimizer(self) -> bool:
        if self._scaler is None or all(p.grad is None for p in self.optimized()):
            # A scaler raises where there is no gradient at all.
            self.optimizer.step()
            return True
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return bool(self._scaler.get_scale() >= scale)  # a skipped step lowers the scale

    def _step_scheduler(self, loss: Tensor) -> None:
        if isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(float(loss))
        else:
            self._scheduler.step()

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
                f"optimizer={optimizer!r} is not a torch.optim.Optimizer; pass one, or None"
            )
        elif isinstance(optimizer, torch.optim.LBFGS):
            raise ArgumentError(
                "optimizer=LBFGS evaluates the loss several times per step, which a window "
                "cannot; use a first-order optimizer"
            )
        if clip is not None and (
            isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0
        ):
            raise ArgumentError(f"clip_grad_norm={clip!r} must be a positive number, or None")
        if scaler is not None and not (hasattr(scaler, "scale") and hasattr(scaler, "unscale_")):
            raise ArgumentError(f"scaler={scaler!r} is not a torch.amp.GradScaler")
        if scheduler is not None and not hasattr(scheduler, "step"):
            raise ArgumentError(f"scheduler={scheduler!r} has no step(); pass a LRScheduler")
