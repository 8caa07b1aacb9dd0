"""The protocol of batched environments, what breaks it, and one episode of any such environment on PettingZoo."""

import inspect
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ALICEBOB, ROOT, TINY
from pettingzoo.test import parallel_api_test, parallel_seed_test

from envs import check_action, check_env
from envs.alice_bob import AliceBob
from envs.pettingzoo import make
from envs.single import SingleEnv


class Count:
    """Two agents whose observation is their number of ones; the episode ends at three of agent 0's; horizon 8."""

    num_agents, num_actions, obs_dim, horizon = 2, 3, 1, 8

    def __init__(self, num_envs=16, fault=None, continuous=False):
        self.num_envs, self.fault, self.continuous, self.resets = num_envs, fault, continuous, 0

    def reset(self, seed=None):
        self.resets += self.fault == "seed"
        self.t, self.count = 0, torch.full((self.num_envs, 2), float(self.resets))
        if self.fault != "reset" or not hasattr(self, "terminated"):
            self.terminated = torch.zeros(self.num_envs, dtype=torch.bool)
        return self.observe()

    def observe(self):
        return self.count.unsqueeze(2) + torch.rand(1) if self.fault == "observe" else self.count.unsqueeze(2)

    def step(self, act):
        if self.fault != "horizon" and not (self.fault == "action shape" and len(act) < self.num_envs):
            check_action(self, act)
        act = torch.cat((act, act))[: self.num_envs]
        self.t += self.fault != "t"
        ones = (act[..., 0] > 0.5 if self.continuous else act == 1).float()
        if self.fault != "not frozen":
            ones = ones * ~self.terminated[:, None]
        self.count = self.count.add_(ones) if self.fault == "in place" else self.count + ones
        reward = ones.sum(dim=1)
        if self.fault == "paid when over":
            reward = reward + self.terminated.float()
        over = self.count[:, 0] >= 3
        if self.fault == "terminated in place":
            over = self.terminated.logical_or_(over)
        self.terminated = over if self.fault == "not sticky" and self.t < 6 else self.terminated | over
        if self.fault == "not sticky" and self.t == 6:
            self.terminated = self.terminated & False
        reward = {"double": reward.double(), "nan": reward / 0}.get(self.fault, reward)
        obs = self.observe()[:, 0] if self.fault == "shape" else self.observe()
        if self.fault == "reward in place":
            self.paid = getattr(self, "paid", reward).copy_(reward)
            reward = self.paid
        return obs, reward, self.terminated if self.fault == "terminated in place" else self.terminated.clone()


FAULTS = {
    "seed": "the same episodes from the same seed",
    "reset": "set t and terminated back",
    "observe": "of the current state",
    "horizon": "RuntimeError at the horizon",
    "t": "of the current state",
    "not frozen": "must stay as it is",
    "paid when over": "must stay as it is",
    "not sticky": "must stay as it is",
    "in place": "must be new tensors",
    "reward in place": "must be new tensors",
    "terminated in place": "must be new tensors",
    "action shape": "must raise ValueError on another shape",
    "double": r"team_reward must be \(16,\) torch.float32, are \(16,\) torch.float64",
    "nan": "must be finite",
    "shape": "observations must be",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_the_protocol(fault):
    with pytest.raises(ValueError, match=f"Count, step .*{FAULTS[fault]}"):
        check_env(Count(fault=fault))


def test_what_keeps_the_protocol():
    for continuous in (False, True):
        check_env(Count(continuous=continuous))
    for one_hot in (False, True):
        check_env(AliceBob(64, one_hot=one_hot))
    check_env(make("mpe2.simple_speaker_listener_v4", num_envs=4, horizon=25))
    check_env(make("tests.test_pettingzoo", num_envs=4, horizon=6))  # which ends early


@pytest.mark.parametrize("continuous", [False, True])
def test_one_episode_on_pettingzoo(continuous):
    def build():
        return SingleEnv(Count(1, continuous=continuous), "count")

    parallel_api_test(build(), num_cycles=30)
    parallel_seed_test(build, num_cycles=30)
    env = build()
    none, one = (np.array([x, 0, 0], np.float32) for x in (0, 1)) if continuous else (np.int64(0), np.int64(1))
    first, second = env.possible_agents
    for acts, counts, length in (((none, one), (0, 8), 8), ((one, none), (3, 0), 3)):
        obs, _ = env.reset(seed=1)
        total = steps = 0
        while env.agents:
            obs, rewards, terminated, truncated, _ = env.step(dict(zip(env.agents, acts)))
            assert rewards[first] == rewards[second]
            total, steps = total + rewards[first], steps + 1
        assert (obs[first].item(), obs[second].item(), total, steps) == (*counts, sum(counts), length)
        assert terminated[first] == (length == 3) and truncated[first] == (length == 8)


def test_a_script_of_ones_own(tmp_path):
    """The README's way to train on a class like Count: what it says to change in a copy of the script, and no more."""
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    shutil.copy(ROOT / "evaluate.py", tmp_path)
    imports = "import torch\nfrom envs import check_action\n"
    (tmp_path / "count.py").write_text(imports + inspect.getsource(Count))
    text = (ROOT / ALICEBOB).read_text()
    for old, new in {
        "from envs.alice_bob import AliceBob, parallel_env\n": "from count import Count\n"
        "from envs.single import SingleEnv\n",
        "AliceBob(num_envs, device, one_hot=True)": "Count(num_envs)",
        "parallel_env(render_mode, one_hot=True)": 'SingleEnv(Count(1), "count", render_mode)',
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "my_idea.py").write_text(text)
    for command, told in (
        (f"my_idea.py --run-dir run {TINY[ALICEBOB]}", "draw: python evaluate.py run"),
        ("evaluate.py run --episodes 1", "drawn: run/learning_curve.png, run/credit.png\n"),  # Count has no pictures
    ):
        command = [sys.executable, *command.split()]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
        assert result.returncode == 0 and told in result.stdout, result.stderr
