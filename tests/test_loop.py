"""The training loop of every script: iterations in a row, redone from their seeds by definition."""

import importlib
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ALICEBOB, ML, MPE, PETTINGZOO, ROOT, TORCHRUN, read_metrics

import envs.alice_bob

# The replay buffer is too small for two iterations, so that its ring wraps.
FLAGS = (
    "--num-threads 1 --emb-dim 8 --num-heads 2 --decomposer-batch-size 6 --decomposer-updates 3 --buffer-size 12 "
    "--num-envs 8 --num-minibatches 3 --update-epochs 3 --gamma 0.9 --gae-lambda 0.8 --adv-eps 0.5 --clip-coef 0.03 "
    "--ent-coef 0.3 --vf-coef 0.7 --max-grad-norm 0.05 --learning-rate 0.003 --decomposer-lr 0.01 --eval-episodes 1"
)
GRID = "--env-id envs.alice_bob --horizon 40"
STARTS = [(7, 4), (6, 6)]  # of Alice and Bob, near the treasure, so that episodes differ in length
# Beyond a --target-kl here, some iterations stop early, and others do not; torchrun's two processes, each by its own
# divergence, would not agree on it in the second iteration.
CASES = {
    "alicebob": (ALICEBOB, "--clip-vloss --conserve uniform --learning-starts 16 --total-timesteps 450"),
    "spread": (MPE, "--no-norm-adv --target-kl 0.0002 --total-timesteps 600"),
    "continuous": (MPE, "--continuous-actions --learning-starts 16 --total-timesteps 600"),
    "ml": (ML, "--conserve none --clip-vloss --no-anneal-lr --total-timesteps 600"),
    "pettingzoo": (PETTINGZOO, f"{GRID} --no-norm-adv --no-anneal-ent --total-timesteps 450"),
    "torchrun": (TORCHRUN, f"{GRID} --clip-vloss --learning-starts 32 --target-kl 0.0008 --total-timesteps 900"),
}
# What torchrun's processes run, with the script's path and its flags as arguments.
DRIVER = f"""import runpy, sys, envs.alice_bob
envs.alice_bob.STARTS = {STARTS}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def seeds(*entropy: int) -> list[int]:
    return np.random.SeedSequence(entropy).generate_state(2).tolist()


@contextmanager
def draws_of(process: SimpleNamespace):
    """Random numbers are those of one process of the run."""
    torch.set_rng_state(process.rng)
    yield
    process.rng = torch.get_rng_state()


def explained(predicted: torch.Tensor, true: torch.Tensor) -> float:
    return 1 - ((true - predicted).var() / true.var()).item()


def advantages_of(rewards: torch.Tensor, values: torch.Tensor, gamma: float, gae_lambda: float) -> torch.Tensor:
    """(T, N), of one whole episode, after which nothing is worth anything."""
    errors = rewards + gamma * torch.cat((values[1:], torch.zeros_like(values[:1]))) - values
    discounts = (gamma * gae_lambda) ** torch.arange(len(errors)).unsqueeze(1)
    return torch.stack([(discounts[: len(errors) - t] * errors[t:]).sum(dim=0) for t in range(len(errors))])


def rewards_of(process: SimpleNamespace, credits: torch.Tensor, args) -> list[torch.Tensor]:
    """(T, N) of each episode: the credits and what they leave of the return."""
    episodes = []
    for e, length in enumerate(process.lengths):
        rewards, leftover = credits[e, :length].clone(), process.returns[e] - credits[e].sum()
        if args.conserve != "none":
            paid = rewards[-1:] if args.conserve == "terminal" else rewards
            paid += leftover / paid.numel()
        episodes.append(rewards)
    return episodes


def average_of_what_follows(episodes: list[torch.Tensor], gamma: float) -> torch.Tensor:
    """The mean discounted sum of rewards (T, N) from each step on, over agents and episodes that reach it: (T, 1)"""
    sums = [advantages_of(rewards, torch.zeros_like(rewards), gamma, 1) for rewards in episodes]
    reached = [torch.cat([each[t] for each in sums if len(each) > t]) for t in range(max(map(len, sums)))]
    return torch.stack([values.mean() for values in reached]).unsqueeze(1)


def steps_to_learn_from(process: SimpleNamespace, episodes: list[torch.Tensor], args, baseline: torch.Tensor) -> dict:
    """The valid steps of all episodes, one after another, and what the critic should have said beside the baseline."""
    samples = []
    for e, rewards in enumerate(episodes):
        sample = {k: process.episodes[k][e, : len(rewards)] for k in ("inputs", "act", "logprob", "value")}
        base = torch.cat((baseline, torch.zeros(len(rewards), 1)))[: len(rewards)]
        advantage = advantages_of(rewards, sample["value"] + base, args.gamma, args.gae_lambda)
        sample |= {"advantage": advantage, "target": advantage + sample["value"], "base": base.expand_as(advantage)}
        samples.append(sample)
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def learn(args, agent, optimizer, mb: dict, ent_coef: float) -> dict:
    """One update of PPO. What is logged of it, for every sample."""
    _, logprob, entropy, value = agent.get_action_and_value(mb["inputs"], mb["act"])
    ratio, better = (logprob - mb["logprob"]).exp(), mb["advantage"]
    if args.norm_adv:
        better = (better - better.mean()) / (better.std(correction=0) + args.adv_eps)
    low, high = 1 - args.clip_coef, 1 + args.clip_coef
    policy_loss = -torch.min(better * ratio, better * ratio.clamp(low, high))
    error = (value - mb["target"]).abs()
    if args.clip_vloss:
        near = mb["value"] + (value - mb["value"]).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (near - mb["target"]).abs())
    value_loss = error.square() / 2
    optimizer.zero_grad()
    (policy_loss.mean() - ent_coef * entropy.mean() + args.vf_coef * value_loss.mean()).backward()
    norm = torch.cat([weights.grad.flatten() for weights in agent.parameters()]).norm().item()
    for weights in agent.parameters():
        weights.grad *= min(1, args.max_grad_norm / norm)
    optimizer.step()
    kl = {"old_approx_kl": -ratio.log(), "approx_kl": ratio - 1 - ratio.log()}
    clipfrac = ((ratio < low) | (ratio > high)).float()
    return kl | {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "clipfrac": clipfrac}


def redo(script: str, args, ranks: list[tuple]) -> SimpleNamespace:
    """A run of processes with the given ranks: the rows that the first one logs, the networks and the buffers at the
    end, and how many epochs of PPO each iteration made."""
    module, any_env = importlib.import_module(script.removesuffix(".py")), script in (PETTINGZOO, TORCHRUN)
    torch.manual_seed(args.seed)
    agent, decomposer = module.make_networks(args, module.make_env(args, 1))
    processes = [SimpleNamespace(rank=rank, rng=torch.get_rng_state(), ring={}, stored=0) for rank in ranks]
    first, scale = processes[0], 100.0 if script == ALICEBOB else 10.0
    for p in processes:
        p.env = module.make_env(args, args.num_envs)
        if any_env:  # the scale is the deviation of returns before training
            learner_seed, env_seed = seeds(args.seed, 0, *p.rank)
            if p.rank:
                p.rng = torch.Generator().manual_seed(learner_seed).get_state()
            with draws_of(p):
                p.returns = module.rollout(p.env, agent, env_seed if p.rank else learner_seed)["team_reward"].sum(dim=1)
    if any_env:
        scale = torch.cat([p.returns for p in processes]).std(correction=0).item()
    agent_optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    optimizer = torch.optim.Adam(decomposer.parameters(), fused=True)

    @torch.no_grad()
    def decompose(process: SimpleNamespace) -> torch.Tensor:
        return scale * decomposer(*(process.episodes[name] for name in ("obs", "act", "valid")))

    rows, epochs, baseline, global_step = [], [], None, 0
    while global_step < args.total_timesteps:
        left = 1 - global_step / args.total_timesteps
        agent_optimizer.param_groups[0]["lr"] = args.learning_rate * (left if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = args.decomposer_lr * (left if args.anneal_lr else 1)
        ent_coef = args.ent_coef * (left if args.anneal_ent else 1)
        rows.append(row := {"charts/learning_rate": agent_optimizer.param_groups[0]["lr"]})

        # Every process plays and stores episodes of its own.
        for p in processes:
            learner_seed, env_seed = seeds(args.seed, len(rows), *p.rank)
            p.rng = torch.Generator().manual_seed(learner_seed).get_state()
            with draws_of(p):
                p.episodes = module.rollout(p.env, agent, env_seed)
            p.returns, p.lengths = p.episodes["team_reward"].sum(dim=1), p.episodes["valid"].sum(dim=1).tolist()
            for e in range(args.num_envs):
                obs, act, valid = (p.episodes[name][e] for name in ("obs", "act", "valid"))
                act = act.half() if p.env.continuous else act.int()
                p.ring[p.stored % args.buffer_size] = (obs.half(), act, valid, p.returns[e])
                p.stored += 1
        lengths = [length for p in processes for length in p.lengths]
        global_step += sum(lengths)
        row |= {"global_step": global_step, "charts/episodic_length": np.mean(lengths)}
        row["charts/episodic_return"] = torch.cat([p.returns for p in processes]).mean().item()

        for p in reversed(processes):  # all draw coalitions for it, and the first one logs it
            with draws_of(p):
                row["decomposer/explained_variance"] = explained(decompose(p).sum(dim=(1, 2)), p.returns)
        if len(rows) == 1 and any_env:  # credits begin as equal shares of the mean return
            each = row["charts/episodic_return"] / row["charts/episodic_length"] / first.env.num_agents
            torch.nn.init.constant_(
                decomposer.head.bias, each / scale * math.sqrt(first.env.horizon * first.env.num_agents)
            )

        # A batch of the decomposer is made of those of all processes.
        losses = []
        for _ in range(args.decomposer_updates):
            missed = []
            for p in processes:
                with draws_of(p):
                    drawn = torch.randint(len(p.ring), (args.decomposer_batch_size,)).tolist()
                    obs, act, valid, returns = map(torch.stack, zip(*(p.ring[k] for k in drawn)))
                    missed.append(decomposer(obs, act, valid).sum(dim=(1, 2)) - returns / scale)
            optimizer.zero_grad()
            torch.cat(missed).square().mean().backward()
            optimizer.step()
            losses.append(scale**2 * torch.cat(missed).square().mean().item())
        row["decomposer/loss"] = np.mean(losses)

        # So is a minibatch of PPO.
        epochs.append(0)
        for p in processes:
            with draws_of(p):
                p.rewards = [rewards / scale for rewards in rewards_of(p, decompose(p), args)]
        if len(rows) * args.num_envs * len(processes) < args.learning_starts:
            continue
        if baseline is None:
            baseline = average_of_what_follows([each for p in processes for each in p.rewards], args.gamma) * any_env
        for p in processes:
            p.steps = steps_to_learn_from(p, p.rewards, args, baseline)
        kl = -1
        while epochs[-1] < args.update_epochs and (args.target_kl is None or kl <= args.target_kl):
            epochs[-1] += 1
            parts = []
            for p in processes:
                with draws_of(p):
                    order = torch.randperm(len(p.steps["act"]))
                parts.append((order.tensor_split if p.rank else order.chunk)(args.num_minibatches))
            for some in zip(*parts):
                mb = {name: torch.cat([p.steps[name][k] for p, k in zip(processes, some)]) for name in first.steps}
                logged = learn(args, agent, agent_optimizer, mb, ent_coef)
            kl = logged["approx_kl"].mean().item()
        row |= {f"losses/{name}": values.mean().item() for name, values in logged.items()}
        row["losses/value_loss"] *= scale**2
        row["losses/explained_variance"] = explained(
            *(first.steps[name] + first.steps["base"] for name in ("value", "target"))
        )
    return SimpleNamespace(rows=rows, agent=agent, decomposer=decomposer, processes=processes, epochs=epochs)


@pytest.mark.parametrize("case", CASES)
def test_the_loop_by_definition(case, run_script, tmp_path, monkeypatch, request):
    script, flags = CASES[case]
    flags = f"{FLAGS} {flags} --run-dir run"
    monkeypatch.setattr(envs.alice_bob, "STARTS", STARTS)
    if script == TORCHRUN:
        (tmp_path / "driver.py").write_text(DRIVER)
        command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 driver.py".split()]
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        run = subprocess.Popen([*command, str(ROOT / script), *flags.split()], cwd=tmp_path)
        request.addfinalizer(run.terminate)  # if they hang
        assert run.wait(timeout=120) == 0
    else:
        assert run_script(flags, script)[0] == 0
    rows, saved = read_metrics(tmp_path / "run"), torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["flags"] | {"run_dir": None}
    args = importlib.import_module(script.removesuffix(".py")).Args(**settings)
    redone = redo(script, args, [(0,), (1,)] if script == TORCHRUN else [()])

    assert len(rows) == len(redone.rows) >= 3
    assert args.target_kl is None or {3} < set(redone.epochs) - {0}
    for i, (row, expected) in enumerate(zip(rows, redone.rows)):
        learned = {name for name in row if name.startswith("losses/") and row[name] != ""}
        assert learned == {name for name in expected if name.startswith("losses/")}
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-5), (i, name)
    for name in ("agent", "decomposer"):
        for key, weights in getattr(redone, name).state_dict().items():
            # Gradients that are hardly more than rounding, as of the bias of a key, grow in Adam.
            near = {"agent": 1e-5, "decomposer": 1e-3 if key.endswith("in_proj_bias") else 3e-4}[name]
            torch.testing.assert_close(saved[name][key], weights, rtol=1e-4, atol=near)
    for buffer, p in zip(saved["buffers"] if script == TORCHRUN else [saved["buffer"]], redone.processes, strict=True):
        for k, episode in p.ring.items():
            for name, values in zip(("obs", "act", "valid", "team_return"), episode):
                torch.testing.assert_close(buffer["data"][name][k], values)
