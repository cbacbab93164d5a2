"""What a command of the command line prints, and how it refuses."""

from __future__ import annotations

import json
import math

from tbptt_ckpt.cli.app import main
from tbptt_ckpt.cli.bytes.score import byte_loss
from tbptt_ckpt.cli.task import Task, module_workload

FACTORIES = '''
import torch
from torch import nn


class Counter(nn.Module):
    """One step of a small recurrence, with a first state of its own."""

    def __init__(self, vocab_size, hidden, layers=1):
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocab_size, 8)
        self.cell = nn.GRUCell(8, hidden)
        self.readout = nn.Linear(hidden, vocab_size)

    def init_state(self, lanes):
        return torch.zeros(lanes, self.hidden)

    def forward(self, symbols, state):
        state = self.cell(self.embedding(symbols), state)
        return self.readout(state), state


class Segments(nn.Module):
    per_step = False

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 8)
        self.recurrent = nn.RNN(8, 8)
        self.readout = nn.Linear(8, 256)

    def forward(self, symbols, state):
        outputs, state = self.recurrent(self.embedding(symbols), state)
        return self.readout(outputs), state


def everything(**offered):
    names = ["data", "device", "dtype", "hidden", "lanes", "layers", "vocab_size"]
    assert sorted(offered) == names
    return Counter(offered["vocab_size"], offered["hidden"])


def greedy(vocab_size, depth):
    return Counter(vocab_size, depth)


def broken():
    raise RuntimeError("no such\\nluck")


class Frozen(Segments):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class StateOnly(Segments):
    def forward(self, symbols, state):
        return super().forward(symbols, state)[1]


class Narrow(Segments):
    def forward(self, symbols, state):
        outputs, state = super().forward(symbols, state)
        return outputs[..., :7], state


class Crashing(Segments):
    def forward(self, symbols, state):
        raise KeyError("weights")


class Exploding(Segments):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, symbols, state):
        outputs, state = super().forward(symbols, state)
        return outputs * self.scale.square().exp(), state


class Uncopied(Segments):
    def __deepcopy__(self, memo):
        raise TypeError("one of a kind")


class Nested:
    factory = Segments


number = 3
text = dict
'''


def bits_per_byte(module, source, *, segment_steps):
    """What a byte-level model needs for each byte of `source`, in eval mode."""
    work = module_workload(module, byte_loss, source, lr=0.1)
    return Task(data="", workload=work).evaluate(source, segment_steps).loss / math.log(2)


def outcome_of(capsys, arguments):
    """The JSON object that the command prints."""
    code = main([*arguments, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.count("\n") == 1
    return json.loads(printed.out)


def refusal_of(capsys, arguments):
    """The one line that the command prints when it refuses."""
    code = main(arguments)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("tbptt-ckpt: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err
