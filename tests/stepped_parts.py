"""Steps to find the parts of, and what they are held against: a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tbptt_ckpt.module.trees import map_tensors, tensors_of

STEPS, LANES, WIDTH, WORDS = 4, 3, 4, 7
Step = Callable[[Any, Tensor, Any], Any]


class Net(nn.Module):
    """A step written as a function of this module, an input and a state."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.cell, self.cell2 = nn.LSTMCell(WIDTH, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.gru, self.lin, self.rec, self.out = (
            nn.GRUCell(WIDTH, WIDTH),
            *(nn.Linear(WIDTH, WIDTH) for _ in range(3)),
        )
        self.norm, self.bn = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.drop, self.square = nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH * WIDTH)
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("scale", torch.rand(WIDTH))
        self.table, self.factor, self.count, self.notes = torch.rand(WIDTH), 1.5, 0, []
        self.tally = np.zeros(2)
        self._step = step

    def forward(self, x: Tensor, state: Any) -> Any:
        return self._step(self, x, state)


def net(step: Step) -> Net:
    return Net(step).double()


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


def results(outputs: list[Any], state: Any, module: nn.Module, leaves: list[Tensor]) -> list[Any]:
    """Outputs, last state and the gradients of a loss of all of them."""
    every = [*map(torch.cat, zip(*map(tensors_of, outputs), strict=True)), *tensors_of(state)]
    floating = [t for t in every if t.requires_grad]
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel()).view_as(t)).sum() for t in floating)
    wanted = [*module.parameters(), *(t for t in leaves if t.requires_grad)]
    return [*every, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def leaf(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    return made.requires_grad_() if made.is_floating_point() else made


def plain(module: nn.Module, steps: Any, state: Any) -> list[Any]:
    steps, state = map_tensors(leaf, (steps, state))
    leaves, outputs = tensors_of((steps, state)), []
    for step in range(STEPS):
        output, state = module(map_tensors(lambda t, k=step: t[k], steps), state)
        outputs.append(output)
    return results(outputs, state, module, leaves)


def folded(parts: Any, module: nn.Module, steps: Any, state: Any) -> list[Any]:
    steps, state = map_tensors(leaf, (steps, state))
    leaves, kept = tensors_of((steps, state)), []
    encoded = parts.encode(map_tensors(lambda t: t.flatten(0, 1), steps))
    unfolded = map_tensors(lambda t: t.reshape(STEPS, -1, *t.shape[1:]), encoded)
    for step in range(STEPS):
        features, state = parts.transition(map_tensors(lambda t, k=step: t[k], unfolded), state)
        kept.append(tensors_of(features))
    outputs = parts.readout(tuple(map(torch.cat, zip(*kept, strict=True))), encoded)
    return results([outputs], state, module, leaves)


def agree(module: nn.Module, parts: Any, steps: Any, state: Any) -> None:
    expected, got = plain(module, steps, state), folded(parts, module, steps, state)
    for mine, its in zip(expected, got, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            assert mine.shape == its.shape
            torch.testing.assert_close(its, mine, rtol=1e-12, atol=1e-12)


def words() -> Tensor:
    return torch.randint(0, WORDS, (STEPS, LANES))


def two() -> tuple[Tensor, Tensor]:
    return floats(LANES), floats(LANES)


def lm(m: Any, x: Tensor, state: Any) -> Any:
    h, c = m.cell(m.emb(x) * 1.5, state)
    return m.out(torch.tanh(m.norm(h))), (h, c)


def own(m: Any, x: Tensor, h: Tensor) -> Any:
    z, n = m.lin(m.emb(x)).chunk(2, -1)
    a, b = m.rec(h).chunk(2, -1)
    h = m.norm(torch.cat([torch.sigmoid(z + a), torch.tanh(n * b)], -1) + h)
    return m.out(h), h
