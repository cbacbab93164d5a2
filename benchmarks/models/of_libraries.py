"""Models of libraries, each imported where it is made: those that are missing are left out."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.models.model import LANES, WIDTH, WIDTH_IN, Model, Wrapped
from benchmarks.models.of_torch import zeros
from tbptt_ckpt.module import lifted

FLOAT: dict[str, Any] = {"dtype": torch.float32, "tolerance": 2e-4}


class Neuron(nn.Module):
    """A layer and a neuron of snnTorch, which is given its state and returns it."""

    def __init__(self, neuron: nn.Module, *, layer: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH_IN, WIDTH) if layer else nn.Identity()
        self.neuron = neuron

    def forward(self, x: Tensor, state: Any) -> Any:
        spikes, *state = self.neuron(self.layer(x), *state)
        return spikes + state[-1], tuple(state)


class RecurrentNeuron(Neuron):
    """One whose spikes are its state, too."""

    def forward(self, x: Tensor, state: Any) -> Any:
        spikes, membrane = self.neuron(self.layer(x), *state)
        return spikes + membrane, (spikes, membrane)


def snntorch(kind: str, *args: Any, **kwargs: Any) -> nn.Module:
    """A neuron with a gradient that is not zero almost everywhere."""
    import snntorch as snn

    slope = snn.surrogate.fast_sigmoid(slope=5)
    return getattr(snn, kind)(*args, spike_grad=slope, **kwargs)


def snntorch_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH_IN, WIDTH),
        snntorch("Leaky", 0.9, init_hidden=True),
        nn.Linear(WIDTH, WIDTH),
        snntorch("Leaky", 0.9, init_hidden=True),
        nn.Linear(WIDTH, WIDTH),
    )


class ByHand(Wrapped):
    """What `lifted` does, for a plain loop: `name` is where each layer has its state."""

    def __init__(self, inner: nn.Module, name: str, layers: tuple[int, ...]) -> None:
        super().__init__(inner)
        self.name, self.layers = name, layers

    def forward(self, x: Tensor, state: Any) -> Any:
        for layer, value in zip(self.layers, state or [None] * 9, strict=False):
            setattr(self.inner[layer], self.name, 0.0 if value is None else value)
        y = self.inner(x)
        return y, tuple(getattr(self.inner[layer], self.name) for layer in self.layers)


def spikingjelly_net() -> nn.Module:
    from spikingjelly.activation_based import neuron

    return nn.Sequential(
        nn.Linear(WIDTH_IN, WIDTH),
        neuron.LIFNode(),
        nn.Linear(WIDTH, WIDTH),
        neuron.ParametricLIFNode(),
        nn.Linear(WIDTH, WIDTH),
    )


def norse(kind: str, *args: Any) -> nn.Module:
    import norse.torch

    return getattr(norse.torch, kind)(*args)


def norse_net() -> nn.Module:
    layers = nn.Linear(WIDTH_IN, WIDTH), norse("LIFCell"), nn.Linear(WIDTH, WIDTH), norse("LICell")
    return norse("SequentialState", *layers)


def ncps(kind: str, *, wired: bool = False, **kwargs: Any) -> nn.Module:
    import ncps.torch
    from ncps.wirings import AutoNCP

    units = AutoNCP(12, WIDTH) if wired else WIDTH
    return getattr(ncps.torch, kind)(WIDTH_IN, units, batch_first=False, **kwargs)


class MambaStep(Wrapped):
    def forward(self, x: Tensor, caches: Any) -> Any:
        return self.inner.step(x, caches)


def mambapy() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=WIDTH_IN, n_layers=2, d_state=3, expand_factor=2))


def min_rnn(kind: str) -> Any:
    module = importlib.import_module(f"minGRU_pytorch.{kind}")  # a class bears its name in there
    return getattr(module, kind)(WIDTH_IN)


class MinRNN(Wrapped):
    def forward(self, x: Tensor, h: Any) -> Any:
        return self.inner(x, h, return_next_prev_hidden=True)


class S5Layer(Wrapped):
    def forward(self, x: Tensor, state: Any) -> Any:
        return self.inner(x, state=state, return_state=True)


def s5() -> nn.Module:
    from s5 import S5

    return S5(WIDTH_IN, 8)


def lru() -> nn.Module:
    from LRU_pytorch import LRU

    return LRU(WIDTH_IN, WIDTH, 6)


class DNCStep(Wrapped):
    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.inner(x[None], state or (None, None, None))
        return y[0], state


def dnc() -> nn.Module:
    from dnc import DNC

    return DNC(
        input_size=WIDTH_IN,
        hidden_size=8,
        rnn_type="lstm",
        num_layers=1,
        nr_cells=5,
        cell_size=4,
        read_heads=2,
        gpu_id=-1,
        batch_first=False,
    )


class OdeCell(nn.Module):
    """A cell between whose steps an ordinary differential equation is solved."""

    def __init__(self, solver: str) -> None:
        super().__init__()
        import torchdiffeq

        self.drift, self.cell = nn.Linear(WIDTH, WIDTH), nn.GRUCell(WIDTH_IN, WIDTH)
        self.solve = functools.partial(getattr(torchdiffeq, solver), method="rk4")
        if solver == "odeint_adjoint":
            self.solve.keywords["adjoint_params"] = tuple(self.drift.parameters())

    def forward(self, x: Tensor, h: Tensor) -> Any:
        h = self.cell(x, h)
        times = torch.linspace(0, 1, 4, dtype=h.dtype)
        h = self.solve(lambda _t, h: torch.tanh(self.drift(h)), h, times)[-1]
        return h, h


class XLSTMStep(Wrapped):
    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.inner.step(x[:, None], state=state)
        return y[:, 0], state


class XLSTMStepCloned(Wrapped):
    def forward(self, x: Tensor, state: Any) -> Any:
        state = tree_map_only(Tensor, Tensor.clone, state)
        y, state = self.inner.step(x[:, None], state=state)
        return y[:, 0], state


def xlstm() -> nn.Module:
    import xlstm

    mlstm = xlstm.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=2)
    slstm = xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=2, conv1d_kernel_size=4)
    return xlstm.xLSTMBlockStack(
        xlstm.xLSTMBlockStackConfig(
            mlstm_block=xlstm.mLSTMBlockConfig(mlstm=mlstm),
            slstm_block=xlstm.sLSTMBlockConfig(slstm=slstm),
            context_length=64,
            num_blocks=2,
            embedding_dim=8,
            slstm_at=[1],
        )
    )


def low_rank() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.readout = nn.LSTM(WIDTH_IN, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, state: Any) -> Any:
            y, state = self.lstm(x, state)
            return self.readout(y), state

    return get_peft_model(Net(), LoraConfig(target_modules=["readout"], r=2, lora_dropout=0.0))


class TorchRLStep(Wrapped):
    def forward(self, x: Tensor, state: Any) -> Any:
        first = torch.zeros(len(x), 1, dtype=torch.bool)
        y, h, c = self.inner(x, *state, first)
        return y, (h, c)


def torchrl() -> nn.Module:
    from torchrl.modules import LSTMModule

    return LSTMModule(
        input_size=WIDTH_IN,
        hidden_size=WIDTH,
        in_keys=["x", "h", "c"],
        out_keys=["y", ("next", "h"), ("next", "c")],
    )


class PolicySegment(Wrapped):
    def forward(self, x: Tensor, state: Any) -> Any:
        steps, lanes = x.shape[:2]
        features = self.inner.extract_features(x.transpose(0, 1).flatten(0, 1))
        begins = torch.zeros(lanes * steps)
        y, state = self.inner._process_sequence(features, state, begins, self.inner.lstm_actor)
        latent = self.inner.mlp_extractor.forward_actor(y)
        return self.inner.action_net(latent).unflatten(0, (lanes, steps)).transpose(0, 1), state


def sb3_policy() -> nn.Module:
    import gymnasium
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    return RecurrentActorCriticPolicy(
        gymnasium.spaces.Box(-1, 1, (WIDTH_IN,)),
        gymnasium.spaces.Discrete(3),
        lambda _: 1e-3,
        lstm_hidden_size=8,
        net_arch=[8],
        enable_critic_lstm=False,
        shared_lstm=True,
    )


SPIKES: dict[str, Any] = {"library": "snntorch", "state": lambda: (zeros(),), **FLOAT}
TWO: dict[str, Any] = {**SPIKES, "state": lambda: (zeros(), zeros())}
NORSE: dict[str, Any] = {"library": "norse", **FLOAT}
NCPS: dict[str, Any] = {"library": "ncps", "per_step": False}

MODELS = [
    Model(name="Leaky", make=lambda: Neuron(snntorch("Leaky", 0.9, learn_beta=True)), **SPIKES),
    Model(name="Synaptic", make=lambda: Neuron(snntorch("Synaptic", 0.9, 0.8)), **TWO),
    Model(
        name="Alpha",
        make=lambda: Neuron(snntorch("Alpha", 0.9, 0.8)),
        **{**SPIKES, "state": lambda: (zeros(), zeros(), zeros())},
    ),
    Model(
        name="RLeaky",
        make=lambda: RecurrentNeuron(snntorch("RLeaky", 0.9, linear_features=WIDTH)),
        **TWO,
    ),
    Model(
        name="SLSTM",
        make=lambda: Neuron(snntorch("SLSTM", WIDTH_IN, WIDTH), layer=False),
        **TWO,
    ),
    Model(
        name="Leaky, init_hidden",
        make=lambda: lifted(snntorch_net(), torch.zeros(LANES, WIDTH_IN)),
        plain=lambda: ByHand(snntorch_net(), "mem", (1, 3)),
        **TWO,
    ),
    Model(
        name="LIFNode, ParametricLIFNode, as they are",
        library="spikingjelly",
        make=spikingjelly_net,
        plain=lambda: ByHand(spikingjelly_net(), "v", (1, 3)),
    ),
    Model(
        name="LIFNode, ParametricLIFNode",
        library="spikingjelly",
        make=lambda: lifted(spikingjelly_net(), torch.zeros(LANES, WIDTH_IN)),
        plain=lambda: ByHand(spikingjelly_net(), "v", (1, 3)),
    ),
    Model(
        name="LIFRecurrentCell", make=lambda: norse("LIFRecurrentCell", WIDTH_IN, WIDTH), **NORSE
    ),
    Model(
        name="LSNNRecurrentCell", make=lambda: norse("LSNNRecurrentCell", WIDTH_IN, WIDTH), **NORSE
    ),
    Model(
        name="LIFAdExRecurrentCell",
        make=lambda: norse("LIFAdExRecurrentCell", WIDTH_IN, WIDTH),
        **NORSE,
    ),
    Model(name="SequentialState(LIFCell, LICell)", make=norse_net, **NORSE),
    Model(
        name="LIFRecurrent",
        make=lambda: norse("LIFRecurrent", WIDTH_IN, WIDTH),
        per_step=False,
        **NORSE,
    ),
    Model(name="CfC", make=lambda: ncps("CfC"), **NCPS),
    Model(name="CfC, mixed_memory", make=lambda: ncps("CfC", mixed_memory=True), **NCPS),
    Model(name="CfC, wired", make=lambda: ncps("CfC", wired=True), **NCPS),
    Model(name="LTC, wired", make=lambda: ncps("LTC", wired=True), **NCPS),
    Model(
        name="Mamba",
        library="mambapy",
        make=lambda: MambaStep(mambapy()),
        state=lambda: [(None, torch.zeros(LANES, 8, 3)) for _ in range(2)],
        width=WIDTH_IN,
    ),
    Model(
        name="minGRU",
        library="minGRU-pytorch",
        make=lambda: MinRNN(min_rnn("minGRU")),
        per_step=False,
        time_dim=1,
        width=WIDTH_IN,
    ),
    Model(
        name="minLSTM",
        library="minGRU-pytorch",
        make=lambda: MinRNN(min_rnn("minLSTM")),
        per_step=False,
        time_dim=1,
        width=WIDTH_IN,
        note="cut in two, its parallel form gives another result than in one",
    ),
    Model(
        name="S5",
        library="s5-pytorch",
        make=lambda: S5Layer(s5()),
        state=lambda: torch.zeros(LANES, 8, dtype=torch.complex64),
        per_step=False,
        time_dim=1,
        width=WIDTH_IN,
        **FLOAT,
    ),
    Model(
        name="LRU",
        library="LRU-pytorch",
        make=lru,
        per_step=False,
        lanes=0,
        note="it forgets its state after each call",
    ),
    Model(
        name="DNC",
        library="dnc",
        make=lambda: DNCStep(dnc()),
        per_step=True,
        width=WIDTH_IN,
        **{**FLOAT, "tolerance": 5e-4},
    ),
    Model(
        name="xLSTMBlockStack.step",
        library="xlstm",
        make=lambda: XLSTMStep(xlstm()),
        width_in=8,
        width=8,
        plain=lambda: XLSTMStepCloned(xlstm()),
        note="writes in place into what its backward needs",
    ),
    Model(
        name="xLSTMBlockStack.step, of a clone of its state",
        library="xlstm",
        make=lambda: XLSTMStepCloned(xlstm()),
        width_in=8,
        width=8,
    ),
    Model(
        name="a cell and odeint, rk4",
        library="torchdiffeq",
        make=lambda: OdeCell("odeint"),
        state=zeros,
    ),
    Model(
        name="a cell and odeint_adjoint, rk4",
        library="torchdiffeq",
        make=lambda: OdeCell("odeint_adjoint"),
        state=zeros,
    ),
    Model(name="nn.LSTM, readout by LoRA", library="peft", make=low_rank, per_step=False, **FLOAT),
    Model(
        name="LSTMModule",
        library="torchrl",
        make=lambda: TorchRLStep(torchrl()),
        state=lambda: (zeros(1, WIDTH), zeros(1, WIDTH)),
        per_step=True,
    ),
    Model(
        name="RecurrentActorCriticPolicy",
        library="sb3-contrib",
        make=lambda: PolicySegment(sb3_policy()),
        state=lambda: (torch.zeros(1, LANES, 8), torch.zeros(1, LANES, 8)),
        per_step=False,
        width=3,
        **FLOAT,
    ),
]
