"""The learner: advantages against a loop, log-probabilities against the policy, critics against what they may see."""

import math
from types import SimpleNamespace

import pytest
import torch

from envs.alice_bob import AliceBob, parallel_env
from envs.mpe import make, make_pettingzoo
from evaluate import measure_credits, play_episode, play_episodes
from stas_ippo_alicebob import ActorCritic, compute_gae, rollout
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
    torch.nn.init.normal_(agent.actor[-1].weight, std=0.5)  # a policy that is not nearly uniform
    return agent


def test_stored_logprobs_are_those_of_the_actions_taken():
    env, agent = AliceBob(16), make_agent()
    episodes = rollout(env, agent)
    names = ("obs", "act", "logprob", "team_reward", "valid", "elapsed", "value", "event")
    obs, act, logprob, team_reward, valid, time, value, event = (episodes[name] for name in names)
    assert obs.shape == (16, 40, 2, 19) and act.shape == logprob.shape == value.shape == event.shape == (16, 40, 2)
    assert torch.allclose(time, torch.arange(40).expand(16, -1) / 40)
    assert torch.allclose(value, agent.get_value(obs, time), atol=1e-5)
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
    act, *_ = agent.get_action_and_value(obs, time)
    for i in range(2):
        probs = agent.actor(torch.cat((obs[0, i], torch.eye(2)[i]))).softmax(-1)
        frequency = torch.bincount(act[:, i], minlength=4) / len(act)
        assert (frequency - probs).abs().max() < 4 * math.sqrt(0.25 / len(act))


def test_logprob_entropy_and_value_by_definition():
    agent, obs, time = make_agent(), torch.randn(9, 2, 19), torch.rand(9)
    given = torch.randint(4, (9, 2))
    act, logprob, entropy, value = agent.get_action_and_value(obs, time, given)
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
    time = torch.zeros(5)
    for centralized in (False, True):
        agent = make_agent(centralized=centralized)
        assert torch.equal(
            agent.policy(obs).logits[:, 0], agent.policy(changed).logits[:, 0]
        )  # actors never see the others
        assert not torch.equal(agent.policy(obs).logits[:, 1], agent.policy(changed).logits[:, 1])
        same = torch.equal(agent.get_value(obs, time)[:, 0], agent.get_value(changed, time)[:, 0])
        assert same == (not centralized)
        alike = obs[:, :1].expand(-1, 2, -1)
        value = agent.get_value(alike, time)
        assert not torch.allclose(value[:, 0], value[:, 1])  # but know who they are
        assert agent.get_value(obs.unsqueeze(0), time.unsqueeze(0)).shape == (1, 5, 2)


def test_the_critic_knows_the_time_and_the_actor_does_not():
    for centralized in (False, True):
        agent, obs = make_agent(centralized), torch.randn(5, 2, 19)
        early, late = (agent.get_value(obs, torch.full((5,), time)) for time in (0.0, 1.0))
        assert early.shape == (5, 2) and not torch.allclose(early, late)
        batch = agent.get_value(obs, torch.tensor([0.0, 1, 0, 1, 0]))
        assert torch.allclose(batch[::2], early[::2]) and torch.allclose(batch[1::2], late[1::2])
        assert len(agent.actor[0].weight.T) == 19 + 2


def make_continuous_agent() -> ContinuousActorCritic:
    torch.manual_seed(0)
    env = SimpleNamespace(obs_dim=19, num_actions=5, num_agents=2, continuous=True)
    agent = ContinuousActorCritic(SimpleNamespace(critic="independent"), env)
    torch.nn.init.normal_(agent.actor[-1].weight, std=1.0)
    return agent


def test_continuous_actions_are_beta_draws():
    agent, obs = make_continuous_agent(), torch.randn(1, 2, 19).expand(20_000, -1, -1)
    act, *_ = agent.get_action_and_value(obs, torch.zeros(20_000))
    assert act.shape == (20_000, 2, 5) and act.min() > 0 and act.max() < 1
    policy = agent.policy(obs[0]).base_dist
    a, b = policy.concentration1, policy.concentration0
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert ((act.mean(0) - mean).abs() < 4.5 * (variance / len(act)).sqrt()).all()
    assert (act.var(0) / variance - 1).abs().max() < 0.06


def test_continuous_actions_keep_from_where_densities_are_infinite():
    agent = make_continuous_agent()
    for bias in (-500.0, 500.0):
        torch.nn.init.constant_(agent.actor[-1].bias[:5], bias)  # all of alpha
        torch.nn.init.constant_(agent.actor[-1].bias[5:], -bias)
        act, logprob, *_ = agent.get_action_and_value(torch.zeros(100, 2, 19), torch.zeros(100))
        assert logprob.isfinite().all() and act.min() >= 1e-4 and act.max() <= 1 - 1e-4


def test_continuous_logprob_and_entropy_by_numerical_integration():
    agent, obs = make_continuous_agent(), torch.randn(3, 2, 19)
    act, stored, *_ = agent.get_action_and_value(obs, torch.zeros(3))
    _, logprob, entropy, _ = agent.get_action_and_value(obs, torch.zeros(3), act)
    assert torch.equal(stored, logprob)
    policy = agent.policy(obs).base_dist
    parameters = torch.stack((policy.concentration1, policy.concentration0), dim=-1)  # (3, 2, 5, 2)
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for e in range(3):
        for i in range(2):
            expected_logprob = expected_entropy = 0.0
            for k, (a, b) in enumerate(parameters[e, i].tolist()):
                log_density = (a - 1) * grid.log() + (b - 1) * (1 - grid).log()
                log_density = log_density - log_density.exp().mean().log()  # the density integrates to 1
                expected_entropy -= (log_density.exp() * log_density).mean().item()
                x = act[e, i, k].item()
                log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                expected_logprob += log_norm + (a - 1) * math.log(x) + (b - 1) * math.log(1 - x)
            assert logprob[e, i].item() == pytest.approx(expected_logprob, abs=1e-4)
            assert entropy[e, i].item() == pytest.approx(expected_entropy, abs=1e-4)


def test_a_continuous_rollout_stores_what_was_done():
    torch.manual_seed(0)
    env, replay = (make("push", 4, 2, continuous_actions=True, max_cycles=25) for _ in range(2))
    env.reset(seed=0)
    replay.reset(seed=0)
    agent = ContinuousActorCritic(SimpleNamespace(critic="independent"), env)
    episodes = rollout(env, agent)
    obs, act, logprob, team_reward = (episodes[name] for name in ("obs", "act", "logprob", "team_reward"))
    assert act.shape == (4, 25, 2, 5) and logprob.shape == (4, 25, 2) and episodes["valid"].all()
    assert torch.allclose(agent.get_action_and_value(obs, episodes["elapsed"], act)[1], logprob, atol=1e-4)
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
    episode = play_episode(parallel_env("rgb_array"), lambda obs: agent.policy(obs).sample(), 0, frames)
    length = episode["obs"].shape[1]
    assert len(frames) == length + 1 and episode["valid"].all()
    env = AliceBob(1)
    obs = env.reset()
    for t in range(length):
        assert torch.equal(episode["obs"][:, t], obs)
        obs, reward, _ = env.step(episode["act"][:, t])
        assert episode["team_reward"][0, t].item() == pytest.approx(reward.item())
        assert torch.equal(episode["event"][0, t].long(), env.oracles()["event"][0])


def test_agents_at_random_move_independently_of_each_other(monkeypatch):
    played = []
    monkeypatch.setattr(
        "evaluate.play_episode", lambda *a, **more: played.append(play_episode(*a, **more)) or played[-1]
    )
    play_episodes(make_pettingzoo("spread", 3), None, 2, 0)
    (first, second), act = (each["obs"][0, 0] for each in played), played[0]["act"][0]
    assert not torch.equal(act[:, 0], act[:, 1]) and not torch.equal(first, second)


def test_noise_of_credits_against_a_loop():
    """Over the steps that were played, of the first 32 episodes only."""
    torch.manual_seed(0)
    episodes = {"valid": torch.arange(6) < torch.randint(1, 7, (40, 1)), "team_reward": torch.randn(40, 6)}
    draws = [torch.randn(32, 6, 3) * episodes["valid"][:32].unsqueeze(2) for _ in range(4)]
    left = iter(draws)
    measured = measure_credits(
        SimpleNamespace(credit="temporal"), lambda few: next(left), episodes, torch.randn(40, 6, 3)
    )
    noise = [
        torch.stack([draw[e, t, i] for draw in draws]).std().item()
        for e in range(32)
        for t in range(int(episodes["valid"][e].sum()))
        for i in range(3)
    ]
    assert measured["decomposer/credit_std"] == pytest.approx(sum(noise) / len(noise), rel=1e-4)


def test_evaluation_counts_what_happened():
    class TwoSteps:
        """Pays 1 and 3 to its two agents at each of two steps; every second episode terminates, the others run out."""

        possible_agents = ["a", "b"]

        def __init__(self):
            self.space, self.episodes = parallel_env().action_space("alice"), 0

        def action_space(self, agent):
            return self.space

        def reset(self, seed=None):
            self.agents, self.t, self.episodes = ["a", "b"], 0, self.episodes + 1
            return dict.fromkeys(self.agents, torch.zeros(2).numpy()), {}

        def step(self, actions):
            self.t += 1
            over = self.t == self.episodes
            result = [dict.fromkeys("ab", torch.zeros(2).numpy()), {"a": 1.0, "b": 3.0}]
            result += [dict.fromkeys("ab", over and self.episodes == 2), dict.fromkeys("ab", over), {}]
            self.agents = [] if over else self.agents
            return result

    figures = play_episodes(TwoSteps(), None, 2, 0)  # episode 1 has one step, episode 2 two
    assert figures == {
        "episodic_return": 3.0,
        "episodic_return_std": 1.0,
        "episodic_length": 1.5,
        "episodes": 2,
        "terminated": 0.5,
    }
