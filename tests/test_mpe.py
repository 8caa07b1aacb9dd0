"""The batched particle environments against mpe2, step for step, and their exact credits against brute force."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from pettingzoo.test import parallel_api_test, parallel_seed_test, render_test

from envs import check_env
from envs.mpe import SimpleSpread, distances, make, make_pettingzoo
from envs.mpe_pettingzoo import copy_state, draw, push_parallel_env, raw_env
from stas_ippo_mpe import Args, evaluate, make_env, make_networks, rollout

STATE = {
    "spread": ["agent_pos", "agent_vel", "landmark_pos"],
    "tag": ["agent_pos", "agent_vel", "landmark_pos", "prey_pos", "prey_vel"],
    "push": ["agent_pos", "agent_vel", "landmark_pos", "ball_pos", "ball_vel"],
}


def true_observations(env, num_agents: int) -> np.ndarray:
    """What mpe2's scenario computes, before it is rounded to float32."""
    world, scenario = env.unwrapped.world, env.unwrapped.scenario
    return np.stack([scenario.observation(agent, world) for agent in world.agents[:num_agents]])


def play_mpe2(env, one, act: np.ndarray, crowd: float) -> dict[str, list]:
    """An episode of mpe2 from a crowded start: its first state, then observations, rewards and states of every step.

    `one` is a batched environment with one episode, used to read states.
    """
    world = env.unwrapped.world
    for entity in world.entities:
        entity.state.p_pos = entity.state.p_pos * crowd
    names = [name for name in vars(one) if name.endswith(("_pos", "_vel"))]

    def state() -> dict[str, torch.Tensor]:
        copy_state(world, one)
        return {name: getattr(one, name)[0].clone() for name in names}

    episode = {"state": [state()], "obs": [true_observations(env, one.num_agents)], "reward": [], "prey_reward": []}
    for joint_act in act:
        _, reward, *_ = env.step(dict(zip(env.possible_agents, joint_act)))
        episode["reward"].append(np.mean([reward[name] for name in env.possible_agents]))
        prey = world.agents[one.num_agents :]
        episode["prey_reward"].append([env.unwrapped.scenario.reward(agent, world) for agent in prey])
        episode["obs"].append(true_observations(env, one.num_agents))
        episode["state"].append(state())
    return episode


def prey_reward(env) -> torch.Tensor:
    """mpe2's rewards of the prey, (E, P): -10 for every touch, and less for leaving the arena."""
    x = env.prey_pos.abs()
    beyond = torch.where(x < 1, (10 * (x - 0.9)).clamp(min=0), (2 * x - 2).exp().clamp(max=10))
    return -10 * env.contacts().sum(dim=1).to(env.dtype) - beyond.sum(dim=2)


@pytest.mark.parametrize("neighbors", ["all", "2 nearest", "more than there are"])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("num_agents, episodes", [(3, 200), (6, 40), (15, 10)])
@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_equal_to_mpe2_step_for_step(scenario, num_agents, episodes, continuous, neighbors):
    options = {"continuous_actions": continuous}
    if neighbors != "all":
        k = 2 if neighbors == "2 nearest" else 30
        episodes = math.ceil(episodes / 5)  # the physics is the same
        options["num_agent_neighbors"] = k
        if scenario != "push":
            options["num_landmark_neighbors"] = k
    elif (scenario, num_agents) == ("spread", 15):  # the default differs
        options |= {"num_agent_neighbors": 14, "num_landmark_neighbors": 15}
    rng = np.random.default_rng(0)
    shape = (episodes, 25, num_agents)
    act = rng.random((*shape, 5), dtype=np.float32) if continuous else rng.integers(5, size=shape)
    theirs, one = (
        make_pettingzoo(scenario, num_agents, **options),
        make(scenario, 1, num_agents, dtype=torch.float64, **options),
    )
    played = []
    for e in range(episodes):
        theirs.reset(seed=e)
        played.append(play_mpe2(theirs, one, act[e], crowd=0.4))

    env = make(scenario, episodes, num_agents, dtype=torch.float64, **options)
    env.reset()
    for name in STATE[scenario]:
        setattr(env, name, torch.stack([episode["state"][0][name] for episode in played]))
    obs, touches = env.observe(), 0

    def close(ours: torch.Tensor, true) -> bool:
        return torch.allclose(ours, torch.as_tensor(np.array(true, dtype=float)), rtol=0, atol=1e-7)

    assert close(obs, [episode["obs"][0] for episode in played])
    for t in range(25):
        obs, reward, terminated = env.step(torch.as_tensor(act[:, t]))
        assert obs.dtype == torch.float64 and obs.shape == (episodes, num_agents, env.obs_dim)
        assert close(obs, [episode["obs"][t + 1] for episode in played])
        assert close(reward, [episode["reward"][t] for episode in played])
        for name in STATE[scenario]:
            assert close(getattr(env, name), [episode["state"][t + 1][name].numpy() for episode in played]), name
        if scenario == "tag":
            assert close(prey_reward(env), [episode["prey_reward"][t] for episode in played])
        touches += env.touching().sum().item()
        if scenario != "spread":  # where two agents that touch do not count
            touches += (distances(env.agent_pos, env.agent_pos) < 2 * env.size).sum().item() - episodes * num_agents
        assert not terminated.any()
    assert touches / (episodes * num_agents) > 0.3  # crowded: contacts per agent and episode


@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_max_cycles_is_the_horizon_of_both(scenario):
    env, theirs = make(scenario, 2, 3, max_cycles=7), make_pettingzoo(scenario, 3, max_cycles=7)
    theirs.reset(seed=0)
    for _ in range(7):
        assert theirs.agents and env.t < env.horizon
        env.step(torch.zeros(2, 3, dtype=torch.int64))
        theirs.step({agent: 0 for agent in theirs.agents})
    assert not theirs.agents and env.t == env.horizon


def test_scripts_list_the_nearest_first_in_spread():
    """All others and landmarks by default, the paper's numbers of them with 15 agents; by name on demand."""

    def seen(**flags) -> tuple:
        env = make_env(Args(**flags), 2)
        return env.num_agent_neighbors, env.num_landmark_neighbors

    assert seen() == (2, 3) and seen(num_agents=6) == (5, 6) and seen(num_agents=15) == (5, 6)
    assert seen(num_agents=1) == (1, 1)
    assert seen(num_agent_neighbors=1) == (1, 3)
    assert seen(nearest_first=False) == (None, None) and seen(nearest_first=False, num_agent_neighbors=1) == (1, None)
    assert seen(scenario="tag") == seen(scenario="push") == (None, None)
    env = make_env(Args(num_agents=4), 50)
    landmarks = env.reset(seed=0)[:, :, 4:12].view(50, 4, 4, 2)
    assert (landmarks.norm(dim=3).diff(dim=2) >= 0).all()


def test_neighbors_of_15_agents_in_spread_are_the_papers():
    assert make("spread", 2, 15).obs_dim == 4 + 2 * 6 + 2 * 5 + 2 * 5
    assert make_pettingzoo("spread", 15).observation_space("agent_0").shape == (36,)
    assert make("spread", 2, 15, num_agent_neighbors=2).obs_dim == 4 + 2 * 6 + 2 * 2 + 2 * 2
    assert make("spread", 2, 6).obs_dim == 4 + 2 * 6 + 2 * 5 + 2 * 5  # all, in order


@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_resets_are_distributed_as_in_mpe2(scenario):
    """Ranges, means and standard deviations of all coordinates, and of the distance from the first landmark."""
    count = 1500
    theirs, one = make_pettingzoo(scenario, 3), make(scenario, 1, 3, dtype=torch.float64)
    env = make(scenario, 4000, 3)
    first = env.reset(seed=0)
    samples = {name: [] for name in STATE[scenario]}
    for e in range(count):
        theirs.reset(seed=e)
        copy_state(theirs.unwrapped.world, one)
        for name in samples:
            samples[name].append(getattr(one, name)[0])
    samples = {name: torch.stack(values).float() for name, values in samples.items()}

    def compare(ours: torch.Tensor, true: torch.Tensor) -> None:
        """(4000, ...) against (count, ...)"""
        error = (true.var(0) * (1 / len(ours) + 1 / len(true))).sqrt()
        assert ((ours.mean(0) - true.mean(0)).abs() < 4.5 * error).all()
        assert (ours.std(0) / true.std(0) - 1).abs().max() < 4.5 / math.sqrt(2 * count)

    for name, true in samples.items():
        ours = getattr(env, name)
        if name.endswith("_vel"):
            assert (ours == 0).all() and (true == 0).all()
        else:
            compare(ours, true)
            assert (ours.amax() - true.amax()).abs() < 0.02 and (ours.amin() - true.amin()).abs() < 0.02
    target = {"spread": "agent_pos", "tag": "prey_pos", "push": "ball_pos"}[scenario]
    compare(
        *(
            (x - y[:, :1]).norm(dim=2)
            for x, y in [(getattr(env, target), env.landmark_pos), (samples[target], samples["landmark_pos"])]
        )
    )
    assert torch.equal(env.reset(seed=0), first) and not torch.equal(env.reset(), first)


# ---------------------------------------------------------------------------------------------------------------------
# The exact split of spread's reward
# ---------------------------------------------------------------------------------------------------------------------


def value_of(agents: list, landmarks: list, coalition: tuple[int, ...], num_agents: int) -> float:
    """The team reward if only the agents of the coalition counted, by definition; positions are pairs of numbers."""
    total = 0.0
    for landmark in landmarks:
        total -= 0.5 * min((math.dist(agents[i], landmark) for i in coalition), default=2 * math.sqrt(2))
    for i, j in itertools.combinations(coalition, 2):
        if math.dist(agents[i], agents[j]) < 0.3:
            total -= 2 * 0.5 / num_agents
    return total


@pytest.mark.parametrize("num_agents", [1, 2, 3, 4, 5, 6])
def test_shapley_and_difference_rewards_against_brute_force(num_agents):
    env = SimpleSpread(4, num_agents, dtype=torch.float64)
    env.reset(seed=num_agents)
    env.agent_pos[:2] *= 0.3  # crowded
    env.agent_pos[2] = env.agent_pos[2] + 4  # far outside, where an agent is worth less than nothing
    shapley, difference, team_reward = env.shapley_reward(), env.difference_reward(), env.team_reward()
    assert num_agents < 3 or env.touching()[:2].any()
    everyone = tuple(range(num_agents))
    for e in range(4):
        agents, landmarks = env.agent_pos[e].tolist(), env.landmark_pos[e].tolist()
        v = {
            c: value_of(agents, landmarks, c, num_agents)
            for size in range(num_agents + 1)
            for c in itertools.combinations(everyone, size)
        }
        assert v[everyone] == pytest.approx(team_reward[e].item(), abs=1e-9)
        expected = [0.0] * num_agents
        for order in itertools.permutations(everyone):
            for k, i in enumerate(order):
                before = tuple(sorted(order[:k]))
                gain = v[tuple(sorted((*before, i)))] - v[before]
                expected[i] += gain / math.factorial(num_agents)
        assert shapley[e].tolist() == pytest.approx(expected, abs=1e-9)
        assert shapley[e].sum().item() == pytest.approx(v[everyone] - v[()], abs=1e-9)
        without = [v[everyone] - v[tuple(j for j in everyone if j != i)] for i in everyone]
        assert difference[e].tolist() == pytest.approx(without, abs=1e-9)


def test_shapley_reward_adds_up_with_15_agents():
    env = SimpleSpread(50, 15)
    env.reset(seed=0)
    nothing = -0.5 * 15 * 2 * math.sqrt(2)
    assert torch.allclose(env.shapley_reward().sum(dim=1), env.team_reward() - nothing, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Protocol, prey, PettingZoo
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_protocol(scenario, continuous):
    env = make(scenario, 5, 4, continuous_actions=continuous)
    horizon = 50 if scenario == "push" else 25
    sizes = (env.num_envs, env.num_agents, env.horizon, env.num_actions, env.continuous)
    assert sizes == (5, 4, horizon, 5, continuous)
    check_env(env)
    env.reset()
    for _ in range(horizon):
        act = torch.rand(5, 4, 5) if continuous else torch.randint(5, (5, 4))
        assert not env.step(act)[2].any()
    with pytest.raises(RuntimeError, match=str(horizon)):
        env.step(act)
    env.reset()
    with pytest.raises(ValueError, match="shape"):
        env.step(act[:4])
    env.agent_pos = env.agent_pos + 1
    assert torch.allclose(env.observe()[:, :, 2:4], env.agent_pos)


def test_continuous_actions_outside_the_range_are_clipped():
    act = torch.tensor([[[-3.0, 0, 7, -2, 0]]])
    env = make("spread", 1, 1, continuous_actions=True, dtype=torch.float64)
    theirs = make_pettingzoo("spread", 1, continuous_actions=True)
    theirs.reset(seed=0)
    copy_state(theirs.unwrapped.world, env)
    env.step(act)
    theirs.step({"agent_0": act[0, 0].numpy()})
    assert torch.allclose(env.observe(), torch.as_tensor(true_observations(theirs, 1)), atol=1e-7)
    assert env.agent_vel.abs().max() == pytest.approx(0.5)  # full strength to the right


@pytest.mark.parametrize(
    "scenario, options, message",
    [
        ("chess", {}, "^scenario chess: must be one of"),
        ("spread", {"num_prey": 2}, "^--num-prey 2: must be left out with scenario spread"),
        ("push", {"num_obstacles": 2}, "^--num-obstacles 2: must be left out"),
        ("push", {"num_landmark_neighbors": 1}, "^--num-landmark-neighbors 1: must be left out"),
        ("spread", {"num_agent_neighbors": 0}, "^--num-agent-neighbors 0: must be at least 1"),
        ("tag", {"num_prey": 0}, "^--num-prey 0: must be at least 1"),
        ("tag", {"num_obstacles": -1}, "^--num-obstacles -1: must be at least 0"),
        ("tag", {"num_agents": 0}, "^--num-agents 0: must be at least 1"),
        ("push", {"max_cycles": 0}, "^--max-cycles 0: must be at least 1"),
    ],
)
def test_options_that_make_no_sense(scenario, options, message):
    for build in (lambda **kw: make(num_envs=2, **kw), make_pettingzoo):
        with pytest.raises(ValueError, match=message):
            build(scenario=scenario, **{"num_agents": 3} | options)


def test_prey_go_where_it_is_least_dangerous():
    """The script of the prey against a loop over predators, obstacles and moves, in crowded states."""
    env = make("tag", 200, 6, num_prey=2, dtype=torch.float64)
    env.reset(seed=0)
    env.agent_pos, env.landmark_pos = 0.4 * env.agent_pos, 0.6 * env.landmark_pos  # also two obstacles at once
    env.prey_vel = torch.rand(200, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    moves, chosen = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)], env.prey_policy()
    for e in range(200):
        for i in range(2):
            dangers = []
            for move in moves:
                place, speed = env.prey_pos[e, i].tolist(), env.prey_vel[e, i].tolist()
                for _ in range(2):  # steps of 0.1, in which a quarter of the speed is lost and the force adds 0.4
                    place = [x + 0.1 * v for x, v in zip(place, speed)]
                    speed = [0.75 * v + 0.1 * 4 * m for v, m in zip(speed, move)]
                danger = 1000 * sum(max(0, abs(x) - 0.9) for x in place)
                for predator in env.agent_pos[e].tolist():
                    if (distance := math.dist(place, predator)) < 0.2:
                        danger += 1 / (distance**2 + 0.01) - 1 / (0.2**2 + 0.01)
                danger += sum(100 * max(0, 0.25 - math.dist(place, rock)) for rock in env.landmark_pos[e].tolist())
                dangers.append(danger)
            assert dangers[chosen[e, i]] == pytest.approx(min(dangers), abs=1e-9)
            if max(dangers) == 0:
                assert chosen[e, i] == 0


def test_sizes_of_the_games():
    counts = {n: (env.num_prey, env.num_obstacles) for n in (2, 3, 4, 6, 7, 9) for env in [make("tag", 1, n)]}
    assert counts == {2: (1, 2), 3: (1, 2), 4: (1, 3), 6: (2, 3), 7: (2, 5), 9: (3, 5)}
    env = make("push", 4000, 3)
    env.reset(seed=0)
    apart = (env.ball_pos - env.landmark_pos).norm(dim=-1)
    assert 0.8 <= apart.min() < 0.81 and env.ball_pos.abs().max() <= 0.8 and env.ball_mass == 2


def test_prey_flee_random_predators_but_can_be_caught():
    """Share of episodes with a touch: predators at random, and predators that run straight at the prey."""
    rates = {}
    for who in ("random", "chasing"):
        env = make("tag", 1000, 3)
        env.reset(seed=0)
        touched = torch.zeros(1000, dtype=torch.bool)
        for _ in range(25):
            offset = env.prey_pos - env.agent_pos  # (E, N, 2), one prey
            axis = offset.abs().argmax(dim=2)
            chase = 1 + 2 * axis + (offset.gather(2, axis.unsqueeze(2)).squeeze(2) > 0)
            act = chase if who == "chasing" else torch.randint(5, (1000, 3), generator=env.generator)
            touched |= env.step(act)[1] > 0
        rates[who] = touched.float().mean().item()
        assert env.prey_pos.abs().max() < 2  # it stays about the arena
    assert rates["random"] < 0.15 and rates["chasing"] > 0.9


@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_a_policy_earns_the_same_on_both(scenario):
    """Mean returns within 3 standard errors of their difference. The policy pushes the agents to where they touch."""
    torch.manual_seed(1)
    args = Args(scenario=scenario, max_cycles=25)
    env = make_env(args, 2000)
    agent, _ = make_networks(args, env)
    torch.nn.init.normal_(agent.actor.layers[-1].weight, std=1.0)
    team_return = rollout(env, agent, seed=0)["team_reward"].sum(dim=1)
    figures = evaluate(args, agent, 150)
    error = math.sqrt(figures["eval/episodic_return_std"] ** 2 / 150 + team_return.var().item() / 2000)
    assert error > 0 and abs(figures["eval/episodic_return"] - team_return.mean().item()) < 3 * error
    assert figures["eval/episodic_length"] == 25 and figures["eval/terminated"] == 0


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_pettingzoo_api_and_seeds(scenario, continuous):
    parallel_api_test(make_pettingzoo(scenario, 3, continuous_actions=continuous), num_cycles=60)
    parallel_seed_test(lambda: make_pettingzoo(scenario, 3, continuous_actions=continuous), num_cycles=30)


def test_push_renders(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    render_test(lambda render_mode: raw_env(render_mode=render_mode))
    env = push_parallel_env(render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (700, 700, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 3


@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_pictures_show_the_numbered_agents_from_a_camera_that_stands_still(scenario):
    env = make_pettingzoo(scenario, 3, render_mode="rgb_array")
    env.reset(seed=1)
    before = env.render()
    assert before.shape == (500, 500, 3) and before.dtype == np.uint8 and np.array_equal(before, env.render())
    env.unwrapped.world.agents[1].state.p_pos[:] = (-1.3, 1.3)  # a corner where nothing is
    moved = env.render()
    blue = np.abs(moved.astype(int) - (31, 119, 180)).sum(axis=2) < 30
    row, col = np.argwhere(blue[:100, :100]).mean(axis=0)
    assert (row, col) == pytest.approx((33, 33), abs=3)  # 0.2 of 3 units from the upper left, of 500 pixels
    changed = (before != moved).any(axis=2)
    assert changed.sum() <= 2 * math.pi * (env.rules.size / 3 * 500 + 2) ** 2  # only where agent 1 was and where it is
    one, two = draw(make(scenario, 1, 1)), draw(make(scenario, 1, 2))
    assert not np.array_equal(one, two)


def test_oracles_are_those_of_the_rules():
    """What the wrapper tells of mpe2's state equals the batched environment's, put into that state."""
    env = make_pettingzoo("spread", 3)
    env.reset(seed=2)
    for agent in env.unwrapped.world.agents:
        agent.state.p_pos *= 0.1
    twin = make("spread", 1, 3, dtype=torch.float64)
    copy_state(env.unwrapped.world, twin)
    told = env.oracles()
    assert torch.equal(told["event"], (twin.touching() > 0).long()) and told["event"].any()
    assert torch.equal(told["shapley"], twin.shapley_reward())
    assert torch.equal(told["difference"], twin.difference_reward())
    assert set(make("tag", 2, 3).oracles()) == set(make("push", 2, 3).oracles()) == {"event"}


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_misuse_of_the_pettingzoo_environments(scenario, continuous):
    env = make_pettingzoo(scenario, 2, continuous_actions=continuous)

    def joint(value: float) -> dict:
        return dict.fromkeys(env.possible_agents, np.full(5, value, np.float32) if continuous else value)

    with pytest.raises(RuntimeError, match="reset"):
        env.step(joint(0))
    for actions in ({"nobody": 0}, joint(0) | {"nobody": 0}, dict([joint(0).popitem()])):
        env.reset(seed=0)
        with pytest.raises(ValueError, match="must be actions for"):
            env.step(actions)
    for value in (float("nan"), 9, -1):
        env.reset(seed=0)
        if continuous and value == value:  # what lies outside is clipped, as mpe2 does it
            env.step(joint(value))
        else:
            with pytest.raises(AssertionError, match="action"):
                env.step(joint(value))
    env.reset(seed=0)
    while env.agents:
        env.step(joint(0))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(joint(0))
    env.close()
    env.close()


def test_learning_needs_no_mpe2():
    code = "import sys; sys.modules['mpe2'] = None; import envs.mpe, stas_ippo_mpe; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "fine\n"


def test_predators_are_the_only_agents_in_tag():
    env = make_pettingzoo("tag", 6)
    assert env.possible_agents == [f"adversary_{i}" for i in range(6)] and len(env.prey) == 2
    obs, infos = env.reset(seed=0)
    assert list(obs) == list(infos) == env.agents == env.possible_agents
    world = env.unwrapped.world
    for t in range(25):
        results = env.step(dict.fromkeys(env.agents, 0))
        assert all(list(result) == env.possible_agents for result in results)
        assert env.agents == ([] if t == 24 else env.possible_agents)
    assert any(np.abs(agent.state.p_vel).max() > 0 for agent in world.agents[6:])  # the prey do move


def test_distances():
    a, b = torch.randn(2, 3, 2), torch.randn(2, 4, 2)
    assert torch.allclose(distances(a, b), torch.cdist(a, b), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_the_same_on_cuda(scenario):
    cpu, cuda = (make(scenario, 20, 5, device, torch.float64) for device in ("cpu", "cuda"))
    for name in STATE[scenario]:
        setattr(cuda, name, getattr(cpu, name).cuda())
    act = torch.randint(5, (25, 20, 5), generator=torch.Generator().manual_seed(0))
    for t in range(25):
        (obs, reward, _), theirs = cpu.step(act[t]), cuda.step(act[t].cuda())
        assert torch.allclose(theirs[0].cpu(), obs, atol=1e-7) and torch.allclose(theirs[1].cpu(), reward, atol=1e-7)
    if scenario == "spread":
        for name in ("shapley_reward", "difference_reward"):
            assert torch.allclose(getattr(cuda, name)().cpu(), getattr(cpu, name)(), atol=1e-7)


def test_the_rules_of_push_in_numbers():
    env, theirs = make("push", 4000, 3), make_pettingzoo("push", 3)
    env.reset(seed=0)
    starts = {"agent": env.agent_pos, "ball": env.ball_pos, "target": env.landmark_pos}
    theirs.reset(seed=0)
    ball, target = theirs.unwrapped.world.landmarks
    assert [agent.size for agent in theirs.unwrapped.world.agents] == [0.06] * 3
    assert (ball.size, ball.mass, ball.movable, ball.collide) == (0.1, 2, True, True)
    assert (target.size, target.movable, target.collide) == (0.05, False, False)
    for name, limit in {"agent": 1, "ball": 0.8, "target": 0.8}.items():
        assert 0.999 * limit < starts[name].amax() <= limit and -limit <= starts[name].amin() < -0.999 * limit
    assert 0.8 <= (env.ball_pos - env.landmark_pos).norm(dim=2).min() < 0.801

    # A ball 0.5 from the target and 0.3 from the nearest agent.
    env = make("push", 1, 2)
    env.ball_pos, env.landmark_pos = torch.zeros(1, 1, 2), torch.tensor([[[0.3, 0.4]]])
    env.agent_pos = torch.tensor([[[0.0, -0.3], [0.9, 0.0]]])
    _, reward, _ = env.step(torch.zeros(1, 2, dtype=torch.int64))
    assert reward.item() == pytest.approx(-2 * 0.5 - 0.3)


@pytest.mark.parametrize("scenario", ["spread", "tag", "push"])
def test_one_touch_is_marked(scenario):
    """An o marks those who touch. Agent 0 and one body (the last agent, the prey, the ball) are a bit closer than the
    sum of their radii, then a bit farther apart."""
    env = make(scenario, 2, 3)
    body, reach = {"spread": ("agent_pos", 0.3), "tag": ("prey_pos", 0.125), "push": ("ball_pos", 0.16)}[scenario]
    env.agent_pos[:] = torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    getattr(env, body)[:, -1] = torch.tensor([[reach - 0.001, 0.0], [reach + 0.001, 0.0]])
    assert env.oracles()["event"].tolist() == [[1, 0, int(scenario == "spread")], [0, 0, 0]]
    assert env.event_names[1] == "o"
