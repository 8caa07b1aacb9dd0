"""What other people's environments do: masks, agents that leave, constants in the reward, names, batched classes."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PETTINGZOO, ROOT, TINY, TORCHRUN, read_metrics
from gymnasium.spaces import Box, Dict, Discrete
from pettingzoo import ParallelEnv
from pettingzoo.utils.wrappers import BaseParallelWrapper

import stas_ippo_pettingzoo as script_module
from envs import EnvFailure, check_env
from envs.pettingzoo import PettingZooEnv, UniformEnv, make, make_single, side_by_side


class Cards(ParallelEnv):
    """Three agents draw masks; what is forbidden fails. `c` leaves after step 2. Masks: by dict, infos, or no."""

    metadata = {"name": "cards"}

    def __init__(self, told="dict", fault=None, leaves=True, horizon=5):
        self.possible_agents, self.agents = ["a", "b", "c"], []
        self.told, self.fault, self.leaves, self.horizon = told, fault, leaves, horizon
        box = Box(-1, 1, (2,), np.float32)
        self.space = Dict({"observation": box, "action_mask": Box(0, 1, (4,), np.int8)}) if told == "dict" else box

    def observation_space(self, agent):
        return self.space

    def action_space(self, agent):
        return Discrete(4)

    def deal(self, agents):
        masks = {agent: (self.rng.random(4) < 0.4).astype(np.int8) for agent in agents}
        for mask in masks.values():
            mask[self.rng.integers(4)] = 1
        self.masks = masks if self.told != "no" else {agent: np.ones(4, np.int8) for agent in agents}
        if self.fault == "nothing":
            self.masks["a"][:] = 0
        if self.fault == "short":
            self.masks["a"] = self.masks["a"][:3]
        seen = {agent: np.array([self.t, self.rng.random()], np.float32) for agent in agents}
        if self.told == "dict":
            seen = {agent: {"observation": obs, "action_mask": self.masks[agent]} for agent, obs in seen.items()}
        return seen, {agent: {"action_mask": self.masks[agent]} if self.told == "infos" else {} for agent in agents}

    def reset(self, seed=None, options=None):
        self.rng, self.t = np.random.default_rng(seed), 0
        self.agents = [] if self.fault == "none_there" else list(self.possible_agents)
        if self.fault == "one_missing":
            self.agents.remove("b")
        if self.fault == "shared_list":
            self.agents = self.possible_agents
        return self.deal(self.possible_agents)

    def step(self, actions):
        assert all(self.masks[agent][act] for agent, act in actions.items()), (actions, self.masks)
        self.t += 1
        before = list(self.agents)
        gone = {agent: self.leaves and agent == "c" and self.t == 2 for agent in before}
        cut = self.t == self.horizon or (self.fault == "cut" and self.rng.random() < 0.4)
        for agent in before:
            if gone[agent] or cut:
                self.agents.remove(agent)
        if self.fault == "back" and self.t == 4:
            self.agents.append("c")
        observed, infos = self.deal(before)
        rewards = {agent: float(act == self.masks[agent].argmax()) for agent, act in actions.items()}
        return observed, rewards, gone, dict.fromkeys(before, cut), infos


class Toggle(ParallelEnv):
    """Each step earns a constant, and the share of its two agents whose action is 1."""

    metadata = {"name": "toggle"}

    def __init__(self, constant=0.0, scale=1.0, horizon=10, actions=3):
        self.constant, self.scale, self.horizon, self.actions = constant, scale, horizon, actions
        self.possible_agents, self.agents = ["a", "b"], []

    def observation_space(self, agent):
        return Box(0, 1, (1,), np.float32)

    def action_space(self, agent):
        return Discrete(self.actions)

    def observe(self):
        return {agent: np.array([self.t / self.horizon], np.float32) for agent in self.possible_agents}

    def reset(self, seed=None, options=None):
        self.t, self.agents = 0, list(self.possible_agents)
        return self.observe(), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.t += 1
        reward = self.constant + self.scale * np.mean([act == 1 for act in actions.values()])
        before, over = self.agents, self.t == self.horizon
        self.agents = [] if over else before
        told = (dict.fromkeys(before, value) for value in (reward, False, over))
        return self.observe(), *told, {agent: {} for agent in before}


class Nested:
    """Found by a name that is no module's."""

    parallel_env = Toggle


KINDS = {"cards": Cards, "toggle": Toggle}


def parallel_env(kind="cards", **options):
    return KINDS[kind](**options)


HERE = "tests.test_any_env"


# Masks.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("told", ["dict", "infos"])
def test_what_is_forbidden_is_never_done(told, workers):
    """Neither by the policy nor by the random team, nor is anything but action 0 by an agent that has left."""
    env = make(HERE, 6, 5, num_workers=workers, told=told)
    check_env(env)
    assert env.masked and env.obs_dim == 2 + 4
    agent, _ = script_module.make_networks(script_module.Args(), env)
    torch.nn.init.normal_(agent.actor.layers[-1].weight)
    for seed in range(5):
        episodes = script_module.rollout(env, agent, seed)  # Cards would raise
        mask, act = episodes["obs"][..., -4:], episodes["act"]
        assert mask.gather(-1, act.unsqueeze(-1)).all()
        assert (mask[:, 2:, 2] == torch.tensor([1.0, 0, 0, 0])).all() and mask[:, :2].sum() > 6 * 2 * 3
    logprob, (_, _, entropy, _) = episodes["logprob"], agent.get_action_and_value(episodes["inputs"], act)
    assert logprob[:, 2:, 2].eq(0).all() and entropy[:, 2:, 2].eq(0).all()  # nothing to learn there
    assert logprob[:, :, :2].lt(0).any() and entropy[:, :, :2].gt(0).any()


def test_agents_that_leave_are_found_without_masks():
    assert make(HERE, 2, 5, told="no").masked
    assert (
        not make(HERE, 2, 5, told="no", leaves=False).masked and make(HERE, 2, 5, told="no", leaves=False).obs_dim == 2
    )


def test_a_run_with_masks_learns_and_is_drawn(run_script, tmp_path):
    flags = f"{TINY[PETTINGZOO]} --env-id {HERE} --horizon 5 --env-workers 2 --run-dir run"
    code, out, err = run_script(flags, PETTINGZOO)
    assert code == 0 and "over 2 episodes" in out, err
    command = [sys.executable, str(ROOT / "evaluate.py"), "run", "--episodes", "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert result.returncode == 0 and (tmp_path / "run" / "credit.png").exists(), result.stderr


class Odd(Toggle):
    """What people's environments do, though PettingZoo's rules forbid it; `b` ends, or just vanishes, after step 2."""

    def __init__(self, how, horizon=6):
        super().__init__(horizon=horizon)
        self.how = how

    def reset(self, seed=None, options=None):
        observed, infos = super().reset(seed)
        self.agents = ["a"] if self.how == "absent" else self.agents
        return observed, infos if self.how != "no infos" else None

    def step(self, actions):
        observed, rewards, ends, cuts, infos = super().step(actions)
        if self.t >= 2 and self.agents:
            self.agents = ["a"]
            ends["b"] = self.how != "vanish"
        if self.how == "sticky":
            ends, cuts = {"a": not self.agents, "b": False}, {"a": False, "b": self.t >= 2}
        if self.how == "none seen" and self.t >= 2:
            observed["b"] = None
        if self.how == "array":
            rewards = {agent: np.array([reward]) for agent, reward in rewards.items()}
        return observed, rewards, ends, cuts, infos


@pytest.mark.parametrize("how", ["vanish", "absent", "sticky", "none seen", "array", "no infos"])
def test_odd_environments_are_understood(how):
    """Who is not there is allowed action 0 only, and an end by the rules is no truncation."""
    env = PettingZooEnv(lambda: UniformEnv(Odd(how), "odd", 6, masked=True), 3)
    one = UniformEnv(Odd(how), "odd", 6)
    one.try_out()
    assert one.masked
    agent, _ = script_module.make_networks(script_module.Args(), env)
    episodes = script_module.rollout(env, agent, 1)
    assert episodes["valid"].all() and (episodes["obs"][:, 2:, 1, 1:] == torch.tensor([1.0, 0, 0])).all()
    assert env.terminated.all() == (how == "sticky")


def test_a_mask_that_no_trial_had_is_told():
    env = UniformEnv(Cards("infos", leaves=False), "cards", 5)
    with pytest.raises(EnvFailure, match="--masked True keeps room for it"):
        env.reset(seed=1)


def test_whether_there_are_masks_is_kept_with_the_run(run_script, tmp_path):
    """So that evaluate.py and --resume do not decide anew, whatever an environment does without a seed."""
    flags = f'{TINY[PETTINGZOO]} --env-id {HERE} --horizon 5 --env-kwargs {{"told":"no","leaves":false}}'
    for name, more, masked in (("plain", "", False), ("room", "--masked True", True)):
        assert run_script(f"{flags} {more} --run-dir {name}", PETTINGZOO)[0] == 0
        saved = json.loads((tmp_path / name / "config.json").read_text())["flags"]
        assert saved["masked"] is masked
        args = script_module.Args(**saved | {"run_dir": None})
        assert script_module.make_parallel_env(args).masked is script_module.make_env(args, 2).masked is masked


@pytest.mark.parametrize(
    "fault, message",
    [("nothing", r"step 0: the action mask of a is \[0 0 0 0\], for 4 actions"), ("short", "for 4 actions")]
    + [("none_there", "step 0: there are no agents after reset"), ("back", "step 4: c left the episode, and is back")]
    + [("shared_list", "step 2: possible_agents has changed"), ("cut", "or --truncation-ends be given")],
)
def test_what_an_environment_does_wrong(fault, message):
    env = make(HERE, 8, 5, fault=fault)
    agent, _ = script_module.make_networks(script_module.Args(), env)
    with pytest.raises(EnvFailure, match=message) as failure:
        script_module.rollout(env, agent, 1)
    assert "another --seed" in failure.value.__notes__[0]


def test_an_agent_that_is_not_there_is_told_of(run_script):
    kwargs = '{"fault":"one_missing"}'
    code, out, err = run_script(f"{TINY[PETTINGZOO]} --env-id {HERE} --horizon 5 --env-kwargs {kwargs}", PETTINGZOO)
    assert code == 0 and "up to 1 agents are not there after reset: they count as gone" in out, err


def test_a_truncation_may_be_an_end():
    env = PettingZooEnv(lambda: UniformEnv(Cards("no", "cut"), "cards", 5, truncation_ends=True), 50)
    agent, _ = script_module.make_networks(script_module.Args(), env)
    length = script_module.rollout(env, agent, 1)["valid"].sum(dim=1)
    assert set(length.tolist()) == {1, 2, 3, 4, 5} and torch.equal(env.terminated, length < 5)


class Strange(Toggle):
    """What its spaces, names or returns have of their own, by attributes and methods given as options."""

    def __init__(self, horizon=6, **own):
        super().__init__(horizon=horizon)
        vars(self).update(own)

    def observation_space(self, agent):
        return getattr(self, "space", None) or super().observation_space(agent)

    def observe(self):
        return dict.fromkeys(self.possible_agents, self.seen) if hasattr(self, "seen") else super().observe()

    def reset(self, seed=None, options=None):
        observed, infos = super().reset(seed)
        self.agents = getattr(self, "names", self.agents)
        return observed if hasattr(self, "old") else (observed, infos)

    def step(self, actions):
        observed, rewards, *rest = super().step(actions)
        if getattr(self, "paid", None) is SystemExit:
            raise SystemExit
        return observed, dict.fromkeys(rewards, self.paid) if hasattr(self, "paid") else rewards, *rest


def seen_by(space, seen) -> list:
    observed, _ = UniformEnv(Strange(space=space, seen=seen), "strange", 6).reset(seed=1)
    return observed["b"].tolist()


def test_observations_are_taken_as_they_are():
    """Whatever type their space declares; only bytes are scaled, as nothing can be learned from inputs up to 255."""
    assert seen_by(Box(-1, 1, (1,), int), np.array([0.5])) == [0.5]
    assert seen_by(Box(0, 1, (2,), np.uint8), np.array([0, 1], np.uint8)) == [0, 1]
    picture = np.array([[0, 51], [102, 255]], np.uint8)
    assert seen_by(Box(0, 255, (2, 2), np.uint8), picture) == pytest.approx([0, 0.2, 0.4, 1])
    assert seen_by(Box(0, 255, (1,), np.uint8), [510]) == [2]
    assert seen_by(Discrete(3, dtype=np.uint8), 1) == [0, 1, 0]
    with pytest.raises(EnvFailure, match="is not finite"):
        seen_by(Box(0, 9, (1,), int), np.array([np.nan]))


class Wrapped(BaseParallelWrapper):
    horizon = 5


def test_a_mask_is_what_a_dict_or_the_infos_say():
    """An attribute of that name is the environment's own business."""
    env = UniformEnv(Strange(masked=True), "strange", 6)
    env.reset(seed=1)
    assert not env.masked and env.obs_dim == 1
    wrapped = PettingZooEnv(lambda: Wrapped(UniformEnv(Cards(), "cards", 5)), 2)
    assert wrapped.masked and wrapped.obs_dim == 2 + 4


BOX, MASK = Box(0, 1, (1,)), Box(0, 1, (3,), np.int8)


@pytest.mark.parametrize(
    "own, message",
    [({"space": Dict({"observation": BOX, "message": BOX, "action_mask": MASK})}, "action_mask, no more")]
    + [({"space": Dict({"obs": BOX, "action_mask": MASK})}, "observations; a has Dict.*'obs'.*, no more")]
    + [
        ({"possible_agents": []}, r"possible_agents is \[\]"),
        ({"possible_agents": ["a"] * 2}, r"possible_agents is \['a', 'a'\]"),
    ]
    + [({"action_space": lambda agent: Box(-3e38, 3e38, (2,))}, "below 1e9")],
)
def test_what_an_environment_says_of_itself_is_checked(own, message):
    with pytest.raises(ValueError, match=message):
        UniformEnv(Strange(**own), "strange", 6)


@pytest.mark.parametrize(
    "own, message",
    [({"old": True}, r"step 0: reset must return \(observations, infos\)")]
    + [({"names": ["a", "zed"]}, "step 0: agents has zed, which possible_agents has not")]
    + [({"paid": 1e39}, "step 1: a reward is not finite, or beyond single precision")]
    + [({"paid": SystemExit}, "step 1: SystemExit")],
)
def test_what_it_then_does_is_told(own, message):
    env = UniformEnv(Strange(**own), "strange", 6)
    with pytest.raises(EnvFailure, match=message):
        env.reset(seed=1)
        env.step(dict.fromkeys(env.agents, 0))


def test_every_copy_must_be_a_new_environment():
    one = Toggle()
    with pytest.raises(ValueError, match="--env-id toggle: must make a new environment at each call"):
        PettingZooEnv(lambda: UniformEnv(one, "toggle", 10), 2)


@pytest.mark.parametrize("length, horizon, told", [(100, None, True), (100, 25, False), (25, None, False)])
def test_episodes_that_are_cut_by_default_are_told_of(length, horizon, told):
    env = script_module.make_batched(HERE, {"kind": "toggle", "horizon": length}, horizon, False, None, 2)
    agent, _ = script_module.make_networks(script_module.Args(), env)
    script_module.rollout(env, agent, 1)
    assert ("episodes are cut after 25 steps: give their --horizon" in env.remarks()) == told


@pytest.mark.parametrize("script", [PETTINGZOO, TORCHRUN])
@pytest.mark.parametrize(
    "fault, why", [("none_there", "no agents after reset"), ("shared_list", "possible_agents has")]
)
def test_an_environment_without_agents_is_refused(fault, why, script, run_script, tmp_path):
    flags = f'--env-id {HERE} --horizon 5 --env-kwargs {{"fault":"{fault}"}} --run-dir run'
    code, _, err = run_script(f"{TINY[PETTINGZOO]} {flags}", script)
    assert code == 2 and why in err and not (tmp_path / "run").exists()


# Constants in the reward.


@pytest.mark.parametrize("credit", ["stas", "dense"])
def test_a_large_constant_in_the_reward_does_no_harm(credit, run_script, tmp_path):
    """It is a hundred times the deviation of the returns; without it the same is learned."""
    flags = f"--env-id {HERE} --horizon 10 --num-threads 1 --num-envs 16 --total-timesteps 6400 --emb-dim 16"
    flags += f" --credit {credit} --update-epochs 4 --eval-episodes 4"
    for constant in (0, 20):
        kwargs = f'--env-kwargs {{"kind":"toggle","constant":{constant}}} --run-dir {constant}'
        assert run_script(f"{flags} {kwargs}", PETTINGZOO)[0] == 0
        late = [float(row["charts/episodic_return"]) - 10 * constant for row in read_metrics(tmp_path / str(constant))][
            -5:
        ]
        assert np.mean(late) > 9


def test_one_return_gives_the_scale_of_rewards_too(run_script):
    """A single episode has no deviation from others."""
    kwargs = f'--env-id {HERE} --horizon 10 --env-kwargs {{"kind":"toggle","scale":0,"constant":20}}'
    code, out, err = run_script(f"{TINY[PETTINGZOO]} {kwargs} --num-envs 1", PETTINGZOO)
    assert code == 0 and "returns before training: 200 +- 0, so --reward-scale 200" in out, err


@pytest.mark.parametrize("scale", ["1e-9", "1e9"])
def test_the_scale_of_rewards_does_not_matter(scale, run_script, tmp_path):
    flags = f'--env-id {HERE} --horizon 10 --env-kwargs {{"kind":"toggle","scale":%s}} --run-dir %s'
    for value in ("1", scale):
        code, out, err = run_script(f"{TINY[PETTINGZOO]} {flags % (value, value)}", PETTINGZOO)
        assert code == 0 and "returns before training" in out, err
    one, other = (read_metrics(tmp_path / name)[-1] for name in ("1", scale))
    for name in ("losses/policy_loss", "decomposer/explained_variance"):
        assert float(one[name]) == pytest.approx(float(other[name]), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("credit, code", [("uniform", 0), ("stas", 1)])
def test_a_run_goes_on_with_another_horizon_if_no_network_depends_on_it(credit, code, run_script, tmp_path):
    flags = f'--credit {credit} --env-id {HERE} --env-kwargs {{"kind":"toggle"}} --horizon 10 --run-dir run'
    assert run_script(f"{TINY[PETTINGZOO]} {flags}", PETTINGZOO)[0] == 0
    found, _, err = run_script("--resume run --horizon 8 --total-timesteps 1000", PETTINGZOO)
    assert found == code and ("must have a checkpoint that fits the flags" in err) == (code == 1), err


def test_many_actions_are_stored_whole(run_script, tmp_path):
    kwargs = f'--env-id {HERE} --horizon 2 --env-kwargs {{"kind":"toggle","actions":40000,"horizon":2}} --run-dir run'
    assert run_script(f"{TINY[PETTINGZOO]} {kwargs} --total-timesteps 30", PETTINGZOO)[0] == 0
    act = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["buffer"]["data"]["act"]
    assert act.min() >= 0 and act.max() > 32767


# Memory.


def test_more_observations_than_memory_are_refused(run_script, tmp_path, monkeypatch):
    """8 environments of 10 steps, 2 agents and 1 number take 1,280 bytes, and 60 + 8 stored episodes 2,720."""
    flags = f'--buffer-size 99 --env-id {HERE} --horizon 10 --env-kwargs {{"kind":"toggle"}}'
    for credit, memory, code in (("stas", 3999, 2), ("stas", 4000, 0), ("dense", 1279, 2), ("dense", 1280, 0)):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.get)
        more = f"--credit {credit} --run-dir {credit}"
        found, _, err = run_script(f"{TINY[PETTINGZOO].replace('--buffer-size 12', '')} {flags} {more}", PETTINGZOO)
        assert found == code and (tmp_path / credit).exists() == (code == 0), err
        assert ("--num-envs 8: must be less, or --buffer-size" in err) == (code == 2)


def test_a_buffer_takes_the_room_that_it_needs():
    buffer = script_module.ReplayBuffer(1000, "cpu")
    for i in range(40):
        buffer.add(x=torch.full((7,), float(i)))
        assert len(buffer.data["x"]) <= min(1000, 2 * 7 * (i + 1))
    assert buffer.data["x"][:280].tolist() == [i // 7 for i in range(280)]
    for i in range(40, 200):
        buffer.add(x=torch.full((7,), float(i)))
    assert len(buffer.data["x"]) == 1000 and buffer.data["x"].sort().values.tolist() == [
        i // 7 for i in range(400, 1400)
    ]


# Names.


def test_a_name_may_be_of_something_in_a_module():
    """As gymnasium_robotics.mamujoco_v1 is."""
    assert make(f"{HERE}.Nested", 2, 10).obs_dim == 1


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "at_hand.py").write_text("from tests.test_any_env import Toggle as parallel_env\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert make("at_hand", 2, 10).horizon == 10


def test_an_aec_environment_gets_a_hint():
    with pytest.raises(ValueError, match="parallel_env or batched_env; .*aec_to_parallel"):
        make("pettingzoo.classic.connect_four_v3", 2, 10)


def test_a_module_that_hides_ones_own_is_named():
    with pytest.raises(ValueError, match=r"--env-id signal: must be a module .*signal.py has none\)"):
        make("signal", 2, 10)


def test_what_is_called_parallel_env_must_be_a_function(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text("from tests.test_any_env import Toggle\nparallel_env = Toggle()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="must be a module with a function parallel_env"):
        make("made", 2, 10)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="No module named 'no_such_package'"):
        make("needy", 2, 10)


def test_a_render_mode_among_the_options_is_no_second_one():
    env = make_single("mpe2.simple_spread_v3", {"render_mode": None}, 25, render_mode="rgb_array")
    env.reset(seed=1)
    assert env.render().ndim == 3


# Batched classes.

MINE = """
    import torch
    from envs.alice_bob import AliceBob

    class Mine(AliceBob):
        masked = {masked}

        def __init__(self, num_envs, device, wall=1.0):
            super().__init__(num_envs, device, one_hot=True)
            self.obs_dim += 4 * self.masked
            assert wall == 2

        def observe(self):
            obs = super().observe()
            allowed = torch.tensor([1.0, 1, 0, 1]).expand(*obs.shape[:2], 4)
            return torch.cat((obs, allowed), dim=-1) if self.masked else obs

        def step(self, act):
            assert not (self.masked and (act == 2).any())
            return super().step({act})

    def batched_env(num_envs, device, **options):
        return Mine(num_envs, device, **options)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes a module with a class of one's own, and returns the flags that name it."""

    def write(name: str, masked=False, act="act") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(MINE.format(masked=masked, act=act)))
        monkeypatch.syspath_prepend(tmp_path)
        return f'--env-id {name} --env-kwargs {{"wall":2}}'

    return write


@pytest.mark.parametrize("masked", [False, True])
def test_a_batched_class_by_name(masked, mine, run_script, tmp_path):
    flags = mine(f"mine{masked}", masked)
    code, out, err = run_script(f"{TINY[PETTINGZOO]} {flags} --run-dir run", PETTINGZOO)
    assert code == 0 and "over 2 episodes" in out, err
    command = [sys.executable, str(ROOT / "evaluate.py"), "run", "--episodes", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "run" / "episode.gif").exists(), result.stderr


@pytest.mark.parametrize(
    "act, more, message",
    [("act + 1 * (act < 3)", "--horizon 9", "--horizon 9: must be"), ("act[:1]", "", "must keep the rules of envs")]
    + [("act)[0], (7e4", "", "not enough values to unpack")],
)
def test_a_batched_class_that_does_not_fit_is_refused(act, more, message, mine, run_script, tmp_path):
    code, _, err = run_script(
        f"{TINY[PETTINGZOO]} {mine('wrong' + str(len(act)), act=act)} {more} --run-dir run", PETTINGZOO
    )
    assert code == 2 and message in err and not (tmp_path / "run").exists(), err


@pytest.mark.parametrize(
    "change, message",
    [
        ("mine.num_envs = 16", "must have the num_envs that it is asked for, 8, not 16"),
        ("del mine.horizon", "AttributeError"),
    ],
)
def test_a_batched_class_that_lacks_what_it_must_have(change, message, tmp_path, monkeypatch):
    text = f"""
    class Mine:
        num_envs, num_agents, obs_dim, num_actions, continuous, horizon, t = 8, 2, 1, 2, False, 5, 0
    def batched_env(num_envs, device):
        mine = type("Mine", (), dict(vars(Mine)))
        {change}
        return mine
    """
    name = f"lacks_{change.split()[0]}".replace(".", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    for horizon in (None, 5):
        with pytest.raises(ValueError, match=message):
            make(name, 8, horizon)


def test_many_episodes_of_a_batched_class_are_played_side_by_side(mine):
    mine("mine_too")
    env = side_by_side(lambda: make_single("mine_too", {"wall": 2}, None), 7)
    assert type(env).__name__ == "Mine" and env.num_envs == 7


def test_vmas_keeps_the_protocol():
    pytest.importorskip("vmas")
    for options in ({"scenario": "balance"}, {"scenario": "transport", "continuous_actions": True, "max_steps": 20}):
        env = make("envs.vmas", 5, None, **options)  # check_env tries it
        env.reset(seed=1)
        act = torch.zeros(env.num_envs, env.num_agents, *[env.num_actions] * env.continuous)
        obs, reward, _ = env.step(act if env.continuous else act.long())
        assert obs.shape == (5, env.num_agents, env.obs_dim) and reward.shape == (5,)


def test_vmas_is_the_package_itself():
    vmas = pytest.importorskip("vmas")
    env, game = make("envs.vmas", 4, None, scenario="balance"), vmas.make_env("balance", 4, continuous_actions=False)
    obs, same = env.reset(seed=3), torch.stack(game.reset(seed=3), dim=1)
    torch.testing.assert_close(obs, same)
    for t in range(30):
        act = torch.randint(9, (4, 3), generator=torch.Generator().manual_seed(t))
        running = ~env.terminated
        obs, reward, over = env.step(act)
        theirs, rewards, done, _ = game.step(list(act.unsqueeze(-1).unbind(dim=1)))
        torch.testing.assert_close(obs[running], torch.stack(theirs, dim=1)[running])
        torch.testing.assert_close(reward, torch.stack(rewards).mean(dim=0) * running)
        assert torch.equal(over[running], done[running])


def test_smax_keeps_the_protocol():
    pytest.importorskip("jaxmarl")
    env = make("envs.smax", 4, None, map="3m", max_steps=20)  # check_env tries it
    assert env.masked and env.num_agents == 3 and env.horizon == 20


# Workers.


HANG = """
import os, time
from tests.test_any_env import Toggle

class Hang(Toggle):
    def step(self, actions):
        open("pid", "w").write(str(os.getpid()))
        time.sleep(600)

parallel_env = Hang
"""
PLAY = """
import torch
from envs.pettingzoo import UniformEnv, make
UniformEnv.try_out = lambda env: None  # in which it would hang
if __name__ == "__main__":
    env = make("hang", 2, 10, num_workers=1)
    env.reset(seed=1)
    env.step(torch.zeros(2, 2, dtype=torch.int64))
"""


def test_a_worker_that_hangs_ends_with_the_main_process(tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    (tmp_path / "play.py").write_text(PLAY)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.Popen([sys.executable, "play.py"], cwd=tmp_path, env=env)
    deadline = time.time() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert run.poll() is None and time.time() < deadline
        time.sleep(0.05)
    worker = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert worker.parent.name != str(run.pid)
    run.kill()
    run.wait()
    while worker.exists() and worker.read_text().split()[2] != "Z":
        assert time.time() < deadline
        time.sleep(0.05)
