"""VMAS (Bettini et al. 2022, arXiv 2207.03530), cooperative robots simulated in torch, by name: pip install vmas.

    python stas_ippo_pettingzoo.py --env-id envs.vmas --env-kwargs '{"scenario": "balance"}' --gae-lambda 0.95

Keeps the protocol of envs/__init__.py. Observations of unequal size are padded with zeros. The team reward is the mean
of the agents' rewards, and an episode is over when the scenario says so.
"""

import torch
import torch.nn.functional as F
from vmas import make_env

from envs import check_action


class Vmas:
    """Args:
        scenario: name of a scenario of VMAS. num_envs: E. max_steps: the horizon.
        continuous_actions: forces in [0, 1] for the range of the scenario, instead of one of the moves.
        options: of the scenario.

    Raises ValueError if the agents do not all have equal actions, or have several at once.
    """

    def __init__(self, scenario: str, num_envs: int, device="cpu", max_steps=100, continuous_actions=False, **options):
        self.game = make_env(scenario, num_envs, device, continuous_actions, **options)
        self.num_envs, self.num_agents, self.continuous = num_envs, self.game.n_agents, continuous_actions
        self.horizon = self.t = max_steps  # no episode is running
        spaces = [self.game.get_agent_action_space(agent) for agent in self.game.agents]
        if any(space != spaces[0] for space in spaces) or not hasattr(spaces[0], "low" if continuous_actions else "n"):
            raise ValueError(f"agents of {scenario} must have equal actions, one at a time, not {spaces}")
        self.num_actions = int(spaces[0].shape[0] if continuous_actions else spaces[0].n)
        if continuous_actions:
            self.low, self.high = (torch.as_tensor(x, device=device) for x in (spaces[0].low, spaces[0].high))
        self.obs_dim = max(obs.shape[1] for obs in self.game.reset(seed=0))

    def stack(self, observed: list[torch.Tensor]) -> torch.Tensor:
        """Tensors (E, O_i) of all agents -> (E, N, O)"""
        return torch.stack([F.pad(obs, (0, self.obs_dim - obs.shape[1])).float() for obs in observed], dim=1)

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Start all episodes anew. Returns obs (E, N, O)."""
        self.obs = self.stack(self.game.reset(seed=seed))
        self.t, self.terminated = 0, torch.zeros(self.num_envs, dtype=torch.bool, device=self.obs.device)
        return self.obs.clone()

    def step(self, act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """act (E, N) int64, or (E, N, A) if continuous -> obs (E, N, O), team_reward (E,), terminated (E,)."""
        check_action(self, act)
        self.t += 1
        act = self.low + act * (self.high - self.low) if self.continuous else act.unsqueeze(-1)
        obs, rewards, done, _ = self.game.step(list(act.unbind(dim=1)))
        over = self.terminated  # a game that goes on behind this is of no account
        self.obs = torch.where(over[:, None, None], self.obs, self.stack(obs))
        reward = torch.stack([values.reshape(-1) for values in rewards]).float().mean(dim=0)
        self.terminated = over | done.reshape(-1)
        return self.obs.clone(), torch.where(over, 0.0, reward), self.terminated.clone()

    def observe(self) -> torch.Tensor:
        return self.obs.clone()


def batched_env(num_envs: int, device="cpu", scenario: str = "balance", **options) -> Vmas:
    """What --env-id envs.vmas finds; `options` are those of Vmas."""
    return Vmas(scenario, num_envs, device, **options)
