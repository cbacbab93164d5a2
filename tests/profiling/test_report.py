"""Reports of profiles: plain data that survives JSON, and which rows no other row beats."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace

import pytest

from tbptt_ckpt import ArgumentError
from tbptt_ckpt.profiling import MemoryReport, StrategyReport, pareto_front
from tbptt_ckpt.profiling.front import comparable_times
from tbptt_ckpt.profiling.report import ActionSpan, WindowTrace

TRACE = WindowTrace(
    0.5,
    ((0.0, 100), (0.25, 300), (0.5, 100)),
    (
        ActionSpan("advance", 0, 4, 0.0, 0.1, None, 100, 150, 140),
        ActionSpan("keep", 4, 4, 0.1, 0.1, None, 110, 110),
        ActionSpan("differentiate", 4, 8, 0.1, 0.4, 0.3, 110, 300, 310),
    ),
)
FULL = MemoryReport(
    strategy="uniform:4",
    k1=4,
    k2=8,
    budget_bytes=400,
    peak_bytes=300,
    fixed_bytes=100,
    predicted_peak_bytes=309,
    rss_peak_bytes=10_000,
    rss_before_bytes=9_000,
    seconds=0.5,
    seconds_range=(0.4, 0.7),
    ratio=1.25,
    ratio_range=(1.2, 1.31),
    window_steps=8,
    executed_steps=12,
    held_states=1,
    longest_leaf=4,
    trace=TRACE,
)
LOST = MemoryReport(strategy="retain", k1=4, k2=8, status="out of memory", message="no room")


OF_RANKS = replace(FULL, trace=None, peak_bytes_of_ranks=(300, None, 2048))


@pytest.mark.parametrize("report", [FULL, LOST, OF_RANKS])
def test_a_report_survives_json(report):
    assert MemoryReport.from_json(report.to_json()) == report
    assert MemoryReport.from_json(report.to_json(trace=False)) == replace(report, trace=None)


def test_rows_and_environment_survive_json():
    environment = {"torch": "2.13.0", "threads": 2}
    report = StrategyReport((FULL, LOST), environment, "lstm", "tbptt-ckpt profile")
    assert StrategyReport.from_json(report.to_json()) == report
    plain = json.loads(report.to_json(traces=False))
    assert set(plain) == {"schema", "what", "command", "rows", "environment"}
    assert plain["command"] == "tbptt-ckpt profile"
    promised = {
        *("strategy", "k1", "k2", "budget_bytes", "peak_bytes", "predicted_peak_bytes"),
        *("rss_peak_bytes", "seconds", "ratio", "executed_steps_per_step"),
    }
    assert all(promised <= row.keys() and "trace" not in row for row in plain["rows"])


def test_a_table_says_what_was_held_on_all_ranks():
    table = StrategyReport((OF_RANKS, LOST)).table(200)
    assert "300 B, -, 2.0 KiB" in table
    assert "ranks" not in StrategyReport((FULL, LOST)).table(200)


def test_derived_figures():
    assert FULL.executed_steps_per_step == 1.5
    assert FULL.prediction_error == pytest.approx(0.03)
    assert (LOST.executed_steps_per_step, LOST.prediction_error) == (None, None)


def test_csv_has_a_line_for_each_row_and_nothing_where_nothing_was_measured():
    rows = list(csv.DictReader(io.StringIO(StrategyReport((FULL, LOST)).to_csv())))
    assert [row["strategy"] for row in rows] == ["uniform:4", "retain"]
    assert (rows[0]["peak_bytes"], rows[1]["peak_bytes"]) == ("300", "")
    assert rows[1]["status"] == "out of memory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "this is no JSON"),
        ("[1]", "a report is a JSON object, not list"),
        ('{"strategy": "retain"}', "this is no memory report"),
        ('{"strategy": "retain", "k1": 1, "k2": 1, "weight": 3}', "weight"),
        ('{"strategy": "retain", "k1": 1, "k2": 1, "status": "fine"}', "status='fine' is not"),
        ('{"strategy": "x", "k1": 1, "k2": 1, "trace": {"seconds": 1}}', "no memory report"),
    ],
)
def test_what_is_no_report_is_refused(text, message):
    with pytest.raises(ArgumentError, match=message):
        MemoryReport.from_json(text)


def test_what_has_no_rows_is_refused():
    with pytest.raises(ArgumentError, match="it has no list of rows"):
        StrategyReport.from_json("{}")


def test_the_front_is_what_no_other_row_beats():
    """All ways to give three rows sizes and times of 1, 2 and 3, against the definition."""
    for figures in itertools.product(itertools.product((1, 2, 3), repeat=2), repeat=3):
        rows = [
            MemoryReport(strategy=str(i), k1=1, k2=1, peak_bytes=peak, seconds=float(seconds))
            for i, (peak, seconds) in enumerate(figures)
        ]
        front = [(row.peak_bytes, row.seconds) for row in pareto_front([*rows, LOST])]
        beaten = {a for a in figures for b in figures if a != b and b[0] <= a[0] and b[1] <= a[1]}
        assert front == sorted({(a, float(s)) for a, s in figures if (a, s) not in beaten})


def test_rows_that_ran_one_after_the_other_are_compared_by_their_seconds():
    """As on an accelerator, where plain BPTT makes room for them."""
    plain = MemoryReport(strategy="retain", k1=1, k2=8, seconds=2.0, ratio=1.0)
    later = MemoryReport(strategy="step", k1=1, k2=8, seconds=3.0, ratio=1.5)
    in_turns = replace(later, ratio_range=(1.4, 1.6))
    assert comparable_times([plain, later]) == [2.0, 3.0]
    assert comparable_times([plain, in_turns]) == [1.0, 1.5]
