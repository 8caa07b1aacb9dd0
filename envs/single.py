"""A batched environment that keeps the protocol of envs/__init__.py, with one episode, as a PettingZoo ParallelEnv."""

import gymnasium
import numpy as np
import torch
from pettingzoo import ParallelEnv


class SingleEnv(ParallelEnv):
    """`env` (num_envs 1) for evaluate.py and everything else that takes a ParallelEnv. All agents earn the team reward.

    Actions are numbers from 0 on, or if continuous A numbers in [0, 1]. If `env` has a method `picture`, (H, W, 3)
    uint8, `render_mode="rgb_array"` makes `render` return it, and "human" shows it in a window.

    Args:
        names: of the agents (default: agent_0 and so on). bound: no observation is larger (default: none is known).
    """

    def __init__(self, env, name: str, render_mode: str | None = None, names: tuple = (), bound: float = np.inf):
        self.metadata = {"name": name, "render_modes": ["human", "rgb_array"], "render_fps": 4}
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None, 'human' or 'rgb_array', got {render_mode!r}")
        self.env, self.render_mode, self.window = env, render_mode, None
        self.possible_agents = list(names) or [f"agent_{i}" for i in range(env.num_agents)]
        self.agents, self.horizon, self.masked = [], env.horizon, getattr(env, "masked", False)
        self.space = gymnasium.spaces.Box(-bound, bound, (env.obs_dim,), np.float32)
        box, count = gymnasium.spaces.Box, env.num_actions
        self.action_spaces = {
            agent: box(0, 1, (count,), np.float32) if env.continuous else gymnasium.spaces.Discrete(count)
            for agent in self.possible_agents  # each draws for itself
        }
        for optional in {"oracles", "event_names", "legend"} & set(dir(env)):
            setattr(self, optional, getattr(env, optional))

    def observation_space(self, agent: str) -> gymnasium.spaces.Box:
        return self.space

    def action_space(self, agent: str) -> gymnasium.Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents = list(self.possible_agents)
        obs = self.env.reset(seed)
        if self.render_mode == "human":
            self.render()
        return dict(zip(self.agents, obs[0].numpy())), {agent: {} for agent in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            raise RuntimeError("no episode is running: call reset()")
        known = set(actions) == set(self.agents)
        if not known or not all(self.action_spaces[agent].contains(act) for agent, act in actions.items()):
            space = self.action_spaces[self.agents[0]]
            raise ValueError(f"actions must be in {space} for each of {self.agents}, got {actions}")
        act = torch.as_tensor(np.stack([actions[agent] for agent in self.agents]))[None]
        obs, team_reward, terminated = self.env.step(act if self.env.continuous else act.long())
        terminated = bool(terminated)
        truncated = self.env.t == self.env.horizon and not terminated
        agents = self.agents
        if terminated or truncated:
            self.agents = []
        if self.render_mode == "human":
            self.render()
        return (
            dict(zip(agents, obs[0].numpy())),
            dict.fromkeys(agents, float(team_reward)),
            dict.fromkeys(agents, terminated),
            dict.fromkeys(agents, truncated),
            {agent: {} for agent in agents},
        )

    def render(self) -> np.ndarray | None:
        if self.render_mode is None or not hasattr(self.env, "picture"):
            gymnasium.logger.warn("render() does nothing without a render_mode, or a picture of the environment's")
            return None
        picture = self.env.picture()
        if self.render_mode == "rgb_array":
            return picture
        import pygame  # only a window needs it

        if self.window is None:
            pygame.display.init()
            pygame.display.set_caption(self.metadata["name"])
            self.window = pygame.display.set_mode(picture.shape[1::-1])
        pygame.surfarray.blit_array(self.window, picture.swapaxes(0, 1))
        pygame.event.pump()
        pygame.display.flip()
        pygame.time.wait(1000 // self.metadata["render_fps"])
        return None

    def close(self) -> None:
        if self.window is not None:
            import pygame

            pygame.display.quit()
            self.window = None
