"""Does every promise hold on an accelerator?

    python -m benchmarks.accelerator --json FILE

Under eight minutes on one H100, also from a tree that is not installed. A check a line, and in the
file with its figures. On a CPU what can run runs, at tiny sizes, and the rest says why it does not.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.accelerator.bench import Bench
from benchmarks.accelerator.check import FAIL, Check, Section, promised, skipped
from benchmarks.accelerator.commands import commands
from benchmarks.accelerator.exhaustion import out_of_memory, small_device
from benchmarks.accelerator.gradients import autocast, precision, randomness, truth
from benchmarks.accelerator.launches import kernels, waits
from benchmarks.accelerator.memory import budgets, longest, peaks
from benchmarks.accelerator.states import states_elsewhere
from benchmarks.accelerator.times import compiled, graphs, times
from benchmarks.report import add_output_arguments, print_origin, write_result
from tbptt_ckpt.devices import accelerator
from tbptt_ckpt.profiling.environment import describe_environment

SECONDS = 450.0
# What decides whether anything else means something comes first.
SECTIONS: tuple[Section, ...] = (
    *(truth, randomness, precision, autocast, waits, out_of_memory, small_device),
    *(peaks, budgets, states_elsewhere, kernels, times, commands, longest, graphs, compiled),
)


def run_sections(bench: Bench, sections: tuple[Section, ...]) -> Iterator[Check]:
    """Every check of these sections, as it is made."""
    for section in sections:
        name = section.__name__
        for check in _run(bench, section):
            yield replace(check, section=name)
        bench.fresh()


def _run(bench: Bench, section: Section) -> Iterator[Check]:
    if bench.seconds_left < 15:
        yield skipped(section.__doc__ or "", "no time left")
        return
    begun = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
            bench.warm()
            yield from section(bench)
    except Exception as error:  # the other sections are still worth their time
        traceback.print_exc()
        why = (str(error).splitlines() or [""])[0][:200]
        yield promised(False, "the section's end", raised=type(error).__name__, why=why)
    print(f"        {section.__name__}: {time.perf_counter() - begun:.1f} s", flush=True)


def parse_arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_arguments(parser)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="of the sections")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """0 where no promise is broken."""
    arguments = parse_arguments(given)
    torch.set_num_threads(arguments.threads)
    device = accelerator()
    here = torch.device("cpu") if device is None else torch.device(device.type, 0)
    arguments.quick = arguments.quick or device is None
    bench = Bench(here, is_quick=arguments.quick, seconds=arguments.seconds)
    chosen = tuple(section for section in SECTIONS if section.__name__ in arguments.only)
    checks = []
    for check in run_sections(bench, chosen):
        checks.append(check)
        print(check.line(), flush=True)
    environment = describe_environment()
    print()
    print_origin(environment, arguments)
    counts = Counter(check.verdict for check in checks)
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    if arguments.json is not None:
        payload = {"device": str(here), "checks": [check.to_dict() for check in checks]}
        write_result("accelerator", environment, arguments, payload)
    return int(any(check.verdict == FAIL for check in checks))


if __name__ == "__main__":
    raise SystemExit(main())
