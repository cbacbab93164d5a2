"""A run that some ranks have saved, taken up by another number of them.

The lanes of all ranks, in their order, are those of one batch; `lane_range` says which a rank has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tbptt_ckpt.data.lane_share import lane_range
from tbptt_ckpt.engine.stored_records import load_records, store_records
from tbptt_ckpt.errors import ArgumentError, SnapshotError, shown
from tbptt_ckpt.executor.boundary import Boundary
from tbptt_ckpt.module.trees import Tree, iterate_leaves, replace_tensors, structure, tensors_of
from tbptt_ckpt.trainer.rank_states import digest

_WHOLE = (bool, int, float, complex, str, bytes, type(None))  # leaves that have no lanes


def resplit(
    states: Sequence[dict[str, Any]], rank: int, count: int, lane_dim: int, *, is_shared: bool
) -> dict[str, Any]:
    """What one of `count` ranks goes on with, of the states of all that saved.

    What is not of lanes is that of the rank of the same number, or of the first one.

    Args:
        states: By rank.
        rank: Which one goes on.
        count: How many do.
        lane_dim: Where lanes are in states.
        is_shared: Whether all lanes begin from the same first state.

    Raises:
        ArgumentError: Something has lanes that cannot be told apart.
    """
    base = states[rank if rank < len(states) else 0]
    split = _Split(states, rank, count)
    found = {
        **base,
        "learning": {**base["learning"], "grads": _mean_grads(states)},
        "init_state": _first_states(split, states, lane_dim, is_shared=is_shared),
        "plan": {**base["plan"], "measured": {}},
        "ranks": {"rank": rank, "count": count, "others": []} if count > 1 else None,
    }
    if base["run"] is not None:
        runs = [state["run"] for state in states]
        run = base["run"]
        reader = split.reader([run["reader"] for run in runs])
        found["run"] = {**run, "reader": reader, "records": split.records(runs, lane_dim)}
    if base["identity"]["data"] is not None:
        found["identity"] = {**base["identity"], "data": split.identity(states)}
    return found


def resplit_message(saved: int, count: int) -> str:
    """What is to be told of it."""
    return (
        f"saved by {saved} ranks, taken up by {count}: from here on the run equals the other to "
        "rounding, and not where the module draws random numbers or changes buffers, which are "
        "those of a rank; plans are measured anew"
    )


class _Split:
    """Joins what ranks have of their lanes, and cuts out those of one rank."""

    def __init__(self, states: Sequence[dict[str, Any]], rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        data = [state["identity"]["data"] or {} for state in states]
        known = [each.get("lanes") for each in data]
        self._lanes: list[int] | None = None if None in known else [*map(int, filter(None, known))]

    @property
    def own(self) -> slice:
        """The rank's lanes, of those of all."""
        assert self._lanes is not None, "they are known"
        return lane_range(sum(self._lanes), rank=self._rank, ranks=self._count)

    def tensor(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """The rank's lanes of one that each of the ranks has."""
        lanes = [each.shape[dim] if dim < each.dim() else None for each in tensors]
        if self._lanes is None and None not in lanes:
            self._lanes = [lane for lane in lanes if lane is not None]
        if lanes != self._lanes:
            raise ArgumentError(
                f"the run was saved by {len(tensors)} ranks and goes on with {self._count}, and "
                f"what it carries has a tensor of shape {tuple(tensors[0].shape)} without the "
                f"{self._lanes} lanes of ranks on dimension {dim}; pass lane_dim to say where "
                f"lanes are in the state, or go on with {len(tensors)} ranks"
            )
        return torch.cat(list(tensors), dim)[(slice(None),) * dim + (self.own,)].clone()

    def tree(self, trees: Sequence[Tree], dim: int) -> Tree:
        """The same of nested tensors."""
        kinds = {repr(structure(tree)) for tree in trees}
        others = [
            [each for each in iterate_leaves(t) if not isinstance(each, Tensor)] for t in trees
        ]
        if len(kinds) > 1 or any(
            not isinstance(each, _WHOLE) or repr(other[place]) != repr(each)
            for place, each in enumerate(others[0])
            for other in others
        ):
            raise ArgumentError(
                f"the run was saved by {len(trees)} ranks and goes on with {self._count}, and what "
                f"it carries, {shown(others[0])} beside tensors, is each rank's own and cannot be "
                f"split; go on with {len(trees)} ranks"
            )
        columns = zip(*map(tensors_of, trees), strict=True)
        return replace_tensors(trees[0], [self.tensor(column, dim) for column in columns])

    def records(self, runs: Sequence[dict[str, Any]], dim: int) -> dict[str, Any] | None:
        """States that are kept; generators and buffers found there are the base's."""
        mine = runs[self._rank if self._rank < len(runs) else 0]["records"]
        if mine is None:
            return None
        base, present = load_records(mine)
        all_records = [load_records(run["records"])[0] for run in runs]
        if any([*each.boundaries] != [*base.boundaries] for each in all_records):
            raise SnapshotError("ranks have kept states at different steps")
        made: dict[int, Boundary] = {}

        def joined(boundaries: Sequence[Boundary], own: Boundary) -> Boundary:
            if id(own) not in made:
                state = self.tree([each.state for each in boundaries], dim)
                made[id(own)] = Boundary(own.step, state, own.ambient)
            return made[id(own)]

        kept = {
            step: joined([each.boundaries[step] for each in all_records], own)
            for step, own in base.boundaries.items()
        }
        carried, origin_state = base.carried, base.origin_state
        if carried is not None:
            carried = joined([each.carried for each in all_records if each.carried], carried)
        if base.has_origin_state:
            origin_state = self.tree([each.origin_state for each in all_records], dim)
        found = replace(base, boundaries=kept, carried=carried, origin_state=origin_state)
        return store_records(found, present)

    def reader(self, readers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Where data is read on; steps that are held are split."""
        base = readers[0]
        places = {digest({k: v for k, v in each.items() if k != "held"}) for each in readers}
        if len(places) > 1:
            raise ArgumentError(
                f"the run was saved by {len(readers)} ranks and goes on with {self._count}, and "
                f"each read a source of its own, which says {shown(base.get('source'))} of itself "
                "on the first; give all ranks one of all lanes: tbptt_ckpt.data.own_lanes(source)"
            )
        if "held" not in base:
            return base
        blocks = zip(*(each["held"] for each in readers), strict=True)
        return {**base, "held": [self._block(each) for each in blocks]}

    def _block(self, blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        base = dict(blocks[0])
        for name in ("inputs", "targets"):
            ((kind, _),) = base[name].items()
            dim = 0 if kind == "column" else 1 - base["time_dim"]
            base[name] = {kind: self.tree([each[name][kind] for each in blocks], dim)}
        for name in ("weight", "resets"):
            if base[name] is not None and base[name].dim() == 2:
                base[name] = self.tensor([each[name] for each in blocks], 1)
        return base

    def identity(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the rank's data is known by; each rank's own steps say nothing of those of all."""
        data: dict[str, Any] = {**states[0]["identity"]["data"]}
        is_whole = data.get("share") is None
        lanes = None if self._lanes is None else self.own.stop - self.own.start
        return {**data, "lanes": lanes, "data": data["data"] if is_whole else None}


def _mean_grads(states: Sequence[dict[str, Any]]) -> list[Tensor | None] | None:
    """Gradients that accumulate: an update takes their mean over ranks."""
    grads = [state["learning"]["grads"] for state in states]
    if grads[0] is None:
        return None
    return [_mean(column) for column in zip(*grads, strict=True)]


def _mean(tensors: Sequence[Tensor | None]) -> Tensor | None:
    found = [each for each in tensors if each is not None]
    return sum(found[1:], found[0]) / len(tensors) if found else None


def _first_states(
    split: _Split, states: Sequence[dict[str, Any]], dim: int, *, is_shared: bool
) -> list[dict[str, Any]]:
    """The tensors of the first state, with their gradients."""
    columns = zip(*(state["init_state"] for state in states), strict=True)
    if is_shared:
        return [{**column[0], "grad": _mean([e["grad"] for e in column])} for column in columns]
    return [
        {"value": split.tensor([e["value"] for e in column], dim), "grad": None}
        for column in columns
    ]
