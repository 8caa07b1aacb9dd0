"""One iteration of every script's training loop, redone from its seeds by the definitions of what it does."""

import importlib
import json

import numpy as np
import pytest
import torch
from conftest import PETTINGZOO, TINY, read_metrics

FLAGS = (
    "--gamma 0.9 --gae-lambda 0.8 --clip-coef 0.01 --clip-vloss --ent-coef 0.3 --vf-coef 0.7 --learning-rate 0.01 "
    "--adv-eps 0.5 --max-grad-norm 0.05 --own-share 0.7 --decomposer-lr 0.02 --total-timesteps 200"
)


def seeds(*entropy: int) -> list[int]:
    return np.random.SeedSequence(entropy).generate_state(2).tolist()


@torch.no_grad()
def credits_of(decomposer, episodes, scale: float) -> torch.Tensor:
    return scale * decomposer(episodes["obs"], episodes["act"], episodes["valid"])


def test_an_iteration_by_definition(script, run_script, no_evaluation, tmp_path):
    assert run_script(f"{TINY[script]} {FLAGS} --run-dir run")[0] == 0
    (row,) = read_metrics(tmp_path / "run")
    row = {name: float(value) for name, value in row.items() if value}
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    module = importlib.import_module(script.removesuffix(".py"))
    args = module.Args(**json.loads((tmp_path / "run" / "config.json").read_text())["flags"])
    scale, per_process = args.reward_scale, (0,) if script == PETTINGZOO else ()

    torch.manual_seed(args.seed)
    env = module.make_env(args, args.num_envs)
    agent, decomposer = module.make_networks(args, env)
    if script == PETTINGZOO:
        untrained = module.rollout(env, agent, seeds(args.seed, 0, 0)[0])["team_reward"].sum(dim=1)
        assert scale == pytest.approx(untrained.std(correction=0).item())
    learner_seed, env_seed = seeds(args.seed, 1, *per_process)
    torch.manual_seed(learner_seed)
    episodes = module.rollout(env, agent, env_seed)
    returns, lengths = episodes["team_reward"].sum(dim=1), episodes["valid"].sum(dim=1).tolist()
    E, N = args.num_envs, env.num_agents

    # The decomposer, whose credits are zero at first: nothing is explained.
    assert row["decomposer/explained_variance"] == pytest.approx(0, abs=1e-6)
    optimizer = torch.optim.Adam(decomposer.parameters(), lr=0.02, fused=True)
    losses = []
    for _ in range(args.decomposer_updates):
        drawn = torch.randint(E, (args.decomposer_batch_size,))
        obs, act = episodes["obs"][drawn].half(), episodes["act"][drawn].short()
        missed = decomposer(obs, act, episodes["valid"][drawn]).sum(dim=(1, 2)) - returns[drawn] / scale
        optimizer.zero_grad()
        missed.square().mean().backward()
        optimizer.step()
        losses.append(scale**2 * missed.square().mean().item())
    assert row["decomposer/loss"] == pytest.approx(np.mean(losses), rel=1e-4)

    # Its credits, of which 0.3 are shared, and what they leave of the returns.
    rewards = credits_of(decomposer, episodes, scale)
    leftover = returns - rewards.sum(dim=(1, 2))
    rewards = 0.7 * rewards + 0.3 * rewards.sum(dim=2, keepdim=True) / N
    for e, length in enumerate(lengths):
        rewards[e, length - 1] += leftover[e] / N

    # PPO.
    advantages, targets = module.compute_gae(rewards / scale, episodes["value"], episodes["valid"], 0.9, 0.8)

    def flat(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[e, :length] for e, length in enumerate(lengths)])

    names = ("obs", "elapsed", "act", "logprob", "value")
    obs, elapsed, act, logprob, value = (flat(episodes[name]) for name in names)
    advantages, targets = flat(advantages), flat(targets)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.01, eps=1e-5, fused=True)
    far = []
    for _ in range(args.update_epochs):
        for some in torch.randperm(len(obs)).chunk(args.num_minibatches):
            _, new, entropy, new_value = agent.get_action_and_value(obs[some], elapsed[some], act[some])
            ratio = (new - logprob[some]).exp()
            better = advantages[some] - advantages[some].mean()
            better = better / (better.square().mean().sqrt() + 0.5)
            policy_loss = -torch.min(better * ratio, better * ratio.clamp(0.99, 1.01)).mean()
            near = value[some] + (new_value - value[some]).clamp(-0.01, 0.01)
            errors = torch.stack((new_value - targets[some], near - targets[some])).abs()
            value_loss = 0.5 * errors.amax(dim=0).square().mean()
            far.append(((ratio < 0.99) | (ratio > 1.01)).float().mean().item())
            optimizer.zero_grad()
            (policy_loss - 0.3 * entropy.mean() + 0.7 * value_loss).backward()
            norm = torch.stack([weights.grad.square().sum() for weights in agent.parameters()]).sum().sqrt()
            for weights in agent.parameters():
                weights.grad *= min(1, 0.05 / norm.item())
            optimizer.step()
    expected = {
        "policy_loss": policy_loss,
        "value_loss": scale**2 * value_loss,
        "entropy": entropy.mean(),
        "clipfrac": np.mean(far),
        "old_approx_kl": -ratio.log().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "explained_variance": 1 - (targets - value).var() / targets.var(),
    }
    for name, number in expected.items():
        assert row[f"losses/{name}"] == pytest.approx(float(torch.as_tensor(number).detach()), rel=2e-3, abs=1e-5), name
    for name, network in (("agent", agent), ("decomposer", decomposer)):
        for key, weights in network.state_dict().items():
            torch.testing.assert_close(saved[name][key], weights, rtol=1e-4, atol=2e-5)
