"""A training run that meets NaN or Inf, under each policy."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from grids import covering
from torch import Tensor, nn
from training_jobs import EXACT, Injected, Listener, assert_equal, learning_of

from tbptt_ckpt import (
    TBPTT,
    NonFinite,
    NonFiniteError,
    Snapshots,
    TbpttWarning,
    TensorSequence,
    Trainer,
)


class Poisoned(nn.Module):
    """Its output, state or gradient is not finite at one call of one window."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__()
        self.inner = cases.TanhCell()
        self.what, self.at = what, at
        self.calls = 0
        self.fired = 0

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = self.inner(x, h)
        if self.at <= float(x[0, 0]) < self.at + 1:
            self.fired += 1
            if self.what == "loss":
                y = y * float("nan")
            elif self.what == "state":
                h = torch.where(torch.arange(h.shape[1]) == 1, float("inf"), h)
            elif y.requires_grad:
                y.register_hook(lambda grad: grad * float("inf"))
        return y, h


@dataclass
class Poison:
    """A run whose steps carry their number, so that a fault can be put at one of them."""

    what: str
    at: int
    k1: int = 2
    k2: int | None = 4
    num_steps: int = 9
    overlap: str = "refresh"

    def build(self, **options: Any) -> tuple[Trainer, Poisoned, Listener]:
        torch.manual_seed(1)
        module = Poisoned(self.what, self.at).double()
        listener = Listener()
        engine = self.engine(module)
        source = TensorSequence(*self.data())
        return Trainer(engine, source, events=[listener], **options), module, listener

    def engine(self, module: nn.Module, **changed: Any) -> TBPTT:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        options: dict[str, Any] = {"overlap": self.overlap, "strategy": "uniform:2"} | changed
        return TBPTT(module, nn.functional.mse_loss, self.k1, self.k2, optimizer, **options)

    def data(self) -> tuple[Tensor, Tensor]:
        inputs, targets = cases.random_data(self.num_steps)
        inputs[:, 0, 0] = torch.arange(self.num_steps) + 0.5
        return inputs, targets

    @property
    def window(self) -> int:
        """The first window that meets it."""
        return self.at // self.k1


WHATS = ("loss", "state", "gradient")


class TestNonFinite:
    @covering(together=1, at=range(9), what=WHATS, overlap=["refresh", "stale"])
    def test_stop_leaves_everything_as_it_was_before_the_window(
        self, what: str, at: int, overlap: str, injected: Injected
    ) -> None:
        poison = Poison(what, at, overlap=overlap)
        healthy, _, heard = Poison("none", -1, overlap=overlap).build()
        states = [learning_of(healthy)]
        states += [learning_of(healthy) for _ in healthy.windows()]
        trainer, module, listener = poison.build()
        with pytest.raises(NonFiniteError) as caught:
            trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        start, stop = poison.window * 2, min(poison.window * 2 + 2, 9)
        assert f"window {poison.window}, steps {start} to {stop}: the " in str(caught.value)
        words = {"gradient": "norm of the gradients", "loss": "loss is nan", "state": "the "}
        assert words[what] in str(caught.value)
        assert trainer.num_steps == start
        assert_equal(learning_of(trainer), states[poison.window], EXACT)
        module.at = -1  # healed: it goes on as if nothing had been
        trainer.train()
        assert_equal(learning_of(trainer), states[-1], EXACT)
        assert [w.loss for w in listener.windows] == [w.loss for w in heard.windows]

    @covering(
        together=1, at=[0, 3, 4, 8], what=WHATS, k2=[2, 4, None], overlap=["refresh", "stale"]
    )
    def test_skip_goes_on_from_the_last_finite_state(
        self, what: str, at: int, k2: int | None, overlap: str, injected: Injected
    ) -> None:
        poison = Poison(what, at, k2=k2, overlap=overlap)
        trainer, module, listener = poison.build(non_finite=NonFinite(policy="skip"))
        with pytest.warns(TbpttWarning, match=f"window {poison.window}, .*; skipped"):
            result = trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        # The same by hand: the windows before, and a run over the rest from the state they left.
        twin = Poison("none", -1, k2=k2, overlap=overlap)
        torch.manual_seed(1)
        copied = Poisoned("none", -1).double()
        engine, (inputs, targets) = twin.engine(copied), twin.data()
        losses, state = [], None
        for window in engine.windows(TensorSequence(inputs, targets)):
            if window.index == poison.window:
                break
            losses.append(float(window.loss))
            state = window.state
        rest = 2 * poison.window + 2
        torch.manual_seed(1)
        copied = Poisoned("none", -1).double()
        engine = twin.engine(copied)
        before = engine.windows(TensorSequence(inputs, targets))
        for _ in range(poison.window):
            next(before)
        if rest < 9:
            part = TensorSequence(inputs[rest:], targets[rest:])
            losses += [float(w.loss) for w in engine.windows(part, state)]
        assert [w.loss for w in listener.windows] == losses
        assert_equal(dict(module.state_dict()), dict(copied.state_dict()), EXACT)
        assert (result.num_steps, result.num_windows, result.num_updates) == (9, 5, 4)
        assert all(torch.isfinite(p).all() for p in module.parameters())

    def test_skipping_without_end_stops(self, injected: Injected) -> None:
        trainer, module, _ = Poison("loss", 0).build(
            non_finite=NonFinite(policy="skip", most_in_a_row=2)
        )
        module.what, module.at = "loss", 0
        trainer.tbptt.parts.loss_function.loss_fn = lambda y, _: y.sum() * float("nan")
        with pytest.warns(TbpttWarning), pytest.raises(NonFiniteError, match="2 windows before"):
            trainer.train()
        injected("NaN or Inf in loss, gradient or carried state", 3)
        assert trainer.num_steps == 4

    @pytest.mark.parametrize("what", WHATS)
    def test_going_on_is_not_silent(self, what: str, injected: Injected) -> None:
        trainer, module, listener = Poison(what, 4).build(non_finite=NonFinite(policy="go on"))
        with pytest.warns(TbpttWarning, match="going on"):
            result = trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        assert result.num_updates == 5
        assert "non_finite" in listener.kinds()

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    @pytest.mark.parametrize("keep", [1, 3])
    def test_poisoned_weights_are_not_saved(
        self, keep: int, value: float, tmp_path: Path, injected: Injected
    ) -> None:
        snapshots = Snapshots(directory=tmp_path, every_steps=1, keep=keep)
        poison = Poison("none", -1)
        trainer, module, _ = poison.build(snapshots=snapshots)
        windows = trainer.windows()
        for _ in range(3):
            next(windows)
        with torch.no_grad():
            next(module.parameters()).view(-1)[1] = value
        with pytest.raises(NonFiniteError, match=r"1 weights hold NaN .* after 6 steps"):
            next(windows)
        injected("weights become Inf in an update")
        again, module, _ = poison.build(snapshots=snapshots)
        assert again.resume()
        assert again.num_steps == 4
        again.train()
        healthy, _, _ = poison.build()
        healthy.train()
        assert_equal(learning_of(again), learning_of(healthy), EXACT)

    def test_poisoned_weights_are_named_and_going_on_keeps_the_good_snapshots(
        self, tmp_path: Path, injected: Injected
    ) -> None:
        def poisoned(**options: Any) -> Trainer:
            trainer, module, _ = Poison("none", -1).build(**options)
            with torch.no_grad():
                next(module.parameters()).view(-1)[1] = float("nan")
            return trainer

        with pytest.raises(NonFiniteError, match=r"loss is nan \(1 weights hold NaN"):
            poisoned().train()
        options = {"non_finite": NonFinite(policy="go on")}
        with pytest.warns(TbpttWarning, match="so no snapshot is taken|going on"):
            poisoned(snapshots=Snapshots(directory=tmp_path), **options).train()
        injected("weights become Inf in an update", 2)
        assert not list(tmp_path.glob("step-*"))

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_an_engine_raises_at_the_first_loss_that_is_not_finite(
        self, accumulate: int, injected: Injected
    ) -> None:
        poison = Poison("loss", 4)
        inputs, targets = poison.data()
        torch.manual_seed(1)
        module = Poisoned("loss", 4).double()
        engine = poison.engine(module, accumulate=accumulate)
        windows = engine.windows(TensorSequence(inputs, targets))
        for _ in range(2):
            next(windows)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(NonFiniteError, match=r"window 2, steps 4 to 6: the loss is nan"):
            next(windows)
        injected("NaN or Inf in loss, gradient or carried state")
        assert_equal(dict(module.state_dict()), dict(before), EXACT)
        told_not_to = poison.engine(module, check_finite=False)
        assert math.isnan(told_not_to.train(TensorSequence(inputs, targets)).loss or 0.0)

    def test_a_scaler_keeps_its_own_way_with_gradients(self, injected: Injected) -> None:
        trainer, module, listener = Poison("gradient", 4).build()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        trainer.tbptt.parts.updater.scaler = scaler
        result = trainer.train()
        assert module.fired
        injected("NaN or Inf in loss, gradient or carried state")
        # The window in which the step is new makes no update, and the scale is halved.
        assert (result.num_updates, scaler.get_scale()) == (4, 4.0)
        assert [w.updated for w in listener.windows] == [True, True, False, True, True]
        trainer, module, _ = Poison("loss", 4).build()
        trainer.tbptt.parts.updater.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with pytest.raises(NonFiniteError, match="window 2"):
            trainer.train()
        injected("NaN or Inf in loss, gradient or carried state")
