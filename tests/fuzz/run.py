# ruff: noqa: NPY002  (the global generator of numpy is put back)
"""Runs cases: `python -m tests.fuzz.run --seed N --cases M` prints counts and failures by kind.

Every case follows from its seed alone: `--seed N --cases 1` runs one again, `--kind NAME` takes
seeds of that kind only.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbptt_ckpt import TBPTT
from tbptt_ckpt.errors import TbpttError

from . import (
    kinds_of_axes,
    kinds_of_batches,
    kinds_of_budgets,
    kinds_of_hooks,
    kinds_of_lanes,
    kinds_of_losses,
    kinds_of_modules,
    kinds_of_parts,
    kinds_of_replays,
    kinds_of_storage,
    kinds_of_windows,
)
from .case import Case, Dice
from .oracle import Loop, Run, Window, leaves
from .sources import source_of

KINDS = {
    **kinds_of_losses.KINDS,
    **kinds_of_replays.KINDS,
    **kinds_of_hooks.KINDS,
    **kinds_of_budgets.KINDS,
    **kinds_of_axes.KINDS,
    **kinds_of_modules.KINDS,
    **kinds_of_batches.KINDS,
    **kinds_of_parts.KINDS,
    **kinds_of_storage.KINDS,
    **kinds_of_windows.KINDS,
    **kinds_of_lanes.KINDS,
}
TOLERANCE = 1e-9  # of the larger of 1 and a tensor's largest entry, in float64

EQUAL, NAMED, RIGHT, REFUSED, WRONG, UNNAMED, MISLABELLED = (
    "equal",  # a legal case
    "refused by name",
    "right all the same",  # a case that might have been refused
    "legal but refused",
    "wrong",
    "refused without a name",
    "fails in the plain loop",
)
FAILURES = (REFUSED, WRONG, UNNAMED, MISLABELLED)


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    case: Case
    outcome: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES


def case_of(seed: int) -> Case:
    """The case of a seed; kinds take turns, so that each has its share."""
    kind = list(KINDS)[seed % len(KINDS)]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = KINDS[kind](Dice(seed))
    case.kind, case.seed = kind, seed
    return case


def run_case(case: Case) -> Verdict:
    """Run a case here and as a plain loop, and judge it by its label."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = random.getstate(), np.random.get_state()
        try:
            found = _found(case)
            expected = _expected(case, found.results if isinstance(found, Run) else [])
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
    if isinstance(expected, Exception) and case.is_legal:
        text = f"{type(expected).__name__}: {str(expected)[:300]}"
        return Verdict(case, MISLABELLED, text)
    if isinstance(found, Exception):
        return _judge_error(case, found)
    if isinstance(expected, Exception):
        return Verdict(case, WRONG, f"no error; plain torch: {expected}")
    if case.run is not None:
        return Verdict(case, WRONG, "no error")
    difference = _difference(found, expected)
    if not difference:
        return Verdict(case, EQUAL if case.is_legal else RIGHT)
    return Verdict(case, WRONG, difference)


def _judge_error(case: Case, error: Exception) -> Verdict:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if case.is_legal:
        return Verdict(case, REFUSED, text)
    named = not case.names or any(name.lower() in str(error).lower() for name in case.names)
    ours = isinstance(error, TbpttError) or not case.names  # no names: torch's own error will do
    return Verdict(case, NAMED if named and ours else UNNAMED, text)


def _expected(case: Case, results: list[Any]) -> Run | Exception:
    try:
        return Loop(case).run(results)
    except Exception as error:  # what is to be refused may well fail in plain torch too
        return error


def _found(case: Case) -> Run | Exception:
    torch.manual_seed(case.seed)
    random.seed(case.seed)
    np.random.seed(case.seed % 2**32)
    try:
        if case.run is not None:
            return case.run()
        return _run_package(case)
    except Exception as error:
        return error


def _run_package(case: Case) -> Run:
    module = case.make()
    first = case.start()
    learned = [leaf for leaf in leaves(first) if leaf.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad] + learned
    optimizer = torch.optim.SGD(parameters, case.lr) if case.has_optimizer else None
    tbptt = TBPTT(module, case.loss.function, case.k1, case.k2, optimizer, **case.options)
    windows, results, state = [], [], None
    with case.around(module):
        for window in tbptt.windows(source_of(case), first):
            grads = [None if p.grad is None else p.grad.clone() for p in parameters]
            loss = None if window.loss is None else float(window.loss)
            windows.append(Window(loss, grads))
            results.append(window)
            state = window.state
    return Run(windows, state, [p.detach().clone() for p in parameters], results)


def _difference(found: Run, expected: Run) -> str:
    """Where two runs differ first, or nothing."""
    if len(found.windows) != len(expected.windows):
        return f"{len(found.windows)} windows, not {len(expected.windows)}"
    for number, (a, b) in enumerate(zip(found.windows, expected.windows, strict=True)):
        if b.grads is None:
            if any(g is not None and bool((g != 0).any()) for g in a.grads or ()):
                return f"window {number} has a gradient, and nothing that counts"
            continue
        if a.loss is None or not abs(a.loss - b.loss) <= TOLERANCE * max(1.0, abs(b.loss)):
            return f"loss of window {number} is {a.loss}, not {b.loss}"
        for place, pair in enumerate(zip(a.grads, b.grads, strict=True)):
            if error := _apart(*pair):
                return f"gradient {place} of window {number}: {error}"
    for place, pair in enumerate(zip(found.weights, expected.weights, strict=True)):
        if error := _apart(*pair):
            return f"weight {place}: {error}"
    for pair in zip(leaves(found.state), leaves(expected.state), strict=True):
        if error := _apart(*pair):
            return f"final state: {error}"
    return ""


def _apart(found: Tensor | None, expected: Tensor | None) -> str:
    a, b = (torch.zeros(()) if t is None else t.detach().to_dense() for t in (found, expected))
    if found is not None and expected is not None and a.shape != b.shape:
        return f"shape {list(a.shape)}, not {list(b.shape)}"
    if not b.numel():
        return ""
    error = float((a - b).abs().max())
    return "" if error <= TOLERANCE * max(1.0, float(b.abs().max())) else f"{error:.1e} off"


@dataclass
class Account:
    """Verdicts, counted by kind."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {k: Counter() for k in KINDS})
    legal: Counter[str] = field(default_factory=Counter)
    failures: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.counts[verdict.case.kind][verdict.outcome] += 1
        self.legal[verdict.case.kind] += verdict.case.is_legal
        if verdict.failed:
            self.failures.append(verdict)

    def lines(self, *, shown: int = 3) -> Iterator[str]:
        total = sum(sum(c.values()) for c in self.counts.values())
        yield f"{'kind':28} {'cases':>6} {'legal':>6}  outcomes"
        for kind, counts in self.counts.items():
            if counts:
                told = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
                yield f"{kind:28} {sum(counts.values()):6} {self.legal[kind]:6}  {told}"
        legal = sum(self.legal.values())
        refused = sum(c[REFUSED] for c in self.counts.values())
        share = f"{legal / max(1, total):.1%}"
        yield f"{total} cases, {legal} legal ({share}), of these {refused} refused"
        yield f"{len(self.failures)} failed"
        for kind in KINDS:
            for verdict in [v for v in self.failures if v.case.kind == kind][:shown]:
                yield f"  {verdict.outcome}: {verdict.case}\n    {verdict.detail}"


def run_cases(seeds: Any) -> Account:
    account = Account()
    for seed in seeds:
        account.add(run_case(case_of(seed)))
    return account


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--kind", help="one kind, or the beginning of several")
    parser.add_argument("--shown", type=int, default=3, help="failures to show for each kind")
    given = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    kinds = [i for i, kind in enumerate(KINDS) if kind.startswith(given.kind or "")]
    first = -(-given.seed // len(KINDS)) * len(KINDS) if given.kind else given.seed
    seeds: Any = range(given.seed, given.seed + given.cases)
    if given.kind:
        rounds = -(-given.cases // max(1, len(kinds)))
        seeds = [first + r * len(KINDS) + i for r in range(rounds) for i in kinds]
    begun = time.perf_counter()
    account = run_cases(seeds)
    print("\n".join(account.lines(shown=given.shown)))
    print(f"{time.perf_counter() - begun:.0f} s")
    return 1 if account.failures else 0


if __name__ == "__main__":
    sys.exit(main())
