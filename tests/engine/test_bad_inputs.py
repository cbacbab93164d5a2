"""A table of bad inputs. Each raises one line that says what the user wrote and what would work.

What is refused before the first window leaves weights, gradients, generators and buffers as
they were; what is refused inside the first window leaves all of these but the gradients,
which the window has cleared.
"""

from __future__ import annotations

import io
import mmap
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from broken_parts import (
    AnotherStateLater,
    Bad,
    BadSource,
    Bench,
    BufferUnderTwoNames,
    BufferWithGraph,
    LastOutputOnly,
    LazyCell,
    LyingLength,
    Memory,
    OutputOnly,
    ReadsTooMuch,
    StateInAnAttribute,
    StateInAnObject,
    StateInAQueue,
    ThreeResults,
    argument,
    in_place,
    inputs_with_graph,
    loss,
    made_in_inference_mode,
    module,
    noisy_loss,
    scalar_then_pair,
    schedule,
    sequence,
    stepping_inside,
    whole_segments,
    with_graph_in_init_state,
    with_inference_state,
)
from cases import lstm, random_state
from torch import nn

from tbptt_ckpt import (
    ArgumentError,
    ArraySequence,
    Revolve,
    TbpttError,
    TensorSequence,
    Uniform,
    tbptt_windows,
)
from tbptt_ckpt.module.recurrence import check_differentiable
from tbptt_ckpt.schedule import Advance, Differentiate, Drop, Keep

TABLE: dict[str, Bad] = {
    # k1 and k2
    "k1_zero": argument(r"^k1=0 must be an integer of at least 1", k1=0),
    "k1_negative": argument(r"^k1=-3 must be an integer of at least 1", k1=-3),
    "k1_float": argument(r"^k1=2\.0 must be an integer", k1=2.0),
    "k1_bool": argument(r"^k1=True must be an integer", k1=True),
    "k1_string": argument(r"^k1='2' must be an integer", k1="2"),
    "k1_none": argument(r"^k1=None must be an integer", k1=None),
    "k2_zero": argument(r"^k2=0 must be an integer of at least 1, or 'auto', or None", k2=0),
    "k2_negative": argument(r"^k2=-1 must be an integer of at least 1, or 'auto', or None", k2=-1),
    "k2_float": argument(r"^k2=4\.5 must be an integer of at least 1, or 'auto', or None", k2=4.5),
    "k2_bool": argument(
        r"^k2=False must be an integer of at least 1, or 'auto', or None", k2=False
    ),
    "k2_string": argument(
        r"^k2='all' must be an integer of at least 1, or 'auto', or None", k2="all"
    ),
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
        r"^memory_budget=\[1\] is not a size: write bytes .*512MiB.* part of the free",
        memory_budget=[1],
    ),
    "memory_budget_of_nested_checkpoints": argument(
        r"^executor='checkpoint' holds the graph .*executor='replay'",
        memory_budget="512MiB",
        executor="checkpoint",
    ),
    "costs_of_another_type": argument(r"^costs=3 must be Costs, or None", costs=3),
    # modules
    "module_not_callable": argument(
        r"^module=3 must be callable: a function or a module", module=3
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
    "module_meta": argument(
        r"^module: 'weight_ih' is on the meta device, .* call \.to_empty\(device='cpu'\)",
        module=nn.GRUCell(2, 3, device="meta"),
        optimizer=None,
    ),
    "loss_lazy": argument(
        r"^loss_fn: 'weight' belongs to a lazy layer .* run one step", loss_fn=nn.LazyLinear(1)
    ),
    "per_step_string": argument(r"^per_step='yes' must be True or False, or None", per_step="yes"),
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
            r"^a tensor with the graph of an earlier run was used: .*in the state.*lifted\(",
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
    "loss_fn_not_callable": argument(r"^loss_fn=None must be callable", loss_fn=None),
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
        r"^autocast_dtype='bfloat16' must be a torch.dtype", autocast_dtype="bfloat16"
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
        lambda bench: bench.inputs.cpu().numpy(),
        r"^sequence is a ndarray of shape \(6, 2, 2\); wrap it",
    ),
    "array_of_texts": Bad(
        lambda _: TensorSequence(np.array(["a", "b"])),
        r"^a numpy array of dtype <U1, shape \(2,\) .*cannot be read as a tensor; convert or copy",
    ),
    "array_in_reverse": Bad(
        lambda bench: TensorSequence(bench.inputs.cpu().numpy()[::-1]),
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
@pytest.mark.usefixtures("device")
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


@pytest.mark.usefixtures("device")
def test_after_an_error_the_same_tbptt_runs() -> None:
    bench = Bench()
    tbptt = bench.make()
    with pytest.raises(ArgumentError):
        tbptt.train(bench.inputs)
    with pytest.raises(ArgumentError):
        tbptt.train(list(bench.inputs))
    assert tbptt.train(bench.sequence()).num_windows == 3
