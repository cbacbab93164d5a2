"""`k2="auto"` on two ranks, which choose together, against one process with all their lanes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import gradients, mean_loss, random_data, random_state, relative_error, tanh_cell
from joined_ranks import LANES, LANES_OF, held, in_copies, local, sharded
from runs_of_ranks import check_goes_on
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tbptt_ckpt import TBPTT, TensorSequence
from tbptt_ckpt.engine import reach_rule

STEPS, K1, MAX_K2, LR = 64, 3, 18, 0.03
STEPS_OF = ((STEPS, 46), (25, 25))  # of two sequences, by rank; all end with a short window

Case = tuple[Any, dict[str, Any]]
BY_DEFAULT: list[Case] = [
    (sharded, {"strategy": "uniform:{}", "accumulate": 2}),
]
AUDITED: list[Case] = [
    (wrap, {"strategy": "uniform:{}", "overlap": overlap, "accumulate": windows, **more})
    for wrap, overlap, windows, more in itertools.product(
        (nn.Identity, DistributedDataParallel, sharded, in_copies),
        ("refresh", "stale"),
        (1, 3),
        ({}, {"k2_window_tolerance": 0.3}),
    )
]


def sequence_of(lanes: slice, steps: int) -> tuple[TensorSequence, Tensor]:
    """Targets are inputs of some steps before, and noise; the last lane has none at times."""
    inputs, noise = random_data(STEPS, lanes=LANES)
    targets = 0.2 * noise
    for step in range(5, STEPS):
        delay = 1 if step < STEPS // 2 else 5
        targets[step, :, :2] += inputs[step - delay]
    weight = torch.ones(STEPS, LANES, dtype=torch.float64)
    weight[24:36, 3] = weight[STEPS_OF[0][1] :, 3] = 0
    data = (each[:steps, lanes] for each in (inputs, targets))
    found = TensorSequence(*data, weight=weight[:steps, lanes])
    return found, random_state(lanes=LANES)[lanes]


def engine(module: nn.Module, has_units: bool, **how: Any) -> TBPTT:
    """An engine; weights that are sharded have no units of steps."""
    weights = module.parameters()
    optimizer = torch.optim.Adam(weights, LR) if has_units else torch.optim.SGD(weights, 0.3)
    given = {"max_k2": MAX_K2, "k2_tolerance": 0.05, **how}
    return TBPTT(module, mean_loss, K1, "auto", optimizer, **given)


def check_case(rank: int, wrap: Any, how: dict[str, Any]) -> list[int]:
    """Two sequences, one after the other; the reaches that were chosen."""
    module, found = tanh_cell(), list[int]()
    joined = copy.deepcopy(module)
    weights, alone = list(joined.parameters()), {**how, "strategy": "uniform:3"}
    has_units = wrap not in (sharded, in_copies)
    expected = engine(joined, has_units, **alone)
    module = module if wrap is nn.Identity else wrap(module)
    here = engine(
        module, has_units, ranks="all", **{**how, "strategy": how["strategy"].format(2 + rank)}
    )
    own = list(module.parameters())
    for steps in STEPS_OF:
        windows = here.windows(*sequence_of(LANES_OF[rank], steps[rank]))
        for other in expected.windows(*sequence_of(slice(None), steps[0])):
            if (window := next(windows, None)) is None:
                continue
            where, one, its = (rank, how, other), window.chosen_k2, other.chosen_k2
            assert (one.k2, one.is_audit) == (its.k2, its.is_audit), where
            assert window.start == other.start, where
            assert window.loss_value == pytest.approx(other.loss_value, rel=1e-12), where
            for name in ("missing", "audited_error"):
                pair = getattr(one, name) or 0.0, getattr(its, name) or 0.0
                assert pair[0] == pytest.approx(pair[1], rel=1e-6, abs=1e-7), where
            assert window.updated == other.updated, where
            if window.updated:
                wanted = held(gradients(weights), own)
                assert relative_error(local(gradients(own)), wanted) <= 1e-12, where
            found += [] if one.is_audit else [one.k2]
        assert next(windows, None) is None
        assert relative_error(local(own), held(weights, own)) <= 1e-12, how
    states = [each.parts.truncation.state_dict()["audits"] for each in (here, expected)]
    assert states[0]["audits"] == states[1]["audits"]
    assert torch.allclose(states[0]["means"], states[1]["means"], rtol=1e-9, atol=1e-12)
    return found


def check_auto_k2(path: Path, rank: int, count: int, cases: list[Case] = BY_DEFAULT) -> None:
    with pytest.MonkeyPatch.context() as patch:  # choices follow each other sooner
        patch.setattr(reach_rule, "_FIRST", 4)
        patch.setattr(reach_rule, "_MOST", 3)
        for wrap, how in cases:
            assert len(set(check_case(rank, wrap, how))) > 1, how
        patch.setattr(reach_rule, "_FIRST", 2)
        check_goes_on(path, ("a reach by audits",), rank, count)
