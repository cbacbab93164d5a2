"""The script of the PyTorch forum's thread on truncated backpropagation, and what takes its place.

discuss.pytorch.org, topic 15500. By hand, as there: the graphs of the last k2 steps are retained,
and every k1 steps a walk goes back over them. With weights that stand still, its gradients are
those of windows. With updates in between, today's PyTorch ends it, for k2 > k1: a retained graph
needs the weights as they were. Windows run again from a detached state, with today's weights.

    $ python docs/examples/forum.py
    4 gradients of the script, equal to 1e-12; with updates: in-place error, ours 4 updates

Elsewhere within 1 %.
"""

from collections import deque

import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT

LAYER_SIZE, LANES, STEPS, K1, K2 = 50, 200, 20, 5, 7


class OneStep(nn.Module):
    """The thread's module: one linear layer whose output is split into output and new state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * LAYER_SIZE, 2 * LAYER_SIZE)

    def forward(self, inp: Tensor, state: Tensor):
        output, new_state = self.linear(torch.cat([inp, state], 1)).chunk(2, dim=1)
        return output, new_state


def by_hand(module: nn.Module, loss_fn, sequence, state: Tensor, optimizer=None) -> list[Tensor]:
    """What the thread does: the graphs of the last k2 steps are retained, and walked back over.

    States are detached between steps, so that the walk hands each gradient on itself.
    """
    kept: deque = deque(maxlen=K2)  # (state that went in, state that came out, loss)
    gradients = []
    for number, (inp, target) in enumerate(sequence, start=1):
        went_in = state.detach().requires_grad_()
        output, state = module(inp, went_in)
        kept.append((went_in, state, loss_fn(output, target)))
        if number % K1 == 0:
            module.zero_grad()
            later = None
            for age, (went_in, came_out, loss) in enumerate(reversed(kept)):
                went_in.grad = None
                if age < K1:
                    (loss / K1).backward(retain_graph=True)
                if later is not None:
                    came_out.backward(later.grad, retain_graph=True)
                later = went_in
            gradients.append(module.linear.weight.grad.clone())
            if optimizer is not None:
                optimizer.step()
    return gradients


def main() -> str:
    torch.manual_seed(0)
    module, loss_fn = OneStep().double(), nn.MSELoss()
    sequence = [tuple(torch.randn(2, LANES, LAYER_SIZE).double()) for _ in range(STEPS)]
    state = torch.zeros(LANES, LAYER_SIZE).double()

    expected = by_hand(module, loss_fn, sequence, state)  # with weights that stand still
    module.zero_grad()
    tbptt = TBPTT(module, loss_fn, K1, K2)  # without an optimizer it leaves gradients in .grad
    for _, gradient in zip(tbptt.windows(sequence, state), expected, strict=True):
        torch.testing.assert_close(module.linear.weight.grad, gradient, rtol=1e-12, atol=1e-15)
        module.zero_grad()

    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    try:
        by_hand(module, loss_fn, sequence, state, optimizer)
        ending = "trains"
    except RuntimeError as error:
        ending = "in-place error" if "modified by an inplace operation" in str(error) else "error"
    result = TBPTT(module, loss_fn, K1, K2, optimizer).train(sequence, state)
    return (
        f"{len(expected)} gradients of the script, equal to 1e-12; "
        f"with updates: {ending}, ours {result.num_windows} updates"
    )


if __name__ == "__main__":
    print(main())
