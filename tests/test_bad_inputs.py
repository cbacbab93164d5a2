"""A table of bad inputs. Each raises one line that says what the user wrote and what would work.

What is refused before the first window leaves weights, gradients, generators and buffers as
they were; what is refused inside the first window leaves all of these but the gradients,
which the window has cleared.
"""

from __future__ import annotations

import collections
import io
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import EXECUTORS, LANES, WIDTH, WIDTH_IN, lstm, random_data, random_state, tanh_cell
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    Advance,
    ArgumentError,
    ArraySequence,
    Differentiate,
    Drop,
    Keep,
    Revolve,
    ScheduleError,
    StaleWeightsError,
    TbpttError,
    TensorSequence,
    Uniform,
    tbptt_windows,
)
from tbptt_ckpt.module.recurrence import check_autocast, check_differentiable

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
        own = bench.watch(make())
        arguments = {"module": own, "optimizer": torch.optim.SGD(own.parameters(), lr=0.1)}
        bench.train(**arguments | changed)

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
    embedding = nn.Linear(WIDTH_IN, WIDTH_IN).double()
    bench.watch(bench.module)  # the layer drew random numbers
    return embedding(bench.inputs)


def with_graph_in_init_state(bench: Bench) -> None:
    bench.train(init_state=random_state().requires_grad_() * 2.0)


def stepping_inside(executor: str, strategy: str) -> Bad:
    """A hook that updates the weights while their gradient is still being computed."""

    def run(bench: Bench) -> None:
        weight = bench.module.readout.weight
        weight.register_post_accumulate_grad_hook(lambda _: bench.optimizer.step())
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
        self.register_buffer("memory", torch.zeros(()))
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


TABLE: dict[str, Bad] = {
    # k1 and k2
    "k1_zero": argument(r"^k1=0 must be an integer of at least 1", k1=0),
    "k1_negative": argument(r"^k1=-3 must be an integer of at least 1", k1=-3),
    "k1_float": argument(r"^k1=2\.0 must be an integer", k1=2.0),
    "k1_bool": argument(r"^k1=True must be an integer", k1=True),
    "k1_string": argument(r"^k1='2' must be an integer", k1="2"),
    "k1_none": argument(r"^k1=None must be an integer", k1=None),
    "k2_zero": argument(r"^k2=0 must be an integer of at least 1, or None", k2=0),
    "k2_negative": argument(r"^k2=-1 must be an integer of at least 1, or None", k2=-1),
    "k2_float": argument(r"^k2=4\.5 must be an integer of at least 1, or None", k2=4.5),
    "k2_bool": argument(r"^k2=False must be an integer of at least 1, or None", k2=False),
    "k2_string": argument(r"^k2='all' must be an integer of at least 1, or None", k2="all"),
    "num_steps_zero": Bad(lambda _: tbptt_windows(0, 1, 1), r"^num_steps=0 must be an integer"),
    # choices
    "loss_unknown": argument(r"^loss='all' must be 'new' or 'last'", loss="all"),
    "loss_unhashable": argument(r"^loss=\['new'\] must be 'new' or 'last'", loss=["new"]),
    "reduction_unknown": argument(r"^reduction='none' must be 'mean' or 'sum'", reduction="none"),
    "overlap_unknown": argument(r"^overlap='fresh' must be 'refresh' or 'stale'", overlap="fresh"),
    "executor_unknown": argument(
        r"^executor='fast' must be 'replay' or 'checkpoint'", executor="fast"
    ),
    "executor_unhashable": argument(r"^executor=\[\] must be 'replay' or", executor=[]),
    # strategies
    "strategy_unknown": argument(r"^strategy='best' is not one of 'auto'", strategy="best"),
    "strategy_without_number": argument(
        r"^strategy='uniform' .*'uniform:LENGTH'", strategy="uniform"
    ),
    "strategy_zero": argument(r"^strategy='uniform:0' .*'uniform:LENGTH'", strategy="uniform:0"),
    "strategy_letter": argument(r"^strategy='uniform:x' .*'uniform:LENGTH'", strategy="uniform:x"),
    "strategy_negative": argument(
        r"^strategy='revolve:-1' .*'revolve:STATES'", strategy="revolve:-1"
    ),
    "strategy_needless_number": argument(r"^strategy='sqrt:3' .*'sqrt'", strategy="sqrt:3"),
    "strategy_number": argument(r"^strategy=32 .*'uniform:LENGTH'", strategy=32),
    "strategy_none": argument(r"^strategy=None .*'auto'", strategy=None),
    "strategy_class": argument(r"^strategy=.*Uniform.* such as Uniform\(32\)", strategy=Uniform),
    "uniform_zero": Bad(lambda _: Uniform(0), r"^leaf_steps=0 must be an integer of at least 1"),
    "revolve_float": Bad(lambda _: Revolve(2.5), r"^num_states=2\.5 must be an integer"),
    # the user's schedules, for a first window [0, 2)
    "schedule_of_wrong_length": schedule(
        [Differentiate(0, 3)], r"strategy covers 3 steps, .*\[0, 2\) has 2; pass a function"
    ),
    "schedule_overlapping": schedule(
        [Advance(0, 1), Differentiate(0, 2), Differentiate(0, 1)],
        r"^Differentiate\(start=0, stop=1\) cannot be done: steps must lie in order within",
    ),
    "schedule_with_a_gap": schedule(
        lambda start, stop: [Advance(start, stop - 1), Differentiate(stop - 1, stop)],
        r"^the schedule differentiates \[1, 2\), the window is \[0, 2\)",
    ),
    "schedule_that_never_drops": schedule(
        [Advance(0, 1), Keep(1), Differentiate(1, 2), Differentiate(0, 1)],
        r"never drops the states kept at \[1\]",
    ),
    "schedule_that_drops_nothing": schedule(
        [Differentiate(0, 2), Drop(1)], r"^Drop\(step=1\) cannot be done: the kept states are \[\]"
    ),
    "schedule_of_words": schedule(
        [Differentiate(0, 2), "stop"], r"'?stop'? .*none of Advance, Keep, Differentiate, Drop"
    ),
    "schedule_function_returns_none": schedule(
        lambda start, stop: None, r"NoneType|None.*(actions|Advance)"
    ),
    "schedule_function_returns_words": schedule(
        lambda start, stop: ["go"], r"go .*none of Advance, Keep, Differentiate, Drop"
    ),
    "memory_budget_of_nothing": argument(
        r"^memory_budget=0 must be at least one byte", memory_budget=0
    ),
    "memory_budget_negative": argument(r"^memory_budget=-1 is not a size", memory_budget=-1),
    "memory_budget_above_all": argument(
        r"^memory_budget=2\.0 must be above 0 and at most 1, a fraction", memory_budget=2.0
    ),
    "memory_budget_nan": argument(
        r"^memory_budget=nan must be above 0 and at most 1", memory_budget=float("nan")
    ),
    "memory_budget_in_words": argument(
        r"^memory_budget='much' is not a size.*512MiB", memory_budget="much"
    ),
    "memory_budget_of_another_type": argument(
        r"^memory_budget=\[1\] must be bytes .*512MiB.* fraction", memory_budget=[1]
    ),
    "memory_budget_of_nested_checkpoints": argument(
        r"^executor='checkpoint' holds the graph .*executor='replay'",
        memory_budget="512MiB",
        executor="checkpoint",
    ),
    "costs_of_another_type": argument(r"^costs=3 must be Costs.*measure_costs", costs=3),
    # modules
    "module_not_callable": argument(
        r"^module=3 is not callable; pass an nn\.Module or a function", module=3
    ),
    "lstm_per_step": Bad(
        lambda bench: bench.make(module=lstm(), per_step=True),
        r"^per_step=True does not fit nn\.LSTM, which runs whole segments",
        when="later",
    ),
    "cell_per_segment": Bad(
        lambda bench: bench.make(module=nn.GRUCell(2, 3), per_step=False),
        r"^per_step=False does not fit (nn\.)?GRUCell, which runs one step",
        when="later",
    ),
    "module_lazy": argument(
        r"^module: 'readout\.weight' belongs to a lazy layer .* run one step of the module first",
        module=LazyCell(),
        optimizer=None,
    ),
    "loss_lazy": argument(
        r"^loss_fn: 'weight' belongs to a lazy layer .* run one step", loss_fn=nn.LazyLinear(1)
    ),
    "per_step_string": argument(r"^per_step='yes' must be True, False or None", per_step="yes"),
    "bidirectional": Bad(
        lambda bench: bench.make(module=nn.LSTM(2, 3, bidirectional=True)),
        r"bidirectional=True\) reads the future, .*use bidirectional=False",
        when="later",
    ),
    "module_returns_a_tensor": module(
        OutputOnly, r"^module=OutputOnly returned a Tensor; it must return \(output, state\)"
    ),
    "module_returns_three": module(
        ThreeResults, r"^module=ThreeResults returned a tuple of 3; .*\(output, state\)"
    ),
    "segment_of_one_output": module(
        LastOutputOnly,
        r"^module=LastOutputOnly returned outputs of shape \(1, 2, 3\) for 2 steps .*one output",
        per_step=False,
    ),
    "another_state_later": module(
        AnotherStateLater, r"state of another structure: .*tensor.* instead of", when="later"
    ),
    "state_in_an_object": module(
        StateInAnObject,
        r"^the state holds a Memory with tensors in it, .*dataclasses",
        when="later",
    ),
    "state_in_a_queue": module(
        StateInAQueue, r"^the state holds a deque with tensors in it, .*lists", when="later"
    ),
    "state_in_an_attribute": replace(
        module(
            StateInAnAttribute,
            r"^a tensor with the graph of an earlier run was used: .*belongs in the state",
            strategy="step",
        ),
        error=TbpttError,
    ),
    "init_state_in_an_object": Bad(
        lambda bench: bench.train(init_state=Memory(random_state())),
        r"^the state holds a Memory with tensors in it",
    ),
    "in_place_init_state": in_place(strategy="retain", init_state=random_state()),
    "in_place_in_an_advance": in_place(strategy="uniform:1", init_state=random_state()),
    "in_place_at_a_leaf": in_place(strategy="step"),
    "in_place_in_a_checkpoint": in_place(strategy="step", executor="checkpoint"),
    "buffer_under_two_names": module(
        BufferUnderTwoNames,
        r"^module buffers 'memory' and 'again' are one tensor, which a step changes; register it",
        strategy="step",
        when="later",  # the buffer stays as the module left it
    ),
    "buffer_with_graph": module(
        BufferWithGraph,
        r"^module buffer 'memory' .*autograd graph .*state.*detach",
        when="later",  # the buffer stays as the module left it
    ),
    "eval_mode_on_cudnn": Bad(
        lambda bench: check_differentiable(bench.watch(lstm().eval()), device_types={"cuda"}),
        r"^module.* cuDNN nn\.LSTM in eval mode, .*call \.train\(\)",
    ),
    "init_state_with_graph": Bad(
        with_graph_in_init_state, r"^init_state was computed with a graph.*detach.*optimizer=None"
    ),
    "init_state_of_inference_mode": Bad(with_inference_state, r"^init_state.*inference.*clone"),
    # losses
    "loss_fn_not_callable": argument(r"^loss_fn=None is not callable; pass", loss_fn=None),
    "loss_not_scalar": loss(
        lambda y, target: (y - target).square(),
        r"^loss_fn returned a loss of shape \(2, 3\); return a scalar .*\(loss_sum, weight\)",
    ),
    "loss_none": loss(
        lambda y, target: None, r"^loss_fn returned (None|NoneType); return a scalar tensor"
    ),
    "loss_float": loss(
        lambda y, target: F.mse_loss(y, target).item(),
        r"^loss_fn returned (a )?float; return a scalar tensor",
    ),
    "loss_triple": loss(
        lambda y, target: (F.mse_loss(y, target), 1.0, 2.0),
        r"^loss_fn returned a tuple of 3.*; return a scalar tensor .*\(loss_sum, weight\)",
    ),
    "loss_pair_of_floats": loss(
        lambda y, target: (1.0, 2.0), r"^loss_fn returned .*float.*; return a scalar tensor"
    ),
    "loss_weight_none": loss(
        lambda y, target: (F.mse_loss(y, target), None),
        r"^loss_fn returned .*None.*; return a scalar tensor .*weight",
    ),
    "loss_weight_not_scalar": loss(
        lambda y, target: (F.mse_loss(y, target), torch.ones(2)),
        r"^loss_fn returned a weight of shape \(2,\); return",
    ),
    "loss_weight_with_graph": loss(
        lambda y, target: (F.mse_loss(y, target), y.square().sum()),
        r"^loss_fn returned \(loss_sum, weight\) whose weight requires grad; detach it",
    ),
    "loss_scalar_then_pair": loss(
        scalar_then_pair(), r"^loss_fn returned a scalar once and a pair .*must always return"
    ),
    "loss_random": loss(noisy_loss, r"^loss_fn drew random numbers; .*draw them in the module"),
    # updates
    "optimizer_name": argument(
        r"^optimizer='adam' is not a torch\.optim\.Optimizer; pass one, or None", optimizer="adam"
    ),
    "optimizer_class": argument(
        r"^optimizer=.*SGD.* is not a torch\.optim\.Optimizer; pass one", optimizer=torch.optim.SGD
    ),
    "optimizer_lbfgs": Bad(
        lambda bench: bench.make(optimizer=torch.optim.LBFGS(bench.module.parameters())),
        r"^optimizer=LBFGS evaluates the loss several times .*first-order optimizer",
    ),
    "clip_zero": argument(r"^clip_grad_norm=0 must be a positive number", clip_grad_norm=0),
    "clip_negative": argument(
        r"^clip_grad_norm=-1\.0 must be a positive number", clip_grad_norm=-1.0
    ),
    "clip_nan": argument(
        r"^clip_grad_norm=nan must be a positive number", clip_grad_norm=float("nan")
    ),
    "clip_string": argument(r"^clip_grad_norm='1' must be a positive number", clip_grad_norm="1"),
    "clip_bool": argument(r"^clip_grad_norm=True must be a positive number", clip_grad_norm=True),
    "clip_without_optimizer": argument(
        r"^clip_grad_norm(=1\.0)? needs an optimizer", clip_grad_norm=1.0, optimizer=None
    ),
    "scheduler_without_optimizer": Bad(
        lambda bench: bench.make(
            optimizer=None, scheduler=torch.optim.lr_scheduler.StepLR(bench.optimizer, 1)
        ),
        r"^scheduler needs an optimizer",
    ),
    "scheduler_number": argument(r"^scheduler=0\.1 has no step\(\); pass", scheduler=0.1),
    "scaler_number": argument(r"^scaler=2\.0 is not a torch\.amp\.GradScaler", scaler=2.0),
    "autocast_int": argument(
        r"^autocast_dtype=torch\.int32 must be a floating dtype such as", autocast_dtype=torch.int32
    ),
    "autocast_string": argument(
        r"^autocast_dtype='bfloat16' must be a floating dtype such as", autocast_dtype="bfloat16"
    ),
    "time_dim_negative": argument(r"^time_dim=-1 must be an integer of at least 0", time_dim=-1),
    "time_dim_float": argument(r"^time_dim=1\.0 must be an integer of at least 0", time_dim=1.0),
    "time_dim_too_large": Bad(
        lambda bench: whole_segments(bench, 5),
        r"^time_dim=5 does not exist in inputs of shape",
        when="within",
    ),
    # tensors
    "sequence_lengths": Bad(
        lambda bench: TensorSequence(bench.inputs, bench.targets[1:]),
        r"^targets of shape \(5, 2, 3\) has 5 steps on time_dim=0, inputs have 6",
    ),
    "sequence_empty": Bad(
        lambda bench: TensorSequence(bench.inputs[:0]), r"^inputs .*empty.*at least one step"
    ),
    "sequence_of_nothing": Bad(lambda _: TensorSequence([]), r"^inputs=\[\] holds no tensor"),
    "sequence_of_numbers": Bad(
        lambda _: TensorSequence([1.0, 2.0]), r"^inputs=\[1\.0, 2\.0\] holds no tensor"
    ),
    "sequence_time_dim": Bad(
        lambda bench: TensorSequence(bench.inputs, bench.targets, time_dim=3),
        r"^time_dim=3 does not exist in inputs of shape \(6, 2, 2\)",
    ),
    "sequence_time_dim_negative": Bad(
        lambda bench: TensorSequence(bench.inputs, time_dim=-1), r"^time_dim=-1 "
    ),
    "sequence_time_dim_string": Bad(
        lambda bench: TensorSequence(bench.inputs, time_dim="0"), r"^time_dim='0' "
    ),
    "weight_too_short": Bad(
        lambda bench: TensorSequence(bench.inputs, bench.targets, weight=torch.ones(5)),
        r"^weight of shape \(5,\) must be \[6\] or \[6, lanes\]",
    ),
    "weight_of_three_dimensions": Bad(
        lambda bench: TensorSequence(bench.inputs, bench.targets, weight=torch.ones(6, 2, 3)),
        r"^weight of shape \(6, 2, 3\) must be \[6\] or \[6, lanes\]",
    ),
    "weight_negative": Bad(
        lambda bench: TensorSequence(bench.inputs, bench.targets, weight=-torch.ones(6)),
        r"^weight must be finite and not negative; zero means absent",
    ),
    "weight_nan": Bad(
        lambda bench: TensorSequence(bench.inputs, weight=torch.full((6,), float("nan"))),
        r"^weight must be finite and not negative",
    ),
    "weight_string": Bad(
        lambda bench: TensorSequence(bench.inputs, bench.targets, weight="ones"), r"^weight='ones' "
    ),
    "weight_of_too_many_lanes": sequence(
        lambda b: TensorSequence(b.inputs, b.targets, weight=torch.ones(6, 3) / 2),
        r"^weight.*\b3\b.*lanes?",
        "within",
    ),
    "weight_of_too_few_lanes": sequence(
        lambda b: TensorSequence(b.inputs, b.targets, weight=torch.ones(6, 1) / 2),
        r"^weight.*\b1\b.*lanes?",
        "within",
    ),
    # sequences
    "tensor_as_sequence": sequence(
        lambda bench: bench.inputs,
        r"^sequence is a Tensor of shape \(6, 2, 2\); wrap it: TensorSequence\(inputs, targets\)",
    ),
    "array_as_sequence": sequence(
        lambda bench: bench.inputs.numpy(), r"^sequence is a ndarray of shape \(6, 2, 2\); wrap it"
    ),
    "array_of_texts": Bad(
        lambda _: TensorSequence(np.array(["a", "b"])),
        r"^a numpy array of dtype <U1, shape \(2,\) .*cannot be read as a tensor; convert or copy",
    ),
    "array_in_reverse": Bad(
        lambda bench: TensorSequence(bench.inputs.numpy()[::-1]),
        r"^a numpy array of dtype float64, .* cannot be read as a tensor; convert or copy",
    ),
    "number_as_sequence": sequence(lambda _: 5, r"^sequence=5 is neither an iterable of"),
    "steps_without_targets": sequence(
        lambda bench: list(bench.inputs),
        r"^step 0 of the sequence is a Tensor, not a pair .*TensorSequence",
        "within",
    ),
    "steps_of_three": sequence(
        lambda bench: ((x, y, y) for x, y in bench.steps()),
        r"^step 0 of the sequence is a tuple( of 3)?, not a pair \(input, target\)",
        "within",
    ),
    "empty_list": sequence(lambda _: [], r"^the sequence is empty; at least one step is needed"),
    "empty_generator": sequence(
        lambda _: iter(()), r"^the sequence is empty; at least one step is needed"
    ),
    "length_too_large": sequence(
        lambda bench: LyingLength(bench.steps(), 8),
        r"^the sequence has length 8 but ended after 6 steps",
        "later",
    ),
    "length_too_small": sequence(
        lambda bench: LyingLength(bench.steps(), 4),
        r"^the sequence has length 4 but.*more",
        "later",
    ),
    "source_reads_too_little": sequence(
        lambda bench: BadSource(bench, lambda x, y: (x[1:], y[1:])),
        r"read\(0, 2\) returned 1 steps on time_dim=0",
        "within",
    ),
    "source_reads_too_much": sequence(ReadsTooMuch, r"read\(0, 2\) returned 3 steps on time_dim=0"),
    "source_reads_unequal_lengths": sequence(
        lambda bench: BadSource(bench, lambda x, y: (x, y[1:])),
        r"read\(0, 2\) returned .*(1 steps|1 targets|targets of shape \(1, 2, 3\))",
        "within",
    ),
    "source_reads_a_tensor": sequence(
        lambda bench: BadSource(bench, lambda x, y: x),
        r"read\(0, 2\) must return \(inputs, targets\), not (a )?Tensor",
        "within",
    ),
    "source_reads_nothing": sequence(
        lambda bench: BadSource(bench, lambda x, y: None),
        r"read\(0, 2\) must return \(inputs, targets\), not (None|NoneType)",
        "within",
    ),
    "source_time_dim": sequence(
        lambda bench: BadSource(bench, time_dim=4), r"time_dim=4 does not exist in inputs", "within"
    ),
    "source_weights_too_short": sequence(
        lambda bench: BadSource(bench, weight=lambda n: torch.ones(n - 1)),
        r"weight.*\(1,\).*2",
        "within",
    ),
    "source_weights_negative": sequence(
        lambda bench: BadSource(bench, weight=lambda n: -torch.ones(n)),
        r"weight.*not negative",
        "within",
    ),
    "inputs_with_graph": sequence(
        lambda bench: TensorSequence(inputs_with_graph(bench), bench.targets),
        r"^(the )?inputs .*graph.*(detach.*module|module.*detach)",
        "within",
    ),
    "step_inputs_with_graph": sequence(
        lambda bench: list(zip(inputs_with_graph(bench), bench.targets, strict=True)),
        r"^(the )?inputs? .*graph.*(detach.*module|module.*detach)",
        "within",
    ),
    "targets_with_graph": sequence(
        lambda bench: TensorSequence(bench.inputs, bench.targets.clone().requires_grad_() * 2.0),
        r"^(the )?targets .*graph.*detach",
        "within",
    ),
    "weight_without_targets": Bad(
        lambda bench: TensorSequence(bench.inputs, None, weight=torch.ones(6)),
        r"^weight was given without targets",
    ),
    "inference_inputs": sequence(
        lambda bench: TensorSequence(made_in_inference_mode(bench.inputs), bench.targets),
        r"^inputs hold tensors of torch\.inference_mode.*clone",
    ),
    "open_file_as_sequence": sequence(
        lambda _: io.StringIO("text"), r"^sequence=.* is an open file; pass steps"
    ),
    "mapped_bytes_as_sequence": sequence(
        lambda _: mmap.mmap(-1, 16),
        r"^sequence is an mmap\.mmap, .* map_file\(path, dtype, step_shape\) or np\.memmap",
    ),
    "mapped_bytes_as_inputs": Bad(
        lambda _: TensorSequence(mmap.mmap(-1, 16)), r"^inputs=<mmap.* holds no tensor"
    ),
    "mapped_bytes_as_array": Bad(
        lambda _: ArraySequence(mmap.mmap(-1, 16)), r"^inputs is a mmap; pass a numpy array"
    ),
    "loss_weight_negative": loss(
        lambda y, target: (F.mse_loss(y, target), -1.0),
        r"^loss_fn returned weights that sum to -2\.0 .*finite and not negative",
    ),
    "loss_detached": loss(
        lambda y, target: F.mse_loss(y, target).detach(),
        r"^loss_fn returned losses without a graph .*must not be detached",
    ),
    # weights that change while a window is being differentiated
    "stepped_in_a_hook": stepping_inside("replay", "step"),
    "stepped_in_a_hook_retain": stepping_inside("replay", "retain"),
    "stepped_in_a_hook_checkpoint": stepping_inside("checkpoint", "step"),
}


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_raises_one_helpful_line(name: str) -> None:
    row, bench = TABLE[name], Bench()
    with pytest.raises(row.error) as caught:
        row.run(bench)
    message = str(caught.value)
    assert re.search(row.message, message), message
    assert "\n" not in message
    if row.when == "before":
        assert not bench.changes()
    if row.when == "within":
        assert not {name for name in bench.changes() if not name.startswith("gradient")}


def test_argument_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="k1=0"):
        Bench().make(k1=0)


def test_after_an_error_the_same_tbptt_runs() -> None:
    bench = Bench()
    tbptt = bench.make()
    with pytest.raises(ArgumentError):
        tbptt.train(bench.inputs)
    with pytest.raises(ArgumentError):
        tbptt.train(list(bench.inputs))
    assert tbptt.train(bench.sequence()).num_windows == 3


# oneDNN has nn.LSTM in bfloat16 for some CPUs only.


@pytest.mark.parametrize("runs", [True, False])
def test_an_lstm_that_the_cpu_cannot_run_under_autocast_is_refused(
    monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    monkeypatch.setattr("tbptt_ckpt.module.recurrence._cpu_runs_lstm", lambda dtype: runs)
    bench = Bench()
    bench.make(module=bench.watch(lstm()))
    for fits in (nn.GRU(2, 3), nn.LSTMCell(2, 3), nn.LSTM(2, 3, device="meta")):
        check_autocast(fits, torch.bfloat16)
    refused = pytest.raises(
        ArgumentError, match=r"^autocast_dtype=torch\.bfloat16 does not fit module: .*float32"
    )
    with nullcontext() if runs else refused:
        bench.make(module=bench.watch(lstm()), autocast_dtype=torch.bfloat16)
    assert not bench.changes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_said_of_an_lstm_under_autocast_is_what_torch_does(dtype: torch.dtype) -> None:
    module, cannot = nn.Sequential(nn.LSTM(2, 3)), nullcontext()
    random = torch.get_rng_state()
    try:
        check_autocast(module, dtype)
    except ArgumentError:
        cannot = pytest.raises(RuntimeError)
    assert torch.equal(torch.get_rng_state(), random)
    with cannot, torch.autocast("cpu", dtype=dtype):
        module(torch.zeros(4, 1, 2))


# A cuDNN recurrent layer keeps what its backward needs in training mode only.


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_in_eval_mode_are_refused_on_cudnn_only(layer: Any) -> None:
    inner = layer(2, 3)
    owner = nn.Sequential(nn.Linear(2, 2), inner)
    with torch.backends.cudnn.flags(enabled=True):
        check_differentiable(owner, device_types={"cuda"})
        owner.eval()
        check_differentiable(owner, device_types={"cpu"})
        check_differentiable(owner)
        with pytest.raises(ArgumentError, match=rf"1 is a cuDNN nn\.{layer.__name__} in eval mode"):
            check_differentiable(owner, device_types={"cuda"})
        inner.train()
        check_differentiable(owner, device_types={"cuda"})
    inner.eval()
    with torch.backends.cudnn.flags(enabled=False):
        check_differentiable(owner, device_types={"cuda"})


def test_eval_mode_is_found_before_the_first_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the module went to eval mode after the constructor saw it."""
    bench = Bench()
    own = bench.watch(lstm())
    tbptt = bench.make(module=own)
    own.eval()
    monkeypatch.setattr("tbptt_ckpt.engine.tbptt.check_differentiable", _as_on_cuda)
    with pytest.raises(ArgumentError, match="eval mode"):
        tbptt.train(bench.sequence())
    assert not bench.changes()


def _as_on_cuda(module: object) -> None:
    check_differentiable(module, device_types={"cuda"})


def test_a_lazy_module_runs_once_it_has_made_a_step() -> None:
    bench, module = Bench(), LazyCell()
    module(bench.inputs[0], None)
    bench.train(module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    assert module.readout.weight.grad.any()


# Weights that change inside a window, and inference mode.


@pytest.mark.parametrize("executor", EXECUTORS)
def test_weights_changed_by_the_module_are_noticed(executor: str) -> None:
    class Restless(Cell):
        def result(self, y: Tensor, h: Tensor) -> Any:
            with torch.no_grad():
                self.cell.readout.bias.add_(1e-3)
            return y, h

    with pytest.raises(StaleWeightsError, match="between windows"):
        Bench().train(module=Restless(), optimizer=None, executor=executor, strategy="step")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_weights_of_a_function_are_watched_through_the_optimizer(executor: str) -> None:
    bench = Bench()

    def step(x: Tensor, h: Tensor) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                bench.module.readout.bias.add_(1e-3)
        return bench.module(x, h)

    with pytest.raises(StaleWeightsError, match="between windows"):
        bench.train(module=step, executor=executor, strategy="step")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_stepping_between_windows_is_fine(executor: str) -> None:
    bench, other = Bench(), Bench()
    other.train(executor=executor)
    bench.optimizer.zero_grad()
    for _ in bench.make(optimizer=None, executor=executor).windows(bench.sequence()):
        bench.optimizer.step()
        bench.optimizer.zero_grad()
    for one, another in zip(bench.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_inference_mode_is_refused_or_makes_no_difference(executor: str) -> None:
    bench, other = Bench(), Bench()
    other.make(executor=executor).train(other.sequence())
    refusal = None
    try:
        with torch.inference_mode():
            bench.make(executor=executor).train(bench.sequence())
    except TbpttError as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(r"^[^\n]*inference_mode[^\n]*$", refusal), refusal
        assert not bench.changes()
        return
    for one, another in zip(bench.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(one, another)
