"""Is a memory budget kept, and how close is the predicted peak to the measured one?

For each module, reach and precision: budgets from the smallest possible to "keep all", each in
a run of its own that measures its costs within the budget and updates the weights with Adam.
Held against the exact peak of every window: the prediction, to 3 % of the peak less its fixed
part (weights, gradients, optimizer, inputs) or 64 KiB, and the budget itself. A budget a tenth
below the smallest has to raise.

Sources that make new tensors in every read, streams that are read ahead, and lanes that reset run
too, with k1 at a third of k2. There a meter around the whole run, reading included, says what was
live once windows have their full reach: what an earlier one leaves behind is in it. Predictions
may be above that, since they count the most resets and cuts that a leaf can have, but not below.

The smallest budget holds one state and a leaf of one step, if nothing else takes more; then a
step runs again for each step after it. Beyond some hundred steps that takes hours, so there the
first budget has room for some more states; the smallest itself only has to be accepted. There are
fewer budgets then: half of them up to a thousand steps, and three beyond.

    python -m benchmarks.budget_accuracy --json benchmarks/results/DATE-budget-accuracy.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tbptt_ckpt import (
    TBPTT,
    Costs,
    InfeasibleBudgetError,
    LaneSource,
    TensorSequence,
    WindowResult,
    measure_costs,
)
from tbptt_ckpt.memory import peak_memory
from tbptt_ckpt.memory.sizes import format_bytes
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.profiling.environment import describe_environment

LANES, WIDTH, CLASSES, READOUT = 8, 64, 32, 2048
SMALLEST_RUN, MORE_STATES, FEWEST = 100, 12, 3
TOLERANCE, ROUNDING_BYTES = 0.03, 64 * 1024
DTYPES = {"float32": None, "bfloat16 autocast": torch.bfloat16}


class CellLoop(nn.Module):
    """A cell and a readout, one step at a time."""

    def __init__(self, classes: int = CLASSES, dropout: float = 0.0) -> None:
        super().__init__()
        self.cell, self.readout = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        h, c = self.cell(x, state)
        return self.readout(self.dropout(h)), (h, c)


class DeepTransition(nn.Module):
    """A step of several layers between one state and the next."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(2 * WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.readout = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(x) if h is None else h
        z = torch.relu(self.first(torch.cat([x, h], -1)))
        for layer in self.layers:
            z = z + torch.relu(layer(z))
        h = torch.tanh(z)
        return self.readout(h), h


class Fused(nn.Module):
    """A fused layer and a readout, a segment at a time."""

    def __init__(self, kind: type[nn.RNNBase], layers: int) -> None:
        super().__init__()
        self.rnn, self.readout = kind(WIDTH, WIDTH, layers), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        h, state = self.rnn(x, state)
        return self.readout(h), state


MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "LSTMCell loop": (CellLoop, True),
    "nn.LSTM, 1 layer": (lambda: Fused(nn.LSTM, 1), False),
    "nn.LSTM, 3 layers": (lambda: Fused(nn.LSTM, 3), False),
    "nn.GRU": (lambda: Fused(nn.GRU, 1), False),
    "deep transition": (DeepTransition, True),
    "large readout": (lambda: CellLoop(READOUT), True),
    "dropout": (lambda: CellLoop(dropout=0.3), True),
}


class Copies:
    """A source as any loader is: every read is new memory."""

    def __init__(self, data: TensorSequence) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self._data.read(start, stop)
        return inputs.clone(), targets.clone()


def stream(data: TensorSequence) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps in new memory, of which nobody knows how many there are."""
    for x, target in zip(data.inputs, data.targets, strict=True):
        yield x.clone(), target.clone()


def lanes(data: TensorSequence) -> LaneSource:
    """Sequences of unequal lengths side by side, which end and begin inside windows."""
    inputs, targets = data.inputs, data.targets
    cut = [len(inputs) - 7 * lane for lane in range(LANES)]
    found = [TensorSequence(inputs[:n, i], targets[:n, i]) for i, n in enumerate(cut)]
    return LaneSource(found + found[: LANES // 2], lanes=LANES)


TENSORS = "tensors"
SOURCES: dict[str, Callable[[TensorSequence], object]] = {
    TENSORS: lambda data: data,
    "copies": Copies,
    "stream": stream,
    "lanes": lanes,
}
OVER_SOURCES = ("LSTMCell loop", "nn.LSTM, 1 layer")


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets.flatten()
    )


@dataclass(frozen=True)
class Row:
    """One window under one budget; sizes in bytes.

    Attributes:
        error: Predicted less measured, over the measured peak less its fixed part.
        accurate: Whether the prediction is within the tolerance.
        kept: Whether the measured peak is within the budget.
    """

    module: str
    source: str
    k2: int
    dtype: str
    budget: int
    window: int
    predicted: int
    measured: int
    fixed: int
    error: float
    accurate: bool
    kept: bool
    executed_per_step: float
    seconds: float


@dataclass(frozen=True)
class Setting:
    """A module, a reach and a precision."""

    module: str
    k2: int
    dtype: str
    num_windows: int
    source: str = TENSORS

    @property
    def k1(self) -> int:
        """Windows overlap where sources are what is looked at."""
        return self.k2 if self.source == TENSORS else max(1, self.k2 // 3)

    def data(self) -> TensorSequence:
        torch.manual_seed(0)
        num_steps = self.num_windows * self.k2
        inputs = torch.randn(num_steps, LANES, WIDTH)
        return TensorSequence(inputs, torch.randint(0, CLASSES, (num_steps, LANES)))

    def run(self, budget: int) -> Iterator[tuple[WindowResult, int, int]]:
        """Windows under a budget, each with the fixed part of its peak, and its peak."""
        torch.manual_seed(0)
        make, per_step = MODULES[self.module]
        module, data = make(), self.data()
        optimizer = torch.optim.Adam(module.parameters())
        tbptt = TBPTT(
            module,
            loss_fn,
            self.k1,
            self.k2,
            optimizer,
            memory_budget=budget,
            measure_memory=True,
            per_step=per_step,
            autocast_dtype=DTYPES[self.dtype],
        )
        step_bytes = tensor_bytes(data.inputs, data.targets) // len(data)
        held = (module, optimizer)
        state, base = tensor_bytes(optimizer), tensor_bytes(*held, grads=True)
        source = SOURCES[self.source](data)
        with peak_memory(held=held, rss=False) as around:
            for window in tbptt.windows(source):
                inputs = step_bytes * (window.stop - window.start)
                fixed, live = 2 * tensor_bytes(module) + state + inputs, around.lap().peak_bytes
                assert window.peak_bytes is not None
                # The package's meter counts what is read of tensors that lie outside.
                # While windows grow, so does what a longer leaf takes that is measured in between.
                is_growing = self.source == TENSORS or window.start == 0
                within = 0 if is_growing else base + live
                yield window, fixed, max(window.peak_bytes, within)
                state = tensor_bytes(optimizer)

    def smallest(self) -> int:
        """The smallest budget, as the error for an impossible one names it."""
        try:
            next(self.run(1))
        except InfeasibleBudgetError as error:
            return error.smallest_budget_bytes or 0
        raise SystemExit(f"{self}: a budget of one byte was accepted")

    def refuses(self, budget: int) -> bool:
        """Whether a budget raises before its first window."""
        try:
            next(self.run(budget))
        except InfeasibleBudgetError:
            return True
        return False

    def costs(self) -> Costs:
        """What steps take."""
        make, per_step = MODULES[self.module]
        data = self.data().read(0, min(64, self.k2))
        return measure_costs(
            make(), loss_fn, *data, per_step=per_step, autocast_dtype=DTYPES[self.dtype]
        )

    def budgets(self, smallest: int, count: int) -> list[int]:
        """From the smallest to one that holds the graph of a whole window.

        Each is further above the smallest by a fixed factor.
        """
        costs = self.costs()
        span = int(1.25 * costs.leaf_bytes(self.k2))
        first = 0 if self.k2 <= SMALLEST_RUN else MORE_STATES * costs.state_bytes
        least = max(16 * 1024, 2 * first, span // 2**count)
        ratio = (span / least) ** (1 / (count - 2))
        above = [first, *(int(least * ratio**i) for i in range(count - 1))]
        return [smallest + each for each in above]


def rows_of(setting: Setting, count: int) -> Iterator[Row]:
    """All windows under all budgets."""
    smallest = setting.smallest()
    if not setting.refuses(int(0.9 * smallest)):
        raise SystemExit(f"{setting}: a budget a tenth below the smallest was accepted")
    for budget in setting.budgets(smallest, count):
        for window, fixed, measured in setting.run(budget):
            assert window.plan is not None
            assert window.plan.predicted_peak_bytes is not None
            predicted = window.plan.predicted_peak_bytes
            off, above = predicted - measured, measured - fixed
            yield Row(
                module=setting.module,
                source=setting.source,
                k2=setting.k2,
                dtype=setting.dtype,
                budget=budget,
                window=window.index,
                predicted=predicted,
                measured=measured,
                fixed=fixed,
                error=off / above,
                accurate=max(-off, off if setting.source == TENSORS else 0)
                <= max(TOLERANCE * above, ROUNDING_BYTES),
                kept=measured <= budget,
                executed_per_step=window.plan.executed_steps / setting.k2,
                seconds=window.seconds,
            )


def num_budgets(most: int, k2: int) -> int:
    """Budgets of a reach: the longest windows take minutes each."""
    if k2 <= SMALLEST_RUN:
        return most
    return max(FEWEST, most // 2 if k2 <= 10 * SMALLEST_RUN else 0)


def summary(rows: list[Row]) -> str:
    """A line for each setting, in Markdown."""
    lines = [
        "| module | source | k2 | precision | budgets | windows | largest error | in bytes |"
        " above budget | executed steps per step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = [(row.module, row.source, row.k2, row.dtype) for row in rows]
    for key in dict.fromkeys(keys):
        mine = [row for row, its in zip(rows, keys, strict=True) if its == key]
        sizes = sorted({row.budget for row in mine})
        worst = max(mine, key=lambda row: abs(row.error))
        executed = [row.executed_per_step for row in mine]
        most_off = max(abs(row.predicted - row.measured) for row in mine)
        lines.append(
            f"| {' | '.join(map(str, key))} | {len(sizes)}: {format_bytes(sizes[0])} to "
            f"{format_bytes(sizes[-1])} | {len(mine)} | {100 * worst.error:+.2f} % | "
            f"{most_off} | {sum(not row.kept for row in mine)} | "
            f"{min(executed):.2f} to {max(executed):.2f} |"
        )
    misses = [row for row in rows if not row.accurate]
    lines += ["", f"{len(rows)} windows, {len(misses)} predictions outside the tolerance."]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k2", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=list(MODULES))
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table; must be new")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.k2, arguments.budgets, arguments.modules = [30], 3, ["LSTMCell loop", "nn.GRU"]
    return arguments


def write(file: Path, rows: list[Row]) -> None:
    """Everything so far: a long run that is cut off leaves what it has found."""
    result = {
        "benchmark": "budget_accuracy",
        "environment": describe_environment(),
        "rows": [asdict(row) for row in rows],
    }
    file.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # products this small gain nothing by more, and lose beside others
    if arguments.json is not None:
        arguments.json.touch(exist_ok=False)  # a dated result is never overwritten
    rows: list[Row] = []
    began = time.perf_counter()
    settings = [
        Setting(module, k2, dtype, arguments.windows)
        for k2 in arguments.k2
        for module in arguments.modules
        for dtype in DTYPES
    ]
    settings += [
        Setting(module, min(arguments.k2), next(iter(DTYPES)), arguments.windows, source)
        for source in SOURCES
        for module in OVER_SOURCES
        if source != TENSORS and module in arguments.modules
    ]
    for setting in settings:
        found = list(rows_of(setting, num_budgets(arguments.budgets, setting.k2)))
        rows += found
        print(summary(found).splitlines()[2], flush=True)
        if arguments.json is not None:
            write(arguments.json, rows)
    print()
    print(summary(rows))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
