"""Level-based foraging (Christianos et al. 2020, arXiv 2006.07169) as a PettingZoo ParallelEnv: pip install lbforaging.

    env = parallel_env(players=2, size=6, food=2)

Players walk on a grid, on which food lies. A player beside food may load it, which works only if all who load it in
that step have at least its level together. The level of each player is 1 or 2, that of food the sum of the players'
levels (of the lowest three, if there are more), so that nobody can load it alone. All food together is worth 1,
divided by level among those who load it; so the team reward here, the mean over players, adds up to at most
1 / players. The episode ends when no food is left, or after `max_cycles` steps.
"""

from gymnasium.spaces import Box, Discrete
from lbforaging.foraging import ForagingEnv
from pettingzoo import ParallelEnv


class Foraging(ParallelEnv):
    """lbforaging's ForagingEnv, each player's entries of its lists under the player's name."""

    metadata = {"render_modes": [], "name": "foraging"}

    def __init__(self, players: int = 2, size: int = 6, food: int = 2, max_cycles: int = 50):
        self.game = ForagingEnv(
            players=players,
            min_player_level=1,
            max_player_level=2,
            min_food_level=1,
            max_food_level=None,
            field_size=(size, size),
            max_num_food=food,
            sight=size,
            max_episode_steps=max_cycles,
            force_coop=True,
        )
        self.possible_agents, self.agents = [f"player_{i}" for i in range(players)], []

    def observation_space(self, agent: str) -> Box:
        return self.game.observation_space[self.possible_agents.index(agent)]

    def action_space(self, agent: str) -> Discrete:
        return self.game.action_space[self.possible_agents.index(agent)]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.agents = list(self.possible_agents)
        for player in self.game.players:
            player.position = None  # else nobody is placed where someone stood when the last episode ended
        observed, _ = self.game.reset(seed=seed)
        return dict(zip(self.agents, observed)), {agent: {} for agent in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        observed, rewards, over, _, _ = self.game.step([int(actions[agent]) for agent in self.agents])
        players, none_left = self.agents, not self.game.field.any()
        self.agents = [] if over else self.agents
        return (
            dict(zip(players, observed)),
            dict(zip(players, map(float, rewards))),
            dict.fromkeys(players, none_left),
            dict.fromkeys(players, over and not none_left),
            {player: {} for player in players},
        )


def parallel_env(render_mode: None = None, **options) -> Foraging:
    """The game; `options` are those of Foraging. It has no pictures, as lbforaging draws in a window only."""
    if render_mode is not None:
        raise ValueError("it has no pictures")
    return Foraging(**options)
