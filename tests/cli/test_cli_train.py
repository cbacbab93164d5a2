"""`tbptt-ckpt train`: what it takes, what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import bits_per_byte, outcome_of, refusal_of
from grids import covering, later
from models_for_tests import skip_unless_torch_runs_lstm

from tbptt_ckpt import TBPTT, TensorSequence, tbptt_windows
from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.bytes.models import build_model
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.lanes import EqualLanes
from tbptt_ckpt.cli.train.config import TrainingConfig
from tbptt_ckpt.cli.train.job import run_training_job
from tbptt_ckpt.cli.train.loop import figures
from tbptt_ckpt.errors import ArgumentError
from tbptt_ckpt.executor.runner import Runner
from tbptt_ckpt.profiling.peaks import fullest_window
from tbptt_ckpt.profiling.sweep import Progress


class TestTraining:
    @covering(together=1, model=["lstm", "gru", "rnn", "lstmcell"], layers=["1", "2"])
    def test_every_built_in_model_learns(self, capsys, small, model, layers):
        words = [*small, "--model", model, "--layers", layers, "--lr", "0.02"]
        bits = outcome_of(capsys, words)["scores"]
        assert bits["after"] < bits["before"] - 1

    @pytest.mark.parametrize(
        "words",
        [
            "--k2 none",
            later("--k2 3"),
            "--overlap stale",
            "--k2 auto --max-k2 24 --k2-tolerance 0.3",
            "--truncation roulette:0.5",
            "--executor checkpoint",
            "--strategy revolve:3",
            later("--strategy step"),
            later("--dtype float64"),
            later("--dtype bfloat16"),
            "--dtype bfloat16 --model lstmcell",
            later("--k1 100 --k2 100"),
            "--budget 64MiB",
        ],
    )
    def test_every_way_to_train_learns(self, capsys, small, words):
        if words == "--dtype bfloat16":
            skip_unless_torch_runs_lstm(torch.bfloat16)
        outcome = outcome_of(capsys, [*small, *words.split()])
        assert outcome["scores"]["after"] < outcome["scores"]["before"]
        assert outcome["work"]["num_steps"] == 64
        assert math.isfinite(outcome["memory"]["retained_peak_bytes"])

    def test_strategies_change_memory_and_not_what_is_learned(self, capsys, small):
        words = [*small, "--model", "lstmcell", "--dtype", "float64"]
        bits = [
            outcome_of(capsys, [*words, "--strategy", strategy])["scores"]["after"]
            for strategy in ("retain", "step", "uniform:5", "revolve:3")
        ]
        assert bits == pytest.approx([bits[0]] * 4, rel=1e-9)

    def test_states_on_a_disk_change_no_bit(self, capsys, small, tmp_path):
        words = [*small, "--model", "lstmcell"]
        weights = []
        for number, more in enumerate(([], ["--offload", str(tmp_path)])):
            path = tmp_path / f"{number}.pt"
            outcome_of(capsys, [*words, *more, "--save", str(path)])
            weights.append(torch.load(path, weights_only=True))
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        message = refusal_of(capsys, [*words, *more, "--executor", "checkpoint"])
        assert "needs --executor replay" in message
        message = refusal_of(capsys, [*words, "--offload", str(tmp_path / "absent")])
        assert "absent' must be a folder in which files can be made" in message

    def test_states_in_fewer_bits_say_how_far_the_gradient_is_off(self, capsys, small):
        words = [*small, "--model", "lstmcell", "--strategy", "uniform:2"]
        assert outcome_of(capsys, words)["gradient_error"] is None
        words += ["--state-dtype", "bfloat16"]
        error = outcome_of(capsys, words)["gradient_error"]
        assert 1e-6 < error < 1e-2
        assert main(words) == 0
        shown = capsys.readouterr().out.split("gradient off by states in bfloat16")[1]
        assert f"{error:.1e}" in shown

    @pytest.mark.parametrize(
        "reach", ["--k2 auto --max-k2 32", "--k2 32 --truncation roulette", "--k2 none"]
    )
    def test_windows_of_other_lengths_are_looked_at_where_they_can_be(self, capsys, small, reach):
        words = f"--model lstmcell --strategy uniform:2 --state-dtype bfloat16 --k1 8 {reach}"
        found = outcome_of(capsys, [*small, *words.split()])["gradient_error"]
        assert (found is not None) == (reach == "--k2 none")

    def test_a_trained_model_beats_the_bigram_table(self, capsys, text):
        bits = outcome_of(
            capsys,
            f"train --data {text} --device cpu --hidden 32 --lanes 4 --k1 16 --k2 32 "
            "--lr 0.01 --max-steps 3200".split(),
        )["scores"]
        assert bits["after"] < 0.5 * bits["baseline"]
        assert bits["baseline"] < bits["before"]

    def test_steps_beyond_the_text_are_further_passes(self, capsys, small):
        # 7,600 bytes give 4 lanes of 1,899 steps.
        work = outcome_of(capsys, [*small, "--k1", "500", "--k2", "500", "--max-steps", "4000"])
        assert work["work"]["num_steps"] == 4_000
        assert work["work"]["num_passes"] == 3
        assert work["work"]["num_windows"] == 4 + 4 + 1

    def test_the_same_arguments_give_the_same_bytes(self, capsys, small, tmp_path):
        runs = []
        for name in ("first", "second"):
            path = tmp_path / name
            outcome = outcome_of(capsys, [*small, "--save", str(path)])
            runs.append((outcome["scores"], path.read_bytes()))
        assert runs[0] == runs[1]
        assert outcome_of(capsys, [*small, "--seed", "1"])["scores"] != runs[0][0]

    def test_lanes_feed_the_engine_as_the_same_tensors_do(self):
        data = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
        lanes = EqualLanes(data, 3)
        results = []
        for sequence in (lanes, TensorSequence(*lanes.read(0, len(lanes)))):
            torch.manual_seed(0)
            module = build_model("lstmcell", hidden=4, layers=1)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            tbptt = TBPTT(module, byte_loss, 8, 12, optimizer, strategy="uniform:5")
            losses = [w.loss.item() for w in tbptt.windows(sequence)]
            results.append((losses, *(p.tolist() for p in module.parameters())))
        assert results[0] == results[1]


class TestOptions:
    def test_without_options_the_defaults_are_used(self, monkeypatch, capsys):
        assert self.asked_for(monkeypatch, capsys, ["train"]) == TrainingConfig()

    def test_the_defaults_are_the_documented_job(self):
        config = TrainingConfig()
        assert (config.model, config.hidden, config.layers, config.lanes) == ("lstm", 192, 1, 32)
        assert (config.k1, config.k2, config.strategy) == (64, 128, "uniform:32")
        assert (config.overlap, config.executor, config.lr) == ("refresh", "replay", 4e-3)
        config.check()

    def test_every_option_arrives(self, monkeypatch, capsys):
        words = (
            "train --data d --model gru --hidden 2 --layers 3 --lanes 4 --k1 5 --k2 6 "
            "--strategy sqrt --overlap stale --executor checkpoint --lr 0.5 --max-steps 7 "
            "--truncation roulette --compile true --offload o --seed 8 --device cpu "
            "--state-dtype float32 --dtype float64 --save s --force"
        )
        assert self.asked_for(monkeypatch, capsys, words.split()) == TrainingConfig(
            data=Path("d"),
            model="gru",
            hidden=2,
            layers=3,
            lanes=4,
            k1=5,
            k2=6,
            strategy="sqrt",
            overlap="stale",
            truncation="roulette",
            compile="true",
            offload="o",
            state_dtype="float32",
            executor="checkpoint",
            lr=0.5,
            max_steps=7,
            seed=8,
            device="cpu",
            dtype="float64",
            save=Path("s"),
            force=True,
        )

    def test_a_budget_asks_for_the_fastest_plan_within_it(self, monkeypatch, capsys):
        config = self.asked_for(monkeypatch, capsys, ["train", "--budget", "200MiB"])
        assert (config.strategy, config.budget) == ("optimal", "200MiB")
        words = ["train", "--budget", "0.5", "--strategy", "uniform:8"]
        config = self.asked_for(monkeypatch, capsys, words)
        assert (config.strategy, config.budget) == ("uniform:8", "0.5")

    def test_k2_none_reaches_back_to_the_start(self, monkeypatch, capsys):
        assert self.asked_for(monkeypatch, capsys, ["train", "--k2", "none"]).k2 is None

    def asked_for(self, monkeypatch, capsys, arguments):
        asked = []

        def record(config, watch):
            asked.append(config)
            raise ArgumentError("recorded")

        monkeypatch.setattr("tbptt_ckpt.cli.train.job.run_training_job", record)
        assert main(arguments) == 2
        capsys.readouterr()
        return asked[0]


def memory_of_a_process(words):
    """What a run says of its memory; its peak counts every tensor that lives in its process."""
    command = [sys.executable, "-m", "tbptt_ckpt", *words, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)["memory"]


class TestReport:
    def test_the_json_object_says_what_was_done(self, capsys, small, text):
        outcome = outcome_of(capsys, small)
        assert outcome["config"]["data"] == str(text)
        assert outcome["config"]["save"] is None
        assert outcome["device"] == "cpu"
        assert outcome["num_train_steps"] == 7_599 // 4
        name = "bigram table on the same 396 bytes"  # 399 // 4 steps of 4 lanes
        assert outcome["scores"]["baseline_name"] == name
        work = outcome["work"]
        assert (work["num_steps"], work["num_windows"], work["num_passes"]) == (64, 8, 1)
        # The first window advances 4 of 8 steps; the other seven run 12 + 16 for 8 new ones.
        assert work["recomputed_steps_per_step"] == pytest.approx((4 + 7 * 20) / 64)
        assert work["mean_drift"] > 0
        assert work["steps_per_second"] == pytest.approx(64 / work["seconds"])

    def test_memory_is_measured_and_retaining_takes_more(self, small):
        memory = memory_of_a_process([*small, "--k2", "64", "--max-steps", "128"])
        assert memory["window_steps"] == 64
        assert memory["retained_is_measured"]
        assert 0 < memory["peak_bytes"] < memory["retained_peak_bytes"]
        assert 0 < memory["rss_before_bytes"] <= memory["rss_peak_bytes"]

    @pytest.mark.exhaustive
    def test_retaining_as_strategy_takes_what_retaining_takes(self, small):
        memory = memory_of_a_process([*small, "--strategy", "retain"])
        assert memory["peak_bytes"] == pytest.approx(memory["retained_peak_bytes"], rel=0.02)

    @pytest.mark.parametrize("model", [later("lstm"), "lstmcell"])
    def test_extrapolated_peaks_are_near_measured_ones(self, capsys, small, monkeypatch, model):
        words = [*small, "--model", model, "--k1", "16", "--k2", "128", "--max-steps", "160"]
        measured = outcome_of(capsys, words)["memory"]
        monkeypatch.setattr("tbptt_ckpt.profiling.peaks._MOST_RETAINED_STEPS", 100)
        extrapolated = outcome_of(capsys, words)["memory"]
        assert measured["retained_is_measured"]
        assert not extrapolated["retained_is_measured"]
        assert extrapolated["retained_peak_bytes"] == pytest.approx(
            measured["retained_peak_bytes"], rel=0.05
        )

    def test_what_had_no_memory_is_not_run_retained(self, capsys, small, monkeypatch):
        def exhausted(*_):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("tbptt_ckpt.profiling.peaks._measure", exhausted)
            outcome = outcome_of(capsys, small)
        assert outcome["memory"]["retained_peak_bytes"] is None
        assert outcome["work"]["num_steps"] == 64

        run, measured = Runner.run, []

        def run_up_to_two_steps(self, blocks, resets, begin, end, *others):
            if torch.is_grad_enabled() and end - begin > 2:
                raise MemoryError
            return run(self, blocks, resets, begin, end, *others)

        monkeypatch.setattr(Runner, "run", run_up_to_two_steps)
        monkeypatch.setattr("tbptt_ckpt.cli.train.job.retained_peak", measured.append)
        assert main(small) == 0
        printed = capsys.readouterr()
        assert "did not fit" in printed.err
        assert "not measured: memory is missing" in printed.out
        assert measured == []

    def test_the_table_has_a_line_for_every_figure(self, capsys, small):
        assert main(small) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        for words in (
            "held-out bits per byte before",
            "held-out bits per byte after",
            "bigram table on the same 396 bytes",
            "windows",
            "time steps per lane",
            "recomputed steps per step",
            "peak tensor memory",
            "the same window of 16 steps retained",
            "resident memory",
        ):
            assert words in printed.out

    def test_the_bar_is_shown_on_a_terminal_and_leaves_stdout_alone(
        self, capsys, small, monkeypatch
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert json.loads(json.dumps(outcome_of(capsys, small)))["device"] == "cpu"

    def test_the_bar_shows_loss_speed_and_memory(self):
        assert (
            figures(1.25, "bits per byte", 1234.5, 3 << 20)
            == "1.250 bits per byte  1,234 steps/s  3.0 MiB"
        )
        assert Progress("reading", 0, 10).figures == ""

    def test_help_is_shown_without_a_command(self, capsys):
        assert main([]) == 0
        assert "train" in capsys.readouterr().out


class TestSaving:
    def test_saved_weights_load_into_the_same_model(self, capsys, small, tmp_path):
        path = tmp_path / "weights.pt"
        bits = outcome_of(capsys, [*small, "--save", str(path)])["scores"]
        module = build_model("lstm", hidden=8, layers=1)
        module.load_state_dict(torch.load(path, weights_only=True))
        held_out = np.fromfile(tmp_path / "text", np.uint8)[7_600:]
        found = bits_per_byte(module, EqualLanes(held_out, 4), segment_steps=32)
        assert found == pytest.approx(bits["after"], rel=1e-6)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "weights.pt"]

    def test_a_file_is_replaced_only_by_force(self, capsys, small, tmp_path):
        path = tmp_path / "weights.pt"
        path.write_bytes(b"precious")
        message = refusal_of(capsys, [*small, "--save", str(path)])
        assert f"--save {path} exists; add --force" in message
        assert path.read_bytes() == b"precious"
        outcome_of(capsys, [*small, "--save", str(path), "--force"])
        assert torch.load(path, weights_only=True)

    def test_it_is_refused_before_training(self, small, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("tbptt_ckpt.cli.train.job._Job", None)  # calling it would raise
        (tmp_path / "there").touch()
        message = refusal_of(capsys, [*small, "--save", str(tmp_path / "there")])
        assert "there exists; add --force" in message

    def test_a_failed_write_leaves_the_old_file(self, small, tmp_path, monkeypatch, capsys):
        path = tmp_path / "weights.pt"
        path.write_bytes(b"precious")

        def fail(weights, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", fail)
        message = refusal_of(capsys, [*small, "--save", str(path), "--force"])
        assert "cannot be written: No space left on device" in message
        assert path.read_bytes() == b"precious"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "weights.pt"]


@pytest.mark.parametrize("k1", [1, 2, 3, 5])
@pytest.mark.parametrize("k2", [1, 2, 4, 9, None])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 30])
def test_the_metered_window_is_as_long_as_any(num_steps, k1, k2):
    windows = tbptt_windows(num_steps, k1, k2)
    longest = max(w.stop - w.first for w in windows)
    chosen = fullest_window(windows)
    assert windows[chosen].stop - windows[chosen].first == longest
    warm = [w.index for w in windows if w.stop - w.first == longest and w.index >= 2]
    assert not warm or chosen >= 2


def test_the_job_is_a_function_too(text):
    seen = []
    config = TrainingConfig(
        data=text, hidden=4, lanes=2, k1=8, k2=8, max_steps=24, device="cpu", strategy="retain"
    )
    outcome = run_training_job(config, seen.append)
    assert outcome.work.num_windows == 3
    assert [p.done for p in seen if p.stage == "training"] == [8, 16, 24]
    shown = r"\d+\.\d{3} bits per byte  [\d,]+ steps/s  [1-9][\d.]* [KMG]iB"  # no memory is none
    assert all(re.fullmatch(shown, p.figures) for p in seen if p.stage == "training")
