"""`Batches`: a loader of batches of whole sequences, against plain loops and runs never stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from tbptt_ckpt import TBPTT, ArgumentError, Batches, Snapshots, Trainer

K1, WIDTH = 3, 4


class Noisy:
    """Eight sequences of seven steps, with noise from every global generator."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + torch.rand(7, WIDTH).double()  # noqa: NPY002
        return index + noise, torch.full((7, WIDTH), float(index)).double()


class Dropped(nn.Module):
    """Draws from torch's generator, as the data does."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True).double()

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x, h)
        return nn.functional.dropout(y, 0.2, self.training), h


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=3, shuffle=True, **options)  # 3, 3 and 2 lanes


def engine(module: nn.Module, k2: int | None = K1) -> TBPTT:
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    options: dict[str, Any] = {"per_step": False, "time_dim": 1, "strategy": "retain"}
    return TBPTT(module, mse_loss, K1, k2, optimizer, **options)


def trainer(path: Path | None = None, source: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    source = Batches(shuffled(), time_dim=1) if source is None else source
    snapshots = None if path is None else Snapshots(directory=path, every_steps=1, keep=99)
    return Trainer(engine(Dropped()), source, epochs=2, snapshots=snapshots, **options)


def weights(made: Trainer) -> list[Tensor]:
    return [weight.detach().clone() for weight in made.tbptt.parts.weights()]


def test_every_batch_is_a_sequence_of_its_own() -> None:
    torch.manual_seed(0)
    sizes = [(2, 6), (2, 2), (1, 9)]  # lanes and steps
    pairs = [(torch.randn(*s, WIDTH).double(), torch.randn(*s, WIDTH).double()) for s in sizes]
    module, plain = (nn.GRU(WIDTH, WIDTH, batch_first=True).double() for _ in range(2))
    plain.load_state_dict(module.state_dict())
    result = Trainer(engine(module), Batches(pairs, time_dim=1), epochs=2).train()
    optimizer = torch.optim.Adam(plain.parameters(), 0.01)
    for x, y in pairs * 2:
        h = None
        for part, target in zip(x.split(K1, 1), y.split(K1, 1), strict=True):
            optimizer.zero_grad()
            out, h = plain(part, h)
            mse_loss(out, target).backward()
            optimizer.step()
            h = h.detach()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (result.num_epochs, result.num_steps, result.num_windows) == (2, 34, 12)


def test_a_run_resumed_inside_any_batch_is_the_run_never_stopped(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    saved = sorted((tmp_path / "whole").glob("step-*"), key=lambda path: int(path.name[5:]))
    assert len(saved) == 2 * 3 * 3 + 1
    for path in (saved[4], saved[11]):  # in the second batch of each pass
        part = tmp_path / f"from-{path.name}"
        part.mkdir()
        path.rename(part / path.name)
        resumed = trainer(part)
        assert resumed.resume()
        result = resumed.train()
        assert all(map(torch.equal, weights(resumed), weights(whole)))
        assert (result.num_epochs, result.num_steps) == (2, 42)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    trainer(tmp_path, Batches(shuffled(), time_dim=1, seed=1)).train()
    (path,) = (p for p in tmp_path.glob("step-*") if p.name == "step-6")
    for other in tmp_path.glob("step-*"):
        if other != path:
            other.rename(tmp_path.parent / f"{other.name}-aside")
    with pytest.raises(ArgumentError, match="data="):
        trainer(tmp_path).resume()
    assert trainer(tmp_path, Batches(shuffled(), time_dim=1, seed=1)).resume()
    shorter = Batches([(torch.zeros(3, 3, WIDTH).double(),) * 2], time_dim=1)
    at_second = trainer(tmp_path, shorter)
    with pytest.raises(ArgumentError, match="data="):
        at_second.resume()


def positions() -> tuple[object, ...]:
    here = np.random.get_state()[2]  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), here


def test_what_the_loader_draws_is_a_function_of_seed_and_epoch() -> None:
    def drawn(batches: Batches, epoch: int) -> list[Tensor]:
        batches.set_epoch(epoch)
        return [sequence.inputs for sequence in batches]

    generator = torch.Generator()
    for loader in (shuffled(), shuffled(generator=generator)):
        batches = Batches(loader, time_dim=1)
        torch.manual_seed(5)
        before = positions()
        first, second = drawn(batches, 0), drawn(batches, 1)
        assert positions() == before
        assert not torch.equal(first[0], second[0])
        torch.manual_seed(6)
        generator.manual_seed(7)
        assert all(map(torch.equal, drawn(batches, 0), first))


def test_an_evaluation_is_the_mean_over_all_batches() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 4, WIDTH).double(), torch.randn(5, 4, WIDTH).double()
    module = nn.GRU(WIDTH, WIDTH, batch_first=True).double()
    pairs = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = engine(module).evaluate(Batches(pairs, time_dim=1))
    assert found.loss == pytest.approx(mse_loss(module(x)[0], y).item(), rel=1e-12)
    assert found.num_steps == 8


def steps() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, WIDTH)


def test_what_is_no_loader_of_sequences_is_one_clear_error() -> None:
    with pytest.raises(ArgumentError, match=r"Trainer\(tbptt, Batches\(loader, time_dim=1\)\)"):
        trainer(source=shuffled())
    with pytest.raises(ArgumentError, match="anew for each pass"):
        Batches(steps(), time_dim=1)
    with pytest.raises(ArgumentError, match=r"batch 0 of Batches.* is a Tensor, not a pair"):
        trainer(source=Batches([torch.zeros(3)], time_dim=1)).train()
    with pytest.raises(ArgumentError, match="has no batch in pass 0"):
        trainer(source=Batches([], time_dim=1)).train()
    with pytest.raises(ArgumentError, match="for sequence in batches"):
        engine(Dropped()).train(Batches(shuffled(), time_dim=1))
