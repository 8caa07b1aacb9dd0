"""Environments by name: any PettingZoo ParallelEnv, as copies played side by side, or a batched class of your own.

    env = make("mpe2.simple_reference_v3", num_envs=128, horizon=25, local_ratio=0.5)

`UniformEnv` makes one copy uniform: all agents have observations and actions of the same size until the episode ends,
and a mask at the end of the observation where they may not always do everything. `PettingZooEnv` keeps the protocol of
envs/__init__.py over many of them, in this process or in several. Every episode has a seed of its own; runs can be
repeated, and resumed to the digit, as far as reset(seed) of the environment owes nothing to earlier episodes.
"""

import atexit
import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial

import numpy as np
import pettingzoo
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Dict, Discrete, flatdim, flatten
from pettingzoo import ParallelEnv

from envs import EnvFailure, check_action, check_env
from envs.single import SingleEnv


def find(env_id: str) -> tuple[Callable, bool]:
    """What `env_id` names: its function batched_env (True) or parallel_env (False), or what PettingZoo's registry has.

    `env_id` is a dotted name, as pkgutil.resolve_name finds it, here or on PYTHONPATH, or an id such as
    sisl/pursuit-v5. ValueError "--env-id ...: must ..." if it is nothing of the kind.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if "/" in env_id:
            return partial(pettingzoo.make, "parallel", pettingzoo.spec("parallel", env_id)), False
        try:
            named = importlib.import_module(env_id)
        except ImportError as error:
            try:
                named = pkgutil.resolve_name(env_id)  # an attribute, as some packages have their environments
            except (ImportError, AttributeError):
                raise error from None
    except Exception as error:  # whatever importing code that is not ours does
        raise ValueError(
            f"--env-id {env_id}: must be a module or an id that PettingZoo knows ({one_line(error)})"
        ) from error
    for name in ("batched_env", "parallel_env"):
        if callable(getattr(named, name, None)):
            return getattr(named, name), name == "batched_env"
    hint = "; pettingzoo.utils.conversions.aec_to_parallel makes one of its env()" if hasattr(named, "env") else ""
    where = f" ({named.__file__} has none)" if getattr(named, "__file__", None) else ""
    raise ValueError(f"--env-id {env_id}: must be a module with a function parallel_env or batched_env{hint}{where}")


def load(env_id: str, env_kwargs: dict | str, **more):
    """What `find` finds, called with the options `env_kwargs` (also as a JSON object) and `more`, which win.

    ValueError "--env-id ...: must ..." or "--env-kwargs ...: must ..." if that makes no environment.
    """
    options = parse_options(env_kwargs) if isinstance(env_kwargs, str) else env_kwargs
    build, batched = find(env_id)
    try:
        env = build(**options | more)
    except Exception as error:  # whatever the environment makes of them
        if isinstance(error.__cause__, ImportError):
            raise ValueError(f"--env-id {env_id}: must have its packages ({one_line(error.__cause__)})") from error
        raise ValueError(f"--env-kwargs {options}: must be options of {env_id} ({one_line(error, True)})") from error
    if not batched and not isinstance(env, ParallelEnv):
        raise ValueError(f"--env-id {env_id}: must make a ParallelEnv, not a {type(env).__name__}")
    return env


def parse_options(text: str) -> dict:
    """The options in a JSON object; ValueError "--env-kwargs ...: must be ..." if it is none."""
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

    Observations (Box of any shape, or Discrete as a one-hot) are flattened and padded with zeros. Those of bytes, such
    as pictures, are divided by the largest byte that the space allows. Actions are Discrete for all agents, or Box for
    all: then they are given in [0, 1] and scaled to the bounds.

    If `masked`, the last A numbers of an observation tell what is allowed (1) and what is not (0): what the environment
    says, by either convention of PettingZoo (a Dict observation of `observation` and `action_mask`, or `action_mask` in
    the infos), and the actions or dimensions that an agent has, where they are unequal. An agent that leaves `agents`
    before the others keeps its last observation and earns 0. Once it has ended it is allowed action 0 only, or no
    dimension, so that its policy is not trained. The episode ends after `horizon` steps, if it does not before.

    Args:
        truncation_ends: an episode that is truncated before the horizon is over then, which is an error otherwise.
        masked: it is in any case; else only if the spaces show that it must be.

    Raises:
        ValueError: for a space that is of another kind.
        EnvFailure: if the environment raises, has no agents after reset, ends at a limit of its own before the horizon,
            leaves out an agent that goes on, or brings one back, gives numbers that are not finite, or a mask that does
            not fit; with its name, the seed of the episode and the step.
    """

    def __init__(self, env: ParallelEnv, env_id: str, horizon: int, truncation_ends=False, masked: bool = False):
        self.env, self.env_id, self.horizon, self.truncation_ends, self.seed = (
            env,
            env_id,
            horizon,
            truncation_ends,
            None,
        )
        self.metadata = {"render_fps": 10, "name": env_id} | (getattr(env, "metadata", None) or {})
        self.render_mode = getattr(env, "render_mode", None)
        try:
            self.possible_agents, self.agents = list(env.possible_agents), []
            observed = {agent: env.observation_space(agent) for agent in self.possible_agents}
            acted = [env.action_space(agent) for agent in self.possible_agents]
        except Exception as error:  # attributes that it lacks, among others
            raise ValueError(f"--env-id {env_id}: must have agents and spaces ({one_line(error, True)})") from error
        if not 0 < len(self.possible_agents) == len(observed):
            raise ValueError(
                f"--env-id {env_id}: must have agents before reset; possible_agents is {self.possible_agents}"
            )
        self.spaces = {}
        for agent, space in observed.items():
            known = isinstance(space, Dict) and set(space.spaces) == {"observation", "action_mask"}
            self.spaces[agent] = space.spaces["observation"] if known else space
            if not isinstance(self.spaces[agent], Box | Discrete):
                hint = " (a Dict may hold observation and action_mask, no more)" * isinstance(space, Dict)
                raise ValueError(
                    f"--env-id {env_id}: must have Box or Discrete observations; {agent} has {space}{hint}"
                )
        self.continuous = all(isinstance(space, Box) for space in acted)
        if not (self.continuous or all(isinstance(space, Discrete) for space in acted)):
            raise ValueError(f"--env-id {env_id}: must have actions that are Discrete for all agents, or Box for all")
        if self.continuous and not all(space.is_bounded() and space.dtype.kind == "f" for space in acted):
            raise ValueError(f"--env-id {env_id}: must have Box actions of floats with bounds")
        if self.continuous and any(np.abs([space.low, space.high]).max(initial=0) > 1e9 for space in acted):
            raise ValueError(f"--env-id {env_id}: must have Box actions with bounds that mean something, below 1e9")
        sizes = [int(flatdim(space)) for space in acted]
        self.num_actions = max(sizes)
        self.action_mask = np.arange(self.num_actions) < np.array(sizes)[:, None]  # (N, A), what each has
        inner = getattr(env, "unwrapped", env)
        self.has_mask = isinstance(inner, SingleEnv | UniformEnv) and inner.masked  # at the end of its observations
        told = any(isinstance(space, Dict) for space in observed.values())
        self.masked = masked or told or self.has_mask or not self.action_mask.all()
        self.mask_told = self.left_early = self.trial = False  # in the episodes so far; if they are a trial
        spaces = [Box(0, 1, (self.num_actions,), np.float32) if self.continuous else Discrete(size) for size in sizes]
        self.action_spaces = dict(zip(self.possible_agents, spaces))

    @property
    def obs_dim(self) -> int:
        return max(map(flatdim, self.spaces.values())) + self.num_actions * (self.masked and not self.has_mask)

    def observation_space(self, agent: str) -> Box:
        return Box(-np.inf, np.inf, (self.obs_dim,), np.float32)

    def action_space(self, agent: str) -> Box | Discrete:
        """The agent's own actions, from 0 on; if continuous all A dimensions, of which it uses its own."""
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.t, self.terminated, self.cut, self.ended, self.gone = 0, False, False, set(), set()
        self.seed = self.seed if seed is None else seed  # that of the first episode, if the generator goes on
        self.agents = list(self.possible_agents)
        self.observed = {agent: np.zeros(self.obs_dim, np.float32) for agent in self.agents}
        with self.blame():
            result = self.env.reset(seed=seed, options=options)
            if not (isinstance(result, tuple | list) and len(result) == 2):
                raise EnvFailure("reset must return (observations, infos)")
            observed, infos = result
            if not self.env.agents:
                raise EnvFailure("there are no agents after reset, which must list all of them anew")
            self.absent = len(self.agents) - len(self.env.agents)
            self.left_early |= self.absent > 0
            self.check_possible_agents()
            self.see(observed, infos, self.agents)
        return dict(self.observed), {agent: {} for agent in self.agents}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        if not self.agents:
            raise RuntimeError("no episode is running: call reset()")
        self.t += 1
        with self.blame():
            own = {agent: self.own_action(agent, actions[agent]) for agent in self.env.agents}
            observed, earned, terminated, truncated, infos = self.env.step(own)
            self.check_possible_agents()
            if back := self.gone & set(self.env.agents):
                raise EnvFailure(f"{', '.join(map(str, back))} left the episode, and is back")
            last = [agent for agent in own if agent not in self.ended]  # who has played until now
            self.ended |= {agent for agent in own if terminated.get(agent) or truncated.get(agent)}
            self.gone = self.ended - set(self.env.agents)
            over = self.ended.issuperset(self.env.agents)  # of whom none should be left then, but often all are
            self.left_early |= not over and bool(self.ended or set(self.possible_agents) - set(self.env.agents))
            self.see(observed, infos, own)
            self.check_names("rewards", earned)
            rewards = dict.fromkeys(self.agents, 0.0)
            rewards |= {agent: np.asarray(earned[agent]).item() for agent in own if earned.get(agent) is not None}
            if not np.isfinite(np.array(list(rewards.values()), np.float32)).all():
                raise EnvFailure("a reward is not finite, or beyond single precision")
            ends = not any(truncated.get(agent) for agent in last) or self.truncation_ends and self.t < self.horizon
            self.terminated = over and bool(ends or all(terminated.get(agent) for agent in last))
            if over and not self.terminated and self.t < self.horizon:
                raise EnvFailure(f"it is truncated; --horizon must be at most {self.t}, or --truncation-ends be given")
        self.cut = not over and self.t == self.horizon  # the environment would have gone on
        self.agents = [] if over or self.cut else self.agents
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

    def see(self, observed: dict, infos: dict, agents) -> None:
        """Keep the flat observations of these agents, if they have one, and the masks of all."""
        self.check_names("observations", observed)
        for agent, own in zip(self.possible_agents, self.action_mask):
            mask = ((infos or {}).get(agent) or {}).get("action_mask")
            if agent in agents and observed.get(agent) is not None:
                space, obs = self.spaces[agent], observed[agent]
                if isinstance(self.env.observation_space(agent), Dict):
                    obs, mask = obs["observation"], obs.get("action_mask")
                if isinstance(space, Discrete):
                    obs = np.asarray(obs).item()
                    if not space.contains(obs):
                        raise EnvFailure(f"an observation of {agent} is {obs}, not in {space}")
                if isinstance(space, Discrete):
                    flat = flatten(space, obs)
                elif space.dtype == np.uint8:
                    flat = np.asarray(obs, np.float32).reshape(-1) / space.high.max(initial=1)
                else:  # as it is: flatten would cast what the space does not hold
                    flat = np.asarray(obs, np.float64).reshape(-1)
                if len(flat) != flatdim(space):
                    raise EnvFailure(f"an observation of {agent} has {len(flat)} numbers, its space {flatdim(space)}")
                if not np.isfinite(flat.astype(np.float16)).all():  # which replay buffers hold
                    raise EnvFailure(f"an observation of {agent} is not finite, or beyond 65,504")
                self.observed[agent] = np.pad(flat.astype(np.float32), (0, self.obs_dim - len(flat)))
            plays = agent in self.env.agents and agent not in self.ended
            self.mask_told |= mask is not None
            if not self.masked and plays and mask is not None and not self.trial and not np.all(mask):
                raise EnvFailure("a mask came where none was before; --masked True keeps room for it")
            if not self.masked or self.has_mask and plays:
                continue
            allowed = own & (plays or (np.arange(len(own)) == 0) & (not self.continuous))
            if plays and mask is not None:
                mask = np.asarray(mask).reshape(-1) != 0
                if len(mask) != own.sum() or not mask.any():
                    raise EnvFailure(f"the action mask of {agent} is {mask.astype(int)}, for {own.sum()} actions")
                allowed[: len(mask)] &= mask
            self.observed[agent] = np.append(self.observed[agent][: -len(own)], allowed.astype(np.float32))

    def check_possible_agents(self) -> None:
        """EnvFailure if it has lost some, as happens after `self.agents = self.possible_agents` in reset, or others."""
        if set(self.env.possible_agents) != set(self.possible_agents):
            raise EnvFailure("possible_agents has changed: it must stay, and reset must copy it into agents")
        if strange := set(self.env.agents) - set(self.possible_agents):
            raise EnvFailure(f"agents has {', '.join(map(str, strange))}, which possible_agents has not")

    def check_names(self, what: str, given: dict) -> None:
        """EnvFailure unless all agents that go on are given something."""
        for agent in self.env.agents:
            if given.get(agent) is None and agent not in self.ended:
                raise EnvFailure(f"there are no {what} of {agent}, only of {', '.join(map(str, given))}")

    @contextlib.contextmanager
    def blame(self):
        """Whatever goes wrong in code that is not ours becomes an EnvFailure that tells where."""
        try:
            with np.errstate(over="ignore"):
                yield
        except (Exception, SystemExit) as error:
            what = str(error) if isinstance(error, EnvFailure) else one_line(error, True)
            raise EnvFailure(f"{self.env_id}, seed {self.seed}, step {self.t}: {what}") from error

    def try_out(self) -> None:
        """Find by episodes at random, 20 or 1,000 steps of them, whether agents leave early or masks come in infos."""
        generator, steps, self.trial = np.random.default_rng(0), 0, True
        for seed in range(20):
            with contextlib.suppress(EnvFailure):  # it will be met, and told, when a policy plays
                self.reset(seed=seed)
                while self.agents and not (self.mask_told or self.left_early):
                    acts = {agent: generator.random(self.num_actions) for agent in self.agents}
                    self.step(acts if self.continuous else {agent: act.argmax() for agent, act in acts.items()})
            steps += self.t
            if self.mask_told or self.left_early or steps >= 1000:
                break
        self.masked, self.trial = self.masked or self.mask_told or self.left_early, False

    def render(self) -> np.ndarray | None:
        """A picture, None if the environment has none."""
        return self.env.render() if self.render_mode is not None else None

    def close(self) -> None:
        self.env.close()


class Copies:
    """Some UniformEnvs, and what they show together; in a worker process or in this one."""

    def __init__(self, make_one: Callable[[], ParallelEnv], count: int):
        self.envs = [uniform(make_one()) for _ in range(count)]
        if len({id(one.env) for one in self.envs}) < count:
            raise ValueError(f"--env-id {self.envs[0].env_id}: must make a new environment at each call")

    def reset(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observations (count, N, O), and how many agents are not there (count,)."""
        obs = np.stack([rows(env.reset(int(seed))[0]) for env, seed in zip(self.envs, seeds)])
        return obs, np.array([env.absent for env in self.envs])

    def step(self, act: np.ndarray) -> tuple[np.ndarray, ...]:
        """act (count, N[, A]) -> obs (count, N, O), rewards (count, N), whether they terminated, were cut (count,)"""
        rewards = np.zeros((len(self.envs), len(self.envs[0].possible_agents)), np.float32)
        for env, actions, reward in zip(self.envs, act, rewards):
            if env.agents:  # else it is frozen
                reward[:] = rows(env.step(dict(zip(env.possible_agents, actions)))[1])
        return (
            np.stack([rows(env.observed) for env in self.envs]),
            rewards,
            np.array([env.terminated for env in self.envs]),
            np.array([env.cut for env in self.envs]),
        )


def rows(values: dict) -> np.ndarray:
    return np.stack(list(values.values()))


def work(pipe, *args) -> None:
    """What a worker process does: the calls of Copies that come through the pipe, until it is closed."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # they are for the main process, which ends its iteration
    threading.Thread(target=end_with_main, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the main process has ended
        try:
            copies = Copies(*args)
            while True:
                name, argument = pipe.recv()
                pipe.send(getattr(copies, name)(argument))
        except (EnvFailure, ValueError) as error:
            pipe.send(EnvFailure(str(error)))


def end_with_main() -> None:
    """Ends a worker when the main process has ended, even if its environment hangs."""
    multiprocessing.parent_process().join()
    os._exit(1)


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
        self.device, self.rewards_differ, self.rewarded, self.absent = torch.device(device), False, False, 0
        self.masked, self.horizon_given, self.cut = one.masked, True, False
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
        try:
            if self.copies is not None:
                return getattr(self.copies, name)(arguments)
            for pipe, part in zip(self.pipes, self.parts):
                pipe.send((name, arguments[part]))
            results = [pipe.recv() for pipe in self.pipes]
            for result in results:
                if isinstance(result, EnvFailure):
                    raise result
            return [np.concatenate(part) for part in zip(*results)]
        except (EOFError, OSError) as error:
            raise EnvFailure("a worker process of the environments has died") from error
        except EnvFailure as error:
            error.add_note("The same seed meets it again; another --seed, beside --resume too, meets other episodes.")
            raise

    def reset(self, seed: int | None = None) -> torch.Tensor:
        """Start all episodes anew, each with a seed of its own. Returns obs (E, N, obs_dim)."""
        if seed is not None:
            self.seeds = np.random.default_rng(seed)
        self.t = 0
        self.terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        obs, absent = self.call("reset", self.seeds.integers(2**31, size=self.num_envs))
        self.absent = max(self.absent, absent.max())
        self.obs = torch.as_tensor(obs, device=self.device)
        return self.obs

    def step(self, act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """act (E, N) int64, or (E, N, A) if continuous -> obs (E, N, obs_dim), team_reward (E,), terminated (E,).

        Raises RuntimeError at the horizon, and ValueError for actions of another shape.
        """
        check_action(self, act)
        self.t += 1
        obs, rewards, terminated, cut = self.call("step", act.cpu().numpy())
        self.rewards_differ |= bool((rewards != rewards[:, :1]).any())
        self.rewarded |= bool(rewards.any())
        self.cut |= bool(cut.any())
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
            f"up to {self.absent} agents are not there after reset: they count as gone": self.absent > 0,
            f"episodes are cut after {self.horizon} steps: give their --horizon": self.cut and not self.horizon_given,
        }
        return [text for text, holds in remarks.items() if holds and self.t > 0]


def uniform(env: ParallelEnv) -> UniformEnv:
    return env if isinstance(env, UniformEnv) else UniformEnv(env, env.metadata["name"], env.horizon)


def make(env_id: str, num_envs: int, horizon: int | None, device="cpu", num_workers: int = 0, **env_kwargs):
    """The environment of that name, batched: copies of parallel_env(**env_kwargs), of 25 steps if `horizon` is None, or
    batched_env(num_envs, device, **env_kwargs), whose horizon is its own, once `check_env` has tried it."""
    return make_batched(env_id, env_kwargs, horizon, False, None, num_envs, device, num_workers)


def make_batched(env_id, env_kwargs, horizon, truncation_ends, masked, num_envs, device="cpu", num_workers=0):
    """As `make`; the options also as a JSON object, the rest as in `UniformEnv`; masked None: if `try_out` says so."""
    if not find(env_id)[1]:
        options = env_id, env_kwargs, horizon, truncation_ends
        masked = needs_mask(*options) if masked is None else masked  # the same for copies in other processes
        env = PettingZooEnv(partial(make_single, *options, masked), num_envs, device, num_workers)
        env.horizon_given = horizon is not None
        return env
    env = load(env_id, env_kwargs, num_envs=num_envs, device=device)
    if horizon not in (None, getattr(env, "horizon", horizon)):
        raise ValueError(f"--horizon {horizon}: must be {env.horizon}, that of {env_id}")
    if getattr(env, "num_envs", num_envs) != num_envs:
        raise ValueError(
            f"--env-id {env_id}: must have the num_envs that it is asked for, {num_envs}, not {env.num_envs}"
        )
    try:
        check_env(env)
        if env.observe().device.type != torch.device(device).type:
            raise ValueError(f"observations must be on {device}")
    except Exception as error:  # whatever code that is not ours raises
        raise ValueError(
            f"--env-id {env_id}: must keep the rules of envs/__init__.py ({one_line(error, True)})"
        ) from error
    return env


MASKED: dict[str, bool] = {}  # what `needs_mask` has found


def needs_mask(*options) -> bool:
    """What `try_out` says of the environment of these options, the first of `make_single`; it is tried out once."""
    if str(options) not in MASKED:
        one = make_single(*options, masked=False)
        one.try_out()
        one.close()
        MASKED[str(options)] = one.masked
    return MASKED[str(options)]


def make_single(env_id, env_kwargs, horizon, truncation_ends=False, masked=None, render_mode=None) -> ParallelEnv:
    """One episode at a time; without pictures if the environment has none, which is told."""
    if find(env_id)[1]:
        env = SingleEnv(load(env_id, env_kwargs, num_envs=1, device="cpu"), env_id, render_mode)
        env.batch = partial(load, env_id, env_kwargs, device="cpu")
        return env
    masked = needs_mask(env_id, env_kwargs, horizon, truncation_ends) if masked is None else masked
    options = dict(horizon=horizon or 25, truncation_ends=truncation_ends, masked=masked)
    if render_mode is not None:
        try:
            env = UniformEnv(load(env_id, env_kwargs, render_mode=render_mode), env_id, **options)
            env.render_mode = render_mode
            return env
        except ValueError:
            print(f"no pictures: {env_id} takes no render_mode={render_mode!r}")
    return UniformEnv(load(env_id, env_kwargs), env_id, **options)


def side_by_side(make_one: Callable[[], ParallelEnv], num_envs: int):
    """Copies of what `make_one` makes; if that is one episode of a class found by name, many episodes of the class."""
    one = make_one()
    one.close()
    return one.batch(num_envs=num_envs) if hasattr(one, "batch") else PettingZooEnv(make_one, num_envs)


def check_memory(args, env, device: str | torch.device) -> None:
    """ValueError if there are too many coalitions, or if observations take more memory than there is: those of a
    roll-out, twice in single precision, and those of the replay buffer, in half precision, where credit is learned."""
    if args.credit == "stas" and args.coalition == "exact" and env.num_agents > 8:
        raise ValueError("--coalition exact: must be another with more than 8 agents")
    stored = min(args.buffer_size, args.total_timesteps // env.horizon + args.num_envs)  # episodes
    stored *= args.credit in ("stas", "temporal")
    needed = env.horizon * env.num_agents * env.obs_dim * (8 * args.num_envs + 2 * stored)  # bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.device(device).type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    if needed > memory:
        sizes = f"observations take {needed / 1e9:,.0f} GB, and there are {memory / 1e9:,.0f}"
        raise ValueError(f"--num-envs {args.num_envs}: must be less, or --buffer-size, or --horizon ({sizes})")


def apply_mask(env, actor: nn.Module, decomposer: nn.Module | None) -> None:
    """What the mask at the end of an observation forbids gets the logit -inf of the actor, whose inputs begin with the
    observation. A continuous dimension gets a mean so low that its action is 0 with probability 1, which adds nothing
    to log-probabilities and entropies, and the decomposer sees the action 0 there."""
    if not getattr(env, "masked", False):
        return
    mask = slice(env.obs_dim - env.num_actions, env.obs_dim)

    def forbid(actor, inputs, outputs):
        return outputs.masked_fill(inputs[0][..., mask] == 0, -1e4 if env.continuous else -torch.inf)

    actor.register_forward_hook(forbid)
    if decomposer is not None and env.continuous:
        decomposer.register_forward_pre_hook(lambda _, x: (x[0], x[1] * x[0][..., mask], x[2]))
