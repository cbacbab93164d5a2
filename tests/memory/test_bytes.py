"""Bytes of trees, resident memory, sizes as text, what is free."""

import threading
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from measured_regions import MIB, blob, measure, needs_proc, run_script
from torch import nn

from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.memory.available import free_memory
from tbptt_ckpt.memory.meter import peak_memory
from tbptt_ckpt.memory.resident import RssSampler, rss_bytes
from tbptt_ckpt.memory.sizes import format_bytes, parse_bytes
from tbptt_ckpt.memory.storages import tensor_bytes

# --- bytes of trees -----------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


@dataclass
class Box:
    tensor: torch.Tensor
    note: str = ""


def test_a_storage_counts_once_and_whole():
    base = blob(100)
    assert tensor_bytes(base[:10]) == 100
    assert tensor_bytes(base, base.view(10, 10), [base.t()]) == 100


def test_nested_trees_are_searched():
    tree = {"a": [blob(1), (blob(2), None)], "b": Pair(Box(blob(4)), {"c": blob(8)}), "d": 3}
    assert tensor_bytes(tree) == 15
    assert tensor_bytes() == tensor_bytes(None, "text") == 0


def test_modules_gradients_and_optimizers():
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
    weights, buffers = 24 + 16, 16 + 8
    assert tensor_bytes(module) == weights + buffers
    module(torch.randn(4, 3)).sum().backward()
    assert tensor_bytes(module) == weights + buffers
    assert tensor_bytes(module, grads=True) == 2 * weights + buffers
    optimizer = torch.optim.Adam(module.parameters())
    assert tensor_bytes(optimizer) == 0
    optimizer.step()
    assert tensor_bytes(optimizer) == 2 * weights + 3 * 4  # two moments, a step count each
    assert tensor_bytes(module, optimizer) == tensor_bytes(module) + tensor_bytes(optimizer)


def test_tied_weights_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert tensor_bytes(nn.ModuleList([first, second])) == tensor_bytes([first], {second}) == 64


def test_sparse_and_meta_tensors():
    sparse = torch.eye(10).to_sparse()
    assert tensor_bytes(sparse) == 2 * 10 * 8 + 10 * 4
    assert tensor_bytes(torch.empty(10, device="meta"), torch.empty(5, device="meta")) == 60


def test_modules_that_have_no_weights_yet_hold_nothing():
    module = nn.LazyLinear(3)
    assert tensor_bytes(module) == 0
    assert measure(lambda _: None, held=None).net_bytes == 0  # looks at every live tensor


def test_looking_is_invisible_to_modes_and_subclasses():
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    tensor = torch.ones(4).as_subclass(Refusing)
    assert tensor_bytes([tensor], grads=True) == 16
    assert measure(lambda _: None, held=None).net_bytes == 0


def test_a_tensor_made_of_tensors_holds_those():
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert tensor_bytes(ragged) == 5 * 4 + 3 * 8  # values and offsets


# --- resident memory ----------------------------------------------------------------------


def test_resident_bytes_agree_with_psutil():
    ours, theirs = rss_bytes(), psutil.Process().memory_info().rss
    assert ours.total == pytest.approx(theirs, rel=0.05)
    assert 0 < ours.anonymous <= ours.total
    assert ours.anonymous + ours.file_backed <= ours.total


def test_resident_bytes_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr("tbptt_ckpt.memory.resident._STATUS", tmp_path / "missing")
    assert rss_bytes().total == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    with RssSampler(0.001) as rss:
        time.sleep(0.01)
    assert rss.source == "sampled"
    assert rss.peak_bytes > 0


def test_a_sampler_without_a_thread_sees_both_ends(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with RssSampler() as rss:
        pass
    assert rss.peak_bytes >= rss.peak_anonymous_bytes > 0


def test_a_sampler_that_finds_no_memory_for_a_reading_goes_on(monkeypatch):
    readings = []

    def read():
        readings.append(rss_bytes())
        if len(readings) in (2, 3):
            raise MemoryError
        return readings[-1]

    monkeypatch.setattr("tbptt_ckpt.memory.resident.rss_bytes", read)
    with RssSampler(0.001) as rss:
        for _ in range(2000):
            if len(readings) < 6:
                time.sleep(0.001)
    assert len(readings) >= 6
    assert rss.peak_bytes > 0


@needs_proc
def test_the_sampler_sees_a_spike_that_is_gone_again():
    before = rss_bytes()
    with RssSampler(0.001) as rss:
        spike = bytearray(64 * MIB)
        spike[::4096] = b"x" * len(spike[::4096])
        time.sleep(0.1)
        del spike
    assert rss.peak_anonymous_bytes >= before.anonymous + 60 * MIB
    assert rss.peak_bytes >= rss.peak_anonymous_bytes
    assert not any(thread.name == "rss-sampler" for thread in threading.enumerate())


@needs_proc
def test_a_record_high_is_taken_from_the_kernel():
    """A spike between two samples is not missed where the kernel's mark rises."""
    script = """
        import json
        from tbptt_ckpt.memory.resident import RssSampler, rss_bytes
        before = rss_bytes()
        with RssSampler(interval_seconds=3600) as rss:
            spike = bytearray(300 << 20)
            spike[::4096] = b"x" * len(spike[::4096])
            del spike
        print(json.dumps([rss.source, rss.peak_bytes - before.total]))
    """
    source, rise = run_script(script)
    assert source == "VmHWM"
    assert rise >= 290 * MIB


def test_a_region_reports_resident_memory_unless_told_not_to():
    with peak_memory() as meter:
        pass
    assert meter.rss_peak_bytes > 10 * MIB
    assert meter.rss_source in ("VmHWM", "sampled")
    meter = measure(lambda _: None)
    assert (meter.rss_peak_bytes, meter.rss_source) == (None, None)


# --- sizes as text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1023.94, "1023.9 KiB"),
        (1024 * 1023.96, "1.0 MiB"),
        (12.3 * MIB, "12.3 MiB"),
        (-(1024**3), "-1.0 GiB"),
        (2**40, "1.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_bytes_read_well(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        (0, 0),
        (12345, 12345),
        ("4096", 4096),
        ("4096 B", 4096),
        ("512MiB", 512 * MIB),
        (" 1.5 gib ", 3 * 2**29),
        ("2KiB", 2048),
        ("1TiB", 2**40),
        ("2kB", 2000),
        ("200 MB", 200_000_000),
        ("1GB", 10**9),
        ("0.1KiB", 102),
        (".5KB", 500),
        ("8G", 8 * 2**30),
        ("512m", 512 * MIB),
        ("8e9", 8 * 10**9),
        ("1.5E+3 KB", 1_500_000),
    ],
)
def test_sizes_are_understood(value, num_bytes):
    parsed = parse_bytes(value)
    assert parsed == num_bytes
    assert type(parsed) is int


@pytest.mark.parametrize(
    "value", [-1, "-1MiB", "nan", "inf", "", "MiB", "512Q", "1e-9", "1,5GiB", "9e999"]
)
def test_nonsense_sizes_are_named(value):
    with pytest.raises(ArgumentError, match=r"memory_budget=.* is not a size: .*512MiB"):
        parse_bytes(value, "memory_budget")


@pytest.mark.parametrize("value", [True, None, 1.5, float("nan"), b"1MiB", [1]])
def test_sizes_of_other_types_are_named(value):
    with pytest.raises(ArgumentError, match="write bytes as an integer"):
        parse_bytes(value)


# --- what is free -------------------------------------------------------------------------


def write_tree(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.fixture
def _ram(monkeypatch):
    """A machine with 1,000,000 bytes of RAM available."""
    memory = namedtuple("memory", "available")(1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
V1_UNLIMITED = 9223372036854771712


@pytest.mark.usefixtures("_ram")
@pytest.mark.parametrize(
    ("files", "free"),
    [
        pytest.param({}, 1_000_000, id="no groups"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/job/memory.max": 5000,
                f"{V2}/job/memory.current": 2000,
            },
            3000,
            id="v2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/job/memory.max": "max",
                f"{V2}/job/memory.current": 2000,
            },
            1_000_000,
            id="v2 unlimited",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/job/memory.max": 5000,
                f"{V2}/job/memory.high": 4000,
                f"{V2}/job/memory.current": 2000,
                f"{V2}/job/memory.stat": "anon 500\ninactive_file 1500\nactive_file 10",
            },
            3500,
            id="v2 throttled, with droppable cache",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/slice/job",
                f"{V2}/slice/job/memory.max": 5000,
                f"{V2}/slice/job/memory.current": 100,
                f"{V2}/slice/memory.max": 6000,
                f"{V2}/slice/memory.current": 5900,
            },
            100,
            id="v2, the parent is fuller",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/../host/path",
                f"{V2}/memory.max": 5000,
                f"{V2}/memory.current": 1,
            },
            4999,
            id="v2 in a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n0::/",
                f"{V1}/job/memory.limit_in_bytes": 5000,
                f"{V1}/job/memory.usage_in_bytes": 2000,
                f"{V1}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 700",
                f"{V1}/memory.limit_in_bytes": V1_UNLIMITED,
                f"{V1}/memory.usage_in_bytes": 9999,
            },
            3700,
            id="v1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu,memory:/docker/abc",
                f"{V1}/memory.limit_in_bytes": 5000,
                f"{V1}/memory.usage_in_bytes": 4000,
            },
            1000,
            id="v1 in a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/job",
                f"{V2}/unified/job/memory.max": 5000,
                f"{V2}/unified/job/memory.current": 6000,
            },
            0,
            id="hybrid, already over",
        ),
    ],
)
def test_free_memory_heeds_the_container(tmp_path, files, free):
    assert free_memory(root=write_tree(tmp_path, files)) == free


def test_free_memory_of_this_machine():
    assert 0 < free_memory() <= psutil.virtual_memory().total
    assert free_memory("cpu") > 0
