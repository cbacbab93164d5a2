"""TorchRL's recurrent modules by windows, held against a plain loop and the host's own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import bitwise, relative_error
from torch import Tensor, nn

from tbptt_ckpt import peak_memory
from tbptt_ckpt.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("default")  # the library's own
rnn = pytest.importorskip("torchrl.modules")
objectives = pytest.importorskip("torchrl.objectives")
tensordict = pytest.importorskip("tensordict")
from tensordict.nn import TensorDictModule, TensorDictSequential  # noqa: E402
from torchrl.envs.transforms import BurnInTransform  # noqa: E402

from tbptt_ckpt.integrations.torchrl import windowed  # noqa: E402

LANES, STEPS, WIDTH_IN, WIDTH, K1, K2 = 3, 24, 4, 5, 5, 13
STRATEGIES = ("auto", "retain", "uniform:4", "revolve:2")


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


def modules() -> tuple[Any, Any]:
    """An LSTM for an actor, and a GRU for a critic."""
    torch.manual_seed(0)
    lstm = rnn.LSTMModule(
        *(WIDTH_IN, WIDTH),
        in_keys=["observation", "h", "c"],
        out_keys=["features", ("next", "h"), ("next", "c")],
    )
    gru = rnn.GRUModule(
        *(WIDTH_IN, WIDTH), in_keys=["observation", "g"], out_keys=["seen", ("next", "g")]
    )
    return lstm.double(), gru.double()


def loss_of(lstm: Any = None, gru: Any = None) -> Any:
    """PPO over recurrent modules, or over their outputs where these are left out."""
    torch.manual_seed(1)
    head = TensorDictModule(nn.Linear(WIDTH, 3), in_keys=["features"], out_keys=["logits"])
    value = TensorDictModule(nn.Linear(WIDTH, 1), in_keys=["seen"], out_keys=["state_value"])
    actor = rnn.ProbabilisticActor(
        TensorDictSequential(*filter(None, (lstm, head))),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = TensorDictSequential(*filter(None, (gru, value)))
    return objectives.ClipPPOLoss(actor, critic).double()


def total(losses: Any) -> Tensor:
    return sum(loss for name, loss in losses.items() if name.startswith("loss_"))


def differentiated(loss: Any, data: Any, *owners: Any) -> tuple[float, list[Tensor]]:
    """The host's own program; gradients of the loss, or of other modules that it hangs on."""
    with rnn.set_recurrent_mode(True):
        value = total(loss(data.clone(recurse=False)))
    value.backward()
    weights = [w for owner in owners for w in owner.parameters()]
    return value.item(), [w.grad.clone() for w in weights]


def plain_outputs(layer: Any, data: Any, names: tuple[str, ...], k1: int, k2: int) -> Tensor:
    """What comes of windows one step at a time, each from a constant state k2 steps back."""
    states: dict[int, Any] = {0: None}
    found: list[Tensor] = []
    for new in range(0, STEPS, k1):
        stop = min(new + k1, STEPS)
        start = max(0, stop - k2)
        state, outputs = states[start], []
        for n in range(start, stop):
            zeros = torch.zeros(LANES, WIDTH, dtype=torch.float64)
            kept = [zeros if (each := data.get(name)) is None else each[:, n, 0] for name in names]
            begins = data["is_init"][:, n] if n else torch.ones(LANES, 1, dtype=torch.bool)
            state = (
                kept
                if state is None
                else [
                    torch.where(begins, new_state, old)
                    for new_state, old in zip(kept, state, strict=True)
                ]
            )
            hidden = tuple(each[None] for each in state)
            y, last = layer(
                data["observation"][:, n : n + 1], hidden if len(hidden) > 1 else hidden[0]
            )
            state = [each[0] for each in (last if isinstance(last, tuple) else (last,))]
            states[n + 1] = [each.detach() for each in state]
            outputs.append(y)
        found += outputs[new - start :]
    return torch.cat(found, 1)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_has_the_gradient_of_windows_by_a_plain_loop(strategy: str, states: bool) -> None:
    data, (lstm, gru) = rollout(states=states), modules()
    plain = loss_of()
    given = data.clone()
    given["features"] = plain_outputs(lstm.lstm, data, ("h", "c"), K1, K2)
    given["seen"] = plain_outputs(gru.gru, data, ("g",), K1, K2)
    value, expected = differentiated(plain, given, lstm, gru, plain)
    lstm, gru = modules()
    loss = loss_of(*(windowed(each, K1, K2, strategy=strategy) for each in (lstm, gru)))
    heads = [loss.actor_network.module[0].module[1], loss.critic_network.module[1]]
    found, grads = differentiated(loss, data, lstm, gru, *heads)
    assert found == pytest.approx(value, rel=1e-12)
    assert relative_error(grads, expected) < 1e-12
    whole = differentiated(loss_of(*modules()), data)[0]
    assert found == pytest.approx(whole, rel=1e-12)  # the loss is of all steps as ever


def test_reaching_less_far_back_is_another_gradient() -> None:
    found = []
    for k2 in (K1, K2, None):
        lstm, gru = modules()
        loss = loss_of(windowed(lstm, K1, k2), windowed(gru, K1, k2))
        found.append(differentiated(loss, rollout(), lstm, gru)[1])
    lstm, gru = modules()
    _, whole = differentiated(loss_of(lstm, gru), rollout(), lstm, gru)
    errors = [relative_error(grads, whole) for grads in found]
    assert errors[0] > errors[1] > 1e-6
    assert errors[2] < 1e-12


def test_outside_of_losses_it_is_the_module() -> None:
    data, (lstm, _) = rollout(), modules()
    wrapped = windowed(lstm, K1, K2)
    with torch.no_grad(), rnn.set_recurrent_mode(True):
        expected, found = lstm(data.clone()), wrapped(data.clone())
    assert bitwise([found["features"]], [expected["features"]])
    step = data[:, 3]
    assert bitwise([wrapped(step.clone())["features"]], [lstm(step.clone())["features"]])
    with rnn.set_recurrent_mode(True):  # any number of dimensions before time
        for rows in (data[1], data[None].expand(2, LANES, STEPS)):
            outputs = wrapped(rows.clone())["features"]
            assert relative_error([outputs], [lstm(rows.clone())["features"]]) < 1e-12
    assert wrapped.make_tensordict_primer() is not None


def test_burn_in_of_the_hosts_own_gives_the_first_state() -> None:
    found = []
    for wraps in (True, False):
        lstm, gru = modules()
        used = [windowed(each, STEPS, None) if wraps else each for each in (lstm, gru)]
        with rnn.set_recurrent_mode(True):
            data = BurnInTransform(used, burn_in=4, out_keys=["h", "c", "g"])(rollout())
        found.append(differentiated(loss_of(*used), data, lstm, gru))
    (value, grads), (expected, theirs) = found
    assert value == pytest.approx(expected, rel=1e-12)
    assert relative_error(grads, theirs) < 1e-12


def test_it_is_saved_under_the_modules_names_and_copied() -> None:
    lstm, _ = modules()
    wrapped, data = windowed(lstm, K1, K2), rollout()
    assert list(wrapped.state_dict()) == list(lstm.state_dict())
    assert list(loss_of(wrapped).state_dict()) == list(loss_of(lstm).state_dict())
    with rnn.set_recurrent_mode(True):
        expected = wrapped(data.clone())["features"]
        for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
            assert bitwise([twin(data.clone())["features"]], [expected])
            assert next(twin.parameters()) is not next(lstm.parameters())


def test_memory_is_that_of_one_window() -> None:
    peaks = []
    observations = torch.randn(4, 400, WIDTH_IN, dtype=torch.float64)
    fields = {"observation": observations, "is_init": torch.zeros(4, 400, 1, dtype=torch.bool)}
    for k1 in (400, 20):
        lstm = rnn.LSTMModule(WIDTH_IN, 64, in_key="observation", out_key="features").double()
        module = lstm if k1 == 400 else windowed(lstm, k1, 40, strategy="uniform:10")
        data = tensordict.TensorDict(fields, [4, 400])
        with peak_memory(rss=False) as peak, rnn.set_recurrent_mode(True):
            module(data)["features"].square().mean().backward()
        peaks.append(peak.peak_bytes)
    assert peaks[1] < 0.6 * peaks[0]


def test_what_cannot_work_is_refused() -> None:
    lstm, _ = modules()
    with pytest.raises(ArgumentError, match="must be an LSTMModule or a GRUModule"):
        windowed(nn.LSTM(2, 3), K1, K2)
    with pytest.raises(ArgumentError, match="k2=3 must be at least k1=5"):
        windowed(lstm, 5, 3)
    wrapped, data = windowed(lstm.make_python_based(), K1, K2), rollout()
    ensemble = tensordict.TensorDict.from_module(wrapped).expand(2).clone()

    def member(weights: Any) -> Tensor:
        with weights.to_module(wrapped), rnn.set_recurrent_mode(True):
            return wrapped(data.clone())["features"]

    with pytest.raises(ArgumentError, match="such a module goes without windows"):
        torch.vmap(member)(ensemble)
    with pytest.raises(ArgumentError, match="strategy"):
        windowed(lstm, 5, 5, strategy="sqr")
