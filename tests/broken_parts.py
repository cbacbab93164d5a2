"""Modules, losses and sources that break their contract, and a bench to put them on."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from cases import LANES, WIDTH, WIDTH_IN, lstm, random_data, random_state, tanh_cell
from devices import here, placed
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    ArgumentError,
    ScheduleError,
    StaleWeightsError,
    TbpttError,
    TensorSequence,
)

NUM_STEPS = 6


class Bench:
    """A working setting, and a memory of what must not change."""

    def __init__(self) -> None:
        self.inputs, self.targets = random_data(NUM_STEPS)
        self.module = self.watch(tanh_cell())
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)

    def watch(self, module: nn.Module) -> nn.Module:
        """Hold the parameters, gradients and buffers of `module` and the generator from now on."""
        for number, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, float(number + 1))
        self.watched = module
        self.before = self.present()
        return module

    def present(self) -> dict[str, Tensor]:
        found = {"generator": torch.get_rng_state()}
        for name, parameter in self.watched.named_parameters():
            found[f"weight {name}"] = parameter.detach().clone()
            if parameter.grad is not None:
                found[f"gradient {name}"] = parameter.grad.clone()
        for name, buffer in self.watched.named_buffers():
            found[f"buffer {name}"] = buffer.detach().clone()
        return found

    def changes(self) -> set[str]:
        """Names of what differs from the time of `watch`."""
        now = self.present()
        return {
            name
            for name in self.before.keys() | now.keys()
            if name not in now
            or name not in self.before
            or not torch.equal(self.before[name], now[name])
        }

    def sequence(self) -> TensorSequence:
        return TensorSequence(self.inputs, self.targets)

    def steps(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs, self.targets, strict=True))

    def make(self, **changed: Any) -> TBPTT:
        arguments = {
            "module": self.module,
            "loss_fn": F.mse_loss,
            "k1": 2,
            "k2": 4,
            "optimizer": self.optimizer,
        }
        return TBPTT(**arguments | changed)

    def train(self, sequence: object = None, init_state: Any = None, **changed: Any) -> None:
        sequence = self.sequence() if sequence is None else sequence
        self.make(**changed).train(sequence, init_state)


@dataclass(frozen=True)
class Bad:
    """One row: what is done, and the error it must raise."""

    run: Callable[[Bench], object]
    message: str
    error: type[TbpttError] = ArgumentError
    when: str = "before"  # the first window; or "within" it; or "later"


def argument(message: str, **changed: Any) -> Bad:
    """A wrong argument of the constructor, which needs no data to be found out."""
    return Bad(lambda bench: bench.make(**changed), message)


def loss(loss_fn: Callable[[Tensor, Tensor], Any], message: str) -> Bad:
    return Bad(lambda bench: bench.train(loss_fn=loss_fn), message, when="within")


def sequence(make: Callable[[Bench], object], message: str, when: str = "before") -> Bad:
    return Bad(lambda bench: bench.train(make(bench)), message, when=when)


def schedule(actions: Any, message: str, error: type[TbpttError] = ScheduleError) -> Bad:
    return Bad(lambda bench: bench.train(strategy=actions), message, error, when="within")


def module(
    make: Callable[[], nn.Module], message: str, when: str = "within", **changed: Any
) -> Bad:
    def run(bench: Bench) -> None:
        own = bench.watch(placed(make()))
        arguments = {"module": own, "optimizer": torch.optim.SGD(own.parameters(), lr=0.1)}
        bench.train(**arguments | placed(changed))

    return Bad(run, message, when=when)


# Modules, losses and sources that break their contract.


class Cell(nn.Module):
    """The tanh cell, with what it returns left to subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = tanh_cell()

    def forward(self, x: Tensor, h: Any) -> Any:
        return self.result(*self.cell(x, h))

    def result(self, y: Tensor, h: Tensor) -> Any:
        return y, h


class OutputOnly(Cell):
    def result(self, y: Tensor, h: Tensor) -> Any:
        return y


class ThreeResults(Cell):
    def result(self, y: Tensor, h: Tensor) -> Any:
        return y, h, h


class AnotherStateLater(nn.Module):
    """A state of one tensor, and of two from step 3 on."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = tanh_cell()

    def forward(self, x: Tensor, state: Any) -> Any:
        h, step = (None, 0) if state is None else state[:2]
        y, h = self.cell(x, h)
        return y, (h, step + 1) if step < 3 else (h, step + 1, h)


class InPlace(nn.Module):
    """Writes into the state it is given, in a way that plain BPTT does not mind."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = tanh_cell()

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, new = self.cell(x, h)
        if h is None:
            return y, new.clone()
        h.mul_(0.5).add_(new)
        return y, h


def in_place(**changed: Any) -> Bad:
    row = module(InPlace, r"in place.*(new state|clone)", when="later", **changed)
    return replace(row, error=TbpttError)


class BufferWithGraph(nn.Module):
    """Carries a graph from step to step where nobody sees it."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cell = tanh_cell()
        self.register_buffer("memory", torch.zeros(LANES, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = self.cell(x, h)
        self.memory = 0.5 * self.memory + h
        return y + self.memory, h


class LastOutputOnly(nn.Module):
    """A segment module that gives one output per segment."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm()

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.lstm(x, state)
        return y[-1:], state


class Segment(nn.Module):
    """A segment module that nobody recognises."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm()

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.lstm(x, state)


class LazyCell(nn.Module):
    """Its weights have no shape before it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.LazyLinear(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.readout(x))
        return h, h


def scalar_then_pair() -> Callable[[Tensor, Tensor], Any]:
    calls: list[int] = []

    def loss_fn(y: Tensor, target: Tensor) -> Any:
        calls.append(1)
        mean = F.mse_loss(y, target)
        return mean if len(calls) == 1 else (mean, 1.0)

    return loss_fn


def noisy_loss(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y + 0.1 * torch.randn_like(y), target)


@dataclass
class LyingLength:
    """Steps whose number is not what `len` says."""

    steps: list[Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.steps)


@dataclass
class BadSource:
    """A source whose `read` returns what `answer` makes of the right answer."""

    bench: Bench
    answer: Callable[[Tensor, Tensor], Any] = lambda inputs, targets: (inputs, targets)
    time_dim: int = 0
    weight: Callable[[int], Any] | None = None

    def __len__(self) -> int:
        return NUM_STEPS

    def read(self, start: int, stop: int) -> Any:
        return self.answer(self.bench.inputs[start:stop], self.bench.targets[start:stop])

    def weights(self, start: int, stop: int) -> Any:
        return None if self.weight is None else self.weight(stop - start)


class ReadsTooMuch:
    """A source without a length that returns more steps than it was asked for."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def read(self, start: int, stop: int) -> Any:
        return self.bench.inputs[start : stop + 1], self.bench.targets[start : stop + 1]


def with_inference_state(bench: Bench) -> None:
    with torch.inference_mode():
        state = torch.zeros(LANES, WIDTH, dtype=torch.float64)
    bench.train(init_state=state)


def made_in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def inputs_with_graph(bench: Bench) -> Tensor:
    embedding = placed(nn.Linear(WIDTH_IN, WIDTH_IN).double())
    bench.watch(bench.module)  # the layer drew random numbers
    return embedding(bench.inputs)


def with_graph_in_init_state(bench: Bench) -> None:
    bench.train(init_state=random_state().requires_grad_() * 2.0)


def stepping_inside(executor: str, strategy: str) -> Bad:
    """A hook of a layer that updates the weights while their gradient is still being computed."""

    def run(bench: Bench) -> None:
        bench.module.readout.register_full_backward_hook(lambda *_: bench.optimizer.step())
        bench.train(executor=executor, strategy=strategy)

    message = r"^weights changed .*step 2 .*optimizer\.step\(\) only between windows"
    return Bad(run, message, StaleWeightsError, when="later")


def whole_segments(bench: Bench, time_dim: int) -> None:
    own = bench.watch(Segment())
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    bench.train(module=own, optimizer=optimizer, per_step=False, time_dim=time_dim)


class BufferUnderTwoNames(Cell):
    memory: Tensor
    again: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Moved, it would be two.
        self.register_buffer("memory", torch.zeros((), device=here()))
        self.register_buffer("again", self.memory)

    def result(self, y: Tensor, h: Tensor) -> Any:
        self.memory += 1.0
        return y + self.again.clone(), h


class Memory:
    """A state whose tensors nobody finds."""

    def __init__(self, h: Tensor) -> None:
        self.h = h


class StateInAnObject(Cell):
    def forward(self, x: Tensor, state: Any) -> Any:
        y, h = self.cell(x, None if state is None else state.h)
        return y, Memory(h)


class StateInAnAttribute(Cell):
    hidden: Tensor | float = 0.0

    def result(self, y: Tensor, h: Tensor) -> Any:
        y, self.hidden = y + self.hidden, h
        return y, h


class StateInAQueue(Cell):
    def forward(self, x: Tensor, state: Any) -> Any:
        y, h = self.cell(x, None if state is None else state[-1])
        return y, collections.deque([h], maxlen=2)
