"""States with changed content and right checksums: refused before anything changes, or as they run.

An optimizer, a scheduler, generators and a module take what they are given without a look, and
fail in the first window afterwards. What is legal goes on, whatever its optimizer keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training_jobs import EXACT, Injected, Job, Noisy, Stream, assert_equal, with_snapshots

from tbptt_ckpt import TBPTT, SnapshotError, TbpttError, TensorSequence, Trainer
from tbptt_ckpt.snapshot.store import SnapshotStore, SnapshotWarning

JOB = Job(num_steps=14, k1=2, k2=4)
Path_ = tuple[Any, ...]


def saved() -> dict[str, Any]:
    trainer, _, _ = JOB.build()
    windows = trainer.windows()
    for _ in range(3):
        next(windows)
    state = copy.deepcopy(trainer.state_dict())
    windows.close()
    return state


def changed(value: Any, path: Path_, change: Callable[[Any], Any]) -> Any:
    """A copy of nested containers, changed in one place; what becomes `...` is left out."""
    if not path:
        return change(value)
    key, *rest = path
    if isinstance(value, dict):
        items = {**value, key: changed(value[key], tuple(rest), change)}
        return {k: v for k, v in items.items() if v is not ...}
    items = list(value)
    items[key] = changed(items[key], tuple(rest), change)
    return type(value)(item for item in items if item is not ...)


def _more(tensor: Tensor) -> Tensor:
    return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)


def _none(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:0]


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


# What Adam finds only where tensors have values: a decay above one, and one that is True.
ONLY_WITH_VALUES = ("type ComplexDouble", "Boolean alpha")
ADAM = ("learning", "optimizer", "state", 1)
GROUP = ("learning", "optimizer", "param_groups", 0)
RECORDS = ("run", "records")
FORGED: list[tuple[Path_, Callable[[Any], Any], str]] = [
    ((*ADAM, "exp_avg"), _more, "optimizer's state .* no step"),
    ((*ADAM, "exp_avg_sq"), to(...), "optimizer's state .* no step .*exp_avg_sq"),
    ((*ADAM, "step"), _none, "optimizer's state .* no step"),
    ((*ADAM, "max_exp_avg_sq"), to("text"), "no step|no state"),
    ((*GROUP, "lr"), to(None), "optimizer's state .* no step"),
    ((*GROUP, "betas"), to((0.9,)), "optimizer's state .* no step"),
    ((*GROUP, "eps"), to(...), "optimizer's state .* no step"),
    (("learning", "scheduler", "step_size"), to("x"), r"\['step_size'\] is 'x', where .* 1"),
    (("learning", "scheduler", "gamma"), to(None), r"\['gamma'\] is None, where .* 0.9"),
    (("learning", "scheduler", "_last_lr", 0), to("x"), r"\['_last_lr'\]\[0\] is 'x'"),
    ((*RECORDS, "random", 0), _more, "random generators"),
    ((*RECORDS, "random", 0), Tensor.double, "random generators"),
    ((*RECORDS, "generators", 0, 0), to(-7), "random generators .*version -7"),
    ((*RECORDS, "generators", 1, "state", "pos"), to(10**12), "random generators"),
    ((*RECORDS, "values", 0), _more, "'calls' held .* where this one holds"),
    ((*RECORDS, "values", 0), Tensor.int, "'calls' held .* where this one holds"),
    ((*RECORDS, "boundaries", 0, "state"), _more, "states kept at steps 4 and 6"),
    ((*RECORDS, "boundaries", 0, "state"), Tensor.int, "states kept at steps 4 and 6"),
    ((*RECORDS, "boundaries", 1, "state"), to("x"), "states kept at steps 4 and 6"),
    ((*RECORDS, "boundaries", 0, "step"), to(5), "kept at step 4 says step 5"),
    ((*RECORDS, "kept", 4), to(...), "it stands at step 6, .* was not kept"),
    ((*RECORDS, "kept", 6), to(...), "it stands at step 6, .* was not kept"),
    ((*RECORDS, "kept"), to({}), "it stands at step 6, .* was not kept"),
    (RECORDS, to(None), "it stands at step 6, .* was not kept"),
    (("run", "returns_pairs", "counting", "unit"), to("x"), r"\['unit'\] is 'x'"),
    (("run", "returns_pairs", "counting", "leaf"), to(-7), r"\['leaf'\] is -7"),
]


@pytest.mark.parametrize(
    ("path", "change", "says"), FORGED, ids=lambda each: str(each) if type(each) is tuple else ""
)
def test_what_the_run_cannot_go_on_with_is_refused_whole(
    path: Path_, change: Callable[[Any], Any], says: str, injected: Injected
) -> None:
    state, (trainer, _, _) = saved(), JOB.build()
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(SnapshotError, match=says):
        trainer.load_state_dict(changed(state, path, change))
    assert_equal(trainer.state_dict(), before, EXACT)
    trainer.load_state_dict(state)
    trainer.train()
    other, _, _ = JOB.build()
    other.train()
    assert_equal(trainer.state_dict()["learning"], other.state_dict()["learning"], EXACT)
    injected("hostile snapshot")


def test_an_older_snapshot_is_tried_in_place_of_a_forged_one(
    tmp_path: Path, injected: Injected
) -> None:
    trainer, _, _ = with_snapshots(JOB, tmp_path)
    windows = trainer.windows()
    for _ in range(3):
        next(windows)
    path, change, says = FORGED[0]
    SnapshotStore(tmp_path).save(6, changed(trainer.state_dict(), path, change))
    windows.close()
    other, _, _ = with_snapshots(JOB, tmp_path)
    with pytest.warns(SnapshotWarning, match=says):
        assert other.resume()
    assert other.num_steps == 4
    injected("hostile snapshot")


def _places(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    yield path, value
    inside: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list | tuple) and len(value) < 10:
        inside = enumerate(value)
    for key, item in inside:
        yield from _places(item, (*path, key))


def _changes(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [_more(value), _none(value), value.double(), value.int(), "x", ...]
    return [None, "x", -7, 10**12, [], {}, 0.5, True, ...]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [101, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_no_change_of_any_place_ends_in_an_error_of_torch_or_python(
    every: int, injected: Injected
) -> None:
    state = saved()
    cases_ = [(path, to) for path, value in _places(state) if path for to in _changes(value)]
    raw = []
    for path, new in cases_[::every]:
        trainer, _, _ = JOB.build()
        try:
            trainer.load_state_dict(changed(copy.deepcopy(state), path, to(new)))
            trainer.train()
        except TbpttError:
            continue
        except Exception as error:
            if not any(text in str(error) for text in ONLY_WITH_VALUES):
                raw.append((path, new, repr(error)))
    assert not raw
    injected("hostile snapshot")


class Remembering(torch.optim.SGD):
    """Keeps numbers, a growing list, a growing tensor and what comes late; looks at values."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("norms", []).append(float(p.grad.norm()))
                row = p.grad.flatten()[:1]
                state["rows"] = torch.cat([state["rows"], row]) if "rows" in state else row.clone()
                if state["count"] >= 2:
                    state["late"] = state.get("late", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p.add_(p.grad, alpha=-float(group["lr"]))


class ScheduleFree(torch.optim.Optimizer):
    """Averages beside the weights, and a group that has numbers of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_sum": 0.0, "k": 0, "is_training": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] = group["weight_sum"] + group["lr"] ** 2
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"], state["v"] = p.clone(), None
                state["v"] = p.grad.square() if state["v"] is None else state["v"] + p.grad**2
                state["z"].addcdiv_(p.grad, state["v"].sqrt() + 1e-8, value=-group["lr"])
                p.lerp_(state["z"], group["lr"] ** 2 / group["weight_sum"])


class WithAttributes(torch.optim.SGD):
    """Needs what it was made with, which no copy of it has."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.rates = [lr, lr / 2]

    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["lr"] = self.rates[0]
        super().step()


def _torchs(name: str, **options: Any) -> Callable[[Any], Any]:
    return lambda params: getattr(torch.optim, name)(params, **{"lr": 0.05, **options})


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    **{
        f"{name} {options or ''}": _torchs(name, **options)
        for name in ("Adam", "ASGD", "Adadelta", "Adagrad", "Adamax", "RAdam", "Rprop")
        for options in ({}, {"foreach": True})
    },
    "Adafactor": _torchs("Adafactor"),
    "AdamW fused": _torchs("AdamW", fused=True),
    "AdamW tensor": _torchs("AdamW", lr=torch.tensor(0.05)),
    "RMSprop": _torchs("RMSprop", momentum=0.9, centered=True),
    "SGD": _torchs("SGD"),
    "SGD momentum": _torchs("SGD", momentum=0.9, nesterov=True),
    "SGD fused": _torchs("SGD", momentum=0.9, fused=True),
    "remembering": lambda params: Remembering(params, lr=0.05),
    "schedule-free": lambda params: ScheduleFree(params, 0.05),
    "attributes": lambda params: WithAttributes(params, 0.05),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda _: None,
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=30),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "multi": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Growing(Noisy):
    """A state that grows with time, and a buffer that is set by a step and then grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", None)

    def forward(self, x: Tensor, state: Any) -> Any:
        h, past = (None, None) if state is None else state
        y, h = super().forward(x, h)
        past = h.unsqueeze(1) if past is None else torch.cat([past, h.unsqueeze(1)], 1)
        grown = torch.ones(1, dtype=torch.float64)
        self.seen = grown if self.seen is None else torch.cat([self.seen, grown])
        return y + past.mean(), (h, past)


def _assert_goes_on(
    optimizer: Callable[[Any], Any],
    scheduler: Callable[[Any], Any] = SCHEDULERS["none"],
    module: Callable[[], nn.Module] = Noisy,
    windows: int = 3,
    **options: Any,
) -> None:
    def build() -> Trainer:
        torch.manual_seed(3)
        made = module().double()
        by_its = optimizer(made.parameters())
        loss = nn.functional.mse_loss
        engine = TBPTT(made, loss, 2, 4, by_its, scheduler=scheduler(by_its), **options)
        torch.manual_seed(4)
        return Trainer(engine, TensorSequence(*cases.random_data(13)))

    trainer, other = build(), build()
    rest = trainer.windows()
    for _ in range(windows):
        next(rest)
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    random = trainer.state_dict()["random"]
    other.train()
    torch.set_rng_state(random["torch"])
    list(rest)
    for name in ("learning", "run"):
        assert_equal(other.state_dict()[name], trainer.state_dict()[name], EXACT, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name: str) -> None:
    _assert_goes_on(OPTIMIZERS[name], strategy="retain")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_goes_on(name: str) -> None:
    _assert_goes_on(OPTIMIZERS["SGD momentum"], SCHEDULERS[name], strategy="retain")


@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("windows", [1, 3, 6])
def test_states_and_buffers_that_grow_go_on(overlap: str, windows: int) -> None:
    options = {"overlap": overlap, "strategy": "retain"}
    _assert_goes_on(OPTIMIZERS["Adam "], module=Growing, windows=windows, **options)


def test_an_optimizer_without_a_state_yet_goes_on() -> None:
    trainer, _, _ = JOB.build()
    other, _, _ = JOB.build()
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    other.train()
    trainer, _, _ = JOB.build()
    trainer.train()
    assert_equal(other.state_dict()["learning"], trainer.state_dict()["learning"], EXACT)


@pytest.mark.parametrize("k2", [None, 4])
@pytest.mark.parametrize("overlap", ["refresh", "stale"])
@pytest.mark.parametrize("windows", [1, 3])
def test_a_stream_whose_end_is_not_known_goes_on(
    k2: int | None, overlap: str, windows: int
) -> None:
    def build() -> Trainer:
        job = Job(k1=2, k2=k2, engine={"overlap": overlap})
        return Trainer(job.build()[0].tbptt, Stream(9))

    trainer, other = build(), build()
    rest = trainer.windows()
    for _ in range(windows):
        next(rest)
    state = copy.deepcopy(trainer.state_dict())
    list(rest)
    other.load_state_dict(state)
    other.train()
    assert_equal(other.state_dict()["learning"], trainer.state_dict()["learning"], EXACT)
