"""`untouched` leaves everything as it was, whatever happens inside."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_ckpt.module.ambient import in_eval_mode, untouched


def everything(module: nn.Module, others: list[Tensor]) -> list[Any]:
    """Modes, buffers, gradients and the generator, by value."""
    grads = [t.grad for t in (*module.parameters(), *others)]
    return [
        [part.training for part in module.modules()],
        [buffer.tolist() for buffer in module.buffers()],
        [None if grad is None else grad.tolist() for grad in grads],
        torch.get_rng_state().tolist(),
    ]


def disturb(module: nn.Module, other: Tensor) -> None:
    module.train()
    outputs = module(torch.randn(8, 3))
    (outputs.sum() * other.sum()).backward()
    module[0].eval()


@pytest.fixture
def module() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    module[0].weight.grad = torch.ones(3, 3)
    return module


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(module: nn.Module, fails: bool) -> None:
    other = torch.ones(2, requires_grad=True)
    other.grad = torch.full((2,), 7.0)
    grad, before = module[0].weight.grad, everything(module, [other])
    expected: Any = pytest.raises(RuntimeError) if fails else nullcontext()
    with expected, untouched(module, tensors=[other]):
        disturb(module, other)
        assert everything(module, [other]) != before
        module(torch.randn(8, 4 if fails else 3))
    assert everything(module, [other]) == before
    assert module[0].weight.grad is grad


def test_going_back_to_the_start_as_often_as_wanted(module: nn.Module) -> None:
    other = torch.ones(2, requires_grad=True)
    with untouched(module, tensors=[other]) as start_over:
        disturb(module, other)
        once = everything(module, [other])
        start_over()
        assert all(p.grad is None for p in module.parameters())
        disturb(module, other)
        assert everything(module, [other]) == once


def test_a_leaf_that_is_named_twice_keeps_its_gradient(module: nn.Module) -> None:
    before = everything(module, [])
    with untouched(module, module, tensors=list(module.parameters())):
        disturb(module, torch.ones(2))
    assert everything(module, []) == before


def test_the_module_of_a_method_is_meant(module: nn.Module) -> None:
    with in_eval_mode(module.forward):
        assert not module.training
    assert module.training
