"""Three ranks, of which one ends before the others, against one process on all lanes."""

from __future__ import annotations

from typing import Any

import pytest
from cases import gradients, relative_error, tanh_cell
from joined_ranks import K1, STEPS, STEPS_OF, Joined, all_lanes, held, local, masked_mean, sharded
from several_ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from tbptt_ckpt import TBPTT, TensorSequence, Trainer

LANES_OF = (slice(0, 2), slice(2, 3), slice(3, 4))
LENGTHS = (STEPS, STEPS, STEPS_OF[1])


def share(rank: int) -> tuple[TensorSequence, Tensor]:
    inputs, targets, resets, state = all_lanes()
    steps, lanes = LENGTHS[rank], LANES_OF[rank]
    inputs, targets, resets = (each[:steps, lanes] for each in (inputs, targets, resets))
    return TensorSequence(inputs, targets, resets=resets), state[lanes]


CASES: list[tuple[Any, dict[str, Any]]] = [
    (nn.Identity(), {"accumulate": 2, "clip_grad_norm": 0.05}),
    (nn.Identity(), {"overlap": "stale", "reduction": "sum"}),
    (DistributedDataParallel, {"executor": "checkpoint"}),
    (sharded, {"accumulate": 3}),
]


def check_three(rank: int, count: int) -> None:
    for wrap, how in CASES:
        sequence, state = share(rank)
        expected = Joined(tanh_cell(), 0.1, 7, how)
        updates, module = dict(expected.updates), wrap(tanh_cell())
        weights = list(module.parameters())
        given = how | {"strategy": f"uniform:{1 + rank}", "ranks": "all"}
        tbptt = TBPTT(module, masked_mean, K1, 7, SGD(weights, lr=0.1), **given)
        trainer = Trainer(tbptt, sequence, init_state=state)
        for window, loss in zip(trainer.windows(), expected.losses, strict=True):
            assert window.loss_value == pytest.approx(loss, rel=1e-12), how
            if window.updated:
                found = local(gradients(weights))
                wanted = held(updates[trainer.num_steps], weights)
                assert relative_error(found, wanted) <= 1e-12, (rank, how)
        assert relative_error(local(weights), held(expected.weights, weights)) <= 1e-12, how


@pytest.mark.exhaustive
def test_three_ranks_train_as_one_process_does() -> None:
    on_ranks(check_three, 3)
