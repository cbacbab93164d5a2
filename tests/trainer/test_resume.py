"""A run that is saved to disk and resumed in new objects is bitwise one that never stopped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cases
import numpy as np
import pytest
import torch
from devices import CPU, here, placed
from grids import parts
from torch import Tensor, nn
from training_jobs import Stream

from tbptt_ckpt import TBPTT, ArgumentError, BurnIn, LaneSource, SharedState, TensorSequence
from tbptt_ckpt.snapshot.disk import Disk
from tbptt_ckpt.snapshot.store import SnapshotStore
from tbptt_ckpt.trainer.trainer import Trainer

STEPS, K1, K2 = 13, 2, 5


@pytest.fixture
def _same_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a device does not promise by itself."""
    if device == CPU:
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Hasty(Disk):
    """Does not wait for the medium; no power is lost here."""

    def sync(self, descriptor: int) -> None:
        pass

    def sync_directory(self, path: Any) -> None:
        pass


class Restless(nn.Module):
    """Dropout, a buffer that counts and feeds the output, batch statistics, one not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(cases.WIDTH_IN, cases.WIDTH)
        self.norm = nn.BatchNorm1d(cases.WIDTH)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("trace", torch.zeros(cases.WIDTH), persistent=False)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        self.calls += 1
        self.trace = 0.9 * self.trace + 0.1 * h.detach().mean(0)
        return self.norm(self.drop(h)) + 0.01 * self.calls + self.trace, h


class SetLater(Restless):
    """Its buffers are None until a step sets them, also in the module that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.trace = None

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.calls is None:
            self.calls, self.trace = x.new_zeros((), dtype=torch.float32), x.new_zeros(cases.WIDTH)
        return super().forward(x, h)


class Hidden(NamedTuple):
    h: Tensor
    steps: int


@dataclass
class Memory:
    hidden: Hidden
    others: dict[str, Any]


class Nested(nn.Module):
    """A state of a dataclass, a named tuple, a dict, and a number that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(cases.WIDTH_IN, cases.WIDTH)

    def forward(self, x: Tensor, state: Memory | None) -> tuple[Tensor, Memory]:
        if state is None:
            zeros = x.new_zeros(x.shape[0], cases.WIDTH)
            state = Memory(Hidden(zeros, 0), {"c": [zeros]})
        h, c = self.cell(x, (state.hidden.h, state.others["c"][0]))
        return h, Memory(Hidden(h, state.hidden.steps + 1), {"c": [c]})


class Drawing(nn.Module):
    """Draws from global generators, its own, and one in its state beside an array."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(cases.WIDTH_IN, cases.WIDTH)
        self.rngs = [random.Random(1), np.random.default_rng(2), np.random.RandomState(3)]
        self.torchs = torch.Generator().manual_seed(4)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, rng, count = (None, np.random.default_rng(5), np.zeros(1)) if state is None else state
        count += rng.random()
        draws = [random.random(), np.random.randn(), *(each.random() for each in self.rngs[:2])]  # noqa: NPY002
        scale = 0.2 * (sum(draws) + self.rngs[2].randn() + float(count[0]))
        h = self.cell(x * (scale + float(torch.rand((), generator=self.torchs))), h)
        return h, (h, rng, count)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return placed(make().double())


def _drawn_state() -> Tensor:
    return torch.randn(cases.LANES, cases.WIDTH, dtype=torch.float64, device=here())


class FusedWithDropout(nn.Module):
    """A segment module whose dropout draws once per call."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(cases.WIDTH_IN, cases.WIDTH, num_layers=2, dropout=0.4)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.lstm(x, state)


@dataclass
class Case:
    """How to build one run, the same each time."""

    module: Callable[[], nn.Module] = cases.TanhCell
    engine: dict[str, Any] = None  # type: ignore[assignment]
    optimizer: str | None = "adam"
    scheduler: str | None = None
    scaler: bool = False
    trainer: dict[str, Any] = None  # type: ignore[assignment]
    k1: int = K1
    k2: int | None = K2
    source: str = "tensors"
    init: str | None = None

    def build(self) -> tuple[Trainer, nn.Module]:
        module = _seeded(self.module)
        extra = []
        init_state: Any = None
        if self.init == "learned":
            init_state = cases.random_state().requires_grad_()
            extra = [init_state]
        elif self.init == "shared":
            extra = [cases.random_state(lanes=1).requires_grad_()]
            init_state = SharedState(extra[0], cases.LANES)
        elif self.init == "random":
            init_state = _drawn_state
        optimizer: Any = None
        if self.optimizer == "adam":
            optimizer = torch.optim.AdamW([*module.parameters(), *extra], lr=0.05)
        elif self.optimizer == "sgd":
            optimizer = torch.optim.SGD([*module.parameters(), *extra], lr=0.1, momentum=0.9)
        schedulers: dict[str | None, Callable[[], Any]] = {
            None: lambda: None,
            "step": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
            "cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=50),
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
            "sequence": lambda: torch.optim.lr_scheduler.SequentialLR(
                optimizer,
                [
                    torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1, 3),
                    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
                ],
                [3],
            ),
        }
        engine = TBPTT(
            module,
            nn.functional.mse_loss,
            self.k1,
            self.k2,
            optimizer,
            scheduler=schedulers[self.scheduler](),
            scaler=torch.amp.GradScaler(here().type, init_scale=4.0, growth_interval=2)
            if self.scaler
            else None,
            **({"strategy": "uniform:2"} | (self.engine or {})),
        )
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)  # noqa: NPY002 - the global generator is what is resumed
        options = {"init_state": init_state} | (self.trainer or {})
        return Trainer(engine, self.make_source(), **options), module

    def make_source(self) -> Any:
        inputs, targets = cases.random_data(STEPS)
        if self.source == "tensors":
            return TensorSequence(inputs, targets)
        if self.source == "masked":
            weight = torch.ones(STEPS, device=here())
            weight[2:7] = 0
            return TensorSequence(inputs, targets, weight=weight)
        if self.source == "stream":
            return Stream(STEPS)
        if self.source == "lanes":
            steps = TensorSequence(*(torch.cat([t[:, 0], t[:, 1]]) for t in (inputs, targets)))
            lengths = (5, 2, 7, 1, 6, 5)
            return BurnIn(LaneSource(steps, cases.LANES, lengths=lengths, seed=3), 1)
        return list(zip(inputs, targets, strict=True))


CASES = {
    "plain": Case(),
    "stale": Case(engine={"overlap": "stale"}),
    "dropout and buffers, refresh": Case(Restless),
    "dropout and buffers, stale": Case(Restless, engine={"overlap": "stale"}),
    "dropout and buffers, checkpoint": Case(Restless, engine={"executor": "checkpoint"}),
    "buffers set later": Case(SetLater),
    "buffers set later, two passes": Case(SetLater, trainer={"epochs": 2}),
    "fused with dropout": Case(FusedWithDropout, engine={"per_step": False}),
    "fused with dropout, stale": Case(
        FusedWithDropout, engine={"per_step": False, "overlap": "stale"}
    ),
    "nn.LSTM": Case(lambda: nn.LSTM(cases.WIDTH_IN, cases.WIDTH)),
    "generators": Case(Drawing),
    "generators, stale": Case(Drawing, engine={"overlap": "stale"}),
    "generators, two passes": Case(Drawing, trainer={"epochs": 2}, k1=3, k2=3),
    "nested state": Case(Nested),
    "nested state, stale": Case(Nested, engine={"overlap": "stale"}),
    "last loss": Case(engine={"loss": "last"}),
    "k2 below k1": Case(k1=4, k2=3),
    "k2 equal to k1": Case(k1=3, k2=3),
    "from the start": Case(k2=None),
    "from the start, stale": Case(Restless, k2=None, engine={"overlap": "stale"}),
    "sgd": Case(optimizer="sgd", engine={"clip_grad_norm": 0.1}),
    "step schedule": Case(scheduler="step"),
    "cycle": Case(scheduler="cycle"),
    "plateau": Case(scheduler="plateau"),
    "sequence of schedules": Case(scheduler="sequence"),
    "scaler": Case(scaler=True, engine={"clip_grad_norm": 0.5}),
    "accumulated gradients": Case(Restless, optimizer=None),
    "groups": Case(Restless, engine={"accumulate": 3}, scheduler="step"),
    "groups, stale": Case(Restless, engine={"accumulate": 2, "overlap": "stale"}),
    "groups, plateau": Case(engine={"accumulate": 4}, scheduler="plateau"),
    "groups, scaler": Case(engine={"accumulate": 2, "clip_grad_norm": 0.5}, scaler=True),
    "groups, learned": Case(init="learned", k2=None, engine={"accumulate": 3}),
    "groups, masked": Case(source="masked", engine={"accumulate": 2}),
    "groups, stream": Case(source="stream", engine={"accumulate": 3}),
    "lanes": Case(source="lanes", trainer={"epochs": 2}),
    "lanes, stale": Case(source="lanes", engine={"overlap": "stale"}, trainer={"epochs": 2}),
    "lanes, learned": Case(source="lanes", init="learned", k2=None),
    "lanes, shared first state": Case(source="lanes", init="shared", trainer={"epochs": 2}),
    "lanes, accumulated": Case(source="lanes", init="learned", optimizer=None),
    "lanes, groups": Case(
        source="lanes", init="learned", engine={"accumulate": 3}, trainer={"epochs": 2}
    ),
    "masked": Case(Restless, source="masked"),
    "masked, stale": Case(Restless, source="masked", engine={"overlap": "stale"}),
    "iterable": Case(source="list"),
    "stream": Case(Restless, source="stream"),
    "stream, stale": Case(Restless, source="stream", engine={"overlap": "stale"}),
    "stream from the start": Case(source="stream", k2=None),
    "stream, steps off the grid": Case(source="stream", trainer={"epochs": None, "max_steps": 11}),
    "two passes": Case(Restless, trainer={"epochs": 2}, init="random"),
    "two passes from the start": Case(trainer={"epochs": 2}, init="random", k2=None),
    "learned first state": Case(init="learned", k2=None),
    "learned first state, accumulated": Case(init="learned", optimizer=None),
    "steps off the grid": Case(trainer={"epochs": None, "max_steps": 21}),
    "steps on the grid": Case(trainer={"epochs": None, "max_steps": 20}),
}


@dataclass
class Account:
    """All that two runs can be compared by."""

    windows: list[tuple[Any, ...]]
    final: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Account)
        return self.windows == other.windows and _bits(self.final) == _bits(other.final)


def _bits(value: Any) -> Any:
    """Comparable by ==, tensors by their bytes."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().cpu().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(item) for item in value]
    if isinstance(value, Memory):
        return _bits(vars(value))
    return value


def _window(result: Any) -> tuple[Any, ...]:
    loss = None if result.loss is None else float(result.loss).hex()
    return result.index, result.start, result.stop, loss, result.drift.hex(), result.updated


def _finish(trainer: Trainer, windows: list[tuple[Any, ...]]) -> Account:
    for result in trainer.windows():
        windows.append(_window(result))
        random.random()
        np.random.rand()  # noqa: NPY002
    state = trainer.state_dict()
    final = {name: state[name] for name in ("learning", "progress", "random", "init_state")}
    return Account(windows, final)


def _run_and_stop(trainer: Trainer, count: int) -> list[tuple[Any, ...]]:
    windows = []
    generator = trainer.windows()
    for _ in range(count):
        windows.append(_window(next(generator)))
        random.random()
        np.random.rand()  # noqa: NPY002
    generator.close()
    return windows


@pytest.mark.parametrize("part", parts(8))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("_same_bits")
def test_a_resumed_run_is_bitwise_one_that_never_stopped(
    name: str, part: int, tmp_path: Any
) -> None:
    """Stopped after every eighth window by default, each case beginning with another one."""
    case = CASES[name]
    expected = _finish(case.build()[0], [])
    assert len(expected.windows) >= 4
    for count in range((part + list(CASES).index(name)) % 8, len(expected.windows) + 1, 8):
        trainer, _ = case.build()
        windows = _run_and_stop(trainer, count)
        store = SnapshotStore(tmp_path, 100, Hasty())
        store.save(count, trainer.state_dict())
        store.wait()
        del trainer
        resumed, module = case.build()
        with torch.no_grad():  # nothing may be right by chance
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(1)
        torch.manual_seed(1234)
        resumed.load_state_dict(store.load(count).state)
        assert _finish(resumed, windows) == expected, count


@pytest.mark.parametrize("name", ["dropout and buffers, stale", "fused with dropout", "masked"])
@pytest.mark.usefixtures("_same_bits")
def test_resuming_at_every_window_is_bitwise_too(name: str, tmp_path: Any) -> None:
    case = CASES[name]
    expected = _finish(case.build()[0], [])
    windows: list[tuple[Any, ...]] = []
    store = SnapshotStore(tmp_path, 1, Hasty())
    for count in range(len(expected.windows)):
        trainer, _ = case.build()
        if count:
            trainer.load_state_dict(store.load(count).state)
        windows += _run_and_stop(trainer, 1)
        store.save(count + 1, trainer.state_dict())
        store.wait()
    trainer, _ = case.build()
    trainer.load_state_dict(store.load(len(windows)).state)
    assert _finish(trainer, windows) == expected


@pytest.mark.parametrize("source", ["tensors", "stream", "list"])
@pytest.mark.parametrize("first", [1, 4, 5, STEPS, STEPS + 1])
def test_a_run_that_is_given_more_steps_goes_on_or_says_why_not(
    first: int, source: str, tmp_path: Any
) -> None:
    """Never are steps left out or trained twice."""
    last = 2 * STEPS

    def case(max_steps: int) -> Case:
        return Case(Restless, source=source, trainer={"epochs": None, "max_steps": max_steps})

    if source == "stream":  # gives its steps once: one pass
        last = STEPS
        if first >= STEPS:
            return
    expected = _finish(case(last).build()[0], [])
    trainer, _ = case(first).build()
    windows = _finish(trainer, []).windows
    store = SnapshotStore(tmp_path, 1, Hasty())
    store.save(first, trainer.state_dict())
    resumed, _ = case(last).build()
    if (first % STEPS) % K1:
        with pytest.raises(ArgumentError, match="between two update points"):
            resumed.load_state_dict(store.load(first).state)
        return
    resumed.load_state_dict(store.load(first).state)
    assert _finish(resumed, windows) == expected


@pytest.mark.usefixtures("_same_bits")
def test_saving_between_windows_changes_nothing() -> None:
    case = CASES["dropout and buffers, stale"]
    expected = _finish(case.build()[0], [])
    trainer, _ = case.build()
    windows = []
    for result in trainer.windows():
        windows.append(_window(result))
        random.random()
        np.random.rand()  # noqa: NPY002
        trainer.state_dict()
    final = trainer.state_dict()
    for name, value in expected.final.items():
        assert _bits(final[name]) == _bits(value)
    assert windows == expected.windows
