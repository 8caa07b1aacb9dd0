"""SMAX of JaxMARL (Rutherford et al. 2024, arXiv 2311.10090), battles like StarCraft's, by name: pip install jaxmarl.

    python stas_ippo_pettingzoo.py --env-id envs.smax --env-kwargs '{"map": "3m"}' --gamma 0.99 --gae-lambda 0.95

Keeps the protocol of envs/__init__.py, with masks: who may be shot at depends on the distance, and an agent that has
died may only stop. A step earns the health the enemies lose, 1 in all, and the one in which the last of them dies 1
more; so a battle won returns 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxmarl import make
from jaxmarl.environments.smax import map_name_to_scenario

from envs import check_action


class Smax:
    """Battles against the enemies' heuristic. Args:
    map: name of a scenario of SMAX, such as 3m or 2s3z. num_envs: E. max_steps: the horizon. options: of SMAX.
    """

    masked, continuous = True, False

    def __init__(self, map: str, num_envs: int, device="cpu", max_steps: int = 100, **options):
        game = make("HeuristicEnemySMAX", scenario=map_name_to_scenario(map), max_steps=max_steps, **options)
        self.num_envs, self.num_agents, self.device = num_envs, game.num_agents, device
        self.num_actions = game.action_space(game.agents[0]).n
        self.obs_dim = game.observation_space(game.agents[0]).shape[0] + self.num_actions
        self.horizon = self.t = max_steps  # no episode is running
        self.key = jax.random.key(0)

        def look(state):
            """(N, O) float, whether it is won or lost"""
            seen, allowed, alive = game.get_obs(state), game.get_avail_actions(state), state.state.unit_alive
            obs = [jnp.concatenate((seen[name], allowed[name].astype(jnp.float32))) for name in game.agents]
            over = ~alive[: game.num_allies].any() | ~alive[game.num_allies :].any()
            return jnp.stack(obs), over

        def begin(key):
            state = game.reset(key)[1]
            return state, look(state)

        def go_on(key, state, over, act):
            _, following, rewards, _, _ = game.step_env(key, state, dict(zip(game.agents, act)))
            state = jax.tree.map(lambda old, new: jnp.where(over, old, new), state, following)
            return state, look(state), jnp.where(over, 0.0, jnp.stack(list(rewards.values())).mean())

        self.begin, self.go_on = jax.jit(jax.vmap(begin)), jax.jit(jax.vmap(go_on))

    def keys(self) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return jax.random.split(key, self.num_envs)

    def tensor(self, values: jax.Array) -> torch.Tensor:
        return torch.as_tensor(np.array(values), device=self.device)

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Start all battles anew. Returns obs (E, N, O)."""
        self.key = self.key if seed is None else jax.random.key(seed)
        self.state, (self.obs, self.over) = self.begin(self.keys())
        self.t, self.terminated = 0, self.tensor(self.over)
        return self.observe()

    def step(self, act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """act (E, N) int64 -> obs (E, N, O), team_reward (E,), terminated (E,)."""
        check_action(self, act)
        self.t += 1
        act = jnp.asarray(act.cpu().numpy().astype(np.int32))
        self.state, (self.obs, self.over), reward = self.go_on(self.keys(), self.state, self.over, act)
        self.terminated = self.tensor(self.over)
        return self.observe(), self.tensor(reward), self.terminated.clone()

    def observe(self) -> torch.Tensor:
        return self.tensor(self.obs)


def batched_env(num_envs: int, device="cpu", map: str = "3m", **options) -> Smax:
    """What --env-id envs.smax finds."""
    return Smax(map, num_envs, device, **options)
