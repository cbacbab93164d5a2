"""A training run that finds no memory: no step is lost, none is done twice."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from devices import here
from grids import later
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_jobs import EXACT, ROUNDING, Injected, Job, assert_equal

from tbptt_ckpt import OutOfMemory, OutOfMemoryError, TbpttError, TbpttWarning


class Scarce(TorchDispatchMode):
    """The n-th operation that would allocate a tensor finds no memory."""

    ERRORS = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    )

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__()
        self.at, self.times, self.count, self.fired = at, times, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t) for t in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        if any(id(t) not in given for t in _storages(result)):
            self.count += 1
            if self.at <= self.count < self.at + self.times:
                self.fired += 1
                raise copy.copy(self.ERRORS[self.at % len(self.ERRORS)])
        return result


def _storages(tree: Any) -> list[Any]:
    if isinstance(tree, Tensor):
        return [_Key(tree.untyped_storage().data_ptr())]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [storage for item in tree for storage in _storages(item)]
    return []


class _Key:
    """Equal addresses have one identity."""

    _known: dict[int, _Key] = {}  # noqa: RUF012

    def __new__(cls, address: int) -> _Key:
        return cls._known.setdefault(address, super().__new__(cls))


OOM_JOBS = {
    "refresh": Job(),
    "stale": Job(engine={"overlap": "stale"}),
    "no overlap, clipped": Job(k2=2, engine={"clip_grad_norm": 0.1}),
    "accumulated": Job(optimizer=None),
    "segments": Job(
        module=lambda: nn.LSTM(cases.WIDTH_IN, cases.WIDTH), engine={"executor": "checkpoint"}
    ),
}
SOME_JOBS = [job if job in ("stale", "accumulated") else later(job) for job in OOM_JOBS]


class TestOutOfMemory:
    @pytest.mark.parametrize("name", SOME_JOBS)
    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    @pytest.mark.usefixtures("device")
    def test_at_every_eleventh_allocation_no_step_is_lost_or_done_twice(
        self, name: str, injected: Injected
    ) -> None:
        self.exhaust(OOM_JOBS[name], 11, injected)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OOM_JOBS)
    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    def test_at_every_allocation_no_step_is_lost_or_done_twice(
        self, name: str, injected: Injected
    ) -> None:
        self.exhaust(OOM_JOBS[name], 1, injected)

    def exhaust(self, job: Job, stride: int, injected: Injected) -> None:
        """Let every `stride`-th allocation of a run find no memory, one in each run."""
        expected = job.undisturbed()
        count = 1 - stride
        while True:
            count += stride
            trainer, _, listener = job.build()
            with Scarce(count) as scarce:
                trainer.train()
            if not scarce.fired:
                break
            injected("out of memory on the device")
            assert "out_of_memory" in listener.kinds()
            assert_equal(job.account(trainer, listener), expected, ROUNDING, str(count))
        assert count > 60

    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    @pytest.mark.usefixtures("device")
    def test_plans_get_smaller_until_one_fits(self, injected: Injected) -> None:
        job = Job(num_steps=64, k1=64, k2=64, module=cases.TanhCell)
        expected = job.undisturbed()
        trainer, _, listener = job.build()
        fits = 4
        run = trainer.tbptt.parts.runner.run

        def run_or_fail(blocks: Any, resets: Any, start: int, stop: int, *args: Any) -> Any:
            if torch.is_grad_enabled() and stop - start > fits:
                injected("out of memory on the device")
                raise MemoryError
            return run(blocks, resets, start, stop, *args)

        trainer.tbptt.parts.runner.run = run_or_fail  # type: ignore[method-assign]
        trainer.train()
        assert str(trainer.tbptt.parts.budget.strategy) == "uniform:4"
        assert [n.figures["attempt"] for n in listener.notices] == [1, 2, 3, 4]
        assert_equal(job.account(trainer, listener), expected, ROUNDING)

    @pytest.mark.filterwarnings("ignore::tbptt_ckpt.errors.TbpttWarning")
    @pytest.mark.usefixtures("device")
    def test_retries_are_bounded_and_the_error_has_the_figures(self, injected: Injected) -> None:
        job = Job()
        trainer, module, listener = job.build(out_of_memory=OutOfMemory(retries=3))
        before = copy.deepcopy(module.state_dict())
        with Scarce(1, times=10**9) as scarce, pytest.raises(OutOfMemoryError) as caught:
            trainer.train()
        assert scarce.fired
        injected("out of memory on the device", scarce.fired)
        message = str(caught.value)
        assert "window 0, steps 0 to 2, does not fit" in message
        assert "after 4 tries" in message
        assert f"free on {here()}" in message
        assert "resident" in message
        assert isinstance(caught.value, MemoryError)
        assert_equal(module.state_dict(), before, EXACT)
        assert trainer.num_steps == 0
        trainer.train()  # memory is back
        expected = job.undisturbed()
        assert_equal(job.account(trainer, listener), expected, ROUNDING)

    def test_an_update_cut_short_without_a_copy_is_an_error(self, injected: Injected) -> None:
        job = Job()
        expected = job.undisturbed()
        outcomes = set()
        count = 0
        while True:
            count += 7
            trainer, _, listener = job.build(out_of_memory=OutOfMemory(protect_update=False))
            with Scarce(count) as scarce, warnings.catch_warnings():
                warnings.simplefilter("ignore", TbpttWarning)
                try:
                    trainer.train()
                except TbpttError as error:
                    outcomes.add(str(error))
            if not scarce.fired:
                break
            injected("out of memory on the device")
            if trainer.num_steps == 5:
                assert_equal(job.account(trainer, listener), expected, ROUNDING)
        assert len(outcomes) == 1
        assert "go on from the last snapshot" in outcomes.pop()

    def test_other_errors_are_not_taken_for_it(self) -> None:
        trainer, module, _ = Job().build()
        module.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()

    def test_for_real_below_a_limit_of_the_address_space(
        self, tmp_path: Path, injected: Injected
    ) -> None:
        """RLIMIT_AS half-way to what the first plan needs: a smaller plan, the same losses."""
        free, limited = free_and_limited(tmp_path)
        assert free["notices"] == []
        injected("out of memory on the device", limited["notices"].count("out_of_memory"))
        assert "retain" in free["strategy"]
        assert limited["strategy"] != free["strategy"]
        assert limited["losses"] == pytest.approx(free["losses"], rel=1e-5)
        assert limited["windows"] == free["windows"] == 3
        assert limited["peak_bytes"] < 0.6 * free["peak_bytes"]


CHILD_WITH_A_LIMIT = """
    import json, os, resource, warnings
    import torch
    from torch import nn
    from tbptt_ckpt import TBPTT, TensorSequence, Trainer

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    steps, lanes, width = 600, 16, 64

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTMCell(8, width), nn.Linear(width, 8)
        def forward(self, x, state):
            h, c = self.cell(x, state)
            return self.head(h), (h, c)

    def memory(name):
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith(name))
        return 1024 * int(line.split()[1])

    class Kinds(list):
        def on_window(self, event): pass
        def on_update(self, event): pass
        def on_notice(self, event): self.append(event.kind)
        def resume_at(self, steps): pass
        def flush(self): pass
        def close(self): pass

    def run(steps, kinds):
        torch.manual_seed(0)
        module = Cell()
        inputs = torch.randn(steps, lanes, 8)
        # A kernel's code is made for each length of a segment, and stays in the address space.
        tbptt = TBPTT(module, nn.functional.mse_loss, steps // 3, None,
                      torch.optim.Adam(module.parameters(), 0.01), strategy="retain",
                      time_batching=False)
        trainer = Trainer(tbptt, TensorSequence(inputs, inputs.roll(1, 0)), events=[kinds])
        losses = [float(window.loss) for window in trainer.windows()]
        return losses, str(tbptt.parts.budget.strategy)

    def report(allowed):
        before = memory("VmSize")
        if allowed:
            resource.setrlimit(resource.RLIMIT_AS, (before + allowed, before + allowed))
        kinds = Kinds()
        losses, strategy = run(steps, kinds)
        peak = memory("VmPeak") - before
        print(json.dumps({"losses": losses, "strategy": strategy, "notices": kinds,
                          "windows": len(losses), "peak_bytes": peak}), flush=True)
        return peak

    run(30, Kinds())  # all that is loaded lazily is there
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, str(report(0)).encode())
        os._exit(0)
    os.wait()
    report(int(os.read(read, 100)) // 2)
"""


def free_and_limited(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same run twice, the second with half of what the first took at its most."""
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD_WITH_A_LIMIT))
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    free, limited = map(json.loads, done.stdout.splitlines())
    return free, limited
