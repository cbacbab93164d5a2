"""Losses of TorchRL by windows: the host's own over a rollout, and a plain loop where k1 < k2."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from cases import EXECUTORS, relative_error
from torch import Tensor, nn

from tbptt_ckpt import TBPTT
from tbptt_ckpt.data import BurnIn
from tbptt_ckpt.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("default")  # the library's own
rnn = pytest.importorskip("torchrl.modules")
objectives = pytest.importorskip("torchrl.objectives")
tensordict = pytest.importorskip("tensordict")
from tensordict.nn import TensorDictModule, TensorDictSequential  # noqa: E402

from tbptt_ckpt.integrations.torchrl import RecurrentLoss, rollout_sequence  # noqa: E402

LANES, STEPS, WIDTH_IN, WIDTH, K1, K2 = 3, 24, 4, 5, 5, 13
STRATEGIES = ("retain", "uniform:4", "revolve:2")


def rollout(*, states: bool = True) -> Any:
    """Two lanes in which trajectories begin on the way, and one in which none does."""
    draw = torch.Generator().manual_seed(1)
    kind: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
    begins = torch.zeros(LANES, STEPS, 1, dtype=torch.bool)
    begins[1:, 0] = begins[1, 9] = begins[2, 5] = begins[2, 17] = True
    fields = {
        "observation": torch.randn(LANES, STEPS, WIDTH_IN, **kind),
        "is_init": begins,
        "action": torch.randint(3, (LANES, STEPS), generator=draw),
        "action_log_prob": -torch.rand(LANES, STEPS, **kind) - 0.5,
        "advantage": torch.randn(LANES, STEPS, 1, **kind),
        "value_target": torch.randn(LANES, STEPS, 1, **kind),
    }
    if states:  # what a collector stores: zeros where a trajectory begins
        stored = torch.randn(LANES, STEPS, 1, WIDTH, **kind) * ~begins[..., None]
        fields |= {"h": stored, "c": stored / 2, "g": stored / 3}
    return tensordict.TensorDict(fields, [LANES, STEPS])


def loss_of(kind: str, reduction: str) -> Any:
    """PPO with an LSTM in its actor, and a GRU in its critic where `kind` says so."""
    torch.manual_seed(0)
    lstm = rnn.LSTMModule(
        *(WIDTH_IN, WIDTH),
        in_keys=["observation", "h", "c"],
        out_keys=["features", ("next", "h"), ("next", "c")],
    )
    gru = rnn.GRUModule(
        *(WIDTH_IN, WIDTH), in_keys=["observation", "g"], out_keys=["seen", ("next", "g")]
    )
    head = TensorDictModule(nn.Linear(WIDTH, 3), in_keys=["features"], out_keys=["logits"])
    actor = rnn.ProbabilisticActor(
        TensorDictSequential(lstm, head),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = rnn.ValueOperator(nn.Linear(WIDTH_IN, 1), in_keys=["observation"])
    if kind == "recurrent critic":
        value = TensorDictModule(nn.Linear(WIDTH, 1), in_keys=["seen"], out_keys=["state_value"])
        critic = TensorDictSequential(gru, value)
    return objectives.ClipPPOLoss(actor, critic, reduction=reduction).double()


def total(losses: Any) -> Tensor:
    return sum(loss for name, loss in losses.items() if name.startswith("loss_"))


def mean(losses: Tensor, _targets: Any) -> Tensor:
    return losses.mean()


def grads_of(loss: nn.Module) -> list[Tensor]:
    return [w.grad.clone() for w in loss.parameters() if w.grad is not None]


@pytest.mark.parametrize("kind", ["actor", "recurrent critic"])
@pytest.mark.parametrize("states", [True, False])
def test_a_whole_rollout_has_the_gradient_of_the_hosts_own_loss(kind: str, states: bool) -> None:
    data = rollout(states=states)
    theirs = loss_of(kind, "mean")
    with rnn.set_recurrent_mode(True):
        expected = total(theirs(data.clone()))
    expected.backward()
    for strategy, executor in itertools.product(STRATEGIES, EXECUTORS):
        loss = loss_of(kind, "none")
        tbptt = TBPTT(
            *(RecurrentLoss(loss), mean, STEPS, None),
            **{"strategy": strategy, "executor": executor, "per_step": False, "time_dim": 1},
        )
        result = tbptt.train(rollout_sequence(data))
        assert result.loss == pytest.approx(expected.item(), rel=1e-12)
        assert relative_error(grads_of(loss), grads_of(theirs)) < 1e-12


def plain_windows(loss: Any, data: Any, optimizer: Any, burn_in: int) -> list[list[Tensor]]:
    """Windows by hand: the host's loss over each, from the states that the one before left."""
    lstm = loss.actor_network.module[0].module[0]
    states: dict[int, Any] = {0: None}
    found = []
    for stop in [*range(K1, STEPS, K1), STEPS]:
        new, start = (stop - 1) // K1 * K1, max(0, stop - K2)
        part = data[:, start:stop].clone()
        carry(part, states[start])
        optimizer.zero_grad()
        with rnn.set_recurrent_mode(True):
            each = total(loss(part))[:, max(new, burn_in) - start :]
        each.mean().backward()
        found.append(grads_of(loss))
        follow(lstm, loss, data[:, start:stop].clone(), states, start)
        optimizer.step()
    return found


def carry(part: Any, state: Any) -> None:
    if state is not None:
        kept = part["is_init"][:, 0, :, None]
        for name, value in zip(("h", "c"), state, strict=True):
            part[name][:, 0] = torch.where(kept, part[name][:, 0], value)


def follow(lstm: Any, loss: Any, part: Any, states: dict[int, Any], start: int) -> None:
    """The state after every step, one step at a time, with the weights of now."""
    state = states[start]
    with torch.no_grad(), loss.actor_network_params.to_module(loss.actor_network):
        for n in range(part.shape[1]):
            step = part[:, n : n + 1].clone()
            carry(step, state)
            with rnn.set_recurrent_mode(True):
                lstm(step)
            state = (step["next", "h"][:, 0], step["next", "c"][:, 0])
            states[start + n + 1] = state


@pytest.mark.parametrize("burn_in", [0, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_windows_that_reach_further_back_than_to_the_last_update(
    strategy: str, burn_in: int
) -> None:
    data = rollout()
    plain = loss_of("actor", "none")
    expected = plain_windows(plain, data, torch.optim.SGD(plain.parameters(), 0.1), burn_in)
    for executor in EXECUTORS:
        loss = loss_of("actor", "none")
        source = rollout_sequence(data)
        tbptt = TBPTT(
            *(RecurrentLoss(loss), mean, K1, K2, torch.optim.SGD(loss.parameters(), 0.1)),
            **{"strategy": strategy, "executor": executor, "per_step": False, "time_dim": 1},
        )
        windows = tbptt.windows(BurnIn(source, burn_in) if burn_in else source)
        for grads, window in zip(expected, windows, strict=True):
            assert relative_error(grads_of(loss), grads) < 1e-12, window
        assert relative_error(list(loss.parameters()), list(plain.parameters())) < 1e-12


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ArgumentError, match="must be made with reduction='none'"):
        RecurrentLoss(loss_of("actor", "mean"))
    actor = rnn.ProbabilisticActor(
        TensorDictModule(nn.Linear(WIDTH_IN, 3), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = rnn.ValueOperator(nn.Linear(WIDTH_IN, 1), in_keys=["observation"])
    with pytest.raises(ArgumentError, match="must have an LSTMModule or a GRUModule"):
        RecurrentLoss(objectives.ClipPPOLoss(actor, critic, reduction="none"))
    for wrong in (rollout()[0], rollout().exclude("is_init"), {"is_init": 1}):
        with pytest.raises(ArgumentError, match=r"rollout=.* must be a TensorDict of \[B, T\]"):
            rollout_sequence(wrong)


def test_a_loss_is_copied_with_its_recurrent_modules() -> None:
    loss, data = RecurrentLoss(loss_of("actor", "none")), rollout()
    twin = copy.deepcopy(loss)
    losses, state = twin(data.to_dict(), None)
    again, _ = loss(data.to_dict(), None)
    assert torch.equal(losses, again)
    assert [value.shape for value in state] == [(LANES, 1, WIDTH)] * 2
