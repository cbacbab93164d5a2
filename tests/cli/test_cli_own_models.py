"""`tbptt-ckpt train`: models of one's own, what it refuses, and held-out data."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from command_lines import FACTORIES, bits_per_byte, outcome_of, refusal_of
from grids import later
from torch import nn

from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.bytes.models import build_model
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.lanes import EqualLanes


class TestOwnModels:
    @pytest.mark.parametrize(
        "factory", ["Counter", later("Segments"), later("everything"), "Nested.factory"]
    )
    def test_a_factory_in_the_current_directory_is_found(self, capsys, own, factories, factory):
        outcome = outcome_of(capsys, [*own, "--model", f"{factories}:{factory}"])
        assert outcome["scores"]["after"] < outcome["scores"]["before"]

    def test_a_model_that_cannot_be_copied_is_trained_all_the_same(self, capsys, own, factories):
        words = [*own, "--model", f"{factories}:Uncopied"]
        assert outcome_of(capsys, words)["memory"]["retained_peak_bytes"] is None
        assert main(words) == 0
        assert "not measured: " in capsys.readouterr().out

    def test_a_first_state_follows_the_weights(self, capsys, own, factories):
        words = [*own, "--model", f"{factories}:Counter", "--dtype", "float64"]
        assert outcome_of(capsys, words)["num_parameters"] > 0

    def test_an_installed_command_finds_it_too(self, own, factories, tmp_path):
        script = "import sys; sys.path.remove(''); from tbptt_ckpt.cli.app import main; "
        command = [sys.executable, "-c", script + "sys.exit(main())", *own, "--json"]
        run = subprocess.run(
            [*command, "--model", f"{factories}:Counter"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert json.loads(run.stdout)["work"]["num_windows"] == 8

    @pytest.mark.parametrize(
        ("factory", "expected"),
        [
            ("absent", "cannot be found: AttributeError"),
            (
                "greedy",
                "needs the argument 'depth'; offered are vocab_size, hidden, layers, lanes, device",
            ),
            ("broken", "raised RuntimeError: no such luck"),
            ("number", "is int, not something to call"),
            (
                "text",
                "returned dict, not what a command can work on: a factory returns a",
            ),
            ("Frozen", "is a module without trainable parameters"),
            ("StateOnly", "returned a Tensor; it must return (output, state)"),
            ("Narrow", "returned logits [2, 4, 7], not [2, 4, 256]"),
            ("Crashing", "raised KeyError: 'weights'"),
        ],
    )
    def test_a_factory_that_is_no_use_is_one_line(self, capsys, own, factories, factory, expected):
        assert expected in refusal_of(capsys, [*own, "--model", f"{factories}:{factory}"])


REFUSALS = [
    ("--lanes 0", "--lanes=0 must be an integer of at least 1"),
    ("--lanes 1000", "too short for --lanes 1000, which needs 20020"),
    ("--lanes two", "Invalid value for '--lanes'"),
    ("--hidden 0", "--hidden=0 must be an integer of at least 1"),
    ("--hidden 10000000", "out of memory; a smaller --hidden"),  # more than addresses reach
    ("--layers -1", "--layers=-1 must be an integer of at least 1"),
    ("--k1 0", "--k1=0 must be an integer of at least 1"),
    ("--k2 0", "--k2=0 must be an integer of at least 1, or none"),
    ("--k2 some", "--k2 some is neither a number of steps nor none"),
    ("--max-steps 0", "--max-steps=0 must be an integer of at least 1"),
    ("--lr 0", "--lr 0.0 must be above 0 and at most 1000.0"),
    ("--lr -1", "--lr -1.0 must be above 0 and at most 1000.0"),
    ("--lr nan", "--lr nan must be above 0 and at most 1000.0"),
    ("--lr inf", "--lr inf must be above 0 and at most 1000.0"),
    ("--lr 1e38", "--lr 1e+38 must be above 0 and at most 1000.0"),
    ("--seed -1", "--seed -1 must be in 0 to"),
    ("--budget much", "--budget='much' is not a size"),
    ("--budget 0", "--budget='0' must be at least one byte"),
    ("--budget 1KiB", "memory_budget=1.0 KiB is below the"),
    ("--strategy best", "--strategy best is not one of auto, optimal, retain"),
    ("--strategy uniform", "--strategy uniform is not one of auto, optimal, retain"),
    ("--strategy revolve:0", "--strategy revolve:0 is not one of auto, optimal, retain"),
    ("--truncation never", "--truncation never is not one of fixed, roulette, roulette:P"),
    ("--truncation roulette:2", "--truncation roulette:2 is not one of fixed, roulette"),
    ("--compile nobody", "--compile nobody is not one of true, false, auto, or a backend"),
    ("--compile true", "compile=True is for modules of one step"),
    ("--overlap twice", "'twice' is not one of 'refresh', 'stale'"),
    ("--executor magic", "'magic' is not one of 'replay', 'checkpoint'"),
    ("--dtype float16", "'float16' is not one of 'float32', 'float64', 'bfloat16'"),
    ("--device tpu9", "--device tpu9 is no device"),
    ("--device meta", "--device meta is not on this machine"),
    (
        "--model transformer",
        "is neither lstm, gru, rnn or lstmcell, nor file.py:factory or package.module",
    ),
    ("--model no_such_module:make", "cannot be found: ModuleNotFoundError"),
    ("--model torch.nn:Linear", "needs the argument 'in_features'"),
    ("--data nowhere", "--data nowhere does not exist"),
    ("--data .", "--data . is not a regular file"),
    ("--save nowhere/weights", "there is no directory nowhere"),
    ("--save .", "--save . is a directory"),
    ("--widht 3", "No such option: --widht"),
    ("--k1", "Option '--k1' requires an argument"),
    ("more", "unexpected extra argument"),
]


class TestRefusals:
    @pytest.mark.parametrize(("words", "expected"), REFUSALS)
    def test_bad_options_are_one_line(self, capsys, small, tmp_path, monkeypatch, words, expected):
        monkeypatch.chdir(tmp_path)
        assert expected in refusal_of(capsys, [*small, *words.split()])

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_cuda_without_cuda_is_one_line(self, capsys, small):
        message = refusal_of(capsys, [*small, "--device", "cuda"])
        assert "--device cuda is not on this machine, which has cpu" in message

    def test_weights_do_not_replace_the_text_they_are_learned_from(self, capsys, small, text):
        words = [*small, "--save", str(text), "--force"]
        assert "would replace the text of --data" in refusal_of(capsys, words)

    def test_short_and_empty_files_are_one_line(self, capsys, small, tmp_path):
        short = tmp_path / "short"
        short.write_bytes(b"x" * 99)
        message = refusal_of(capsys, [*small, "--data", str(short)])
        assert "has 99 bytes, too short for --lanes 4, which needs 100" in message
        short.write_bytes(b"")
        assert "is empty" in refusal_of(capsys, [*small, "--data", str(short)])

    def test_an_unknown_command_is_one_line(self, capsys):
        assert "No such command 'trian'" in refusal_of(capsys, ["trian"])

    def test_nothing_is_saved_of_a_run_that_diverged(self, capsys, own, factories, tmp_path):
        path = tmp_path / "weights"
        words = [*own, "--model", f"{factories}:Exploding", "--lr", "100"]
        message = refusal_of(capsys, [*words, "--save", str(path)])
        assert "window 1, steps 8 to 16: the loss is nan; nothing was updated" in message
        assert not path.exists()

    def test_an_interrupt_is_one_line_and_exit_code_130(self, own, factories, tmp_path):
        module = tmp_path / f"{factories}.py"
        module.write_text(
            FACTORIES + "\ndef begun():\n    open('begun', 'w').close()\n    return Segments()\n"
        )
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tbptt_ckpt", *own),
                *("--model", f"{factories}:begun", "--max-steps", "100000000"),
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Shells start what they put into the background deaf to it, tests included.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            while not (tmp_path / "begun").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            time.sleep(1.0)  # into the windows; earlier would do as well
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (130, "", "tbptt-ckpt: interrupted\n")

    def test_an_error_that_follows_an_interrupt_is_an_interrupt(
        self, own, factories, tmp_path, capsys
    ):
        (tmp_path / f"{factories}.py").write_text(
            "import signal\n\ndef half():\n    try:\n        signal.raise_signal(signal.SIGINT)\n"
            "    except KeyboardInterrupt:\n        raise AttributeError('imported in part')\n"
        )
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert main([*own, "--model", f"{factories}:half"]) == 130
        finally:
            signal.signal(signal.SIGINT, before)
        assert capsys.readouterr() == ("", "tbptt-ckpt: interrupted\n")


class TestEvaluation:
    class Remembering(nn.Module):
        """Dropout, a buffer that counts calls, and modes that differ."""

        per_step = True

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(256, 4)
            self.drop = nn.Dropout(0.5)
            self.frozen = nn.BatchNorm1d(4).eval()
            self.cell = nn.GRUCell(4, 6)
            self.readout = nn.Linear(6, 256)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, symbols, state):
            self.calls += 1
            noise = torch.rand(1)
            state = self.cell(self.drop(self.frozen(self.embedding(symbols))), state)
            return self.readout(state) + 0 * noise, state

    def test_it_leaves_everything_as_it_was(self):
        module = self.Remembering()
        source = EqualLanes(np.arange(50, dtype=np.uint8), 3)
        module.calls += 5
        before = {name: value.clone() for name, value in module.state_dict().items()}
        modes = [part.training for part in module.modules()]
        random = torch.get_rng_state()
        bits_per_byte(module, source, segment_steps=4)
        assert [part.training for part in module.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
        assert all(p.grad is None for p in module.parameters())

    @pytest.mark.parametrize("model", ["lstm", "lstmcell"])
    def test_it_equals_one_pass_whatever_the_segments(self, model):
        torch.manual_seed(0)
        module = build_model(model, hidden=6, layers=2).double()
        source = EqualLanes(np.random.default_rng(0).integers(0, 256, 90).astype(np.uint8), 3)
        inputs, targets = source.read(0, len(source))
        state, logits = None, []
        with torch.no_grad():
            for step in inputs:
                given = step if module.per_step else step[None]
                output, state = module(given, state)
                logits.append(output.reshape(3, 256))
        expected = float(byte_loss(torch.stack(logits), targets)) / math.log(2)
        for segment_steps in (1, 2, 7, 29, 100):
            found = bits_per_byte(module, source, segment_steps=segment_steps)
            assert found == pytest.approx(expected, rel=1e-12)

    def test_a_module_that_knows_nothing_needs_eight_bits(self):
        module = build_model("rnn", hidden=4, layers=1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        source = EqualLanes(np.arange(100, dtype=np.uint8), 3)
        assert bits_per_byte(module, source, segment_steps=8) == pytest.approx(8.0)
