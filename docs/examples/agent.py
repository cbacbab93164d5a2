"""A recurrent agent: what it saw at the begin of an episode decides what earns a reward at its end.

REINFORCE on episodes of 6 to 14 steps, side by side in lanes, each of which takes its next
episode where the last one ends. The first steps of an episode warm the state up and have no loss.

    $ python docs/examples/agent.py
    right turns: 100.0 % with k2=24, 52.4 % with k2=4, by chance 50 %

Elsewhere within 8 %.
"""

import torch
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, BurnIn, LaneSource, TensorSequence

BURN_IN, LANES = 2, 16


class Agent(nn.Module):
    """One step: observations [B, 3] to logits of the two actions, left and right."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.readout = nn.GRUCell(3, 24), nn.Linear(24, 2)

    def forward(self, observation: Tensor, h: Tensor | None):
        h = self.cell(observation, h)
        return self.readout(h), h


def play(agent: Agent, episodes: int, numbers: torch.Generator):
    """Corridors of 6 to 14 steps: a sign at the begin says where the reward will be at the end.

    Returns of each episode its observations, actions, and the reward, 1 or -1, of the last action.
    """
    played = []
    for length in torch.randint(6, 15, (episodes // LANES,), generator=numbers).tolist():
        side = torch.randint(0, 2, (LANES,), generator=numbers)
        seen = 0.3 * torch.randn(length, LANES, 3, generator=numbers)
        seen[0, :, 0] = side * 2.0 - 1.0  # the sign
        seen[-1, :, 1] = 1.0  # the junction
        actions, h = [], None
        with torch.no_grad():
            for x in seen:
                logits, h = agent(x, h)
                actions.append(torch.multinomial(logits.softmax(1), 1, generator=numbers)[:, 0])
        reward = (actions[-1] == side) * 2.0 - 1.0
        played += [(seen[:, i], torch.stack(actions)[:, i], reward[i]) for i in range(LANES)]
    return played


def policy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """REINFORCE: of each step [B], the action's negative log probability times the return."""
    actions, returns = targets[:, 0].long(), targets[:, 1]
    chosen = logits.log_softmax(1).gather(1, actions[:, None])[:, 0]
    return -(chosen * returns).sum(), torch.ones_like(returns).sum()


def success(k2: int, iterations: int) -> float:
    torch.manual_seed(0)
    numbers = torch.Generator().manual_seed(1)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.01)
    tbptt = TBPTT(agent, policy_loss, k1=8, k2=k2, optimizer=optimizer, strategy="retain")
    for _ in range(iterations):
        episodes = []
        for seen, actions, reward in play(agent, 256, numbers):
            at_junction = torch.zeros(len(seen))
            at_junction[-1] = reward
            episodes.append(TensorSequence(seen, torch.stack([actions.float(), at_junction], 1)))
        tbptt.train(BurnIn(LaneSource(episodes, lanes=LANES), BURN_IN))
    rewards = torch.stack([reward for _, _, reward in play(agent, 1024, numbers)])
    return 100 * (rewards > 0).float().mean().item()


def main(iterations: int = 10) -> str:
    far, near = success(24, iterations), success(4, iterations)
    return f"right turns: {far:.1f} % with k2=24, {near:.1f} % with k2=4, by chance 50 %"


if __name__ == "__main__":
    print(main())
