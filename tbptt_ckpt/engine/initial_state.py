"""The state that sequences begin from, which may be learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbptt_ckpt.arguments import PositiveInt, check_fields
from tbptt_ckpt.errors import ArgumentError, SnapshotError
from tbptt_ckpt.executor.window_pass import StateGrads
from tbptt_ckpt.memory.storages import tensor_bytes
from tbptt_ckpt.module.trees import Tree, check_no_hidden_tensors, map_tensors, tensors_of
from tbptt_ckpt.updates.updater import Updater


@dataclass(frozen=True, slots=True, eq=False)
class SharedState:
    """One initial state that all lanes begin from, such as a learned row.

    Its tensors may be leaves that an optimizer updates; an `expand` of them would carry a
    graph, which the first update invalidates. Their gradients are summed over the lanes.

    Attributes:
        state: Nested tensors of size 1 where lanes are: [1, H] for cells, [layers, 1, H] for
            `nn.RNN/LSTM/GRU`.
        lanes: Number of lanes.
    """

    state: Tree
    lanes: PositiveInt

    def __post_init__(self) -> None:
        check_fields(self)


def for_lanes(state: Tree, lane_dim: int) -> Tree:
    """An initial state as a module takes it: a shared one in every lane, others as they are.

    Raises:
        ArgumentError: A shared state whose tensors are not of size 1 on `lane_dim`.
    """
    if not isinstance(state, SharedState):
        return state

    def repeated(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if len(shape) <= lane_dim or shape[lane_dim] != 1:
            raise ArgumentError(
                f"a SharedState has a tensor of shape {tuple(shape)}, which must be of size 1 on "
                f"lane_dim={lane_dim}"
            )
        shape[lane_dim] = state.lanes
        return tensor.detach().expand(shape).clone()

    return map_tensors(repeated, state.state)


class InitialState:
    """Takes the gradients of every window that starts at step 0 or resets a lane.

    Leaf tensors that require grad get theirs window by window. Tensors with a graph of
    their own get the sum over all windows, in one backward at the end.
    `given` is the user's, a `SharedState` perhaps; it is read anew by each window.

    Attributes:
        given: As given.
        attached: Its values for lanes that reset, whose gradients a window's backward
            collects.

    Raises:
        ArgumentError: A tensor with a graph, whose weights an optimizer would change before
            that graph is differentiated.
    """

    def __init__(self, given: Tree, updater: Updater, lane_dim: int = 0) -> None:
        self.given, self._lane_dim = given, lane_dim
        own = given.state if isinstance(given, SharedState) else given
        self._tensors = tensors_of(own)
        self._sums: dict[int, Tensor] = {}
        check_no_hidden_tensors(own)
        if any(t.is_inference() for t in self._tensors):
            raise ArgumentError(
                "init_state holds tensors of torch.inference_mode, which cannot be differentiated; "
                "clone them outside of it"
            )
        if updater.optimizer is not None and any(t.grad_fn is not None for t in self._tensors):
            raise ArgumentError(
                "init_state was computed with a graph, which the optimizer's steps would "
                "invalidate; pass leaf tensors (SharedState has one for all lanes), detach it, or "
                "use optimizer=None"
            )
        self.attached = map_tensors(self._stand_in, own)
        for_lanes(given, lane_dim)  # raises now what would come late

    @property
    def state(self) -> Tree:
        """The state at step 0, with today's values."""
        return for_lanes(self.given, self._lane_dim)

    @property
    def is_shared(self) -> bool:
        """Whether all lanes begin from the same one."""
        return isinstance(self.given, SharedState)

    def leaves(self) -> list[Tensor]:
        """Its learned tensors."""
        return [t for t in self._tensors if t.requires_grad and t.is_leaf]

    def learned_bytes(self) -> int:
        """Bytes of its gradients."""
        return tensor_bytes([t for t in self._tensors if t.requires_grad])

    def collect(self, grads: StateGrads | None) -> None:
        """Take the gradients of one window."""
        for tensor, grad in zip(self._tensors, self.over_lanes(grads), strict=False):
            if grad is None or not tensor.requires_grad:
                continue
            if tensor.is_leaf:
                torch.autograd.backward([tensor], [grad])
            else:
                self._add(tensor, grad)

    def over_lanes(self, grads: StateGrads | None) -> StateGrads:
        """Gradients of `state` as those of the given tensors: shared ones are sums over lanes."""
        pairs = zip(self._tensors, grads or [], strict=False)
        return [None if grad is None else grad.sum_to_size(t.shape) for t, grad in pairs]

    def collected(self) -> dict[int, Tensor]:
        """The gradients summed for tensors with a graph, by their place in the state."""
        places = {id(tensor): place for place, tensor in enumerate(self._tensors)}
        return {places[key]: grad for key, grad in self._sums.items()}

    def set_collected(self, collected: dict[int, Tensor]) -> None:
        """Put back what `collected` gave.

        Raises:
            SnapshotError: It is of another state.
        """
        shapes = {place: tensor.shape for place, tensor in enumerate(self._tensors)}
        if wrong := [place for place, grad in collected.items() if grad.shape != shapes.get(place)]:
            found = {place: list(grad.shape) for place, grad in collected.items()}
            raise SnapshotError(
                f"it holds gradients {found} of a first state, of others at {wrong}"
            )
        self._sums = {id(self._tensors[place]): grad for place, grad in collected.items()}

    def backward(self) -> None:
        """Differentiate what the state was computed from."""
        sums, self._sums = self._sums, {}
        # One tensor may stand in several places of the state; its sum counts once.
        tensors = {id(t): t for t in self._tensors if id(t) in sums}
        if tensors:
            torch.autograd.backward(list(tensors.values()), [sums[key] for key in tensors])

    def _add(self, tensor: Tensor, grad: Tensor) -> None:
        known = self._sums.get(id(tensor))
        self._sums[id(tensor)] = grad if known is None else known + grad

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """A leaf in place of a tensor with a graph, which later windows need as well.

        A window's backward stops at it, and its gradient goes to the sum.
        """
        if tensor.grad_fn is None:
            return tensor
        stand_in = tensor.detach().requires_grad_()

        def hand_on(leaf: Tensor) -> None:
            if leaf.grad is not None:
                self._add(tensor, leaf.grad)
                leaf.grad = None

        stand_in.register_post_accumulate_grad_hook(hand_on)  # type: ignore[no-untyped-call]
        return stand_in
