"""RecurrentPPO of `sb3-contrib`, its update made by windows over whole rollouts.

What is shown at the first step of an episode must be said at its last. The library collects
rollouts and advantages as ever. Its own update runs one lane after another in batches, each of
which begins with a state that was stored while the rollout was made, and reaches no further back;
batches of 192 steps reach far enough here. A window takes 6 new steps of all lanes instead and
begins with the state that the windows before left; its gradient reaches `k2` steps back, and
episodes that begin on the way reset the state inside of the policy.

    $ pip install sb3_contrib
    $ python docs/examples/recurrent_ppo.py
    right answers: 100.0 % with k2=18, 51.4 % with k2=6, 100.0 % by its own update, by chance 50 %

Elsewhere within 8 %.
"""

import functools
from collections.abc import Callable

import gymnasium
import numpy
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

from tbptt_ckpt import TBPTT, TensorSequence

LANES, STEPS, K1 = 32, 64, 6


class Recall(gymnasium.Env):
    """Episodes of 10 to 13 steps: a sign at the first, and at the last 1 for saying which."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.sign, self.left = self.np_random.integers(2), self.np_random.integers(9, 13)
        return numpy.array([2 * self.sign - 1, 0], dtype=numpy.float32), {}

    def step(self, action: int):
        self.left -= 1
        is_over = self.left < 0
        seen = numpy.array([0, self.left == 0], dtype=numpy.float32)
        return seen, float(is_over and action == self.sign), bool(is_over), False, {}


class Segment(nn.Module):
    """Some steps of the policy, whose critic has no memory: what PPO's loss needs, each [n, B]."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, steps: dict[str, Tensor], state: tuple[Tensor, Tensor]):
        n = len(steps["begins"])
        seen, actions, begins = [  # the policy wants lanes first, in one dimension with time
            steps[name].transpose(0, 1).flatten(0, 1) for name in ("seen", "actions", "begins")
        ]
        choice, after = self.policy.get_distribution(seen, state, begins)
        values = self.policy.predict_values(seen, state, begins)[:, 0]
        found = choice.log_prob(actions), values, choice.entropy()
        return tuple(each.unflatten(0, (-1, n)).transpose(0, 1) for each in found), after


class WindowedPPO(RecurrentPPO):
    """Updates by windows of K1 new steps of all lanes, which reach `k2` steps back."""

    def __init__(self, *args: object, k2: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.k2 = k2

    def train(self) -> None:
        clip = self.clip_range(self._current_progress_remaining)

        def loss(found: tuple[Tensor, ...], old: dict[str, Tensor]) -> Tensor:
            log_probs, values, entropy = found
            ratio = (log_probs - old["log_probs"]).exp()
            gain = torch.min(
                ratio * old["advantages"], ratio.clamp(1 - clip, 1 + clip) * old["advantages"]
            )
            error = (values - old["returns"]) ** 2
            return (self.vf_coef * error - gain - self.ent_coef * entropy).mean()

        played, to_torch = self.rollout_buffer, self.rollout_buffer.to_torch
        advantages = to_torch(played.advantages)
        steps = {
            "seen": to_torch(played.observations),
            "actions": to_torch(played.actions)[..., 0],
            "begins": to_torch(played.episode_starts),
        }
        old = {
            "log_probs": to_torch(played.log_probs),
            "advantages": (advantages - advantages.mean()) / advantages.std(),
            "returns": to_torch(played.returns),
        }
        first = to_torch(played.hidden_states_pi[0]), to_torch(played.cell_states_pi[0])
        self.policy.set_training_mode(True)
        tbptt = TBPTT(
            *(Segment(self.policy), loss, K1, self.k2, self.policy.optimizer),
            **{"strategy": "retain", "per_step": False, "clip_grad_norm": self.max_grad_norm},
        )
        for _ in range(self.n_epochs):
            tbptt.train(TensorSequence(steps, old), first)


def success(make: Callable[..., RecurrentPPO], rollouts: int) -> float:
    """Percent of right answers after training."""
    agent = make(
        "MlpLstmPolicy",
        make_vec_env(Recall, LANES, seed=0),
        n_steps=STEPS,
        batch_size=LANES * K1,
        n_epochs=4,
        learning_rate=1e-2,
        gamma=0.5,
        gae_lambda=0.5,
        policy_kwargs={"lstm_hidden_size": 24, "net_arch": [], "enable_critic_lstm": False},
        seed=0,
        device="cpu",
    )
    agent.learn(rollouts * STEPS * LANES)
    env = make_vec_env(Recall, 64, seed=1)
    seen, state, begins, rewards, over = env.reset(), None, numpy.ones(64), 0.0, 0
    for _ in range(100):
        actions, state = agent.predict(seen, state, begins, deterministic=True)
        seen, reward, begins, _ = env.step(actions)
        rewards, over = rewards + reward.sum(), over + begins.sum()
    return 100 * rewards / over


def main(rollouts: int = 6) -> str:
    far, near = [success(functools.partial(WindowedPPO, k2=k2), rollouts) for k2 in (18, 6)]
    own = success(RecurrentPPO, rollouts)
    return (
        f"right answers: {far:.1f} % with k2=18, {near:.1f} % with k2=6, "
        f"{own:.1f} % by its own update, by chance 50 %"
    )


if __name__ == "__main__":
    print(main())
