"""The particle environments on mpe2 itself, as PettingZoo ParallelEnvs: what teams are evaluated on.

simple_spread_v3 and simple_tag_v3 are mpe2's own; cooperative push is `PushScenario` here, on mpe2's world.
"""

import mpe2.simple_spread_v3
import mpe2.simple_tag_v3
import numpy as np
import torch
from gymnasium.utils import EzPickle
from mpe2._mpe_utils.core import Agent, Landmark, World
from mpe2._mpe_utils.partial_observability import padded_relative_positions
from mpe2._mpe_utils.scenario import BaseScenario
from mpe2._mpe_utils.simple_env import SimpleEnv, make_env
from pettingzoo import ParallelEnv
from pettingzoo.utils.conversions import parallel_wrapper_fn
from PIL import Image, ImageDraw, ImageFont

from envs.mpe import MOVES, CooperativePush, ParticleEnv, SimpleTag, make

AGENT_COLOUR = (31, 119, 180)


class PushScenario(BaseScenario):
    """`CooperativePush` on mpe2's world; its docstring gives the rules."""

    def __init__(self, num_agent_neighbors: int | None = None):
        self.num_agent_neighbors = num_agent_neighbors

    def make_world(self, num_agents: int = 3) -> World:
        world = World()
        world.dim_c = 2
        world.agents = [Agent() for _ in range(num_agents)]
        for i, agent in enumerate(world.agents):
            agent.name = f"agent_{i}"
            agent.silent = True
            agent.size = CooperativePush.size
        ball, target = world.landmarks = [Landmark(), Landmark()]
        ball.name, target.name = "ball", "target"
        ball.size, ball.movable, ball.initial_mass = CooperativePush.ball_size, True, CooperativePush.ball_mass
        target.size, target.collide = CooperativePush.target_size, False
        return world

    def reset_world(self, world: World, np_random: np.random.Generator) -> None:
        ball, target = world.landmarks
        for entity, color in [(ball, [0.85, 0.55, 0.15]), (target, [0.25, 0.85, 0.25])]:
            entity.color = np.array(color)
        for agent in world.agents:
            agent.color = np.array([0.35, 0.35, 0.85])
            agent.state.p_pos = np_random.uniform(-1, 1, world.dim_p)
            agent.state.c = np.zeros(world.dim_c)
        while True:
            reach = CooperativePush.reach
            ball.state.p_pos, target.state.p_pos = np_random.uniform(-reach, reach, (2, world.dim_p))
            if np.linalg.norm(ball.state.p_pos - target.state.p_pos) >= CooperativePush.least_distance:
                break
        for entity in world.entities:
            entity.state.p_vel = np.zeros(world.dim_p)

    def reward(self, agent: Agent, world: World) -> float:
        ball, target = world.landmarks
        to_ball = [float(np.linalg.norm(other.state.p_pos - ball.state.p_pos)) for other in world.agents]
        to_target = float(np.linalg.norm(ball.state.p_pos - target.state.p_pos))
        return -2 * to_target - min(to_ball)

    def observation(self, agent: Agent, world: World) -> np.ndarray:
        others = [other for other in world.agents if other is not agent]
        offsets = [entity.state.p_pos - agent.state.p_pos for entity in world.landmarks]
        offsets += padded_relative_positions(agent, others, self.num_agent_neighbors)
        return np.concatenate([agent.state.p_vel, agent.state.p_pos, *offsets])


class raw_env(SimpleEnv, EzPickle):
    """Cooperative push as an AEC environment, made as mpe2 makes its own."""

    def __init__(
        self,
        num_agents: int = 3,
        max_cycles: int = CooperativePush.usual_horizon,
        continuous_actions: bool = False,
        render_mode: str | None = None,
        num_agent_neighbors: int | None = None,
    ):
        EzPickle.__init__(self, num_agents, max_cycles, continuous_actions, render_mode, num_agent_neighbors)
        scenario = PushScenario(num_agent_neighbors)
        super().__init__(scenario, scenario.make_world(num_agents), max_cycles, render_mode, continuous_actions)
        self.metadata = {**self.metadata, "name": "cooperative_push_v0"}


push_parallel_env = parallel_wrapper_fn(make_env(raw_env))


def copy_state(world: World, env: ParticleEnv) -> torch.Tensor:
    """Put the batched environment `env`, with one episode, into the state of a world of mpe2; return `observe()`."""

    def read(entities: list, name: str) -> torch.Tensor:
        values = np.array([getattr(entity.state, name) for entity in entities]).reshape(1, len(entities), 2)
        return torch.as_tensor(values, dtype=env.dtype, device=env.device)

    agents, landmarks = world.agents, world.landmarks
    if isinstance(env, SimpleTag):
        agents, prey = agents[: env.num_agents], agents[env.num_agents :]
        env.prey_pos, env.prey_vel = read(prey, "p_pos"), read(prey, "p_vel")
    if isinstance(env, CooperativePush):
        balls, landmarks = landmarks[:1], landmarks[1:]
        env.ball_pos, env.ball_vel = read(balls, "p_pos"), read(balls, "p_vel")
    env.agent_pos, env.agent_vel = read(agents, "p_pos"), read(agents, "p_vel")
    env.landmark_pos = read(landmarks, "p_pos")
    return env.observe()


class ParticleParallelEnv(ParallelEnv):
    """A game of mpe2 with the learning agents as its agents; in tag the prey follow `SimpleTag.prey_policy`.

    Args:
        env: the ParallelEnv of mpe2.
        rules: the same game as a batched environment of one episode, which is put into mpe2's state to ask it for the
            prey's moves, for `oracles` and for a picture.
    """

    def __init__(self, env: ParallelEnv, rules: ParticleEnv):
        self.env, self.rules = env, rules
        self.metadata, self.render_mode = env.metadata, env.render_mode
        self.possible_agents = env.possible_agents[: rules.num_agents]
        self.prey = env.possible_agents[rules.num_agents :]
        self.agents, self.horizon = [], rules.horizon
        self.event_names, self.legend = rules.event_names, rules.legend

    def observation_space(self, agent: str):
        return self.env.observation_space(agent)

    def action_space(self, agent: str):
        return self.env.action_space(agent)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        results = self.env.reset(seed=seed, options=options)
        self.agents = list(self.possible_agents)
        return tuple(self.of_agents(result) for result in results)

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            raise RuntimeError("no episode is running: call reset()")
        if set(actions) != set(self.agents):
            raise ValueError(f"there must be actions for {self.agents}, got them for {list(actions)}")
        if self.prey:
            copy_state(self.unwrapped.world, self.rules)
            moves = self.rules.prey_policy()[0].tolist()
            if self.rules.continuous:
                moves = np.eye(len(MOVES), dtype=np.float32)[moves]  # all strength into one move
            actions = actions | dict(zip(self.prey, moves))
        results = tuple(self.of_agents(result) for result in self.env.step(actions))
        self.agents = [agent for agent in self.agents if agent in self.env.agents]
        return results

    def of_agents(self, values: dict) -> dict:
        return {agent: values[agent] for agent in self.agents}

    def oracles(self) -> dict:
        """As a batched environment tells them, of the current state."""
        copy_state(self.unwrapped.world, self.rules)
        return self.rules.oracles()

    @property
    def unwrapped(self):
        return self.env.unwrapped

    def render(self) -> np.ndarray | None:
        """rgb_array: (500, 500, 3) uint8, agents with their numbers, a camera that stands still; else as mpe2 does."""
        if self.render_mode != "rgb_array":
            return self.env.render()
        copy_state(self.unwrapped.world, self.rules)
        return draw(self.rules)

    def close(self) -> None:
        self.env.close()


def draw(env: ParticleEnv, pixels: int = 500, reach: float = 1.5) -> np.ndarray:
    """Picture of [-reach, reach]^2 in the first episode of a batched environment, (pixels, pixels, 3) uint8."""
    scale = 2 * pixels  # twice the size, for smooth edges
    image = Image.new("RGB", (scale, scale), "white")
    pen = ImageDraw.Draw(image)
    landmark_size, legend = CooperativePush.target_size, "grey: landmarks to cover"
    if isinstance(env, SimpleTag):
        landmark_size, legend = SimpleTag.obstacle_size, "green: prey, grey: obstacles"
    elif isinstance(env, CooperativePush):
        legend = "brown: ball, grey: target"
    discs = [(landmark_size, pos, (90, 90, 90), "") for pos in env.landmark_pos[0]]
    discs += [(SimpleTag.prey_size, pos, (60, 160, 60), "") for pos in getattr(env, "prey_pos", [[]])[0]]
    discs += [(CooperativePush.ball_size, pos, (217, 140, 38), "") for pos in getattr(env, "ball_pos", [[]])[0]]
    discs += [(env.size, pos, AGENT_COLOUR, str(i)) for i, pos in enumerate(env.agent_pos[0])]
    texts = []
    for size, pos, fill, text in sorted(discs, key=lambda disc: -disc[0]):  # the small ones on top
        x, y, radius = (1 + pos[0].item() / reach) * pixels, (1 - pos[1].item() / reach) * pixels, size / reach * pixels
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        texts.append(((x, y), text, ImageFont.load_default(1.3 * radius)))
    for place, text, font in texts:
        pen.text(place, text, fill="white", font=font, anchor="mm")
    pen.text((16, 16), legend, fill="black", font=ImageFont.load_default(26))
    return np.asarray(image.resize((pixels, pixels), Image.Resampling.LANCZOS))


def make_pettingzoo(
    scenario: str,
    num_agents: int,
    continuous_actions: bool = False,
    num_agent_neighbors: int | None = None,
    num_landmark_neighbors: int | None = None,
    num_prey: int | None = None,
    num_obstacles: int | None = None,
    max_cycles: int | None = None,
    nearest_first: bool = False,
    render_mode: str | None = None,
) -> ParticleParallelEnv:
    """The game of `make` with the same options on mpe2: a PettingZoo ParallelEnv of the learning agents only."""
    options = (continuous_actions, num_agent_neighbors, num_landmark_neighbors)
    options += (num_prey, num_obstacles, max_cycles, nearest_first)
    rules = make(scenario, 1, num_agents, "cpu", torch.float64, *options)  # which checks them, and knows the defaults
    flags = {"continuous_actions": continuous_actions, "render_mode": render_mode, "max_cycles": rules.horizon}
    flags |= {"num_agent_neighbors": rules.num_agent_neighbors}
    if scenario == "push":
        return ParticleParallelEnv(push_parallel_env(num_agents=num_agents, **flags), rules)
    flags |= {"num_landmark_neighbors": rules.num_landmark_neighbors}
    if scenario == "spread":
        return ParticleParallelEnv(mpe2.simple_spread_v3.parallel_env(N=num_agents, **flags), rules)
    numbers = {"num_adversaries": num_agents, "num_good": rules.num_prey, "num_obstacles": rules.num_obstacles}
    return ParticleParallelEnv(mpe2.simple_tag_v3.parallel_env(**numbers, **flags), rules)
