"""Copies of PettingZoo environments as a batched environment, and a run in several processes."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pettingzoo
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import PETTINGZOO, ROOT, TINY, TORCHRUN, read_metrics
from gymnasium.spaces import Box, Discrete, MultiBinary
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test

import envs.mpe
import stas_ippo_pettingzoo as script_module
import stas_ippo_pettingzoo_torchrun as together
from envs import EnvFailure
from envs.mpe_pettingzoo import copy_state
from envs.pettingzoo import UniformEnv, make


class Walk(ParallelEnv):
    """Three agents with their own spaces; `b` leaves after step 2. Action 1 of anyone ends it all, as does `limit`."""

    metadata = {"name": "walk"}

    def __init__(self, limit=6, fault=None, box=False):
        self.possible_agents, self.limit, self.fault = ["a", "b", "c"], limit, fault
        self.spaces = {"a": Box(-1, 1, (2, 2)), "b": Discrete(3, start=1), "c": Box(0, 9, (1,))}
        self.actions = {"a": Discrete(4), "b": Discrete(2, start=5), "c": Discrete(3)}
        if box:
            self.actions = {
                "a": Box(-1, 3, (2,)),
                "b": Box(0, 1, (1,)),
                "c": Box(np.array([[-2, 0]]), np.array([[2, 4]])),
            }
        if fault == "space":
            self.spaces["c"] = MultiBinary(3)
        self.taken, self.seed, self.paid = [], 0, 0

    def observation_space(self, agent):
        return self.spaces[agent]

    def action_space(self, agent):
        return self.actions[agent]

    def observe(self):
        values = {"a": np.full((2, 2), self.t / 10), "b": min(1 + self.t, 3), "c": np.array([self.seed % 10])}
        return {agent: values[agent] for agent in self.agents}

    def reset(self, seed=None, options=None):
        self.t, self.seed, self.agents = 0, self.seed if seed is None else seed, list(self.possible_agents)
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.t += 1
        self.taken.append(actions)
        if self.fault == "raise" and self.t == 2:
            raise KeyError("a bug")
        observed, before = self.observe(), self.agents
        if self.fault == "large":
            observed["c"] = np.array([7e4])
        if self.fault == "nan":
            observed["a"] = np.full((2, 2), np.nan)
        if self.fault == "unseen":
            observed.pop("c")
        if self.fault == "unknown":
            observed["b"] = 9
        over = self.limit > 0 and self.t == self.limit
        won = any(np.ndim(action) == 0 and action == 1 for action in actions.values())
        gone = {agent: won or (agent == "b" and self.t == 2) for agent in before}
        self.agents = [] if over else [agent for agent in before if not gone[agent]]
        if self.fault == "one by one":
            gone = {agent: "cba".index(agent) + 1 == self.t for agent in before}
            self.agents = before
        if self.fault in ("stay", "stay unseen"):
            self.agents = before
        if self.fault == "stay unseen" and self.t > 2:
            observed.pop("b", None)
        reward = np.inf if self.fault == "inf" else 3.0
        rewards = {agent: reward * (agent == "a") for agent in before if self.fault != "unpaid" or agent != "c"}
        if self.fault == "pension" and "b" not in before:
            rewards["b"], self.paid = 1.0, self.paid + 1
        return observed, rewards, gone, {agent: over for agent in before}, {agent: {} for agent in before}


class Blind(Walk):
    """Takes a render_mode, and has no `render`."""

    def __init__(self, render_mode=None, **options):
        super().__init__(**options)
        self.render_mode = render_mode


def parallel_env(blind=False, **options):
    return (Blind if blind else Walk)(**options)


HERE = "tests.test_pettingzoo"


def walk(horizon=6, **options) -> UniformEnv:
    return UniformEnv(Walk(**options), "walk", horizon)


def test_unequal_spaces_are_made_alike():
    env = walk()
    assert (env.obs_dim, env.num_actions, env.continuous, env.masked) == (8, 4, False, True)
    observed, _ = env.reset(seed=7)
    assert [row[:4].tolist() for row in observed.values()] == [[0] * 4, [1, 0, 0, 0], [7, 0, 0, 0]]
    assert [row[4:].tolist() for row in observed.values()] == [[1] * 4, [1, 1, 0, 0], [1, 1, 1, 0]]  # what each has
    observed, rewards, ends, cuts, _ = env.step({"a": np.int64(2), "b": np.int64(0), "c": np.int64(0)})
    np.testing.assert_allclose(observed["a"], [0.1] * 4 + [1] * 4, rtol=1e-6)
    assert observed["b"].tolist() == [0, 1, 0, 0, 1, 1, 0, 0] and rewards == {"a": 3, "b": 0, "c": 0}
    assert env.env.taken == [{"a": 2, "b": 5, "c": 0}]  # b's actions start at 5
    assert not any(ends.values()) and not any(cuts.values())


def test_an_agent_that_leaves_stays_as_it_was():
    env = walk()
    env.reset(seed=1)
    still = dict.fromkeys("abc", 0)
    for _ in range(4):
        observed, rewards, ends, _, _ = env.step(still)
    assert observed["b"].tolist() == [0, 0, 1, 0, 1, 0, 0, 0] and rewards["b"] == 0  # it may do action 0 only
    assert list(observed) == ["a", "b", "c"] and observed["c"][4:].tolist() == [1, 1, 1, 0]
    assert list(env.env.taken[-1]) == ["a", "c"] and not any(ends.values()) and env.agents == ["a", "b", "c"]


@pytest.mark.parametrize("horizon, limit, length", [(6, 6, 6), (4, 6, 4), (4, 0, 4)])
def test_the_horizon_ends_an_episode(horizon, limit, length):
    env = walk(horizon, limit=limit)
    env.reset(seed=1)
    steps = 0
    while env.agents:
        _, _, ends, cuts, _ = env.step(dict.fromkeys("abc", 0))
        steps += 1
    assert steps == length and all(cuts.values()) and not any(ends.values()) and not env.terminated


def test_actions_from_zero_to_one_are_scaled_to_the_bounds():
    env = walk(box=True)
    env.reset(seed=1)
    assert env.continuous and env.num_actions == 2 and env.action_space("b") == Box(0, 1, (2,))
    env.step({"a": np.array([0, 1]), "b": np.array([0.5, 0.9]), "c": np.array([0.25, 0.5])})
    taken = env.env.taken[0]
    assert taken["a"].tolist() == [-1, 3] and taken["b"].tolist() == [0.5] and taken["c"].tolist() == [[-1, 2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_freezes_what_has_ended(workers):
    env = make(HERE, num_envs=3, horizon=6, num_workers=workers)
    obs = env.reset(seed=3)
    assert obs.shape == (3, 3, 8) and len(set(obs[:, 2, 0].tolist())) > 1  # seeds of their own
    assert torch.equal(env.reset(seed=3), obs) and not torch.equal(env.reset(), obs)
    act = torch.zeros(3, 3, dtype=torch.int64)
    act[1, 0] = 1  # the second episode ends by its rules at the first step
    obs, reward, terminated = env.step(act)
    assert terminated.tolist() == [False, True, False] and reward.tolist() == [1, 1, 1] and env.rewards_differ
    later, reward, terminated = env.step(act * 0)
    assert terminated.tolist() == [False, True, False] and reward.tolist() == [1, 0, 1]
    assert torch.equal(later[1], obs[1]) and not torch.equal(later[0], obs[0])
    for _ in range(4):
        _, _, terminated = env.step(act * 0)
    assert terminated.tolist() == [False, True, False]
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(act)


@pytest.mark.parametrize(
    "fault, message",
    [("raise", r"seed 5, step 2: KeyError: 'a bug' at test_pettingzoo\.py:\d+$")]
    + [("nan", "step 1: an observation of a is not finite"), ("inf", "step 1: a reward is not finite")]
    + [("large", "step 1: an observation of c is not finite, or beyond 65,504")]
    + [("unseen", "no observations of c, only of a, b"), ("unpaid", "no rewards of c, only of a, b")]
    + [("unknown", r"an observation of b is 9, not in Discrete\(3, start=1\)")],
)
def test_what_an_environment_does_wrong(fault, message):
    env = walk(fault=fault)
    env.reset(seed=5)
    with pytest.raises(EnvFailure, match=message):
        for _ in range(3):
            env.step(dict.fromkeys("abc", 0))


def test_an_agent_that_has_ended_need_not_be_told_of_though_it_is_listed():
    env = walk(4, fault="stay unseen", limit=4)
    env.reset(seed=1)
    for _ in range(4):
        observed = env.step(dict.fromkeys("abc", 0))[0]
    assert env.agents == [] and observed["b"].tolist() == [0, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("first", [0, 1])
def test_agents_that_are_still_listed_when_they_have_ended(first):
    """Against PettingZoo's rules, but common: the episode is over all the same, by action 1 at once."""
    env = walk(2, fault="stay", limit=2)
    env.reset(seed=1)
    for act in (first, 0):
        if env.agents:
            _, _, ends, cuts, _ = env.step({"a": act, "b": 0, "c": 0})
    assert (env.t, env.agents, env.terminated) == (2 - first, [], bool(first)) and all(ends.values()) == bool(first)


def test_an_end_by_the_rules_at_the_limit_is_no_truncation():
    """Whether all end at once, or one after the other while they stay listed."""
    env = walk(6)
    env.reset(seed=1)
    for t in range(6):
        _, _, ends, cuts, _ = env.step(dict.fromkeys("abc", int(t == 5)))
    assert env.terminated and all(ends.values()) and not any(cuts.values())
    env = walk(6, fault="one by one", limit=0)
    env.reset(seed=1)
    for _ in range(3):
        assert env.agents and not env.terminated
        _, _, ends, cuts, _ = env.step(dict.fromkeys("abc", 0))
    assert env.terminated and all(ends.values()) and not any(cuts.values())


def test_agents_that_have_left_earn_nothing_more():
    env = walk(fault="pension")
    env.reset(seed=1)
    earned = [env.step(dict.fromkeys("abc", 0))[1]["b"] for _ in range(4)]
    assert earned == [0, 0, 0, 0] and env.env.paid == 2


def test_an_id_of_the_registry_is_its_module():
    episodes = []
    for env_id in ("sisl/pursuit-v5", "pettingzoo.sisl.pursuit_v5"):
        env = make(env_id, num_envs=1, horizon=3, n_pursuers=2)
        episodes.append([env.reset(seed=1), *(env.step(torch.tensor([[act, 0]]))[0] for act in range(3))])
    assert all(map(torch.equal, *episodes))


def test_an_id_whose_packages_are_missing():
    pettingzoo.register("parallel", "tests/missing-v1", entry_point="no_such_package:parallel_env")
    with pytest.raises(ValueError, match="--env-id tests/missing-v1: must have its packages .*no_such_package"):
        make("tests/missing-v1", num_envs=1, horizon=1)


def test_an_environment_without_agents_or_spaces():
    with pytest.raises(ValueError, match="--env-id walk: must have agents and spaces"):
        UniformEnv(ParallelEnv(), "walk", 6)


def test_remarks():
    env = make(HERE, num_envs=2, horizon=6)
    assert env.remarks() == []
    env.reset(seed=1)
    act = torch.zeros(2, 3, dtype=torch.int64)
    env.step(act)
    assert env.remarks() == ["the agents' rewards differ: the team's is their mean"]
    env.rewards_differ = env.rewarded = False
    assert len(env.remarks()) == 1 and "--horizon 6 long enough" in env.remarks()[0]


def test_a_worker_tells_what_went_wrong():
    env = make(HERE, num_envs=2, horizon=6, num_workers=2, fault="raise")
    env.reset(seed=1)
    with pytest.raises(EnvFailure, match="step 2: KeyError"):
        for _ in range(3):
            env.step(torch.zeros(2, 3, dtype=torch.int64))


def test_a_worker_that_dies_is_told_in_one_line():
    env = make(HERE, num_envs=2, horizon=6, num_workers=2)
    env.reset(seed=1)
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    with pytest.raises(EnvFailure, match="worker process"):
        env.reset(seed=1)


@pytest.mark.parametrize("blind", ["false", "true"])
def test_an_environment_without_pictures_is_evaluated(blind, run_script, tmp_path):
    flags = f'--env-id {HERE} --env-kwargs {{"blind":{blind}}} --horizon 6 --run-dir run'
    code, out, err = run_script(f"{TINY[PETTINGZOO]} {flags} --total-timesteps 100", PETTINGZOO)
    assert code == 0 and "the agents' rewards differ: the team's is their mean" in out.splitlines(), err
    command = [sys.executable, str(ROOT / "evaluate.py"), "run", "--episodes", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # where this module finds conftest.py
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert result.returncode == 0 and "over 2 episodes" in result.stdout, result.stderr
    assert ("takes no render_mode='rgb_array'" in result.stdout) == (blind == "false")
    assert (tmp_path / "run" / "credit.png").exists() and not (tmp_path / "run" / "episode.gif").exists()


@pytest.mark.parametrize("limit, fault", [(6, None), (2, "stay")])
def test_a_limit_before_the_horizon_is_refused(limit, fault):
    """Also if all agents are still listed when they have ended."""
    env = walk(horizon=7, limit=limit, fault=fault)
    env.reset(seed=1)
    with pytest.raises(EnvFailure, match=f"--horizon must be at most {limit}"):
        for _ in range(7):
            env.step(dict.fromkeys("abc", 0))


def test_spaces_of_another_kind():
    for what, space in (
        ("spaces", MultiBinary(3)),
        ("actions", MultiBinary(3)),
        ("actions", Box(-np.inf, np.inf, (1,))),
    ):
        env = Walk(box=isinstance(space, Box))
        getattr(env, what)["c"] = space
        with pytest.raises(ValueError, match="--env-id walk: must have"):
            UniformEnv(env, "walk", 6)


def test_spread_is_the_batched_spread():
    """The same states and actions give the same observations and rewards as envs/mpe.py."""
    copies = make("mpe2.simple_spread_v3", num_envs=3, horizon=25)
    batch = envs.mpe.make("spread", 3, 3, dtype=torch.float64)
    copies.reset(seed=1)
    alone = envs.mpe.make("spread", 1, 3, dtype=torch.float64)
    states = []
    for copy in copies.copies.envs:
        copy_state(copy.env.unwrapped.world, alone)
        states.append([alone.agent_pos, alone.agent_vel, alone.landmark_pos])
    batch.agent_pos, batch.agent_vel, batch.landmark_pos = map(torch.cat, zip(*states))
    torch.testing.assert_close(copies.observe().double(), batch.observe(), rtol=1e-5, atol=1e-6)
    for _ in range(25):
        act = torch.randint(5, (3, 3))
        (obs, reward, _), (same_obs, same_reward, _) = copies.step(act), batch.step(act)
        torch.testing.assert_close(obs.double(), same_obs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reward.double(), same_reward, rtol=1e-5, atol=1e-5)


def test_foraging_pays_those_who_load_together():
    """Levels 1 and 2 beside food of level 3: alone nobody can load it; together they share the whole by level."""
    foraging = pytest.importorskip("envs.foraging")
    parallel_api_test(foraging.parallel_env(), 200)
    env = foraging.parallel_env(size=5, food=1)
    none, load, first, second = 0, 5, *env.possible_agents

    def play(*acts):
        env.reset(seed=3)
        env.game.field[:] = 0
        env.game.field[2, 2] = env.game._food_spawned = 3
        for player, position, level in zip(env.game.players, ((1, 2), (2, 3)), (1, 2)):
            player.position, player.level = position, level
        env.game._gen_valid_moves()
        return env.step(dict(zip(env.agents, acts)))[1:4]

    assert play(load, none) == ({first: 0, second: 0}, *[{first: False, second: False}] * 2)
    rewards, terminated, truncated = play(load, load)
    assert rewards == pytest.approx({first: 1 / 3, second: 2 / 3}) and env.agents == []
    assert all(terminated.values()) and not any(truncated.values())
    env.reset(seed=4)
    for _ in range(50):
        *_, terminated, truncated, _ = env.step(dict.fromkeys(env.agents, none))
    assert all(truncated.values()) and not any(terminated.values()) and env.agents == []
    for seed in range(30):  # nobody can load alone, and an episode owes nothing to the one before
        env.reset(seed)
        assert set(env.game.field[env.game.field > 0]) == {sum(player.level for player in env.game.players)}
        fresh = foraging.parallel_env(size=5, food=1)
        assert np.array_equal(fresh.reset(seed)[0][first], env.reset(seed)[0][first])
        for _ in range(9):
            env.step(dict.fromkeys(env.agents, 1 + seed % 4))


@pytest.mark.parametrize("box", [False, True])
def test_the_policy_leaves_out_what_an_agent_does_not_have(box):
    env = make(HERE, num_envs=2, horizon=6, box=box)
    args = script_module.Args(emb_dim=8)
    agent, _ = script_module.make_networks(args, env)
    obs = env.reset(seed=1)[0].expand(200, -1, -1)
    act, logprob, entropy, _ = agent.get_action_and_value(agent.get_inputs(obs, torch.zeros(200)))
    assert logprob.isfinite().all() and entropy.isfinite().all()
    outputs = agent.actor(torch.cat((obs, torch.eye(3).expand(200, -1, -1)), dim=-1))[:, 1]  # of b
    if box:  # it has the first of two dimensions
        first, x = torch.distributions.Normal(0.5 + outputs[:, 0], args.init_std), act[:, 1, 0]
        at_limits = torch.where(x == 0, first.cdf(torch.zeros(())), 1 - first.cdf(torch.ones(()))).log()
        inside = (0 < x) & (x < 1)
        torch.testing.assert_close(logprob[:, 1], torch.where(inside, first.log_prob(x), at_limits), atol=1e-4, rtol=0)
        torch.testing.assert_close(entropy[:, 1], first.entropy())
        assert (act[:, 1, 1] == 0).all() and 0.5 < inside.float().mean() < 1
    else:
        assert act[:, 1].max() == 1 and act[:, 2].max() == 2 and act[:, 0].max() == 3
        assert (outputs[:, 2:] == -torch.inf).all()
    (logprob.sum() + entropy.sum()).backward()
    learned = [*agent.actor.parameters(), *([agent.raw_std] if box else [])]
    assert all(weights.grad.isfinite().all() for weights in learned)


def test_credits_do_not_depend_on_actions_that_an_agent_does_not_have():
    env = make(HERE, num_envs=2, horizon=6, box=True)
    _, decomposer = script_module.make_networks(script_module.Args(emb_dim=8, coalition="all"), env)
    torch.nn.init.ones_(decomposer.head.weight)
    act, valid = torch.rand(2, 6, 3, 2), torch.ones(2, 6, dtype=torch.bool)
    obs = env.reset(seed=1).unsqueeze(1).expand(-1, 6, -1, -1)
    credits, has = decomposer(obs, act, valid), torch.tensor([[1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    for missing in (True, False):
        other = torch.where(has ^ missing, 1 - act, act)
        assert torch.equal(decomposer(obs, other, valid), credits) == missing


BAD = {
    "--env-id nowhere": "must be a module or an id that PettingZoo knows (ModuleNotFoundError",
    "--env-id sisl/chase-v1": "must be a module or an id that PettingZoo knows (",
    "--env-id json": "must be a module with a function parallel_env or batched_env",
    "--env-kwargs [1]": "must be a JSON object",
    "--env-kwargs {x": "must be a JSON object",
    '--env-kwargs {"wings":2}': "must be options of mpe2.simple_reference_v3",
    "--horizon 26": "--horizon must be at most 25",
    "--coalition exact --env-id tests.test_pettingzoo --horizon 6 --num-heads 3": "--num-heads 3: must be a divisor",
    f'--env-id {HERE} --horizon 6 --env-kwargs {{"fault":"nan"}}': "an observation of a is not finite",
    f'--env-id {HERE} --horizon 6 --env-kwargs {{"fault":"space"}}': "must have Box or Discrete observations; c has",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_told(flags, run_script, tmp_path):
    code, _, err = run_script(f"{TINY[PETTINGZOO]} --run-dir run {flags}", PETTINGZOO)
    assert code == 2 and BAD[flags] in err.replace("│", " ") and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


def test_a_failure_in_training_keeps_the_checkpoint(run_script, tmp_path, monkeypatch):
    steps = 0
    step = UniformEnv.step

    def fail_late(self, actions):
        nonlocal steps
        steps += 1
        if steps > 5 * 8 * 25:
            raise EnvFailure("walk, seed 1, step 9: it broke")
        return step(self, actions)

    monkeypatch.setattr(UniformEnv, "step", fail_late)
    with pytest.raises(EnvFailure, match="walk, seed 1, step 9"):
        run_script(f"{TINY[PETTINGZOO]} --total-timesteps 9999 --checkpoint-every 1 --run-dir run", PETTINGZOO)
    assert (tmp_path / "run" / "checkpoint.pt").exists()


# Several processes.


def start(rank: int, world: int, meeting, function) -> None:
    """function(rank) in one of `world` processes, which meet at a file."""
    torch.set_num_threads(1)
    together.RANK, together.WORLD_SIZE = rank, world
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    function(rank)
    dist.destroy_process_group()


def sums_are_those_of_one_process(rank: int) -> None:
    torch.manual_seed(0)
    data = torch.randn(11, 3)
    mine = data[:4] if rank == 0 else data[4:]  # batches of unequal size
    networks = [torch.nn.Linear(3, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    networks[0](data).square().sum().backward()
    networks[1](mine).square().sum().backward()
    together.sum_gradients(networks[1])
    for one, other in zip(networks[0].parameters(), networks[1].parameters()):
        torch.testing.assert_close(other.grad, one.grad)
    assert together.total(torch.tensor(rank + 1)) == 3


def updates_are_those_of_one_process(rank: int) -> None:
    """Of PPO with parts of unequal size, of the decomposer with parts of equal size."""
    args = together.Args(emb_dim=8, coalition="all", reward_scale=3.0, adv_eps=0.1, clip_coef=0.01)
    env = together.make_env(args, 6)
    torch.manual_seed(0)
    episodes = together.rollout(env, together.make_networks(args, env)[0], 1)
    steps = {name: episodes[name].flatten(0, 1) for name in ("inputs", "act", "logprob", "value")}
    steps |= {"advantage": torch.randn_like(steps["value"]), "return": torch.randn_like(steps["value"])}
    steps["weight"] = torch.ones(len(steps["act"]), 1)
    stored = {name: episodes[name] for name in ("obs", "act", "valid")}
    stored["team_return"] = episodes["team_reward"].sum(dim=1)
    cut = [slice(0, 50), slice(50, None)][rank], [slice(0, 3), slice(3, None)][rank]
    results = []
    for module, some in ((script_module, (slice(None),) * 2), (together, cut)):
        torch.manual_seed(1)
        agent, decomposer = together.make_networks(args, env)
        torch.nn.init.normal_(agent.actor.layers[-1].weight)
        torch.nn.init.normal_(decomposer.head.weight)
        update_agent, update_decomposer = (
            getattr(module, name + "_together" * (module is together)) for name in ("update_agent", "update_decomposer")
        )
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (agent, decomposer)]
        batch = {name: values[some[0]] for name, values in steps.items()} | {"ent_coef": torch.tensor(0.1)}
        losses = update_agent(args, agent, optimizers[0], batch)
        batch = {name: values[some[1]] for name, values in stored.items()}
        losses |= {"decomposer": update_decomposer(args, decomposer, optimizers[1], batch)}
        if module is together:  # each process has its part of a loss
            losses = {name: together.total(loss) for name, loss in losses.items()}
        results.append(losses | dict(agent.named_parameters()) | dict(decomposer.named_parameters()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("what", [sums_are_those_of_one_process, updates_are_those_of_one_process])
def test_two_processes_do_what_one_does(what, tmp_path):
    mp.spawn(start, (2, tmp_path / "meeting", what), nprocs=2)


DRIVER = f"""
import atexit, os, runpy, torch, traceback
rank = os.environ["RANK"]
open("pid-" + rank, "w").write(str(os.getpid()))
if os.environ.get("LATE") == rank:  # a signal that comes just after the third sum of signals, which are whole numbers
    all_reduce, sums = torch.distributed.all_reduce, []
    def late(values):
        all_reduce(values)
        sums.extend([values] * (values.dtype == torch.int64))
        if len(sums) == 3 and values is sums[-1]:
            os.kill(os.getpid(), 15)
    torch.distributed.all_reduce = late
atexit.register(lambda: print("all threads ended:", not torch.distributed.is_initialized()))
try:
    end = runpy.run_path({str(ROOT / TORCHRUN)!r}, run_name="__main__")
except SystemExit as exit:  # as process 1 ends
    *_, (frame, _) = traceback.walk_tb(exit.__traceback__)
    end = frame.f_globals
torch.save(end["agent"].state_dict() | end["decomposer"].state_dict(), "weights-" + rank + ".pt")
"""


@pytest.fixture
def torchrun(tmp_path):
    """torchrun("--flag value ...") begins the script in tmp_path with two processes, which leave their numbers and
    weights there, and end with the test."""
    (tmp_path / "driver.py").write_text(DRIVER)
    runs = []

    def begin(flags: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["driver.py", *TINY[TORCHRUN].split(), *"--no-anneal-lr --no-anneal-ent".split(), *flags.split()]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        runs.append(subprocess.Popen(command, cwd=tmp_path, env=env, **options))
        return runs[-1]

    yield begin
    for run in runs:
        if run.poll() is None:
            for path in tmp_path.glob("pid-*"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            run.kill()


def wait_for_rows(run: subprocess.Popen, csv_file) -> None:
    """Until two iterations have ended."""
    while not (csv_file.exists() and len(csv_file.read_text().splitlines()) > 2):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.02)


def test_a_run_of_two_processes_that_loses_one_resumes_to_the_digit(torchrun, tmp_path):
    part = torchrun("--checkpoint-every 1 --run-dir part --total-timesteps 2000000")
    wait_for_rows(part, tmp_path / "part" / "metrics.csv")
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    part.communicate(timeout=60)
    assert part.returncode != 0
    first, second = torch.load(tmp_path / "part" / "checkpoint.pt", weights_only=True)["buffers"]
    assert not torch.equal(first["data"]["obs"], second["data"]["obs"])  # episodes of their own
    steps = 400 * (len(read_metrics(tmp_path / "part")) + 2)
    weights = []
    for flags in ("--resume part", "--run-dir whole"):
        run = torchrun(f"{flags} --total-timesteps {steps}")
        output, _ = run.communicate(timeout=180)
        assert run.returncode == 0 and output.count("all threads ended: True") == 2, output
        weights += [torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2)]
    assert read_metrics(tmp_path / "part") == read_metrics(tmp_path / "whole")
    for other in weights[1:]:  # of both processes and both runs
        assert all(torch.equal(weights[0][name], other[name]) for name in other)

    alone = [sys.executable, str(ROOT / TORCHRUN), "--resume", "whole", "--total-timesteps", "99999"]
    result = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "must be continued by 2 processes" in result.stderr


@pytest.mark.parametrize("when", ["at any time", "late"])
def test_two_processes_stop_together_at_a_signal_to_one(when, torchrun, tmp_path):
    """Also if it comes too late for the iteration in which it comes."""
    flags = "--checkpoint-every 1000 --run-dir run --total-timesteps 2000000"
    run = torchrun(flags, LATE="1") if when == "late" else torchrun(flags)
    if when == "at any time":
        wait_for_rows(run, tmp_path / "run" / "metrics.csv")
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
    output, _ = run.communicate(timeout=60)
    start = f"torchrun --nproc-per-node 2 {ROOT / TORCHRUN}"
    assert f"stopped; to continue: {start} --resume run" in output, output
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == len(read_metrics(tmp_path / "run")) and len(saved["buffers"]) == 2


def test_one_process_of_torchrun_is_the_plain_script(run_script, tmp_path):
    for script in (PETTINGZOO, TORCHRUN):
        assert run_script(f"{TINY[script]} --reward-scale 10 --run-dir {script}", script)[0] == 0
    for row, other in zip(*(read_metrics(tmp_path / script) for script in (PETTINGZOO, TORCHRUN))):
        numbers, others = ({name: float(value) for name, value in each.items()} for each in (row, other))
        assert numbers == pytest.approx(others, rel=1e-3, abs=1e-6)


def test_one_process_needs_no_others():
    assert together.WORLD_SIZE == 1
    values = torch.tensor([1.0, 3.0])
    assert together.total(values) is values and values.tolist() == [1, 3]
