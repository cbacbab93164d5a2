"""Measured costs: against leaves run by hand, real optimizers, and nothing left behind."""

from __future__ import annotations

import copy
import importlib
import logging

import numpy as np
import pytest
import torch
from grids import covering
from torch import nn

from tbptt_ckpt import ArgumentError, Costs, measure_costs
from tbptt_ckpt.budget.update_bytes import update_bytes
from tbptt_ckpt.memory.allocators import CpuSource
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.schedule import Curve
from tbptt_ckpt.schedule.curves import bounding_curve, seconds_curve
from tbptt_ckpt.updates.updater import Updater

pytestmark = pytest.mark.times_the_module


LANES, WIDTH, STEPS = 4, 48, 48
RANDOM_STATE_BYTES = 5056


class Loop(nn.Module):
    """A cell and a readout, with dropout or a running mean where asked for."""

    def __init__(self, *, dropout=0.0, counts=False):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.dropout = nn.Dropout(dropout)
        self.counts = counts
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x, state):
        h, c = self.cell(x, state)
        if self.counts:
            self.seen += h.detach().mean(0)
        return self.out(self.dropout(h)), (h, c)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x, state):
        h, state = self.lstm(x, state)
        return self.out(h), state


def loss_fn(logits, targets):
    return nn.functional.cross_entropy(logits.reshape(-1, 10), targets.reshape(-1))


def data(num_steps=STEPS):
    torch.manual_seed(1)
    return torch.randn(num_steps, LANES, WIDTH), torch.randint(0, 10, (num_steps, LANES))


def zeros(*shape):
    return torch.zeros(*shape, LANES, WIDTH), torch.zeros(*shape, LANES, WIDTH)


CASES = {"loop": (Loop, True, ()), "fused": (Fused, False, (1,))}


def costs_of(module, **options):
    inputs, targets = data()
    return measure_costs(module, loss_fn, inputs, targets, **options)


def leaf_by_hand(module, per_step, inputs, targets, state, grads, loss_fn=loss_fn):
    """Peak of one leaf between its neighbours: gradients exist, and some of its end's state."""

    def run():
        leaves = [each.detach().requires_grad_() for each in state]
        with torch.enable_grad():
            if per_step:
                loss, at = torch.zeros(()), tuple(leaves)
                for x, target in zip(inputs.unbind(), targets.unbind(), strict=True):
                    y, at = module(x, at)
                    loss = loss + loss_fn(y, target)
            else:
                y, at = module(inputs, tuple(leaves))
                loss = loss_fn(y, targets) * len(inputs)
        torch.autograd.backward([loss, *at], [torch.ones(()), *grads])

    run()
    with peak_memory(rss=False) as meter:
        run()
    return meter.peak_bytes


@covering(together=1, case=CASES, steps=[1, 5, 13, 40])
def test_a_leaf_takes_what_it_takes_when_run_by_hand(case, steps):
    kind, per_step, shape = CASES[case]
    module, (inputs, targets) = kind(), data()
    costs = costs_of(module, init_state=zeros(*shape), per_step=per_step)
    found = leaf_by_hand(
        module, per_step, inputs[:steps], targets[:steps], zeros(*shape), zeros(*shape)
    )
    assert costs.leaf_bytes(steps) == pytest.approx(found, rel=0.03, abs=8192)


def test_long_leaves_are_predicted_where_there_is_little_time(monkeypatch):
    """A line through 5 and 8 steps would be 3.5 % too low."""
    module_of_lengths = importlib.import_module("tbptt_ckpt.budget.calibrate")
    monkeypatch.setattr(module_of_lengths, "_METERED_SHARE", 0.0)
    torch.manual_seed(0)
    module, steps = nn.LSTM(64, 64, 3), 200
    inputs, targets = torch.randn(steps, 8, 64), torch.randn(steps, 8, 64)
    state = torch.zeros(3, 8, 64), torch.zeros(3, 8, 64)
    costs = measure_costs(module, nn.functional.mse_loss, inputs, targets, state, max_seconds=5)
    for length in (100, 200):
        found = leaf_by_hand(
            module, False, inputs[:length], targets[:length], state, state, nn.functional.mse_loss
        )
        assert costs.leaf_bytes(length) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("case", CASES)
def test_the_leaf_that_comes_first_takes_less_by_gradients_that_do_not_exist(case):
    kind, per_step, shape = CASES[case]
    module, (inputs, targets) = kind(), data()
    costs = costs_of(module, init_state=zeros(*shape), per_step=per_step)
    module.zero_grad()
    with peak_memory(rss=False) as meter:
        loss, state = 0.0, tuple(each.requires_grad_() for each in zeros(*shape))
        if per_step:
            for x, target in zip(inputs.unbind(), targets.unbind(), strict=True):
                y, state = module(x, state)
                loss = loss + loss_fn(y, target)
        else:
            loss = loss_fn(module(inputs, state)[0], targets) * STEPS
        loss.backward()
    states = costs.state_bytes  # the gradient of a state, counted in the fixed part
    expected = meter.peak_bytes - tensor_bytes([p.grad for p in module.parameters()]) - states
    assert costs.last_leaf_bytes(STEPS) == pytest.approx(expected, rel=0.03, abs=4096 + states)
    assert costs.last_leaf_bytes(STEPS) < costs.leaf_bytes(STEPS)


def test_fixed_parts_and_states_are_exact():
    module = Loop()
    costs = costs_of(module, init_state=zeros())
    assert costs.state_bytes == 2 * LANES * WIDTH * 4
    assert costs.fixed.weights == tensor_bytes(module)
    assert costs.fixed.gradients == sum(p.nbytes for p in module.parameters())
    assert costs.fixed.step_inputs == LANES * (WIDTH * 4 + 8)


def test_generators_and_buffers_count_where_steps_change_them():
    plain = costs_of(Loop(), init_state=zeros()).state_bytes
    assert costs_of(Loop(dropout=0.5), init_state=zeros()).state_bytes == (
        plain + RANDOM_STATE_BYTES
    )
    assert costs_of(Loop(counts=True), init_state=zeros()).state_bytes == plain + 2 * WIDTH * 4


def test_weights_gradients_buffers_and_random_state_are_left_alone():
    module = Loop(dropout=0.5, counts=True)
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    grads = [parameter.grad for parameter in module.parameters()]
    before = copy.deepcopy((module.state_dict(), grads, optimizer.state_dict()))
    inputs, targets = data()
    random_state = torch.get_rng_state()
    measure_costs(module, loss_fn, inputs, targets, zeros(), optimizer=optimizer)
    after = (module.state_dict(), grads, optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(p.grad is grad for p, grad in zip(module.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_failing_module_leaves_gradients_where_they_were():
    class Failing(Loop):
        def forward(self, x, state):
            if not torch.is_grad_enabled():
                return super().forward(x, state)
            raise RuntimeError("no")

    module = Failing()
    grad = module.out.bias.grad = torch.ones(10)
    with pytest.raises(RuntimeError, match="no"):
        costs_of(module, init_state=zeros())
    assert module.out.bias.grad is grad


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "Adam, all at once": lambda p: torch.optim.Adam(p, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_takes_what_was_foreseen(name, exists):
    module = Loop()
    optimizer = OPTIMIZERS[name](module.parameters())
    loss = torch.zeros(())

    def update():
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        with peak_memory(held=(), rss=False) as meter:
            Updater(optimizer, (), None, None, None).step(loss)
        return meter

    if exists:
        update()
    foreseen = update_bytes(Updater(optimizer, (), None, None, None))
    meter = update()
    assert foreseen.state == tensor_bytes(optimizer)
    transient = meter.peak_bytes - (0 if exists else foreseen.state)
    assert transient <= foreseen.transient + 64
    later = update()
    assert later.peak_bytes <= foreseen.transient + 64
    assert foreseen.transient <= 1.05 * max(transient, later.peak_bytes) + 64


def rounding_to_512_bytes(report):
    """What an accelerator's allocator reports in the place of the CPU's."""

    def rounded(self, events):
        seconds, deltas = events
        report(self, (seconds, np.sign(deltas) * -(-abs(deltas) // 512) * 512))

    return rounded


@pytest.mark.parametrize("shape", [(400_000,), (300_000, 2), (3000, 200), (200, 4096)])
@pytest.mark.parametrize("name", ["Adam", "momentum"])
def test_no_rounding_of_an_allocator_hides_an_optimizers_state(name, shape, monkeypatch):
    """Few rows of a narrow weight take one block of 512 bytes, and twice as many no more."""
    monkeypatch.setattr(CpuSource, "_report", rounding_to_512_bytes(CpuSource._report))
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = OPTIMIZERS[name]([weight])
    foreseen = update_bytes(Updater(optimizer, (), None, None, None))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert foreseen.state == pytest.approx(tensor_bytes(optimizer), abs=1024)


def test_a_foreign_optimizer_is_taken_to_be_like_adam():
    class Foreign(torch.optim.Adam):
        def __init__(self, params, secret):
            super().__init__(params)

    module = Loop()
    foreseen = update_bytes(Updater(Foreign(module.parameters(), 1), (), None, None, None))
    assert foreseen.state == 2 * sum(p.nbytes for p in module.parameters())


def test_no_optimizer_takes_nothing():
    costs = costs_of(Loop(), init_state=zeros())
    assert (costs.fixed.optimizer, costs.update_bytes) == (0, 0)


def test_host_memory_of_a_cell_loop_is_kilobytes_a_step_and_of_a_fused_layer_is_not():
    assert 8 * 1024 < costs_of(Loop(), init_state=zeros()).host_step_bytes < 40 * 1024
    assert costs_of(Fused(), init_state=zeros(1), per_step=False).host_step_bytes < 1024


def test_autocast_changes_what_a_leaf_takes():
    plain = costs_of(Loop(), init_state=zeros())
    mixed = costs_of(Loop(), init_state=zeros(), autocast_dtype=torch.bfloat16)
    assert mixed.leaf_bytes.slope < 0.9 * plain.leaf_bytes.slope


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_few_steps_are_enough(num_steps):
    costs = measure_costs(Loop(), loss_fn, *data(num_steps))
    assert costs.leaf_bytes(1) > 0


def test_masked_and_absent_targets_can_be_measured():
    def masked(logits, targets):
        return 0.0 * logits.sum(), 0.0

    assert measure_costs(Loop(), masked, *data()).leaf_bytes(4) > 0
    inputs, _ = data()
    assert measure_costs(Loop(), loss_fn, inputs, None).leaf_bytes(4) > 0


def test_memory_bounds_what_is_run():
    module = Loop()
    inputs, targets = data()
    one = measure_costs(module, loss_fn, inputs[:1], targets[:1], zeros())
    room = round(one.leaf_bytes(1) + one.fixed.gradients + 8 * one.state_bytes)
    with peak_memory(rss=False) as meter:
        few = measure_costs(module, loss_fn, inputs, targets, zeros(), memory=room)
    assert few.leaf_bytes.points[-1][0] < 8
    assert meter.peak_bytes < 1.1 * room


def test_a_disturbed_sample_makes_no_step_free():
    times = [(1, 0.1), (2, 0.9), (3, 0.3), (5, 0.5), (8, 0.7)]
    curve = seconds_curve(times)
    assert [curve(steps) for steps in (1, 2, 3, 5, 8)] == [0.1, 0.3, 0.3, 0.5, 0.7]
    curve = seconds_curve([(1, 0.5), (2, 0.2), (4, 9.0), (8, 0.8)])
    assert curve(16) == pytest.approx(1.6)


def test_no_longer_run_is_taken_to_be_many_times_slower():
    curve = seconds_curve([(1, 0.1), (4, 4.0), (16, 16.0)])
    assert [curve(1), curve(4), curve(16)] == pytest.approx([0.1, 0.64, 2.56])
    slower = ((1, 0.1), (4, 0.4), (16, 2.2))
    assert seconds_curve(slower) == Curve(slower)


def test_bytes_that_wiggle_are_bounded_from_above_and_bent_ones_are_not():
    wiggle = [(1, 100), (2, 150), (3, 203), (5, 300), (8, 453), (13, 700)]
    scaled = [(steps, 1000 * value) for steps, value in wiggle]
    curve = bounding_curve(scaled)
    assert all(value <= curve(steps) <= 1.02 * value for steps, value in scaled)
    assert curve(5) == 303_000
    bent = [(1, 0), (2, 0), (3, 0), (5, 0), (8, 10**6), (13, 10**7)]
    assert bounding_curve(bent) == Curve(tuple(bent))


def test_what_was_done_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="tbptt_ckpt"):
        costs_of(Loop(), init_state=zeros())
    (record,) = caplog.records
    assert "segments of 1 to" in record.message
    assert "a boundary state 1.5 KiB" in record.message


def test_costs_are_plain_data():
    costs = costs_of(Loop(), init_state=zeros())
    assert Costs.from_dict(costs.to_dict()) == costs


def test_a_bad_size_is_named():
    with pytest.raises(ArgumentError, match="memory='much'"):
        measure_costs(Loop(), loss_fn, *data(), memory="much")


def test_gradients_that_a_leaf_makes_once_do_not_count_twice_for_two_steps():
    """In room for two steps, but not for twice what one takes, two are metered all the same."""
    module, inputs = nn.LSTMCell(128, 128), torch.randn(8, 2, 128)

    def measure(memory=None):
        given = {"time_batching": True, "memory": memory}
        return measure_costs(
            module, nn.functional.mse_loss, inputs, torch.zeros_like(inputs), **given
        )

    known = measure()
    # An advance takes more than a leaf, and both are metered beside gradients.
    one, two = (known.fixed.gradients + known.advance_bytes(steps) for steps in (1, 2))
    assert two < 1.4 * one
    assert measure(int(1.5 * one)).leaf_bytes(2) == known.leaf_bytes(2)


def test_the_longest_leaf_that_fits_is_metered_where_room_ends_between_the_usual_lengths():
    """Kernels may take more from some length on; 21 and 34 steps are usual."""
    module, inputs = nn.GRU(16, 16), torch.randn(64, 8, 16)

    def metered(memory=None):
        limits = {"memory": memory, "max_seconds": 30}  # a busy machine meters all of them
        costs = measure_costs(
            module, nn.functional.mse_loss, inputs, torch.zeros_like(inputs), **limits
        )
        return costs, [steps for steps, _ in costs.leaf_bytes.points]

    known, _ = metered()
    room = known.fixed.gradients + int(known.leaf_bytes(30))
    costs, lengths = metered(room)
    assert any(21 < steps < 34 for steps in lengths)
    assert 34 not in lengths
    longest = max(steps for steps in lengths if steps < 34)
    assert costs.leaf_bytes(longest) >= known.leaf_bytes(longest) * 0.99
