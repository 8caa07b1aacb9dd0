"""Any PettingZoo ParallelEnv as a batched environment: copies of it, played side by side.

    env = make("mpe2.simple_reference_v3", num_envs=128, horizon=25, local_ratio=0.5)

`UniformEnv` makes one copy uniform: all agents have observations and actions of the same size until the episode ends.
`PettingZooEnv` keeps the protocol of envs/__init__.py over many of them, in this process or in several. Every episode
has a seed of its own; runs can be repeated, and resumed to the digit, as far as reset(seed) of the environment owes
nothing to earlier episodes.
"""

import atexit
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from functools import partial

import numpy as np
import pettingzoo
import torch
from gymnasium.spaces import Box, Discrete, flatdim, flatten
from pettingzoo import ParallelEnv

from envs import EnvFailure, check_action


def load(env_id: str, env_kwargs: dict | str, **more) -> ParallelEnv:
    """parallel_env(**env_kwargs) of a module, or what PettingZoo's registry has; the options also as a JSON object.

    `env_id` is the dotted name of a module, here or on PYTHONPATH, or an id such as sisl/pursuit-v5. ValueError
    "--env-id ...: must ..." or "--env-kwargs ...: must ..." if that makes no ParallelEnv.
    """
    options = parse_options(env_kwargs) if isinstance(env_kwargs, str) else env_kwargs
    try:
        if "/" in env_id:
            build = partial(pettingzoo.make, "parallel", pettingzoo.spec("parallel", env_id))
        else:
            build = getattr(importlib.import_module(env_id), "parallel_env", None)
    except Exception as error:  # whatever importing code that is not ours does
        raise ValueError(
            f"--env-id {env_id}: must be a module or an id that PettingZoo knows ({one_line(error)})"
        ) from error
    if build is None:
        raise ValueError(f"--env-id {env_id}: must be a module with a function parallel_env")
    try:
        env = build(**options, **more)
    except Exception as error:  # whatever the environment makes of them
        if isinstance(error.__cause__, ImportError):
            raise ValueError(f"--env-id {env_id}: must have its packages ({one_line(error.__cause__)})") from error
        raise ValueError(f"--env-kwargs {options}: must be options of {env_id} ({one_line(error, True)})") from error
    if not isinstance(env, ParallelEnv):
        raise ValueError(f"--env-id {env_id}: must make a ParallelEnv, not a {type(env).__name__}")
    return env


def parse_options(text: str) -> dict:
    """The options of parallel_env in a JSON object; ValueError "--env-kwargs ...: must be ..." if it is none."""
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(options := json.loads(text), dict):
            return options
    raise ValueError(f"--env-kwargs {text}: must be a JSON object")


def one_line(error: BaseException, where: bool = False) -> str:
    """The error, with `where` also the line that raised it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if where:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text += f" at {os.path.basename(last.filename)}:{last.lineno}"
    return text


class UniformEnv(ParallelEnv):
    """A ParallelEnv whose agents all observe O numbers and have A actions, from reset to the end of the episode.

    Observations (Box of any shape, or Discrete as a one-hot) are flattened and padded with zeros. Actions are Discrete
    for all agents, or Box for all: then they are given in [0, 1] and scaled to the bounds. An agent with fewer than A
    actions or dimensions has True in `action_mask` (N, A) only for its own. An agent that leaves before the others
    keeps its last observation and earns 0; what it is told to do from then on has no effect, though PPO counts it. The
    episode ends after `horizon` steps, if it does not before.

    Raises:
        ValueError: for a space that is of another kind.
        EnvFailure: if the environment raises, ends at a limit of its own before the horizon, leaves out an agent that
            goes on, or gives numbers that are not finite; with its name, the seed of the episode and the step.
    """

    def __init__(self, env: ParallelEnv, env_id: str, horizon: int):
        self.env, self.env_id, self.horizon, self.seed = env, env_id, horizon, None
        self.metadata = {"render_fps": 10, "name": env_id} | (getattr(env, "metadata", None) or {})
        self.render_mode = getattr(env, "render_mode", None)
        try:
            self.possible_agents, self.agents = list(env.possible_agents), []
            observed = [env.observation_space(agent) for agent in self.possible_agents]
            acted = [env.action_space(agent) for agent in self.possible_agents]
        except Exception as error:  # attributes that it lacks, among others
            raise ValueError(f"--env-id {env_id}: must have agents and spaces ({one_line(error, True)})") from error
        for agent, space in zip(self.possible_agents, observed):
            if not isinstance(space, Box | Discrete):
                raise ValueError(f"--env-id {env_id}: must have Box or Discrete observations; {agent} has {space}")
        self.continuous = all(isinstance(space, Box) for space in acted)
        if not (self.continuous or all(isinstance(space, Discrete) for space in acted)):
            raise ValueError(f"--env-id {env_id}: must have actions that are Discrete for all agents, or Box for all")
        if self.continuous and not all(space.is_bounded() and space.dtype.kind == "f" for space in acted):
            raise ValueError(f"--env-id {env_id}: must have Box actions of floats with bounds")
        self.obs_dim = max(map(flatdim, observed))
        sizes = [int(flatdim(space)) for space in acted]
        self.num_actions = max(sizes)
        self.action_mask = np.arange(self.num_actions) < np.array(sizes)[:, None]  # (N, A)
        spaces = [Box(0, 1, (self.num_actions,), np.float32) if self.continuous else Discrete(size) for size in sizes]
        self.action_spaces = dict(zip(self.possible_agents, spaces))

    def observation_space(self, agent: str) -> Box:
        return Box(-np.inf, np.inf, (self.obs_dim,), np.float32)

    def action_space(self, agent: str) -> Box | Discrete:
        """The agent's own actions, from 0 on; if continuous all A dimensions, of which it uses its own."""
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.t, self.terminated, self.ended = 0, False, set()
        self.seed = self.seed if seed is None else seed  # that of the first episode, if the generator goes on
        self.agents = list(self.possible_agents)
        self.observed = {agent: np.zeros(self.obs_dim, np.float32) for agent in self.agents}
        with self.blame():
            observed, _ = self.env.reset(seed=seed, options=options)
            self.see(observed, self.agents)
        return dict(self.observed), {agent: {} for agent in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            raise RuntimeError("no episode is running: call reset()")
        self.t += 1
        with self.blame():
            own = {agent: self.own_action(agent, actions[agent]) for agent in self.env.agents}
            observed, earned, terminated, truncated, _ = self.env.step(own)
            self.ended |= {agent for agent in own if terminated.get(agent) or truncated.get(agent)}
            self.see(observed, own)
            self.check_names("rewards", earned)
            rewards = {agent: float(earned.get(agent, 0)) if agent in own else 0.0 for agent in self.agents}
            if not np.isfinite(list(rewards.values())).all():
                raise EnvFailure("a reward is not finite")
            over = self.ended.issuperset(self.env.agents)  # of whom none should be left then, but often all are
            self.terminated = over and (all(terminated.values()) or not any(truncated.values()))
            if over and not self.terminated and self.t < self.horizon:
                raise EnvFailure(f"it is truncated; --horizon must be at most {self.t}, or its end a termination")
        self.agents = [] if over or self.t == self.horizon else self.agents
        ends = dict.fromkeys(rewards, self.terminated)
        cut = dict.fromkeys(rewards, not self.terminated and self.t == self.horizon)
        return dict(self.observed), rewards, ends, cut, {agent: {} for agent in rewards}

    def own_action(self, agent: str, action: np.ndarray):
        """An action of size A as the environment takes it."""
        space = self.env.action_space(agent)
        if isinstance(space, Discrete):
            return int(action) + int(space.start)
        part = np.asarray(action, np.float64).reshape(-1)[: flatdim(space)].reshape(space.shape)
        return (space.low + part * (space.high.astype(np.float64) - space.low)).astype(space.dtype)

    def see(self, observed: dict, agents) -> None:
        """Keep the flat observations of these agents, if they have one."""
        self.check_names("observations", observed)
        for agent in [agent for agent in agents if agent in observed]:
            space, obs = self.env.observation_space(agent), observed[agent]
            if isinstance(space, Discrete):
                obs = np.asarray(obs).item()
                if not space.contains(obs):
                    raise EnvFailure(f"an observation of {agent} is {obs}, not in {space}")
            flat = flatten(space, obs)
            if len(flat) != flatdim(space):
                raise EnvFailure(f"an observation of {agent} has {len(flat)} numbers, its space {flatdim(space)}")
            if not np.isfinite(flat.astype(np.float16)).all():  # which replay buffers hold
                raise EnvFailure(f"an observation of {agent} is not finite, or beyond 65,504")
            self.observed[agent] = np.pad(flat.astype(np.float32), (0, self.obs_dim - len(flat)))

    def check_names(self, what: str, given: dict) -> None:
        """EnvFailure unless all agents that go on are given something."""
        for agent in self.env.agents:
            if agent not in given and agent not in self.ended:
                raise EnvFailure(f"there are no {what} of {agent}, only of {', '.join(map(str, given))}")

    @contextlib.contextmanager
    def blame(self):
        """Whatever goes wrong in code that is not ours becomes an EnvFailure that tells where."""
        try:
            with np.errstate(over="ignore"):
                yield
        except Exception as error:
            what = str(error) if isinstance(error, EnvFailure) else one_line(error, True)
            raise EnvFailure(f"{self.env_id}, seed {self.seed}, step {self.t}: {what}") from error

    def render(self) -> np.ndarray | None:
        """A picture, None if the environment has none."""
        return self.env.render() if self.render_mode is not None else None

    def close(self) -> None:
        self.env.close()


class Copies:
    """Some UniformEnvs, and what they show together; in a worker process or in this one."""

    def __init__(self, make_one: Callable[[], ParallelEnv], count: int):
        self.envs = [uniform(make_one()) for _ in range(count)]

    def reset(self, seeds: np.ndarray) -> tuple[np.ndarray]:
        """Observations (count, N, O), in a tuple."""
        return (np.stack([rows(env.reset(int(seed))[0]) for env, seed in zip(self.envs, seeds)]),)

    def step(self, act: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """act (count, N[, A]) -> obs (count, N, O), rewards (count, N), whether they terminated (count,)"""
        rewards = np.zeros((len(self.envs), len(self.envs[0].possible_agents)), np.float32)
        for env, actions, reward in zip(self.envs, act, rewards):
            if env.agents:  # else it is frozen
                reward[:] = rows(env.step(dict(zip(env.possible_agents, actions)))[1])
        return (
            np.stack([rows(env.observed) for env in self.envs]),
            rewards,
            np.array([env.terminated for env in self.envs]),
        )


def rows(values: dict) -> np.ndarray:
    return np.stack(list(values.values()))


def work(pipe, *args) -> None:
    """What a worker process does: the calls of Copies that come through the pipe, until it is closed."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # they are for the main process, which ends its iteration
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the main process has ended
        try:
            copies = Copies(*args)
            while True:
                name, argument = pipe.recv()
                pipe.send(getattr(copies, name)(argument))
        except (EnvFailure, ValueError) as error:
            pipe.send(EnvFailure(str(error)))


class PettingZooEnv:
    """Copies of a PettingZoo environment; see `envs/__init__.py` for the protocol.

    Args:
        make_one: makes a copy, a UniformEnv, or any ParallelEnv that has a `horizon`. num_envs: E.
        num_workers: processes that the copies are shared out to (0: all in this one).
    The team reward is the mean of the agents' rewards.
    """

    def __init__(self, make_one: Callable[[], ParallelEnv], num_envs: int, device="cpu", num_workers: int = 0):
        one = uniform(make_one())
        self.num_agents, self.obs_dim, self.num_actions = len(one.possible_agents), one.obs_dim, one.num_actions
        self.continuous, self.horizon, self.num_envs = one.continuous, one.horizon, num_envs
        self.device, self.rewards_differ, self.rewarded = torch.device(device), False, False
        self.action_mask = torch.as_tensor(one.action_mask, device=self.device)
        one.close()
        self.seeds, self.t = np.random.default_rng(), 0
        self.parts = np.array_split(np.arange(num_envs), max(1, min(num_workers, num_envs)))  # which copies are where
        settings = [(make_one, len(part)) for part in self.parts]
        self.pipes, self.copies = [], None
        if num_workers == 0:
            self.copies = Copies(*settings[0])
        else:
            context = multiprocessing.get_context("forkserver")
            for setting in settings:
                pipe, other = context.Pipe()
                context.Process(target=work, args=(other, *setting), daemon=True).start()
                other.close()
                self.pipes.append(pipe)
                atexit.register(pipe.close)  # at which the worker ends

    def call(self, name: str, arguments: np.ndarray) -> list[np.ndarray]:
        """The results of a method of all copies."""
        if self.copies is not None:
            return getattr(self.copies, name)(arguments)
        try:
            for pipe, part in zip(self.pipes, self.parts):
                pipe.send((name, arguments[part]))
            results = [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            raise EnvFailure("a worker process of the environments has died") from error
        for result in results:
            if isinstance(result, EnvFailure):
                raise result
        return [np.concatenate(part) for part in zip(*results)]

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Start all episodes anew, each with a seed of its own. Returns obs (E, N, obs_dim)."""
        if seed is not None:
            self.seeds = np.random.default_rng(seed)
        self.t = 0
        self.terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        (obs,) = self.call("reset", self.seeds.integers(2**31, size=self.num_envs))
        self.obs = torch.as_tensor(obs, device=self.device)
        return self.obs

    def step(self, act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """act (E, N) int64, or (E, N, A) if continuous -> obs (E, N, obs_dim), team_reward (E,), terminated (E,).

        Raises RuntimeError at the horizon, and ValueError for actions of another shape.
        """
        check_action(self, act)
        self.t += 1
        obs, rewards, terminated = self.call("step", act.cpu().numpy())
        self.rewards_differ |= bool((rewards != rewards[:, :1]).any())
        self.rewarded |= bool(rewards.any())
        self.obs = torch.as_tensor(obs, device=self.device)
        self.terminated = torch.as_tensor(terminated, device=self.device)
        return self.obs, torch.as_tensor(rewards.mean(axis=1), device=self.device), self.terminated.clone()

    def observe(self) -> torch.Tensor:
        return self.obs

    def remarks(self) -> list[str]:
        """What a user should know of the episodes so far."""
        remarks = {
            "the agents' rewards differ: the team's is their mean": self.rewards_differ,
            f"no episode met a reward before training: is --horizon {self.horizon} long enough?": not self.rewarded,
        }
        return [text for text, holds in remarks.items() if holds and self.t > 0]


def uniform(env: ParallelEnv) -> UniformEnv:
    return env if isinstance(env, UniformEnv) else UniformEnv(env, env.metadata["name"], env.horizon)


def make(env_id: str, num_envs: int, horizon: int, device="cpu", num_workers: int = 0, **env_kwargs) -> PettingZooEnv:
    """A batched environment of copies of `env_id`.parallel_env(**env_kwargs)."""
    return PettingZooEnv(partial(make_uniform_env, env_id, horizon, env_kwargs), num_envs, device, num_workers)


def make_uniform_env(env_id: str, horizon: int, env_kwargs: dict | str, render_mode: str | None = None) -> UniformEnv:
    """One copy; without pictures if the environment has none, which is told."""
    if render_mode is not None:
        try:
            return UniformEnv(load(env_id, env_kwargs, render_mode=render_mode), env_id, horizon)
        except ValueError:
            print(f"no pictures: {env_id} takes no render_mode={render_mode!r}")
    return UniformEnv(load(env_id, env_kwargs), env_id, horizon)
