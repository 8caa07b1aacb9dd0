"""STAS + independent PPO on Alice & Bob, the whole algorithm in one file.

STAS (Chen, Zhang, Yang, Du, AAAI 2024, https://arxiv.org/abs/2304.07520) learns from a team return R that is known only
when an episode ends. One iteration of the training loop, which is at the end of this file:
  1. roll out: every agent acts on its own observation, one whole episode in each of `num_envs` environments;
  2. store: the episodes go into a replay buffer, with nothing of the reward but their returns;
  3. fit the decomposer: attention over each agent's past, then over agents, where agent i sees itself and a random
     coalition C of the others, on average over `mc_samples` of them; a linear head turns the mean into a credit. (A
     Shapley value averages v(C + i) - v(C); STAS has the network guess that, and trains all credits to add up to R.)
  4. decompose: fresh episodes get credits, a dense reward for every agent at every step. They sum to the *predicted*
     return; the leftover is paid at the last step, in equal shares. (The paper drops it: `--conserve none`.)
  5. PPO: one actor and one critic serve all agents, given an agent's one-hot; each agent learns from its own credits.

Axes stand in the order (episode E, time T, agent N, feature). O is the size of an observation, D of an
embedding; H heads, M coalitions, B any batch.
"""

import csv
import importlib.metadata
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.alice_bob import AliceBob, parallel_env
from envs.pettingzoo import side_by_side


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # [the run] name of the experiment
    seed: int = 1  # of the first weights; every iteration and the evaluation derive theirs from it
    torch_deterministic: bool = True  # use deterministic torch algorithms only
    cuda: bool = False  # train on a CUDA device if there is one
    num_threads: int = 0  # CPU threads (0: torch's default)
    track: bool = False  # also log to Weights and Biases (needs wandb)
    wandb_project_name: str = "stas"  # project of Weights and Biases
    wandb_entity: str | None = None  # entity (team) of Weights and Biases
    run_dir: str | None = None  # run folder (default: runs/{environment}__{exp_name}__{changed flags}__{seed}__{time})
    resume: str | None = None  # run folder to continue; its flags are the defaults; flags given now override them
    checkpoint_every: int = 10  # iterations between two checkpoints
    eval_episodes: int = 100  # episodes of the final evaluation on the PettingZoo environment

    total_timesteps: int = 600_000  # [PPO] environment steps (joint actions in running episodes), in whole iterations
    num_envs: int = 512  # episodes per iteration, played side by side
    learning_rate: float = 2e-3  # learning rate of the policy and the critic (Adam)
    anneal_lr: bool = True  # decay both learning rates, of PPO and of the decomposer, linearly to zero
    gamma: float = 0.97  # discount factor
    gae_lambda: float = 1.0  # lambda of generalised advantage estimation
    num_minibatches: int = 8  # minibatches per epoch, at most
    update_epochs: int = 5  # epochs of policy updates per iteration
    norm_adv: bool = True  # normalise the advantages of each minibatch
    adv_eps: float = 0.2  # added to their standard deviation; advantages far below it stay small
    clip_coef: float = 0.2  # clipping range of the surrogate objective
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: float = 0.01  # weight of the entropy bonus
    anneal_ent: bool = True  # decay the weight of the entropy bonus linearly to zero
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient of policy and critic together
    target_kl: float | None = None  # stop an iteration's policy updates beyond this KL divergence
    critic: Literal["independent", "centralized"] = "independent"  # sees its own observation, or everyone's (MAPPO)

    credit: Literal["stas", "temporal", "uniform", "episodic", "dense"] = "stas"
    """[the method] stas (learned), temporal (no attention over agents), uniform (R / length), episodic (R at the end:
    plain PPO), dense (an oracle: the true reward of every step)"""
    conserve: Literal["none", "terminal", "uniform"] = "terminal"  # when to pay R - sum of credits (none: the paper)
    mc_samples: int = 5  # coalitions drawn per agent and step, M
    coalition: Literal["bernoulli", "permutation", "exact", "all"] = "bernoulli"
    """coin flips (the paper), predecessors in a random order (Shapley's weights), all (the same), or everyone"""
    embedding: Literal["mlp", "linear"] = "mlp"  # of the decomposer's inputs: two hidden layers of 2 D, or none (paper)
    outcome: bool = True  # the decomposer also sees each agent's next observation (paper: only the current)
    emb_dim: int = 32  # width of the decomposer, D
    num_heads: int = 1  # attention heads of the decomposer
    num_layers: int = 1  # temporal attention layers of the decomposer (0: attention over agents only)
    attention_window: int = 0  # steps each layer of temporal attention looks back on, the present one included (0: all)
    decomposer_lr: float = 1e-3  # learning rate of the decomposer (Adam)
    decomposer_batch_size: int = 32  # episodes per decomposer update
    decomposer_updates: int = 16  # decomposer updates per iteration
    buffer_size: int = 16_384  # episodes the replay buffer holds
    learning_starts: int = 0  # episodes collected before the first PPO update
    reward_scale: float = 100.0  # divides returns and PPO's rewards; all logs are in raw units

    def __post_init__(self):
        """Raises a ValueError, which tyro shows, for flags that make no sense."""
        may_be_zero = ("seed", "num_threads", "num_layers", "attention_window", "learning_starts")
        may_be_zero += ("gamma", "gae_lambda", "ent_coef", "vf_coef")
        rules = {"seed": (self.seed < 2**32, "below 2**32"), "gamma": (self.gamma <= 1, "at most 1")}
        rules["gae_lambda"] = self.gae_lambda <= 1, "at most 1"
        for name, value in vars(self).items():
            if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and name in may_be_zero):
                rules[name] = False, "a number above 0" + " or 0" * (name in may_be_zero)
        rules["num_heads"] = self.num_heads > 0 and self.emb_dim % self.num_heads == 0, "a divisor of --emb-dim"
        rules["resume"] = self.resume is None or os.path.exists(f"{self.resume}/config.json"), "the folder of a run"
        rules["run_dir"] = self.run_dir is None or not (self.resume or os.path.exists(self.run_dir)), "a new folder"
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {rule}")


def make_env(args, num_envs: int, device: str | torch.device = "cpu"):
    """The batched environment to learn in."""
    return AliceBob(num_envs, device, one_hot=True)


def make_parallel_env(args, render_mode: str | None = None):
    """The PettingZoo environment to be evaluated on."""
    return parallel_env(render_mode, one_hot=True)


def sample_coalitions(kind: str, num_samples: int, batch: int, num_agents: int, device="cpu") -> tuple:
    """Coalitions, drawn afresh for each of `batch` (episode, step) pairs (the paper's Monte Carlo), and their weights.

    bernoulli: uniform over coalitions, which estimates the Banzhaf weighting (the paper's choice). permutation: the
    agents before i in a random order, which have Shapley's weights. Both draw antithetic pairs, m and m + ceil(M / 2),
    with all coins flipped or the order reversed: their mean varies less. One draw serves all agents. Returns
        masks (M, B, N, N) bool, [m, b, i, j]: agent j is in C_m + {i}, so the diagonal is True; (M, 1, N, N) where
        nothing is drawn, by "exact" (all 2^(N-1) coalitions) and "all" (everyone); weights (M,), which sum to 1.
    """
    self_mask = torch.eye(num_agents, dtype=torch.bool, device=device)
    pairs = (num_samples + 1) // 2
    if kind == "bernoulli":
        first = torch.rand(pairs, batch, num_agents, device=device) < 0.5
        masks = torch.cat((first, ~first))[:num_samples].unsqueeze(2) | self_mask
    elif kind == "permutation":
        arrival = torch.rand(pairs, batch, num_agents, device=device)  # random times make a random order
        first = arrival.unsqueeze(-2) < arrival.unsqueeze(-1)
        masks = torch.cat((first, first.transpose(-2, -1)))[:num_samples] | self_mask
    elif kind == "exact":
        agents, N = torch.arange(num_agents, device=device), num_agents
        bit = agents - (agents > agents.unsqueeze(1)).long()  # (i, j): bit of m that puts j into C_m of i
        masks = (torch.arange(2 ** (N - 1), device=device).view(-1, 1, 1, 1) >> bit & 1).bool() | self_mask
        size = masks[:, 0, 0].sum(dim=-1).double() - 1  # |C|; Shapley's weight: |C|! (N - |C| - 1)! / N!
        return masks, (torch.lgamma(size + 1) + torch.lgamma(N - size) - math.lgamma(N + 1)).exp().float()
    else:  # all
        masks = torch.ones(1, 1, num_agents, num_agents, dtype=torch.bool, device=device)
    return masks, torch.full((len(masks),), 1 / len(masks), device=device)


class ShapleyAttention(nn.Module):
    """Attention over agents, averaged over coalitions: the paper's stand-in for a Shapley value.

    phi_i = sum_m w_m Attn_i(S_m), S_m = C_m + {i}: agent i attends to itself and the members of a coalition. Each agent
    has a W_Q and a learned identity vector of its own; W_K, W_V and W_O are shared. Only the mask differs between
    coalitions, and all after the softmax is linear, so its probabilities are averaged, and the rest is done once:

        P_ij = sum_m w_m 1[j in S_m] e_ij / sum_{k in S_m} e_ik,   e_ij = exp(score_ij),   phi_i = W_O sum_j P_ij v_j
    """

    def __init__(self, emb_dim: int, num_heads: int, num_agents: int):
        super().__init__()
        self.num_heads = num_heads
        self.identity = nn.Parameter(0.02 * torch.randn(num_agents, emb_dim))
        self.query = nn.Parameter(torch.randn(num_agents, emb_dim, emb_dim) / math.sqrt(emb_dim))
        self.key_value = nn.Linear(emb_dim, 2 * emb_dim)
        self.proj = nn.Linear(emb_dim, emb_dim)

    def forward(self, x: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x (B, N, D), masks (M, B or 1, N, N) bool, weights (M,) that sum to 1 -> phi (B, N, D)"""
        x = x + self.identity
        query = torch.einsum("bnd,nde->bne", x, self.query)
        key, value = self.key_value(x).chunk(2, dim=-1)
        query, key, value = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (query, key, value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(key.shape[-1])  # (B, H, N, N)
        # Scores relative to the agent's own make e_ii = 1 in every sum: no division by a tiny number.
        own = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        e = (scores - own).clamp(-40, 40).exp()
        members = masks.unsqueeze(2).to(e)  # (M, B or 1, 1, N, N)
        sums = (members * e).sum(dim=-1, keepdim=True)  # (M, B, H, N, 1)
        P = e * (weights.view(-1, 1, 1, 1, 1) / sums * members).sum(dim=0)
        return self.proj((P @ value).transpose(1, 2).flatten(2))


class Decomposer(nn.Module):
    """Splits the team return into credits: embedding, temporal layers, a Shapley block, a linear head. With credit
    "temporal" there is no Shapley block, and the agents share each step's credit equally."""

    def __init__(self, args, env):
        super().__init__()
        D, N = args.emb_dim, env.num_agents
        self.mc_samples, self.coalition, self.outcome = args.mc_samples, args.coalition, args.outcome
        self.num_actions, self.continuous = env.num_actions, env.continuous
        self.scale = 1 / math.sqrt(env.horizon * N)  # keeps Adam's steps on a sum of T N credits small
        self.register_buffer("agent_id", torch.eye(N), persistent=False)
        inputs = (1 + args.outcome) * env.obs_dim + env.num_actions + N
        hidden = (nn.Linear(inputs, 2 * D), nn.ReLU(), nn.Linear(2 * D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))
        self.embedding = nn.Sequential(*hidden) if args.embedding == "mlp" else nn.Linear(inputs, D)
        self.position = nn.Parameter(torch.zeros(env.horizon, D))
        age = torch.arange(env.horizon).unsqueeze(1) - torch.arange(env.horizon)  # (T, T), query step minus key step
        self.register_buffer("unseen", (age < 0) | (age >= (args.attention_window or env.horizon)), persistent=False)
        options = dict(nhead=args.num_heads, dim_feedforward=2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.temporal = nn.ModuleList(nn.TransformerEncoderLayer(D, **options) for _ in range(args.num_layers))
        for layer in self.temporal:  # start as the identity: attention to the past is learned
            for weights in (*layer.self_attn.out_proj.parameters(), *layer.linear2.parameters()):
                nn.init.zeros_(weights)
        self.norm = nn.LayerNorm(D)
        self.shapley = ShapleyAttention(D, args.num_heads, N) if args.credit != "temporal" else None
        self.head = nn.Linear(D, 1)
        nn.init.zeros_(self.head.weight)  # credits start at zero
        nn.init.zeros_(self.head.bias)

    def forward(self, obs: torch.Tensor, act: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """obs (E, T, N, O), act (E, T, N[, A]), valid (E, T) -> credits (E, T, N) / reward scale, 0 where not valid"""
        E, T, N, _ = obs.shape
        if self.outcome:  # append the next observation (at an episode's last step: the current one again)
            follows = F.pad(valid[:, 1:], (0, 1))[..., None, None]  # (E, T, 1, 1), whether the episode goes on
            obs = torch.cat((obs, torch.where(follows, obs.roll(-1, dims=1), obs)), dim=-1)
        if not self.continuous:
            act = act.unsqueeze(-1) == torch.arange(self.num_actions, device=act.device)  # one-hot
        # A buffer may hold half precision and short integers. Scaled up, fine differences are learned much sooner.
        inputs = (5 * obs.to(self.position), act.to(self.position), self.agent_id.expand(E, T, N, N))
        x = self.embedding(torch.cat(inputs, dim=-1)) + self.position[:T].unsqueeze(1)  # (E, T, N, D)
        x = x.transpose(1, 2).flatten(0, 1)  # (E N, T, D), one sequence per agent
        for layer in self.temporal:
            x = layer(x, self.unseen[:T, :T])  # padding comes last, so that no valid step sees it
        x = self.norm(x).unflatten(0, (E, N)).transpose(1, 2).flatten(0, 1)  # (E T, N, D)
        if self.shapley is None:  # equal shares
            x = x.mean(dim=1, keepdim=True)
        else:
            x = self.shapley(x, *sample_coalitions(self.coalition, self.mc_samples, E * T, N, x.device))
        return self.scale * self.head(x).view(E, T, -1).expand(E, T, N) * valid.unsqueeze(-1)


def conserve(credits: torch.Tensor, team_return: torch.Tensor, valid: torch.Tensor, where: str) -> torch.Tensor:
    """Add returns (E,) minus summed credits (E, T, N), in equal shares: at the last valid step ("terminal"), at all
    steps that valid (E, T) marks ("uniform"), or nowhere ("none")."""
    if where == "none":
        return credits
    length = valid.sum(dim=1, keepdim=True)  # (E, 1)
    last = torch.arange(valid.shape[1], device=valid.device) == length - 1  # (E, T)
    leftover = (team_return - credits.sum(dim=(1, 2))).unsqueeze(1) * (last if where == "terminal" else valid / length)
    return credits + leftover.unsqueeze(-1) / credits.shape[2]


@torch.no_grad()
def decompose(args, decomposer: nn.Module | None, episodes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Credits of `args.credit` for whole episodes as `rollout` returns them: (E, T, N) in raw reward units."""
    team_reward, valid, zeros = episodes["team_reward"], episodes["valid"], torch.zeros_like(episodes["obs"][..., 0])
    if decomposer is not None:  # it sees nothing of the reward
        return args.reward_scale * decomposer(episodes["obs"], episodes["act"], valid)
    if args.credit in ("episodic", "uniform"):
        return conserve(zeros, team_reward.sum(dim=1), valid, "terminal" if args.credit == "episodic" else "uniform")
    if args.credit == "dense":
        return zeros + team_reward.unsqueeze(-1) / zeros.shape[2]
    return episodes[args.credit]  # an oracle of the environment


class ReplayBuffer:
    """A ring of the latest `capacity` episodes, each a row in tensors of the names given to `add`."""

    def __init__(self, capacity: int, device: str | torch.device):
        self.capacity, self.device, self.count = capacity, device, 0  # the next row is count % capacity
        self.data: dict[str, torch.Tensor] = {}

    def add(self, **episodes: torch.Tensor) -> None:
        for name, rows in episodes.items():
            rows = rows[-self.capacity :].to(self.device)
            stored, size = self.data.get(name, rows[:0]), min(self.count + len(rows), self.capacity)
            if size > len(stored):  # grow to twice the size
                room = min(2 * size, self.capacity) - len(stored)
                self.data[name] = torch.cat((stored, rows.new_zeros((room, *rows.shape[1:]))))
            index = (self.count + torch.arange(len(rows), device=self.device)) % self.capacity
            self.data[name][index] = rows
        self.count += len(rows)

    def sample(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Episodes drawn with replacement, so that any batch size works from the first episode on."""
        index = torch.randint(min(self.count, self.capacity), (batch_size,), device=self.device)
        return {name: rows[index] for name, rows in self.data.items()}

    def state_dict(self) -> dict:
        return {"count": self.count, "data": {name: rows[: self.count].clone() for name, rows in self.data.items()}}

    def load_state_dict(self, state: dict) -> None:
        full = len(next(iter(state["data"].values()))) == self.capacity  # then rows return to where they were
        self.count = state["count"] - self.capacity if full else 0
        self.add(**{name: rows.roll(-state["count"], dims=0) for name, rows in state["data"].items()})  # oldest first


class MLP(nn.Module):
    """Two hidden layers of 64 with orthogonal weights and tanh, as 2 sigmoid(2 x) - 1, which is faster on CPUs."""

    def __init__(self, inputs: int, outputs: int, std: float):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)])
        for layer, gain in zip(self.layers, (math.sqrt(2), math.sqrt(2), std)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = 2 * torch.sigmoid(2 * layer(x)) - 1
        return self.layers[-1](x)


class ActorCritic(nn.Module):
    """One actor and one critic for all agents, told by a one-hot which one they serve. The actor sees its observation.
    The critic sees that, or all observations if centralized, and the time, as most episodes end at the horizon."""

    def __init__(self, args, env):
        super().__init__()
        seen, N = env.obs_dim, env.num_agents
        self.register_buffer("agent_id", torch.eye(N), persistent=False)
        self.centralized = args.critic == "centralized"
        self.actor_sees, self.critic_sees = slice(0, seen + N), slice(seen if self.centralized else 0, None)
        self.actor = MLP(seen + N, env.num_actions, std=0.01)
        self.critic = MLP((seen * N if self.centralized else seen) + N + 1, 1, std=1.0)

    def get_inputs(self, obs: torch.Tensor, elapsed: torch.Tensor) -> torch.Tensor:
        """obs (..., N, O), elapsed (...), fraction of the horizon -> what the networks see (..., N, I)"""
        shape = obs.shape[:-1]
        inputs = (obs, self.agent_id.expand(*shape, -1), elapsed[..., None, None].expand(*shape, -1))
        everyone = (obs.flatten(-2).unsqueeze(-2).expand(*shape, -1),) if self.centralized else ()
        return torch.cat(inputs + everyone, dim=-1)

    def get_action_and_value(self, inputs: torch.Tensor, action: torch.Tensor | None = None):
        """inputs (..., N, I) -> action (drawn if None), logprob, the policy's entropy, value: (..., N)"""
        policy = Categorical(logits=self.actor(inputs[..., self.actor_sees]), validate_args=False)
        if action is None:
            action = policy.sample()
        entropy = -(policy.logits.exp() * policy.logits.clamp(min=-1e9)).sum(dim=-1)  # 0 where a mask forbids
        return action, policy.log_prob(action), entropy, self.critic(inputs[..., self.critic_sees]).squeeze(-1)


def make_networks(args, env) -> tuple[nn.Module, nn.Module | None]:
    """The agents' networks, and the decomposer where the credit is learned."""
    return ActorCritic(args, env), Decomposer(args, env) if args.credit in ("stas", "temporal") else None


@torch.no_grad()
def rollout(env, agent: nn.Module, seed: int | None = None) -> dict[str, torch.Tensor]:
    """One whole episode in every environment: obs (E, T, N, O), inputs (E, T, N, I), act (E, T, N) or (E, T, N, A),
    logprob and value (E, T, N), team_reward (0 where not valid) and valid (E, T), and what `env.oracles()` tells."""
    obs, steps = env.reset(seed), []
    for t in range(env.horizon):
        inputs = agent.get_inputs(obs, torch.full((env.num_envs,), t / env.horizon, device=obs.device))
        act, logprob, _, value = agent.get_action_and_value(inputs)
        step = dict(obs=obs, inputs=inputs, act=act, logprob=logprob, value=value, valid=~env.terminated)
        obs, step["team_reward"], _ = env.step(act)
        steps.append(step | (env.oracles() if hasattr(env, "oracles") else {}))
    return {name: torch.stack([step[name] for step in steps], dim=1) for name in steps[0]}


def compute_gae(rewards, values, valid, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), where the value after the last valid step is 0: of rewards
    and values (E, T, N), valid (E, T). Both results are (E, T, N), zero where not valid."""
    valid = valid.unsqueeze(-1).to(values.dtype)  # (E, T, 1)
    values = values * valid
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = (delta + gamma * gae_lambda * next_advantage) * valid[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def update_decomposer(args, decomposer, optimizer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One gradient step towards credits that add up to the return, on stored episodes: obs (B, T, N, O), act (B, T, N)
    or (B, T, N, A), valid (B, T), team_return (B,). Returns the loss."""
    predicted = decomposer(batch["obs"], batch["act"], batch["valid"]).sum(dim=(1, 2))
    loss = F.mse_loss(predicted, batch["team_return"] / args.reward_scale)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def update_agent(args, agent, optimizer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One gradient step of PPO (arXiv 1707.06347) on B steps of episodes: inputs (B, N, I), act (B, N) or (B, N, A),
    logprob, value, advantage and return (B, N), weight (B, 1), which is 0 for steps that do not count, ent_coef ()."""
    _, logprob, entropy, value = agent.get_action_and_value(batch["inputs"], batch["act"])
    weight = (batch["weight"] / batch["weight"].sum().clamp(min=1) / logprob.shape[1]).expand_as(logprob)
    logratio = logprob - batch["logprob"]
    ratio = logratio.exp()
    advantage = batch["advantage"]
    if args.norm_adv and advantage.numel() > 1:  # one alone has no deviation
        advantage = advantage - (weight * advantage).sum()
        advantage = advantage / ((weight * advantage.square()).sum().sqrt() + args.adv_eps)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = (weight * torch.max(-advantage * ratio, -advantage * clipped_ratio)).sum()
    error = (value - batch["return"]).square()
    if args.clip_vloss:
        change = (value - batch["value"]).clamp(-args.clip_coef, args.clip_coef)
        error = torch.max(error, (batch["value"] + change - batch["return"]).square())
    value_loss, entropy = 0.5 * (weight * error).sum(), (weight * entropy).sum()
    loss = policy_loss - batch["ent_coef"] * entropy + args.vf_coef * value_loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    losses = {"value_loss": value_loss, "policy_loss": policy_loss, "entropy": entropy}
    losses |= {"old_approx_kl": -(weight * logratio).sum(), "approx_kl": (weight * ((ratio - 1) - logratio)).sum()}
    losses |= {"clipfrac": (weight * ((ratio - 1).abs() > args.clip_coef)).sum()}
    return {name: loss.detach() for name, loss in losses.items()}


class CudaGraph:
    """An update that a GPU replays without Python, from its fourth call on. Other shapes run without it."""

    def __init__(self, update):
        self.update, self.calls, self.batch, self.graph = update, 0, {}, torch.cuda.CUDAGraph()

    def __call__(self, args, network, optimizer, batch: dict[str, torch.Tensor]):
        self.batch = self.batch or {name: values.clone() for name, values in batch.items()}
        if any(values.shape != self.batch[name].shape for name, values in batch.items()):
            return self.update(args, network, optimizer, batch)
        for name, values in batch.items():
            self.batch[name].copy_(values)
        self.calls += 1
        if self.calls < 4:  # to warm up, on another stream
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                self.result = self.update(args, network, optimizer, self.batch)
            torch.cuda.synchronize()
            return self.result
        if self.calls == 4:
            with torch.cuda.graph(self.graph):
                self.result = self.update(args, network, optimizer, self.batch)
        self.graph.replay()
        return self.result


def explained_variance(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """1 - Var(true - predicted) / Var(true); nan if `true` is constant."""
    return (1 - (true - predicted).var(correction=0) / (true.var(correction=0) or math.nan)).item()


def centred_correlation(x: torch.Tensor, y: torch.Tensor, valid: torch.Tensor) -> float:
    """Pearson correlation of the valid entries of x and y (B, K), both centred within each row; nan if constant."""
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    x, y = ((z - (z * valid).sum(dim=1, keepdim=True) / count) * valid for z in (x, y))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def evaluate(args, agent: nn.Module, num_episodes: int) -> dict[str, float]:
    """Team returns of whole episodes on PettingZoo: eval/... of the agents, random/... of uniformly random actions."""
    env = side_by_side(lambda: make_parallel_env(args), num_episodes)
    at_random, _ = make_networks(args, env)
    nn.init.zeros_(at_random.actor.layers[-1].weight)  # equal logits
    at_random.uniform = True  # where actions are continuous
    seed = int(np.random.SeedSequence((args.seed, 0)).generate_state(1)[0])  # no iteration has number 0
    summary: dict[str, float] = {"eval/episodes": num_episodes, "random/episodes": num_episodes}
    for who, player in (("eval", agent), ("random", at_random)):
        torch.manual_seed(seed)
        episodes = rollout(env, player, seed)
        valid, returns = episodes["valid"], episodes["team_reward"].sum(dim=1)
        figures = {"episodic_return": returns.mean(), "episodic_return_std": returns.std(correction=0)}
        figures |= {"episodic_length": valid.sum(dim=1).float().mean(), "terminated": env.terminated.float().mean()}
        summary |= {f"{who}/{name}": value.item() for name, value in figures.items()}
    return summary


if __name__ == "__main__":
    # Flags. Those of a run to resume are the defaults.
    words = [word for text in sys.argv[1:] for word in text.split("=", 1)]
    resume, saved = dict(zip(words, words[1:])).get("--resume"), {}
    if resume is not None and os.path.exists(f"{resume}/config.json"):
        saved = json.loads(Path(resume, "config.json").read_text())["flags"] | {"run_dir": None, "resume": None}
    args = tyro.cli(Args, default=Args(**{f.name: saved[f.name] for f in fields(Args) if f.name in saved}))
    changed = {f.name: getattr(args, f.name) for f in fields(args) if getattr(args, f.name) != f.default}
    changes = ",".join(f"{name}-{value}" for name, value in changed.items() if name not in ("exp_name", "seed"))[:100]
    run_name = f"alice_bob__{args.exp_name}__{changes}__{args.seed}__{time.time_ns() // 1000}"
    run_dir = Path(args.resume or args.run_dir or "runs/" + re.sub(r"[^\w.-]+", "-", run_name))

    # Device and seed.
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("--cuda: no CUDA device found, running on the CPU")
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism asks of CUDA
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # to save time: nothing here reads it
    torch.manual_seed(args.seed)

    # Environment, networks, replay buffer.
    env = make_env(args, args.num_envs, device)
    agent, decomposer = make_networks(args, env)
    adam = {"lr": torch.tensor(0.0, device=device), "fused": True, "capturable": True}  # the loop sets the rates
    agent_optimizer = torch.optim.Adam(agent.to(device).parameters(), eps=1e-5, **adam)
    parts = {"agent": agent, "agent_optimizer": agent_optimizer}
    if decomposer is not None:
        decomposer_optimizer = torch.optim.Adam(decomposer.to(device).parameters(), **adam | {"lr": adam["lr"].clone()})
        buffer = ReplayBuffer(args.buffer_size, device)
        parts |= {"decomposer": decomposer, "decomposer_optimizer": decomposer_optimizer, "buffer": buffer}
    fit = list(vars(args))[list(vars(args)).index("conserve") : list(vars(args)).index("learning_starts")]
    if decomposer is None and (idle := [name for name in changed if name in fit]):
        print(f"without effect as --credit is {args.credit}: {', '.join(idle)}")
    if device.type == "cuda":
        update_agent, update_decomposer = CudaGraph(update_agent), CudaGraph(update_decomposer)

    # The run folder, where the run stood if it is resumed, and the logs.
    if args.track:
        import wandb

        run = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name[-128:], resume="allow")
        wandb.init(**run, id=re.sub(r"[^\w-]", "-", run["name"]), config=vars(args), sync_tensorboard=True)
    run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
    lock = FileLock(run_dir / "lock").acquire(blocking=False)  # held to the end: two runs would mix their rows
    iteration, global_step, wall_time, rows = 0, 0, 0.0, []
    if args.resume and Path(args.resume, "checkpoint.pt").exists():
        checkpoint = torch.load(f"{args.resume}/checkpoint.pt", map_location=device, weights_only=True)
        iteration, global_step, wall_time = (checkpoint[name] for name in ("iteration", "global_step", "wall_time"))
        try:
            rows = checkpoint["rows"]  # of metrics.csv
            for name, part in parts.items():
                part.load_state_dict(checkpoint.pop(name))
        except (LookupError, RuntimeError, ValueError) as error:
            sys.exit(f"error: --resume {args.resume}: must have a checkpoint that fits the flags ({error!r:.300})")
    (run_dir / os.path.basename(__file__)).write_text(Path(__file__).read_text())
    git = f"git -C {quote(os.path.dirname(__file__))} describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null"
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pettingzoo", "mpe2", "tyro")}
    config = {"script": os.path.basename(__file__), "git_commit": os.popen(git).read().strip(), "versions": versions}
    (run_dir / "config.tmp").write_text(json.dumps(config | {"flags": vars(args)}, indent=2) + "\n")
    os.replace(run_dir / "config.tmp", run_dir / "config.json")
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=None)
    csv_writer, start_time, stopped = None, time.time() - wall_time, []

    # At Ctrl-C or SIGTERM an iteration ends and is saved; the second one ends at once.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda code, _: os._exit(128 + code) if stopped else stopped.append(128 + code))

    while global_step < args.total_timesteps:
        iteration += 1
        remaining = 1 - global_step / args.total_timesteps
        agent_optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (remaining if args.anneal_lr else 1))
        ent_coef = torch.tensor(args.ent_coef * (remaining if args.anneal_ent else 1), device=device)
        clock = time.time()

        # 1. Roll out one episode per environment. All draws follow from seed and iteration: no generator is saved.
        learner_seed, env_seed = np.random.SeedSequence((args.seed, iteration)).generate_state(2).tolist()
        torch.manual_seed(learner_seed)
        episodes = rollout(env, agent, env_seed)
        valid, team_return = episodes["valid"], episodes["team_reward"].sum(dim=1)  # (E, T), (E,)
        global_step += int(valid.sum())
        metrics = {
            "charts/episodic_return": team_return.mean().item(),
            "charts/episodic_length": valid.sum(dim=1).float().mean().item(),
            "charts/treasure_rate": env.terminated.float().mean().item(),
            "charts/agent_return_sum": env.num_agents * team_return.mean().item(),  # the paper's figure
            "charts/learning_rate": agent_optimizer.param_groups[0]["lr"].item(),
            "time/rollout": time.time() - clock,
        }
        clock = time.time()

        # 2. Store the episodes, with nothing of the reward but their returns; half precision is enough.
        if decomposer is not None:
            predicted = decompose(args, decomposer, episodes).sum(dim=(1, 2))  # before it is trained on these episodes
            metrics["decomposer/explained_variance"] = explained_variance(predicted, team_return)
            buffer.add(obs=episodes["obs"].half(), act=episodes["act"].int(), valid=valid, team_return=team_return)

            # 3. Fit the decomposer to the returns of stored episodes.
            decomposer_optimizer.param_groups[0]["lr"].fill_(args.decomposer_lr * (remaining if args.anneal_lr else 1))
            fit_losses = []
            for _ in range(args.decomposer_updates):
                batch = buffer.sample(args.decomposer_batch_size)
                fit_losses.append(update_decomposer(args, decomposer, decomposer_optimizer, batch).clone())
            metrics["decomposer/loss"] = torch.stack(fit_losses).mean().item() * args.reward_scale**2

        # 4. Decompose the fresh episodes' returns into credits; pay the leftover.
        credits = decompose(args, decomposer, episodes)  # (E, T, N)
        rewards = conserve(credits, team_return, valid, args.conserve if decomposer is not None else "none")
        metrics["time/decomposer"], clock = time.time() - clock, time.time()

        # 5. Independent PPO on these rewards, over the S valid steps of all episodes.
        if iteration * args.num_envs >= args.learning_starts:
            scaled = rewards / args.reward_scale
            advantages, returns = compute_gae(scaled, episodes["value"], valid, args.gamma, args.gae_lambda)
            used = valid if device.type == "cpu" else torch.ones_like(valid)  # a CUDA graph's shapes stay the same
            steps = {name: episodes[name][used] for name in ("inputs", "act", "logprob", "value")}  # (S, ...)
            more = {"advantage": advantages, "return": returns, "weight": valid.unsqueeze(2).float()}
            steps |= {name: values[used] for name, values in more.items()}
            for _ in range(args.update_epochs):
                order = torch.randperm(len(steps["act"]), device=device)
                shuffled = {name: values[order].chunk(args.num_minibatches) for name, values in steps.items()}
                for k in range(len(shuffled["act"])):
                    batch = {name: values[k] for name, values in shuffled.items()} | {"ent_coef": ent_coef}
                    losses = update_agent(args, agent, agent_optimizer, batch)
                if args.target_kl is not None and losses["approx_kl"] > args.target_kl:
                    break
            metrics |= {f"losses/{name}": loss.item() for name, loss in losses.items()}  # of the last minibatch
            metrics["losses/value_loss"] *= args.reward_scale**2
            metrics["losses/explained_variance"] = explained_variance(episodes["value"][valid], returns[valid])
        metrics["time/ppo"] = time.time() - clock

        if not all(weights.isfinite().all() for part in (agent, decomposer or agent) for weights in part.parameters()):
            sys.exit(f"error: a loss is not finite in iteration {iteration}; the last checkpoint is kept")

        # Do credits match the true reward over time? How much do coalition draws vary them (32 episodes)?
        if decomposer is not None:
            when = centred_correlation(credits.sum(dim=2), episodes["team_reward"], valid)
            metrics["decomposer/reward_correlation"] = when
            few = {name: values[:32] for name, values in episodes.items()}
            draws = torch.stack([decompose(args, decomposer, few) for _ in range(4)])
            metrics["decomposer/credit_std"] = draws.std(dim=0)[valid[:32]].mean().item()

        # Log. Missing or nan values are empty cells of metrics.csv.
        wall_time = time.time() - start_time
        metrics["charts/SPS"] = round(global_step / wall_time)
        metrics = {name: float(value) if math.isfinite(value) else "" for name, value in metrics.items()}
        rows.append({"iteration": iteration, "global_step": global_step, "wall_time": wall_time} | metrics)
        if csv_writer is None or not rows[-1].keys() <= set(csv_writer.fieldnames):  # at first, and for new columns
            csv_file = open(run_dir / "metrics.csv", "w", newline="", buffering=1)
            csv_writer = csv.DictWriter(csv_file, list(dict.fromkeys(name for row in rows for name in row)))
            csv_writer.writeheader()
            csv_writer.writerows(rows[:-1])
        csv_writer.writerow(rows[-1])
        for name, value in metrics.items():
            if value != "":
                writer.add_scalar(name, value, global_step)
        bar.set_postfix_str(f"treasure rate {metrics['charts/treasure_rate']:.2f}", refresh=False)
        bar.update(min(global_step, bar.total) - bar.n)

        # Save.
        if stopped or global_step >= args.total_timesteps or iteration % args.checkpoint_every == 0:
            if bar.disable:  # as the output is no terminal
                print(f"step {global_step:,}: treasure rate {metrics['charts/treasure_rate']:.2f}", flush=True)
            writer.flush()
            state = {name: part.state_dict() for name, part in parts.items()} | {"rows": rows}
            state |= {"iteration": iteration, "global_step": global_step, "wall_time": wall_time}
            torch.save(state, run_dir / "checkpoint.tmp")
            os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")
        if stopped:
            print(f"stopped; to continue: python {quote(sys.argv[0])} --resume {quote(str(run_dir))}", file=sys.stderr)
            sys.exit(stopped[0])

    # Evaluate.
    stopped.append(0)  # from here on the first signal ends at once
    summary = evaluate(args, agent.cpu(), args.eval_episodes) | {"global_step": global_step, "wall_time": wall_time}
    summary |= {f"{who}/treasure_rate": summary[f"{who}/terminated"] for who in ("eval", "random")}
    for name, value in summary.items():
        writer.add_scalar(name, value, global_step)
    writer.close()
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    scores = f"treasure rate {summary['eval/treasure_rate']:.2f}, return {summary['eval/episodic_return']:.2f}"
    print(f"{scores} on PettingZoo over {args.eval_episodes} episodes; draw: python evaluate.py {quote(str(run_dir))}")
