"""The learner: advantages against a loop, log-probabilities against the policy, critics against what they may see."""

import math
import runpy
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ML, MPE, PETTINGZOO, SCRIPTS, TINY, TORCHRUN
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

import stas_ippo_alicebob
import stas_ippo_mpe
from envs.alice_bob import AliceBob, parallel_env
from envs.mpe import make
from evaluate import play_episode
from stas_ippo_alicebob import MLP, ActorCritic, compute_gae, rollout
from stas_ippo_mpe import ContinuousActorCritic


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_against_a_loop(gamma, gae_lambda):
    generator = torch.Generator().manual_seed(0)
    lengths = [6, 1, 3, 6]
    rewards, values = torch.randn(2, 4, 6, 3, generator=generator, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    advantages, returns = compute_gae(rewards, values, valid, gamma, gae_lambda)
    for e, length in enumerate(lengths):
        for i in range(3):
            r, v = rewards[e, :length, i].tolist(), values[e, :length, i].tolist() + [0.0]  # worth nothing at the end
            for t in range(length):
                deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(t, length)]
                expected = sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas))
                assert advantages[e, t, i].item() == pytest.approx(expected)
                assert returns[e, t, i].item() == pytest.approx(expected + v[t])
    assert (advantages[~valid] == 0).all() and (returns[~valid] == 0).all()


def make_agent(centralized: bool = False) -> ActorCritic:
    torch.manual_seed(0)
    args = SimpleNamespace(critic="centralized" if centralized else "independent")
    agent = ActorCritic(args, AliceBob(1))
    torch.nn.init.normal_(agent.actor.layers[-1].weight, std=0.5)  # a policy that is not nearly uniform
    return agent


def act_and_value(agent: ActorCritic, obs: torch.Tensor, elapsed: torch.Tensor, action: torch.Tensor | None = None):
    """obs (..., N, O), elapsed (...) -> action, logprob, entropy, value"""
    return agent.get_action_and_value(agent.get_inputs(obs, elapsed), action)


def test_an_mlp_is_two_layers_of_tanh():
    network, x = MLP(5, 3, std=2.0), torch.randn(7, 5)
    first, second, last = network.layers
    expected = last(torch.tanh(second(torch.tanh(first(x)))))
    assert torch.allclose(network(x), expected, atol=1e-5)
    for layer, gain in ((second, 2**0.5), (last, 2.0)):
        torch.testing.assert_close(
            layer.weight @ layer.weight.T, gain**2 * torch.eye(len(layer.weight)), atol=1e-4, rtol=0
        )


def test_stored_logprobs_are_those_of_the_actions_taken():
    env, agent = AliceBob(16), make_agent()
    episodes = rollout(env, agent)
    names = ("obs", "act", "logprob", "team_reward", "valid", "inputs", "value", "event")
    obs, act, logprob, team_reward, valid, inputs, value, event = (episodes[name] for name in names)
    assert obs.shape == (16, 40, 2, 19) and act.shape == logprob.shape == value.shape == event.shape == (16, 40, 2)
    assert torch.allclose(inputs, agent.get_inputs(obs, torch.arange(40).expand(16, -1) / 40))
    assert torch.allclose(value, agent.get_action_and_value(inputs)[3], atol=1e-5)
    assert team_reward.shape == valid.shape == (16, 40) and valid.dtype == torch.bool
    replay = AliceBob(16)  # the same actions give the same observations and rewards
    next_obs = replay.reset()
    for t in range(40):
        assert torch.equal(next_obs, obs[:, t]) and torch.equal(valid[:, t], ~replay.terminated)
        for e in range(0, 16, 5):
            for i in range(2):
                one_hot = torch.eye(2)[i]
                probs = agent.actor(torch.cat((obs[e, t, i], one_hot))).softmax(-1)
                assert logprob[e, t, i].item() == pytest.approx(math.log(probs[act[e, t, i]].item()), abs=1e-5)
        next_obs, reward, _ = replay.step(act[:, t])
        assert torch.equal(reward, team_reward[:, t]) and torch.equal(replay.oracles()["event"], event[:, t])


def test_actions_are_drawn_from_the_policy():
    agent = make_agent()
    obs, time = torch.randn(1, 2, 19).expand(50_000, -1, -1), torch.zeros(50_000)
    act, *_ = act_and_value(agent, obs, time)
    for i in range(2):
        probs = agent.actor(torch.cat((obs[0, i], torch.eye(2)[i]))).softmax(-1)
        frequency = torch.bincount(act[:, i], minlength=4) / len(act)
        assert (frequency - probs).abs().max() < 4 * math.sqrt(0.25 / len(act))


def test_logprob_entropy_and_value_by_definition():
    agent, obs, time = make_agent(), torch.randn(9, 2, 19), torch.rand(9)
    given = torch.randint(4, (9, 2))
    act, logprob, entropy, value = act_and_value(agent, obs, time, given)
    assert act is given
    for b in range(9):
        for i in range(2):
            seen = torch.cat((obs[b, i], torch.eye(2)[i]))
            probs = agent.actor(seen).softmax(-1).tolist()
            assert logprob[b, i].item() == pytest.approx(math.log(probs[given[b, i]]), abs=1e-5)
            assert entropy[b, i].item() == pytest.approx(-sum(p * math.log(p) for p in probs), abs=1e-5)
            expected = agent.critic(torch.cat((seen, time[b : b + 1]))).item()
            assert value[b, i].item() == pytest.approx(expected, abs=1e-5)


def test_who_sees_what():
    obs = torch.randn(5, 2, 19)
    changed = obs.clone()
    changed[:, 1] += 1
    time, act = torch.zeros(5), torch.randint(4, (5, 2))
    for centralized in (False, True):
        agent = make_agent(centralized=centralized)
        before, after = (act_and_value(agent, seen, time, act)[1] for seen in (obs, changed))
        assert torch.equal(before[:, 0], after[:, 0])  # actors never see the others
        assert not torch.equal(before[:, 1], after[:, 1])
        before, after = (act_and_value(agent, seen, time)[3] for seen in (obs, changed))
        assert torch.equal(before[:, 0], after[:, 0]) == (not centralized)
        alike = obs[:, :1].expand(-1, 2, -1)
        value = act_and_value(agent, alike, time)[3]
        assert not torch.allclose(value[:, 0], value[:, 1])  # but know who they are
        assert act_and_value(agent, obs.unsqueeze(0), time.unsqueeze(0))[3].shape == (1, 5, 2)


def test_the_critic_knows_the_time_and_the_actor_does_not():
    for centralized in (False, True):
        agent, obs = make_agent(centralized), torch.randn(5, 2, 19)
        early, late = (act_and_value(agent, obs, torch.full((5,), time))[3] for time in (0.0, 1.0))
        assert early.shape == (5, 2) and not torch.allclose(early, late)
        batch = act_and_value(agent, obs, torch.tensor([0.0, 1, 0, 1, 0]))[3]
        assert torch.allclose(batch[::2], early[::2]) and torch.allclose(batch[1::2], late[1::2])
        assert len(agent.actor.layers[0].weight.T) == 19 + 2


def make_continuous_agent(num_actions: int = 5) -> ContinuousActorCritic:
    torch.manual_seed(0)
    env = SimpleNamespace(obs_dim=19, num_actions=num_actions, num_agents=2, continuous=True)
    agent = ContinuousActorCritic(SimpleNamespace(critic="independent", init_std=0.8), env)
    torch.nn.init.normal_(agent.actor.layers[-1].weight, std=0.3)
    torch.nn.init.normal_(agent.raw_std)
    return agent


def gaussian_of(agent: ContinuousActorCritic, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """obs (..., N, O) -> mean and deviation of every strength before it is clipped (..., N, A)"""
    mean = 0.5 + agent.actor(torch.cat((obs, torch.eye(2).expand(*obs.shape[:-1], -1)), dim=-1))
    return mean, (1.6 / (1 + (-agent.raw_std).exp())).expand_as(mean)


def below(x: float, mean: float, std: float) -> float:
    """The probability that a Gaussian draw is at most x."""
    return math.erfc((mean - x) / std / math.sqrt(2)) / 2


def test_continuous_actions_are_clipped_gaussian_draws():
    agent, obs = make_continuous_agent(), torch.randn(1, 2, 19).expand(20_000, -1, -1)
    act, *_ = act_and_value(agent, obs, torch.zeros(20_000))
    assert act.shape == (20_000, 2, 5) and act.min() == 0 and act.max() == 1
    mean, std = gaussian_of(agent, obs[0])
    for x in (0.0, 0.2, 0.5, 0.9):
        for i in range(2):
            for k in range(5):
                p = below(x, mean[i, k].item(), std[i, k].item())
                share = (act[:, i, k] <= x).float().mean().item()
                assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / len(act)) + 1e-3


def test_the_deviation_of_continuous_actions_starts_at_init_std_and_at_most_doubles():
    env = SimpleNamespace(obs_dim=19, num_actions=1, num_agents=2, continuous=True)
    agent = ContinuousActorCritic(SimpleNamespace(critic="independent", init_std=0.3), env)
    for raw, std in ((0.0, 0.3), (50.0, 0.6)):
        torch.nn.init.constant_(agent.raw_std, raw)
        entropy = act_and_value(agent, torch.zeros(1, 2, 19), torch.zeros(1))[2]
        assert torch.allclose(entropy, torch.tensor(0.5 * math.log(2 * math.pi * math.e * std**2)), atol=1e-5)


def test_continuous_probabilities_are_finite_wherever_the_mean_is():
    for bias, limit in ((-500.0, 0), (500.0, 1)):
        agent = make_continuous_agent()
        torch.nn.init.constant_(agent.actor.layers[-1].bias, bias)
        act, logprob, *_ = act_and_value(agent, torch.zeros(100, 2, 19), torch.zeros(100))
        assert (act == limit).all() and logprob.abs().max() < 1e-6
        for played in (act, 1 - act, act * 0 + 0.5):  # what an earlier policy may have played
            agent.zero_grad()
            logprob = act_and_value(agent, torch.zeros(100, 2, 19), torch.zeros(100), played)[1]
            logprob.sum().backward()
            assert logprob.isfinite().all()
            assert all(p.grad.isfinite().all() for p in (*agent.actor.parameters(), agent.raw_std))


def test_continuous_logprob_and_entropy_by_definition():
    agent, obs = make_continuous_agent(), torch.randn(3, 2, 19)
    act, stored, *_ = act_and_value(agent, obs, torch.zeros(3))
    _, logprob, entropy, _ = act_and_value(agent, obs, torch.zeros(3), act)
    assert torch.equal(stored, logprob)
    assert (act == 0).any() and (act == 1).any() and ((0 < act) & (act < 1)).any()
    means, stds = gaussian_of(agent, obs)
    for e in range(3):
        for i in range(2):
            expected_logprob = expected_entropy = 0.0
            for x, mean, std in zip(act[e, i].tolist(), means[e, i].tolist(), stds[e, i].tolist()):
                density = math.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
                p = {0.0: below(0, mean, std), 1.0: below(-1, -mean, std)}.get(x, density)
                expected_logprob += math.log(p)
                expected_entropy += math.log(std * math.sqrt(2 * math.pi * math.e))  # before it is clipped
            assert logprob[e, i].item() == pytest.approx(expected_logprob, abs=1e-4)
            assert entropy[e, i].item() == pytest.approx(expected_entropy, abs=1e-4)


def test_continuous_probabilities_add_up_to_one():
    agent, obs = make_continuous_agent(num_actions=1), torch.randn(1, 2, 19)
    torch.nn.init.normal_(agent.actor.layers[-1].weight, std=0.05)
    inside = (torch.arange(20_000) + 0.5) / 20_000
    played = torch.cat((torch.tensor([0.0, 1.0]), inside)).view(-1, 1, 1).expand(-1, 2, 1)
    logprob = act_and_value(agent, obs.expand(len(played), -1, -1), torch.zeros(len(played)), played)[1].double()
    at_limits, density = logprob[:2].exp().sum(dim=0), logprob[2:].exp().mean(dim=0)
    assert torch.allclose(at_limits + density, torch.ones(2, dtype=torch.float64), atol=1e-5)
    assert (at_limits > 0.05).all() and (density > 0.05).all()


def test_a_continuous_rollout_stores_what_was_done():
    torch.manual_seed(0)
    env, replay = (make("push", 4, 2, continuous_actions=True, max_cycles=25) for _ in range(2))
    env.reset(seed=0)
    replay.reset(seed=0)
    agent = ContinuousActorCritic(SimpleNamespace(critic="independent", init_std=1.0), env)
    episodes = rollout(env, agent)
    obs, act, logprob, team_reward = (episodes[name] for name in ("obs", "act", "logprob", "team_reward"))
    assert act.shape == (4, 25, 2, 5) and logprob.shape == (4, 25, 2) and episodes["valid"].all()
    assert torch.allclose(agent.get_action_and_value(episodes["inputs"], act)[1], logprob, atol=1e-4)
    next_obs = replay.reset()  # rollout resets, too
    for t in range(25):
        assert torch.equal(next_obs, obs[:, t])
        next_obs, reward, _ = replay.step(act[:, t])
        assert torch.equal(reward, team_reward[:, t])


def test_rollout_takes_a_seed_and_the_draws_come_from_torch():
    torch.manual_seed(0)
    env = make("spread", 4, 3)
    agent, act = ActorCritic(SimpleNamespace(critic="independent"), env), []
    for seed, torch_seed in ((1, 1), (1, 1), (1, 2), (2, 1)):
        torch.manual_seed(torch_seed)
        act.append(rollout(env, agent, seed))
    same, other_draws, other_start = (
        [torch.equal(act[0][name], episodes[name]) for name in ("obs", "act")] for episodes in act[1:]
    )
    assert same == [True, True] and other_draws == [False, False] and not other_start[0]
    assert torch.equal(act[0]["obs"][:, 0], act[2]["obs"][:, 0])  # the same start


def test_an_episode_on_pettingzoo_equals_the_batched_game():
    agent, frames = make_agent(), []
    episode = play_episode(parallel_env("rgb_array"), agent, 0, frames)
    length = episode["obs"].shape[1]
    assert len(frames) == length + 1 and episode["valid"].all()
    env = AliceBob(1)
    obs = env.reset()
    for t in range(length):
        assert torch.equal(episode["obs"][:, t], obs)
        obs, reward, _ = env.step(episode["act"][:, t])
        assert episode["team_reward"][0, t].item() == pytest.approx(reward.item())
        assert torch.equal(episode["event"][0, t].long(), env.oracles()["event"][0])


def test_a_team_at_random_plays_uniformly_and_independently(monkeypatch):
    """The other team of an evaluation, with the same starts."""
    played = []
    monkeypatch.setattr(stas_ippo_mpe, "rollout", lambda *a: played.append(rollout(*a)) or played[-1])
    for continuous in (False, True):
        args = stas_ippo_mpe.Args(continuous_actions=continuous)
        agent, _ = stas_ippo_mpe.make_networks(args, stas_ippo_mpe.make_env(args, 1))
        torch.nn.init.normal_(agent.actor.layers[-1].weight)
        figures = stas_ippo_mpe.evaluate(args, agent, 20)
        torch.nn.init.normal_(agent.actor.layers[-1].weight)  # another agent meets the same random team
        again = stas_ippo_mpe.evaluate(args, agent, 20)
        for name, figure in figures.items():
            assert (figure == again[name]) == (name.startswith("random") or "return" not in name)
        trained, random = played[:2]
        played.clear()
        assert (
            torch.equal(trained["obs"][:, 0], random["obs"][:, 0]) and random["obs"][:, 0].unique(dim=0).shape[0] == 20
        )
        act = random["act"].flatten(0, 1).double()  # (500, N) or (500, N, 5)
        if continuous:  # uniform on [0, 1]
            assert (act.mean(0) - 0.5).abs().max() < 0.06 and (act.var(0) - 1 / 12).abs().max() < 0.02
        else:
            for i in range(3):
                assert (torch.bincount(act[:, i].long(), minlength=5) / len(act) - 0.2).abs().max() < 0.08
        together = torch.corrcoef(act.flatten(1).T) - torch.eye(act[0].numel())
        assert together.abs().max() < 0.25


@pytest.mark.parametrize("script", [*SCRIPTS, TORCHRUN])
def test_diagnostics_of_credits_against_loops(script, run_script, monkeypatch):
    """When, who and noise, as a run logs them of its last iteration: over the steps that were played."""
    ends, run_path = [], runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda *a, **more: ends.append(run_path(*a, **more)))
    flags = f"{TINY[script]} --num-envs 40 --reward-scale 1 --run-dir run"
    if script in (PETTINGZOO, TORCHRUN):  # whose episodes end sooner or later
        flags += " --env-id tests.test_pettingzoo --horizon 6"
    assert run_script(flags, script)[0] == 0
    end = ends[0]
    credits, episodes = end["credits"].numpy(), {name: each.numpy() for name, each in end["episodes"].items()}
    lengths, N = episodes["valid"].sum(axis=1), credits.shape[2]
    played = [(e, t) for e, T in enumerate(lengths) for t in range(T)]

    def correlation(rows: list[tuple]) -> float:
        """Of pairs of sequences, each centred."""
        x, y = (np.concatenate([each - np.mean(each) for each in side]) for side in zip(*rows))
        return (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()) if y.any() else math.nan

    rows = [(credits[e, :T].sum(axis=1), episodes["team_reward"][e, :T]) for e, T in enumerate(lengths)]
    noise = [statistics.stdev(end["draws"][:, e, t, i].tolist()) for e, t in played if e < 32 for i in range(N)]
    expected = {"reward_correlation": correlation(rows), "credit_std": statistics.mean(noise)}
    assert math.isnan(correlation(rows)) == (script in (PETTINGZOO, TORCHRUN))  # where all rewards are alike
    if script in (MPE, ML):
        expected["shapley_correlation"] = correlation([(credits[e, t], episodes["shapley"][e, t]) for e, t in played])
    for name, value in expected.items():
        logged = end["metrics"][f"decomposer/{name}"]
        assert logged == "" if math.isnan(value) else logged == pytest.approx(value, rel=1e-3), name


class TwoSteps(ParallelEnv):
    """Pays 1 and 3 to its two agents at each of two steps; every second copy terminates after one."""

    metadata, horizon, made = {"name": "two steps"}, 2, 0
    possible_agents = ["a", "b"]

    def __init__(self):
        TwoSteps.made += 1
        self.short = TwoSteps.made % 2

    def observation_space(self, agent):
        return Box(0, 1, (2,), np.float32)

    def action_space(self, agent):
        return Discrete(3)

    def reset(self, seed=None, options=None):
        self.agents, self.t = ["a", "b"], 0
        return dict.fromkeys("ab", np.zeros(2, np.float32)), {"a": {}, "b": {}}

    def step(self, actions):
        self.t += 1
        ends, cut = bool(self.short), self.t == 2
        self.agents = [] if ends or cut else ["a", "b"]
        obs = dict.fromkeys("ab", np.zeros(2, np.float32))
        return obs, {"a": 1.0, "b": 3.0}, dict.fromkeys("ab", ends), dict.fromkeys("ab", cut), {"a": {}, "b": {}}


def test_evaluation_counts_what_happened(monkeypatch):
    monkeypatch.setattr(stas_ippo_alicebob, "make_parallel_env", lambda args: TwoSteps())
    sizes = SimpleNamespace(obs_dim=2, num_actions=3, num_agents=2, continuous=False)
    args = stas_ippo_alicebob.Args(credit="dense")
    agent, _ = stas_ippo_alicebob.make_networks(args, sizes)
    figures = stas_ippo_alicebob.evaluate(args, agent, 4)
    expected = {  # returns 2 and 4
        "episodic_return": 3.0,
        "episodic_return_std": 1.0,
        "episodic_length": 1.5,
        "episodes": 4,
        "terminated": 0.5,
    }
    assert figures == {f"{who}/{name}": value for who in ("eval", "random") for name, value in expected.items()}
