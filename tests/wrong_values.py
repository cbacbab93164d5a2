"""Public callables with arguments that work, and values that do not."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from stateful_modules import Attribute, stateful
from torch import nn

from tbptt_ckpt import (
    TBPTT,
    ArraySequence,
    Batches,
    BurnIn,
    Costs,
    LaneSource,
    NonFinite,
    OutOfMemory,
    Recurrent,
    Revolve,
    SharedState,
    Snapshots,
    TensorSequence,
    Trainer,
    Uniform,
    Validation,
    evaluate,
    measure_costs,
    peak_memory,
    plan,
    profile_strategies,
    profile_window,
    run_window,
    simulate,
    tbptt_windows,
    unroll,
    verify,
)
from tbptt_ckpt.data import lane_range, map_file, own_lanes
from tbptt_ckpt.engine import Border, Decay, Ranks
from tbptt_ckpt.executor import CheckpointExecutor, ReplayExecutor
from tbptt_ckpt.memory import (
    RssSampler,
    can_measure,
    format_bytes,
    free_memory,
    parse_bytes,
    tensor_bytes,
)
from tbptt_ckpt.module import lifted, recurrent_parts
from tbptt_ckpt.profiling import (
    Configuration,
    MeasuredReach,
    MemoryReport,
    StrategyReport,
    Workload,
    measure_reach,
    pareto_front,
    with_baselines,
)
from tbptt_ckpt.schedule import (
    Curve,
    Differentiate,
    FixedBytes,
    Plan,
    Roulette,
    Schedule,
    fitted_roulette,
    parse_strategy,
    parse_truncation,
    roulette_price,
)
from tbptt_ckpt.snapshot import SnapshotStore
from tbptt_ckpt.time_batching import TimeBatching
from tbptt_ckpt.trainer import JsonLines

STEPS, LANES, WIDTH = 4, 2, 3


class Hostile:
    """Whatever is asked of it is an error."""

    def _raise(self, *_: object) -> Any:
        raise ZeroDivisionError("asked")

    __repr__ = __len__ = __iter__ = __eq__ = __bool__ = __float__ = __index__ = _raise
    __hash__ = object.__hash__


# Each text makes a new value.
VALUES = (
    *("None", "True", "False", "0", "1", "-1", "3", "10**30", "-10**30", "10**5000", "0.0", "0.5"),
    *("-0.5", "1.0", "float('inf')", "float('-inf')", "float('nan')", "1j", "''", "'x'", "'auto'"),
    *("'5'", "'\\0'", "'\\ud800'", "'512MiB'", "'cuda:99'", "b''", "b'x'", "[]", "[1]", "[None]"),
    *("['x']", "()", "(1,)", "(0, -1)", "{}", "{'a': 1}", "{1: 2}", "set()", "{1}", "range(3)"),
    *("range(0)", "iter([])", "iter([1])", "object()", "object", "int", "len", "lambda: None"),
    *("lambda *_: None", "torch.zeros(())", "torch.zeros(3)", "torch.zeros(0)", "torch.ones(2, 3)"),
    *("torch.tensor([True, False])", "torch.ones(3, dtype=torch.int64)", "torch.Tensor"),
    *("torch.ones(3, dtype=torch.complex64)", "torch.ones(3, device='meta')", "nn.Linear(2, 2)"),
    *("torch.eye(3).to_sparse()", "nn.Module", "nn.Parameter(torch.ones(3))", "torch.float32"),
    *("torch.int64", "torch.device('meta')", "np.float32(1)", "np.int64(3)", "np.zeros(3)"),
    *("np.array([])", "np.array('x')", "np.array([None])", "Path('x')", "Path('/proc/nowhere')"),
    *("io.BytesIO()", "...", "NotImplemented", "ValueError('x')", "Fraction(1, 2)", "Decimal(1)"),
    *(
        "'uniform:' + '9' * 5000",
        "'9' * 5000",
        "timedelta(1)",
        "type('Own', (), {})()",
        "Hostile()",
    ),
)


def value_of(text: str) -> Any:
    """A new one."""
    known = {"Path": Path, "io": io, "np": np, "torch": torch, "nn": nn, "Hostile": Hostile}
    known |= {"Fraction": Fraction, "Decimal": Decimal, "timedelta": timedelta}
    return eval(text, known)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.GRUCell(WIDTH, WIDTH)


def work() -> dict[str, Any]:
    inputs = torch.ones(STEPS, LANES, WIDTH)
    return {
        "module": module(),
        "loss_fn": F.mse_loss,
        "inputs": inputs,
        "targets": inputs + 1,
        "init_state": torch.zeros(LANES, WIDTH),
    }


def decay() -> Decay:
    return Decay((Border(1, 1.0, 1e-2), Border(2, None, 0.0)), 1)


def sequence() -> TensorSequence:
    return TensorSequence(torch.ones(STEPS, LANES, WIDTH), torch.ones(STEPS, LANES, WIDTH))


def alone() -> TensorSequence:
    return TensorSequence(torch.ones(STEPS, WIDTH), torch.ones(STEPS, WIDTH))


def curve() -> Curve:
    return Curve(((1, 10.0), (2, 20.0)))


def costs(**further: Any) -> Costs:
    known = {name: curve() for name in ("leaf_bytes", "leaf_seconds", "advance_bytes")}
    return Costs(**{"state_bytes": 8, "advance_seconds": curve(), **known, **further})


def engine(**further: Any) -> TBPTT:
    cell = further.pop("module", None) or module()
    learns = isinstance(cell, nn.GRUCell) and "optimizer" not in further
    known = {"loss_fn": F.mse_loss, "k1": 2, "k2": 4, "strategy": "sqrt"}
    known["optimizer"] = torch.optim.SGD(cell.parameters(), 0.1) if learns else None
    return TBPTT(cell, **{**known, **further})


def use(made: TBPTT) -> Any:
    return made.train(sequence(), torch.zeros(LANES, WIDTH))


def read(made: Any) -> Any:
    return made.read(0, 2)


Call = tuple[Callable[..., Any], dict[str, Any]]


def _on(make: Callable[..., Any], use: Callable[[Any], Any], **given: Any) -> Call:
    """What is made with the arguments is used too."""

    def call(**arguments: Any) -> Any:
        return use(make(**arguments))

    call.__wrapped__ = make
    return call, given


def report() -> MemoryReport:
    return Configuration(strategy="sqrt", k1=2, k2=4).report(status="failed")


def saved(folder: Path) -> Trainer:
    snapshots = Snapshots(directory=mkdtemp(dir=folder))
    made = Trainer(engine(), sequence(), snapshots=snapshots)
    made.train()
    return made


def written(folder: Path, rows: Any) -> Path:
    rows.tofile(folder / "rows")
    return folder / "rows"


def calls(folder: Path) -> dict[str, Callable[[], Call]]:
    """Public callables by name, made with arguments that work."""
    rows = np.ones((STEPS, WIDTH))
    return {
        "TBPTT": lambda: _on(
            TBPTT, use, module=module(), loss_fn=F.mse_loss, k1=2, k2=4, strategy="sqrt"
        ),
        "TBPTT.auto": lambda: _on(
            *(TBPTT, use),
            **{"module": module(), "loss_fn": F.mse_loss, "k1": 2, "k2": "auto", "max_k2": 4},
            **{"k2_tolerance": 0.5, "k2_window_tolerance": 0.5, "strategy": "sqrt"},
        ),
        "Batches": lambda: _on(
            Batches, list, loader=[(torch.ones(LANES, STEPS, WIDTH),) * 2], time_dim=1, seed=0
        ),
        "TBPTT.train": lambda: (engine().train, {"sequence": sequence(), "init_state": None}),
        "TBPTT.evaluate": lambda: (engine().evaluate, {"sequence": sequence(), "segment_steps": 2}),
        "run_window": lambda: (run_window, {**work(), "strategy": "sqrt"}),
        "Recurrent": lambda: (
            Recurrent,
            {"transition": nn.LSTMCell(2, 3), "encode": nn.Linear(2, 2), "readout": None}
            | {"per_step": True},
        ),
        "unroll": lambda: (
            unroll,
            {k: v for k, v in work().items() if k not in ("loss_fn", "targets")},
        ),
        "verify": lambda: (verify, {**work(), "strategy": "sqrt"}),
        "Decay.errors": lambda: (decay().errors, {"every": 1}),
        "MeasuredReach.errors": lambda: (
            MeasuredReach(k1=1, k2=2, decays=(decay(),)).errors,
            {"every": 1},
        ),
        "Decay.reach": lambda: (decay().reach, {"tolerance": 1e-3}),
        "evaluate": lambda: (
            evaluate,
            {"module": module(), "loss_fn": F.mse_loss, "sequence": sequence()},
        ),
        "recurrent_parts": lambda: (
            recurrent_parts,
            {"module": module(), "example": (torch.ones(LANES, WIDTH), torch.ones(LANES, WIDTH))},
        ),
        "lifted": lambda: (
            lifted,
            {"module": stateful(Attribute).float(), "inputs": torch.ones(LANES, 2), "leave": ()},
        ),
        "measure_costs": lambda: (measure_costs, {**work(), "max_seconds": 0.01}),
        "SharedState": lambda: _on(
            SharedState,
            lambda made: engine().train(sequence(), made),
            state=torch.zeros(1, WIDTH),
            lanes=LANES,
        ),
        "MeasuredReach.reach": lambda: (
            MeasuredReach(k1=1, k2=2, decays=(decay(),)).reach,
            {"tolerance": 1e-3},
        ),
        "measure_reach": lambda: (
            measure_reach,
            {**work(), "k1": 2, "k2": 4, "tolerances": (0.1,), "windows": 1},
        ),
        "profile_window": lambda: (profile_window, {**work(), "k1": 2, "k2": 4, "repeats": 1}),
        "profile_strategies": lambda: (
            profile_strategies,
            {**work(), "k1": 2, "k2": 4, "repeats": 1, "strategies": ["sqrt"]},
        ),
        "Configuration": lambda: (Configuration, {"strategy": "sqrt", "k1": 2, "k2": 4}),
        "with_baselines": lambda: (
            with_baselines,
            {"configurations": [Configuration(strategy="sqrt", k1=2, k2=4)]},
        ),
        "pareto_front": lambda: (pareto_front, {"rows": ()}),
        "Workload": lambda: (
            Workload,
            {"module": module(), "loss_fn": F.mse_loss, "source": sequence()},
        ),
        "ArraySequence": lambda: _on(ArraySequence, read, inputs=rows, targets=rows),
        "TensorSequence": lambda: _on(TensorSequence, read, inputs=rows, targets=rows),
        "LaneSource": lambda: _on(LaneSource, read, sequences=[alone(), alone()], lanes=2),
        "lane_range": lambda: (lane_range, {"lanes": 2}),
        "own_lanes": lambda: (own_lanes, {"source": sequence(), "rank": 0, "ranks": 1}),
        "BurnIn": lambda: _on(BurnIn, read, source=sequence(), num_steps=1),
        "map_file": lambda: (
            map_file,
            {"path": written(folder, rows), "dtype": "f8", "step_shape": (WIDTH,)},
        ),
        "Costs": lambda: _on(Costs, lambda made: plan(4, made), **vars_of(costs())),
        "Costs.from_dict": lambda: (Costs.from_dict, {"plain": costs().to_dict()}),
        "Plan.from_dict": lambda: (Plan.from_dict, {"plain": plan(4, costs()).to_dict()}),
        "MemoryReport.from_dict": lambda: (MemoryReport.from_dict, {"plain": report().to_dict()}),
        "MemoryReport.from_json": lambda: (MemoryReport.from_json, {"text": report().to_json()}),
        "StrategyReport.from_dict": lambda: (StrategyReport.from_dict, {"plain": {"rows": []}}),
        "StrategyReport.from_json": lambda: (StrategyReport.from_json, {"text": '{"rows": []}'}),
        "FixedBytes": lambda: _on(FixedBytes, lambda made: plan(4, costs(fixed=made))),
        "Curve": lambda: (Curve, {"points": ((1, 10.0), (2, 20.0))}),
        "Curve.linear": lambda: (Curve.linear, {"fixed": 1.0, "per_step": 2.0}),
        "Curve.through": lambda: (Curve.through, {"points": [(1, 1.0)]}),
        "Uniform": lambda: (Uniform, {"leaf_steps": 2}),
        "Revolve": lambda: (Revolve, {"num_states": 2}),
        "Roulette": lambda: _on(Roulette, lambda made: use(engine(truncation=made)), survival=0.5),
        "Ranks": lambda: (Ranks, {"check_every": 1}),
        "roulette_price": lambda: (
            roulette_price,
            {"roulette": Roulette(), "errors": [0.5, 0.1], "noise": 1.0},
        ),
        "fitted_roulette": lambda: (fitted_roulette, {"errors": [0.5, 0.1], "every": 2}),
        "parse_truncation": lambda: (parse_truncation, {"truncation": "roulette"}),
        "Schedule": lambda: _on(Schedule, list, make_actions=lambda: iter(()), length=0),
        "parse_strategy": lambda: (parse_strategy, {"strategy": "sqrt"}),
        "simulate": lambda: (simulate, {"schedule": [Differentiate(0, 4)], "costs": costs()}),
        "tbptt_windows": lambda: (tbptt_windows, {"num_steps": 4, "k1": 2, "k2": 4}),
        "plan": lambda: (plan, {"num_steps": 4, "costs": costs()}),
        "CheckpointExecutor": lambda: _on(
            CheckpointExecutor, lambda made: use(engine(executor=made))
        ),
        "ReplayExecutor": lambda: _on(ReplayExecutor, lambda made: use(engine(executor=made))),
        "TimeBatching": lambda: (TimeBatching, {}),
        "peak_memory": lambda: _on(
            peak_memory, lambda made: made.__enter__().__exit__(None, None, None)
        ),
        "can_measure": lambda: (can_measure, {}),
        "format_bytes": lambda: (format_bytes, {"num_bytes": 1.0}),
        "free_memory": lambda: (free_memory, {}),
        "parse_bytes": lambda: (parse_bytes, {"value": "1MiB"}),
        "tensor_bytes": lambda: (lambda tree: tensor_bytes(tree), {"tree": torch.ones(3)}),
        "RssSampler": lambda: (RssSampler, {}),
        "SnapshotStore": lambda: (SnapshotStore, {"directory": folder / "store"}),
        "Trainer": lambda: _on(
            Trainer, lambda made: made.train(), tbptt=engine(), source=sequence(), max_steps=STEPS
        ),
        "Trainer.resume": lambda: (saved(folder).resume, {}),
        "Trainer.load_state_dict": lambda: (
            Trainer(engine(), sequence()).load_state_dict,
            {"state": Trainer(engine(), sequence()).state_dict()},
        ),
        "Validation": lambda: _on(
            Validation,
            lambda made: Trainer(engine(), sequence(), validation=made).train(),
            source=sequence(),
            every_windows=1,
        ),
        "Snapshots": lambda: _on(
            Snapshots,
            lambda made: Trainer(engine(), sequence(), snapshots=made),
            directory=folder / "run",
        ),
        "NonFinite": lambda: (NonFinite, {}),
        "OutOfMemory": lambda: (OutOfMemory, {}),
        "JsonLines": lambda: (JsonLines, {"path": folder / "log"}),
    }


def vars_of(instance: Any) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in instance.__dataclass_fields__}
