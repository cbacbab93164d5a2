"""What makes a run: another one is refused by name, or goes on where it was accepted by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    ArraySequence,
    LaneSource,
    TensorSequence,
    Trainer,
)
from tbptt_ckpt.data import map_file
from tbptt_ckpt.executor import ReplayExecutor

STEPS = 24
F = nn.functional


def scaled_loss(output: Tensor, target: Tensor) -> Tensor:
    return 2 * F.mse_loss(output, target)


def data(**changes: Any) -> TensorSequence:
    inputs, targets = cases.random_data(STEPS, **changes)
    return TensorSequence(inputs.float(), targets.float())


def build(
    *,
    source: Any = None,
    lr: float = 0.1,
    optimizer: Callable[..., Any] = torch.optim.Adam,
    scheduler: Callable[..., Any] | None = lambda each: StepLR(each, 2, 0.5),
    loss_fn: Any = F.mse_loss,
    turned: bool = False,
    double: bool = False,
    max_steps: int | None = None,
    extra: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
    hyper: dict[str, Any] | None = None,
    **engine: Any,
) -> Trainer:
    torch.manual_seed(3)
    module = nn.GRUCell(cases.WIDTH_IN, cases.WIDTH)
    if double:
        module.double()
    weights = list(module.parameters())
    made = optimizer(weights[::-1] if turned else weights, lr=lr, **(hyper or {}))
    engine = {"k1": 3, "k2": 5, "strategy": "uniform:2"} | engine
    tbptt = TBPTT(
        module,
        loss_fn,
        engine.pop("k1"),
        engine.pop("k2"),
        made,
        scheduler=None if scheduler is None else scheduler(made),
        **engine,
    )
    source = data() if source is None else source
    return Trainer(tbptt, source, epochs=2, max_steps=max_steps, extra=extra, identity=identity)


@functools.cache
def saved(num_windows: int = 5, **options: Any) -> dict[str, Any]:
    """The state of a run after some windows, when its rate has moved."""
    trainer = build(**options)
    windows = trainer.windows()
    for _ in range(num_windows):
        next(windows)
    windows.close()
    return copy.deepcopy(trainer.state_dict())


class Counter:
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def decayed(optimizer: Any) -> Any:
    return ExponentialLR(optimizer, 0.9)


OTHERS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.2},
    "betas": {"hyper": {"betas": (0.8, 0.9)}},
    "weight_decay": {"hyper": {"weight_decay": 0.1}},
    "optimizer": {"optimizer": torch.optim.SGD},
    "scheduler": {"scheduler": decayed},
    "loss_fn": {"loss_fn": scaled_loss},
    "loss": {"loss": "last"},
    "reduction": {"reduction": "sum"},
    "clip_grad_norm": {"clip_grad_norm": 0.5},
    "autocast_dtype": {"autocast_dtype": torch.bfloat16},
    "executor": {"executor": "checkpoint"},
    "state_dtype": {"executor": ReplayExecutor(state_dtype=torch.bfloat16)},
    "extra": {"extra": {"counter": Counter()}},
    "speed": {"identity": {"speed": 3}},
    "data": {"source": data(seed=7)},
    "scaler": {"scaler": torch.amp.GradScaler("cpu")},
}
NEVER: dict[str, dict[str, Any]] = {
    "k1": {"k1": 4},
    "k2": {"k2": 6},
    "overlap": {"overlap": "stale"},
    "accumulate": {"accumulate": 2},
    "parameters": {"turned": True},
    "lanes": {"source": data(lanes=cases.LANES + 1)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_named_or_accepted(name: str) -> None:
    other = build(**OTHERS[name])
    with pytest.raises(
        ArgumentError, match=rf"differs from the one that was saved: .*{name}=.*was"
    ):
        other.load_state_dict(saved())
    assert other.num_steps == 0
    other.load_state_dict(saved(), accept=(name,))
    assert other.num_steps == 15
    other.train()
    assert other.num_steps == 2 * STEPS
    # What goes on is this run from here on: it resumes without being accepted again.
    build(**OTHERS[name]).load_state_dict(other.state_dict())


def test_values_of_the_users_are_compared_by_what_they_are() -> None:
    given = {"rate": float("nan"), "sizes": (3, [4, {"a": None, 2: True}]), "name": "x"}
    state = build(identity=given).state_dict()
    build(identity=copy.deepcopy(given) | {"rate": float("nan")}).load_state_dict(state)
    with pytest.raises(ArgumentError, match=r"rate=0\.5, which was nan"):
        build(identity=given | {"rate": 0.5}).load_state_dict(state)


class Dropping(nn.GRUCell):
    """A cell with a layer whose printed form names an address."""

    def __init__(self, rate: float) -> None:
        super().__init__(cases.WIDTH_IN, cases.WIDTH)
        self.dropout, self.act = nn.Dropout(rate), _Act()

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return super().forward(self.act(self.dropout(x)), h)


class _Act(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return repr(object())


def test_layers_that_hold_no_parameter_are_part_of_a_run() -> None:
    def dropping(rate: float) -> Trainer:
        torch.manual_seed(3)
        module = Dropping(rate)
        optimizer = torch.optim.Adam(module.parameters())
        engine = TBPTT(module, F.mse_loss, 5, 5, optimizer, strategy="retain")
        return Trainer(engine, data(), epochs=2, max_steps=2 * STEPS)

    begun = dropping(0.1)
    next(begun.windows())
    state = begun.state_dict()
    dropping(0.1).load_state_dict(state)
    with pytest.raises(ArgumentError, match=r"module=\['dropout Dropout\(p=0\.3.*was .*p=0\.1"):
        dropping(0.3).load_state_dict(state)
    dropping(0.3).load_state_dict(state, accept=["module"])
    del state["identity"]["run"]["module"]  # as before it was said
    dropping(0.3).load_state_dict(state)


@pytest.mark.parametrize("name", NEVER)
def test_what_is_never_accepted(name: str) -> None:
    other = build(**NEVER[name])
    with pytest.raises(ArgumentError, match=f"resume with the same .*{name}"):
        other.load_state_dict(saved(), accept=[name, "data"])
    assert other.num_steps == 0


def test_all_differences_are_in_one_error() -> None:
    other = build(lr=0.5, loss_fn=scaled_loss, clip_grad_norm=1.0, source=data(seed=7))
    with pytest.raises(ArgumentError) as caught:
        other.load_state_dict(saved(), accept=("lr",))
    words = ("lr=0.5, which was 0.1", "loss_fn='scaled_loss'", "clip_grad_norm=1.0", "data=")
    assert all(word in str(caught.value) for word in words)
    assert "--accept clip_grad_norm,data,loss_fn,lr" in str(caught.value)
    with pytest.raises(ArgumentError, match=r"accept=\['speed'\] must be among .*'lr'"):
        other.load_state_dict(saved(), accept=("speed",))
    with pytest.raises(ArgumentError, match="accept='lr' must be a list of texts"):
        other.load_state_dict(saved(), accept="lr")


def test_a_dtype_is_another_run() -> None:
    inputs, targets = cases.random_data(STEPS)
    other = build(double=True, source=TensorSequence(inputs, targets))
    with pytest.raises(ArgumentError, match=r"parameters=.*float64.*was.*float32"):
        other.load_state_dict(saved(), accept=("data",))


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "sqrt"},
        {"memory_budget": "1GiB", "strategy": "optimal"},
        {"max_steps": 45},
        {"time_batching": True},
        {"hyper": {"foreach": True}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:(strategy|time_batching)")
def test_what_is_no_part_of_a_run(options: dict[str, Any]) -> None:
    other = build(**options)
    other.load_state_dict(saved())
    other.train()
    assert other.num_steps == options.get("max_steps", 2 * STEPS)


def test_between_two_passes_data_is_compared_too() -> None:
    state = saved(num_windows=STEPS // 3)
    trainer = build()
    for _ in zip(range(STEPS // 3 + 1), windows := trainer.windows(), strict=False):
        pass
    windows.close()
    between = {**state, "run": None, "init_state": [], "limit": None}
    between["progress"] = state["progress"] | {"epoch": 1, "steps_before": STEPS}
    for source, name in ((data(seed=7), "data"), (data(lanes=cases.LANES + 1), "lanes")):
        with pytest.raises(ArgumentError, match=f"saved: .*{name}="):
            build(source=source).load_state_dict(between)
    more_lanes = build(source=data(lanes=cases.LANES + 1))
    more_lanes.load_state_dict(between, accept=("data", "lanes"))
    more_lanes.train()


def test_a_moved_file_is_the_same_and_another_of_its_size_is_not(tmp_path: Path) -> None:
    inputs, targets = (tensor.float().numpy() for tensor in cases.random_data(STEPS))
    steps = np.concatenate([inputs, targets], axis=2)

    def source(name: str) -> ArraySequence:
        rows = map_file(tmp_path / name)
        return ArraySequence(rows[..., : inputs.shape[2]], rows[..., inputs.shape[2] :])

    np.save(tmp_path / "here.npy", steps)
    np.save(tmp_path / "there.npy", steps)
    np.save(tmp_path / "other.npy", steps[::-1])
    trainer = build(source=source("here.npy"))
    windows = trainer.windows()
    next(windows)
    windows.close()
    state = trainer.state_dict()
    build(source=source("there.npy")).load_state_dict(state)
    with pytest.raises(ArgumentError, match="saved: data='"):
        build(source=source("other.npy")).load_state_dict(state)


class Augmented(TensorSequence):
    """Draws from the global generator in every read."""

    def read(self, start: int, stop: int) -> tuple[Any, Any]:
        inputs, targets = super().read(start, stop)
        return inputs + 0.1 * torch.randn_like(inputs), targets


def test_looking_at_the_data_changes_nothing() -> None:
    def run(look: bool) -> list[Tensor]:
        inputs, targets = cases.random_data(STEPS)
        trainer = build(source=Augmented(inputs.float(), targets.float()))
        for _ in trainer.windows():
            if look:
                trainer.state_dict()
        return trainer.tbptt.parts.weights()

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_lanes_in_an_order_of_their_own_are_known() -> None:
    def source(seed: int) -> LaneSource:
        inputs, targets = cases.random_data(STEPS)
        steps = TensorSequence(inputs[:, 0].float(), targets[:, 0].float())
        return LaneSource(steps, cases.LANES, lengths=(5, 2, 7, 4, 6), seed=seed)

    trainer = build(source=source(1))
    next(trainer.windows())
    state = trainer.state_dict()
    build(source=source(1)).load_state_dict(state)
    with pytest.raises(ArgumentError, match="data="):
        build(source=source(2)).load_state_dict(state)


class TestAcceptedHyperParameters:
    def test_a_rate_is_this_runs(self) -> None:
        other = build(lr=0.2, scheduler=None)
        other.load_state_dict(saved(scheduler=None), accept=("lr",))
        assert other.tbptt.parts.updater.learning_rate == 0.2

    def test_a_scheduled_rate_keeps_its_place_in_the_schedule(self) -> None:
        other, same = build(lr=0.2), build()
        same.load_state_dict(saved())
        other.load_state_dict(saved(), accept=("lr",))
        for trainer in (same, other):
            trainer.train()
        rates = [trainer.tbptt.parts.updater.learning_rate for trainer in (same, other)]
        assert rates[1] == pytest.approx(2 * rates[0])
        assert rates[0] == pytest.approx(0.1 * 0.5**8)

    def test_another_optimizer_begins_anew_and_its_schedule_too(self) -> None:
        other = build(optimizer=torch.optim.SGD)
        other.load_state_dict(saved(), accept=("optimizer",))
        updater = other.tbptt.parts.updater
        assert updater.learning_rate == 0.1
        assert not updater.optimizer.state
        assert updater.scheduler.last_epoch == 0

    def test_another_schedule_begins_at_this_runs_rate(self) -> None:
        other = build(scheduler=decayed)
        other.load_state_dict(saved(), accept=("scheduler",))
        updater = other.tbptt.parts.updater
        assert updater.learning_rate == 0.1
        assert len(updater.optimizer.state) == 4
