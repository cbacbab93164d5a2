"""What a kept state takes; the device "meta", which has storages, stands for an accelerator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tbptt_ckpt import TBPTT, TensorSequence, profile_window
from tbptt_ckpt.budget.kept_states import kept_bytes
from tbptt_ckpt.budget.meter import WindowMeter
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.ambient import Ambient, AmbientState

META = torch.device("meta")


def ambient() -> AmbientState:
    return Ambient((), ()).capture()


@pytest.mark.parametrize(("where", "expected"), [("cpu", set()), ("meta", {"whole"})])
def test_on_an_accelerator_a_state_is_copied_where_it_is_part_of_more(
    where: str, expected: set[str]
) -> None:
    """On the CPU always: it would split the heap."""
    rows = torch.zeros(3, 5, device=where)
    state = {
        "whole": torch.zeros(2, 5, device=where),
        "part": rows[1],
        "spread": rows[:1].expand(4, 5),
    }
    kept = Boundary(3, state, ambient()).copied().state
    assert {name for name in state if kept[name] is state[name]} == expected
    assert tensor_bytes(kept) == (2 + 1 + 4) * 5 * 4  # nothing holds what it was part of


def test_bytes_of_the_host_are_none_of_a_devices() -> None:
    """Generators' states are the host's, as are an optimizer's counters."""
    state, before = torch.zeros(2, 5, device=META), ambient()
    later = replace(before, cpu_random=before.cpu_random.clone())
    boundaries = Boundary(2, state, later), Boundary(1, state.clone(), before)
    random_bytes = before.cpu_random.nbytes
    assert kept_bytes(*boundaries, META) == (40, 0, 0)
    assert kept_bytes(*boundaries, torch.device("cpu")) == (random_bytes, random_bytes, 0)
    module = nn.Linear(3, 5, device=META)
    optimizer = torch.optim.Adam(module.parameters())
    for weight in module.parameters():
        moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = {"step": torch.zeros(()), **moments}
    assert tensor_bytes(module, optimizer) == 3 * 80 + 2 * 4
    assert tensor_bytes(module, optimizer, device=META) == 3 * 80
    with WindowMeter(torch.device("cpu"), (module, optimizer), 7) as meter:
        assert meter.base_bytes == 2 * 4 + 7


def test_what_lies_elsewhere_is_in_no_budget_and_no_profile() -> None:
    module, loss_fn, data = nn.GRU(3, 5), nn.functional.mse_loss, torch.randn(2, 8, 2, 5)
    inputs, targets = data[0, ..., :3], data[1]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.state["elsewhere"] = {"sums": torch.zeros(1 << 30, device=META)}
    tbptt = TBPTT(module, loss_fn, 4, 8, optimizer, memory_budget="1MiB", measure_memory=True)
    windows = list(tbptt.windows(TensorSequence(inputs, targets)))
    assert all((window.peak_bytes or 0) < 1 << 20 for window in windows)
    how = {"k1": 4, "k2": 8, "optimizer": optimizer, "repeats": 1}
    row = profile_window(module, loss_fn, inputs, targets, **how)
    assert (row.peak_bytes or 0) < 1 << 20
