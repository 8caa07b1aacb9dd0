"""STAS + independent PPO on Alice & Bob, the whole algorithm in one file.

STAS (Chen, Zhang, Yang, Du, AAAI 2024, https://arxiv.org/abs/2304.07520) learns from a team return R that is known only
when an episode ends. One iteration:
  1. roll out: every agent acts on its own observation, one whole episode in each of `num_envs` environments;
  2. store: the episodes go into a replay buffer, with nothing of the reward but their returns;
  3. fit the decomposer: causal attention over time for each agent, then attention over agents, in which agent i sees
     itself and a random coalition of the others. The mean over `mc_samples` coalitions is the network's direct guess
     at what i contributes to the step, where a Shapley value would average differences of a team value. A linear head
     turns it into a credit, and the credits of all agents and steps are trained to add up to R (mean squared error);
  4. decompose: the fresh episodes get their credits, a dense reward for every agent at every step;
  5. PPO, independent but for shared weights: one actor and one critic serve all agents, told by a one-hot whom they
     serve, and each agent's advantages come from its own observations and credits.
The training loop is at the end of the file; read it first, then `Decomposer`.

Axes stand in the order (episode E, time T, agent N, feature): observations have O features, continuous actions A.
D is the embedding width, H the number of heads, M the number of coalitions, B any batch, L the longest episode of a
batch, S the valid steps of all episodes. R, the team return, is the sum of an episode's team rewards.

checkpoint.pt holds: iteration, global_step, wall_time, agent, agent_optimizer, decomposer, decomposer_optimizer,
buffer, generator, env_generator, device (only state dicts, tensors, numbers and strings, to be loaded with
weights_only=True; the decomposer and its optimizer only where the credit is learned).
"""

import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs.alice_bob import EVENT, AliceBob, parallel_env


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the networks, the environment and every random draw"""
    torch_deterministic: bool = True
    """use deterministic torch algorithms only"""
    cuda: bool = False
    """train on a CUDA device if there is one"""
    track: bool = False
    """also log to Weights and Biases (needs wandb)"""
    wandb_project_name: str = "stas"
    """project of Weights and Biases"""
    wandb_entity: str | None = None
    """entity (team) of Weights and Biases"""
    num_threads: int = 0
    """CPU threads (0: torch's default)"""
    run_dir: str | None = None
    """run folder (default: runs/{env}__{exp_name}__{seed}__{time})"""
    resume: str | None = None
    """run folder to continue; its saved flags win, only total_timesteps, eval_episodes and cuda may be given anew"""
    checkpoint_every: int = 10
    """iterations between two checkpoints"""
    eval_episodes: int = 100
    """episodes of the final evaluation on the PettingZoo environment"""

    total_timesteps: int = 800_000
    """environment steps (joint actions in running episodes) to train for"""
    num_envs: int = 512
    """episodes per iteration, played side by side"""
    learning_rate: float = 1e-3
    """learning rate of the policy and the critic (Adam)"""
    anneal_lr: bool = True
    """decay the learning rate of the policy and the critic linearly to zero"""
    gamma: float = 0.97
    """discount factor"""
    gae_lambda: float = 1.0
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 10
    """epochs of policy updates per iteration"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """clipping range of the surrogate objective"""
    clip_vloss: bool = False
    """clip the value loss too"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    anneal_ent: bool = True
    """decay the weight of the entropy bonus linearly to zero"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient of policy and critic together"""
    target_kl: float | None = None
    """stop an iteration's policy updates beyond this KL divergence"""

    credit: Literal["stas", "temporal", "uniform", "episodic", "dense"] = "stas"
    """what the agents learn from. stas: learned credits; and in equal shares, temporal: credits learned with attention
    over time only; uniform: R / episode length at every step; episodic: R at the last step (plain PPO on the delayed
    return); dense: the true reward of every step, an oracle, as the method may not see it"""
    conserve: Literal["none", "terminal", "uniform"] = "terminal"
    """where the leftover, R - sum of learned credits, goes in equal shares. none: it is dropped (the paper); terminal:
    to the last step; uniform: to all steps"""
    critic: Literal["independent", "centralized"] = "independent"
    """what the critic sees. independent: the agent's own observation; centralized: those of all agents (MAPPO)"""
    mc_samples: int = 5
    """coalitions drawn per agent and step, M"""
    coalition: Literal["bernoulli", "permutation", "exact"] = "bernoulli"
    """who joins an agent's coalitions. bernoulli: each other agent with probability 1/2 (the paper); permutation: those
    before it in a random order, which gives Shapley's weights; exact: all coalitions, with Shapley's weights (up to 8
    agents)"""
    emb_dim: int = 64
    """width of the decomposer, D"""
    num_heads: int = 4
    """attention heads of the decomposer"""
    num_layers: int = 2
    """temporal attention layers of the decomposer"""
    attention_window: int = 0
    """steps each layer of temporal attention looks back on, the present one included (0: all)"""
    decomposer_lr: float = 1e-3
    """learning rate of the decomposer (Adam)"""
    decomposer_batch_size: int = 256
    """episodes per decomposer update"""
    decomposer_updates: int = 4
    """decomposer updates per iteration"""
    buffer_size: int = 2048
    """episodes the replay buffer holds"""
    learning_starts: int = 0
    """episodes collected before the policy learns"""
    reward_scale: float = 100.0
    """the decomposer's targets and PPO's rewards are divided by this, to be of order one; everything logged is in
    raw units"""


# ---------------------------------------------------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------------------------------------------------


def encode_obs(obs: torch.Tensor) -> torch.Tensor:
    """Observations for a network: the nine cells one-hot, all other numbers divided by 8. (..., 19) -> (..., 82)"""
    cells = F.one_hot(obs[..., :9].long(), num_classes=8).flatten(start_dim=-2)
    return torch.cat((cells, obs[..., 9:] / 8), dim=-1)


class EncodedAliceBob(AliceBob):
    """Alice & Bob with encoded observations."""

    obs_dim = 9 * 8 + 10

    def observe(self) -> torch.Tensor:
        return encode_obs(super().observe())


# ---------------------------------------------------------------------------------------------------------------------
# The decomposer
# ---------------------------------------------------------------------------------------------------------------------


def sample_coalitions(
    kind: str, num_samples: int, batch: int, num_agents: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw coalitions afresh for every (episode, step) pair (paper, section 4.2).

    Random coalitions come in antithetic pairs, m and m + ceil(M / 2): one, and its complement among the others (of an
    order, the reverse); if M is odd, one has no partner. Each is distributed as if drawn alone. Their mean varies less
    as far as an agent's output depends on how many and which others it sees, for each other is in one of the two.

    Args:
        kind: "bernoulli": every other agent joins with probability 1/2, which is uniform over coalitions and so
            estimates the Banzhaf weighting (the paper's choice). "permutation": the agents before i in a random order,
            which has Shapley's weights. "exact": no draw, all 2^(N-1) coalitions, to be weighted by `shapley_weights`.
        num_samples: M; not used by "exact".
        batch: number of (episode, step) pairs, B.
        generator: torch's global one if None.
    Returns:
        (M, or 2^(N-1) if "exact", B, N, N) bool, [m, b, i, j]: agent j is in C_m + {i}. The diagonal is always True.
    """
    device = generator.device if generator is not None else None
    self_mask = torch.eye(num_agents, dtype=torch.bool, device=device)
    pairs = (num_samples + 1) // 2
    if kind == "bernoulli":
        first = torch.rand((pairs, batch, num_agents, num_agents), generator=generator, device=device) < 0.5
        return torch.cat((first, ~first))[:num_samples] | self_mask
    if kind == "permutation":
        # Agents arrive at uniformly random times, and so in a random order: before i come those who arrive earlier.
        arrival = torch.rand((pairs, batch, num_agents), generator=generator, device=device)
        first = arrival.unsqueeze(-2) < arrival.unsqueeze(-1)
        return torch.cat((first, first.transpose(-2, -1)))[:num_samples] | self_mask
    if kind == "exact":
        masks = self_mask.repeat(2 ** (num_agents - 1), 1, 1)
        members = (
            torch.arange(len(masks), device=device).unsqueeze(1) >> torch.arange(num_agents - 1, device=device) & 1
        )
        masks[:, ~self_mask] = members.bool().repeat(1, num_agents)  # row i: its N-1 others, in order
        return masks.unsqueeze(1).expand(-1, batch, -1, -1)
    raise ValueError(f"coalition must be 'bernoulli', 'permutation' or 'exact', got {kind!r}")


def shapley_weights(num_agents: int) -> torch.Tensor:
    """|C|! (N-|C|-1)! / N! of every coalition, in the order of `sample_coalitions("exact")`: (2^(N-1),)."""
    sizes = [bin(m).count("1") for m in range(2 ** (num_agents - 1))]
    factorial = [math.factorial(n) for n in range(num_agents + 1)]
    return torch.tensor([factorial[c] * factorial[num_agents - c - 1] / factorial[num_agents] for c in sizes])


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Step t attends to the last `window` steps, t included, or to all steps <= t if `window` is 0.

    With a window W < T, the steps are cut into chunks of W. A chunk's queries meet the keys of their own chunk and of
    the one before, which hold all they may see: work and memory grow with T W, so it pays where T is many times W.
    Shapes: q, k, v and the result (B, H, T, d), where d = D / H.
    """
    B, H, T, _ = q.shape
    if window == 0 or window >= T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v = (F.pad(y.flatten(0, 1), (0, 0, 0, -T % window)).unflatten(1, (-1, window)) for y in (q, k, v))
    # Now q is (B H, chunks, W, d); each chunk of k and v gets the one before it in front: (B H, chunks, 2 W, d).
    k, v = (torch.cat((F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1], y), dim=2) for y in (k, v))
    steps = torch.arange(2 * window, device=q.device)
    ahead = steps - steps[window:].unsqueeze(1)  # of each query, where the keys are
    seen = ((ahead <= 0) & (ahead > -window)).repeat(1, q.shape[1], 1, 1)  # (1, chunks, W, 2 W)
    seen[:, 0, :, :window] = False  # there is no chunk before the first
    return F.scaled_dot_product_attention(q, k, v, seen).flatten(1, 2)[:, :T].view(B, H, T, -1)


class TemporalLayer(nn.Module):
    """One transformer layer along time: step t attends to steps <= t of the same agent, the last `window` if not 0."""

    def __init__(self, emb_dim: int, num_heads: int, window: int = 0):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.norm1, self.norm2 = nn.LayerNorm(emb_dim), nn.LayerNorm(emb_dim)
        self.qkv = nn.Linear(emb_dim, 3 * emb_dim)
        self.proj = nn.Linear(emb_dim, emb_dim)
        self.mlp = nn.Sequential(nn.Linear(emb_dim, 2 * emb_dim), nn.ReLU(), nn.Linear(2 * emb_dim, emb_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)"""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        # Padding comes after the end of an episode, so causality alone keeps valid steps from seeing it.
        attended = causal_attention(q, k, v, self.window)
        x = x + self.proj(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))


class ShapleyAttention(nn.Module):
    """Attention over agents, averaged over coalitions: the paper's stand-in for a Shapley value (section 4.2).

    phi_i = sum_m w_m Attn_i(x restricted to C_m + {i}). Queries are agent-specific; keys, values and output are shared.
    Scores and values do not depend on the coalition, and all that follows the softmax is linear (but for a bias, which
    weights that sum to 1 keep), so the probabilities are averaged over the coalitions and multiplied with the values
    once. In each softmax, exp(score) / sum over the coalition of exp(score), only that sum depends on the coalition, so
    the exponentials are computed once too.
    """

    def __init__(self, emb_dim: int, num_heads: int, num_agents: int):
        super().__init__()
        self.num_heads = num_heads
        self.identity = nn.Parameter(0.02 * torch.randn(num_agents, emb_dim))
        self.query = nn.Parameter(torch.randn(num_agents, emb_dim, emb_dim) / math.sqrt(emb_dim))
        self.key_value = nn.Linear(emb_dim, 2 * emb_dim)
        self.proj = nn.Linear(emb_dim, emb_dim)

    def forward(self, x: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, N, D), masks (M, B or 1, N, N) bool, weights (M,) or (M, N), 1/M if not given -> phi (B, N, D)"""
        B, N, D = x.shape
        M = len(masks)
        weights = x.new_full((M, 1), 1 / M) if weights is None else weights.to(x).view(M, -1)
        x = x + self.identity
        query = torch.einsum("bnd,nde->bne", x, self.query)
        key, value = self.key_value(x).chunk(2, dim=-1)
        query, key, value = (y.view(B, N, self.num_heads, -1).transpose(1, 2) for y in (query, key, value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(key.shape[-1])  # (B, H, N, N)
        # Scores count relative to the agent's own, which is in every coalition: so no sum is below 1, and an agent
        # outside has no influence at all. The clamp prevents overflow; it binds only on differences above 40.
        own = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        exp_scores = (scores - own).clamp(-40, 40).exp().transpose(1, 2)  # (B, N, H, N)
        masks = masks.permute(1, 2, 0, 3).to(x.dtype, memory_format=torch.contiguous_format)  # (B or 1, N, M, N)
        norm = torch.einsum("bihj,bimj->bihm", exp_scores, masks)  # (B, N, H, M)
        share = torch.einsum("bihm,bimj->bihj", weights.T.unsqueeze(1) / norm, masks)  # weighted mean over coalitions
        probs = (exp_scores * share).transpose(1, 2)  # (B, H, N, N)
        return self.proj((probs @ value).transpose(1, 2).reshape(B, N, D))


class Decomposer(nn.Module):
    """Splits the team return into credits: temporal layers, one Shapley block, a linear head (section 4).

    With spatial=False the Shapley block is left out and the agents share each step's credit equally.
    """

    def __init__(
        self,
        obs_dim: int,
        num_actions: int,
        num_agents: int,
        horizon: int,
        emb_dim: int = 64,
        num_heads: int = 4,
        num_layers: int = 2,
        mc_samples: int = 5,
        coalition: str = "bernoulli",
        continuous: bool = False,
        spatial: bool = True,
        attention_window: int = 0,
    ):
        super().__init__()
        self.mc_samples, self.coalition = mc_samples, coalition
        self.scale = 1 / math.sqrt(horizon * num_agents)  # keeps Adam's first steps on the sum of all credits small
        self.embed_obs = nn.Linear(obs_dim, emb_dim)
        self.embed_act = nn.Linear(num_actions, emb_dim) if continuous else nn.Embedding(num_actions, emb_dim)
        self.position = nn.Parameter(0.02 * torch.randn(horizon, 1, emb_dim))
        self.temporal = nn.ModuleList(TemporalLayer(emb_dim, num_heads, attention_window) for _ in range(num_layers))
        self.norm = nn.LayerNorm(emb_dim)
        self.shapley = ShapleyAttention(emb_dim, num_heads, num_agents) if spatial else None
        self.register_buffer("weights", shapley_weights(num_agents) if coalition == "exact" else None, persistent=False)
        self.head = nn.Linear(emb_dim, 1)
        nn.init.zeros_(self.head.weight)  # credits start at zero
        nn.init.zeros_(self.head.bias)

    def forward(
        self, obs: torch.Tensor, act: torch.Tensor, valid: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """obs (E, T, N, O), act (E, T, N) or (E, T, N, A), valid (E, T) -> credits (E, T, N), zero where not valid

        `generator` draws the coalitions (torch's global one if None). Multiply by the reward scale for raw units.
        """
        E, T, N, _ = obs.shape
        L = int(valid.any(dim=0).sum())  # the longest episode: no work on steps that none reaches
        x = self.embed_obs(obs[:, :L]) + self.embed_act(act[:, :L]) + self.position[:L]  # (E, L, N, D)
        x = x.transpose(1, 2).reshape(E * N, L, -1)  # one sequence per agent
        for layer in self.temporal:
            x = layer(x)
        x = self.norm(x).view(E, N, L, -1).transpose(1, 2)  # (E, L, N, D)
        if self.shapley is None:
            credits = self.head(x).squeeze(-1).mean(dim=2, keepdim=True).expand(E, L, N)
        else:
            batch = 1 if self.coalition == "exact" else E * L
            masks = sample_coalitions(self.coalition, self.mc_samples, batch, N, generator).to(x.device)
            phi = self.shapley(x.reshape(E * L, N, -1), masks, self.weights)
            credits = self.head(phi).view(E, L, N)
        credits = F.pad(credits, (0, 0, 0, T - L))  # (E, T, N)
        return self.scale * credits * valid.unsqueeze(-1)


def distribute_return(returns: torch.Tensor, valid: torch.Tensor, num_agents: int, where: str) -> torch.Tensor:
    """Spread one number per episode over its steps and, equally, over the agents.

    Args:
        returns: (E,). valid: (E, T) bool. where: "terminal": all at the last valid step; "uniform": the same at every
            valid step of the episode.
    Returns:
        credits (E, T, N), which sum to the returns.
    """
    length = valid.sum(dim=1, keepdim=True)  # (E, 1)
    if where == "terminal":
        share = (torch.arange(valid.shape[1], device=valid.device) == length - 1).to(returns.dtype)
    elif where == "uniform":
        share = valid / length
    else:
        raise ValueError(f"where must be 'terminal' or 'uniform', got {where!r}")
    return (returns.unsqueeze(1) * share / num_agents).unsqueeze(-1).expand(-1, -1, num_agents)


@torch.no_grad()
def decompose(
    args,
    decomposer: nn.Module | None,
    obs: torch.Tensor,
    act: torch.Tensor,
    team_reward: torch.Tensor,
    valid: torch.Tensor,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Credits of `args.credit` for whole episodes, (E, T, N) in raw reward units; shapes as in `rollout`.

    The learned credits, stas and temporal, do not look at `team_reward`.
    """
    num_agents = obs.shape[2]
    if args.credit == "dense":
        return (team_reward / num_agents).unsqueeze(-1).expand(-1, -1, num_agents)
    if args.credit in ("episodic", "uniform"):
        where = "terminal" if args.credit == "episodic" else "uniform"
        return distribute_return(team_reward.sum(dim=1), valid, num_agents, where)
    return args.reward_scale * decomposer(obs, act, valid, generator)


def conserve(credits: torch.Tensor, returns: torch.Tensor, valid: torch.Tensor, where: str) -> torch.Tensor:
    """Add what the credits (E, T, N) leave of the returns (E,), placed by `distribute_return`, or not if "none"."""
    if where == "none":
        return credits
    return credits + distribute_return(returns - credits.sum(dim=(1, 2)), valid, credits.shape[2], where)


class ReplayBuffer:
    """A ring of the latest `capacity` episodes, each a row in tensors of the names given to `add`."""

    def __init__(self, capacity: int, device: str | torch.device):
        self.capacity, self.device = capacity, device
        self.size, self.position = 0, 0
        self.data: dict[str, torch.Tensor] = {}

    def add(self, **episodes: torch.Tensor) -> None:
        """Append episodes; every tensor has the same number of rows."""
        for name, rows in episodes.items():
            if name not in self.data:
                self.data[name] = torch.zeros((self.capacity, *rows.shape[1:]), dtype=rows.dtype, device=self.device)
            rows = rows[-self.capacity :].to(self.device)
            index = (self.position + torch.arange(len(rows), device=self.device)) % self.capacity
            self.data[name][index] = rows
        self.position = (self.position + len(rows)) % self.capacity
        self.size = min(self.size + len(rows), self.capacity)

    def sample(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Episodes drawn uniformly with replacement, so that any batch size works from the first episode on."""
        index = torch.randint(self.size, (batch_size,), generator=generator, device=self.device)
        return {name: rows[index] for name, rows in self.data.items()}

    def state_dict(self) -> dict:
        free = self.size < self.capacity
        stored = {name: rows[: self.size].clone() if free else rows for name, rows in self.data.items()}
        return {"size": self.size, "position": self.position, "data": stored}

    def load_state_dict(self, state: dict) -> None:
        self.data, self.size, self.position = {}, 0, 0
        if state["size"]:
            self.add(**state["data"])
        self.position = state["position"]


# ---------------------------------------------------------------------------------------------------------------------
# Independent PPO
# ---------------------------------------------------------------------------------------------------------------------


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    """Two hidden layers of 64, tanh."""
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, 64)),
        nn.Tanh(),
        layer_init(nn.Linear(64, outputs), std),
    )


class ActorCritic(nn.Module):
    """One actor and one critic shared by all agents, each told which agent it serves by a one-hot.

    The actor sees the agent's own observation; the critic does too, or all observations if `centralized`; if `timed`,
    the critic is told the time as well, on which the value of a state depends where only the horizon ends an episode.
    """

    def __init__(self, obs_dim: int, num_actions: int, num_agents: int, centralized: bool = False, timed: bool = False):
        super().__init__()
        self.centralized, self.timed = centralized, timed
        self.register_buffer("agent_id", torch.eye(num_agents), persistent=False)
        self.actor = mlp(obs_dim + num_agents, num_actions, std=0.01)
        self.critic = mlp(obs_dim * (num_agents if centralized else 1) + num_agents + timed, 1, std=1.0)

    def log_probs(self, obs: torch.Tensor) -> torch.Tensor:
        """(..., N, O) -> log-probabilities of all actions (..., N, num_actions)"""
        obs = torch.cat((obs, self.agent_id.expand(*obs.shape[:-1], -1)), dim=-1)
        return self.actor(obs).log_softmax(dim=-1)

    def value(self, obs: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """obs (..., N, O), time (...) from 0 to 1, if `timed` -> (..., N)"""
        inputs = [obs, self.agent_id.expand(*obs.shape[:-1], -1)]
        if self.centralized:
            inputs[0] = obs.flatten(-2).unsqueeze(-2).expand(*obs.shape[:-1], -1)
        if self.timed:
            inputs.append(time[..., None, None].expand(*obs.shape[:-1], -1))
        return self.critic(torch.cat(inputs, dim=-1)).squeeze(-1)

    def act(self, obs: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample actions: obs (..., N, O) -> act (..., N) int64, logprob (..., N)"""
        log_probs = self.log_probs(obs)
        noise = torch.empty_like(log_probs).exponential_(generator=generator)
        act = (log_probs - noise.log()).argmax(dim=-1)  # the Gumbel-max trick; torch.distributions takes no generator
        return act, log_probs.gather(-1, act.unsqueeze(-1)).squeeze(-1)

    def evaluate(self, obs: torch.Tensor, act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of the actions and entropy of the policy, both (..., N)"""
        log_probs = self.log_probs(obs)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        return log_probs.gather(-1, act.unsqueeze(-1)).squeeze(-1), entropy


@torch.no_grad()
def rollout(env, agent: nn.Module, generator: torch.Generator, watch=None) -> tuple[torch.Tensor, ...]:
    """Play one whole episode in every environment.

    Args:
        watch: called with `env` after every step.
    Returns:
        obs (E, T, N, O), act (E, T, N) or (E, T, N, A), logprob (E, T, N), team_reward (E, T), valid (E, T) bool.
    """
    next_obs = env.reset()
    steps = []
    for _ in range(env.horizon):
        obs, valid = next_obs, ~env.terminated
        act, logprob = agent.act(obs, generator)
        next_obs, team_reward, _ = env.step(act)
        steps.append((obs, act, logprob, team_reward, valid))
        if watch is not None:
            watch(env)
    return tuple(torch.stack(column, dim=1) for column in zip(*steps))


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), where the value after the last valid step is 0.

    Args:
        rewards, values: (E, T, N). valid: (E, T) bool, true up to and including the last step of each episode.
    Returns:
        advantages, returns: (E, T, N), zero where not valid.
    """
    valid = valid.unsqueeze(-1).to(values.dtype)  # (E, T, 1)
    values = values * valid
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = (delta + gamma * gae_lambda * next_advantage) * valid[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, evaluating, drawing
# ---------------------------------------------------------------------------------------------------------------------


def centred_correlation(x: torch.Tensor, y: torch.Tensor, valid: torch.Tensor) -> float:
    """Pearson correlation of the valid entries of x and y (B, K), both centred within each row; nan if constant."""
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    x, y = ((z - (z * valid).sum(dim=1, keepdim=True) / count) * valid for z in (x, y))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def explained_variance(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """1 - Var(true - predicted) / Var(true); nan if `true` is constant."""
    variance = true.var(correction=0)
    return (1 - (true - predicted).var(correction=0) / variance).item() if variance > 0 else math.nan


@torch.no_grad()
def play_episode(env, policy, seed: int | None = None, watch=None) -> dict[str, torch.Tensor]:
    """Play one episode of a PettingZoo ParallelEnv.

    Args:
        policy: maps obs (N, O) to act (N,) or (N, A); None plays uniformly at random.
        watch: called with `env` before the first step and after every step.
    Returns:
        obs (1, T, N, O), act (1, T, N) or (1, T, N, A), team_reward (1, T), valid (1, T), terminated (1,).
    """
    agents, steps, terminated = env.possible_agents, [], False
    obs, _ = env.reset(seed=seed)
    if watch is not None:
        watch(env)
    while env.agents:
        joint_obs = torch.as_tensor(np.stack([obs[name] for name in agents]), dtype=torch.float32)
        act = np.stack([env.action_space(name).sample() for name in agents]) if policy is None else policy(joint_obs)
        act = torch.as_tensor(act).cpu()
        obs, reward, termination, _, _ = env.step(dict(zip(agents, act.numpy())))
        steps.append(
            (joint_obs, act, torch.tensor(float(np.mean([reward[name] for name in agents]))), torch.tensor(True))
        )
        terminated = any(termination.values())
        if watch is not None:
            watch(env)
    columns = [torch.stack(column).unsqueeze(0) for column in zip(*steps)]
    return dict(zip(("obs", "act", "team_reward", "valid"), columns)) | {"terminated": torch.tensor([terminated])}


def evaluate(env, policy, num_episodes: int, seed: int) -> tuple[dict[str, float], float]:
    """Play episodes of a PettingZoo ParallelEnv; return the summary's figures and the fraction that terminated."""
    for i, name in enumerate(env.possible_agents):
        env.action_space(name).seed(seed + i)
    episodes = [play_episode(env, policy, seed=seed if i == 0 else None) for i in range(num_episodes)]
    returns = torch.stack([episode["team_reward"].sum() for episode in episodes])
    figures = {
        "episodic_return": returns.mean().item(),
        "episodic_return_std": returns.std(correction=0).item(),
        "episodic_length": float(np.mean([episode["valid"].sum() for episode in episodes])),
        "episodes": num_episodes,
    }
    return figures, float(np.mean([bool(episode["terminated"]) for episode in episodes]))


def draw_learning_curve(run_dir: Path, panels: dict[str, str]) -> None:
    """learning_curve.png: columns of metrics.csv (`panels`: column to axis label) against environment steps."""
    import matplotlib.figure
    import matplotlib.ticker

    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = matplotlib.figure.Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axis, (column, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        points = [(int(row["global_step"]), float(row[column])) for row in rows if row[column]]
        axis.plot(*zip(*points) if points else ((), ()), color="tab:blue", marker=".")
        axis.set(xlabel="environment steps", ylabel=label)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axis.grid(alpha=0.3)
    figure.savefig(run_dir / "learning_curve.png", dpi=120)


def draw_credits(
    path: Path, credits: np.ndarray, team_reward: np.ndarray, agents: list[str], title: str, marks: list[tuple]
) -> None:
    """credit.png: one episode's credits, agents x time, under the true team reward of each step.

    Args:
        credits: (T, N). team_reward: (T,). marks: (step, agent index, text) to write into the cells of the heat map.
    """
    import matplotlib.figure

    T, N = credits.shape
    figure = matplotlib.figure.Figure(figsize=(max(7.5, 0.32 * T + 2), 2.6 + 0.45 * N), layout="constrained")
    top, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 0.5 * N))
    top.bar(range(T), team_reward, color="tab:gray")
    top.axhline(0, color="black", linewidth=0.5)
    top.set_ylabel("true team\nreward")
    top.set_title(title, fontsize=10)
    limit = max(float(np.abs(credits).max()), 1e-8)
    image = heat.imshow(credits.T, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    heat.set(xlabel="step", yticks=range(N), yticklabels=agents, xlim=(-0.5, T - 0.5))
    for step, agent, text in marks:
        dark = abs(credits[step, agent]) > 0.6 * limit
        heat.text(step, agent, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=heat, label="credit")
    figure.savefig(path, dpi=120)


def save_gif(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """Write frames (H, W, 3) as an endless animation that rests on its last picture."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    durations = [1000 // fps] * (len(images) - 1) + [2000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def check_flag(args, name: str, allowed: str, ok: bool) -> None:
    """End with a line that names the flag, its value and what is allowed, unless ok."""
    if not ok:
        fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {allowed}")


def validate(args, num_agents: int) -> None:
    """End with a one-line error on flag values that parse but make no sense."""
    at_least_one = "total_timesteps num_envs num_minibatches update_epochs mc_samples emb_dim num_heads num_layers"
    at_least_one += " decomposer_batch_size decomposer_updates buffer_size eval_episodes checkpoint_every"
    for name in at_least_one.split():
        check_flag(args, name, "at least 1", getattr(args, name) >= 1)
    for name in ("num_threads", "learning_starts", "attention_window"):
        check_flag(args, name, "0 or more", getattr(args, name) >= 0)
    check_flag(args, "seed", "between 0 and 2^32 - 1", 0 <= args.seed < 2**32)
    for name in ("learning_rate", "decomposer_lr", "clip_coef", "max_grad_norm", "reward_scale"):
        check_flag(args, name, "a finite number above 0", 0 < getattr(args, name) < math.inf)
    for name in ("ent_coef", "vf_coef"):
        check_flag(args, name, "a finite number, 0 or more", 0 <= getattr(args, name) < math.inf)
    for name in ("gamma", "gae_lambda"):
        check_flag(args, name, "between 0 and 1", 0 <= getattr(args, name) <= 1)
    check_flag(args, "target_kl", "a finite number above 0", args.target_kl is None or 0 < args.target_kl < math.inf)
    check_flag(args, "emb_dim", f"a multiple of --num-heads {args.num_heads}", args.emb_dim % args.num_heads == 0)
    few = args.coalition != "exact" or num_agents <= 8
    check_flag(args, "coalition", "bernoulli or permutation with more than 8 agents", few)
    check_flag(args, "track", "off unless wandb is installed", not args.track or importlib.util.find_spec("wandb"))


def load_run(args):
    """Flags and checkpoint of the run folder `args.resume`. The saved flags win over those of the command line.

    Returns:
        the flags to run with, and the checkpoint, None if the run was killed before its first.
    """
    run_dir = Path(args.resume)
    try:
        config = json.loads((run_dir / "config.json").read_text())
        default = type(args)(**config["flags"]) if config["script"] == os.path.basename(__file__) else None
    except (OSError, ValueError, KeyError, TypeError):
        default = None
    if default is None:
        fail(f"--resume {args.resume}: must be the run folder of an earlier run of {os.path.basename(__file__)}")
    given = tyro.cli(type(args), default=default)  # again, on top of the saved flags: what differs was asked for now
    anew = {name: getattr(given, name) for name in ("total_timesteps", "eval_episodes", "cuda")}
    asked = [field.name for field in fields(args) if getattr(given, field.name) != getattr(default, field.name)]
    ignored = [name for name in asked if name != "resume" and name not in anew]
    if ignored:
        print(f"ignored, a resumed run keeps its own: {', '.join('--' + name.replace('_', '-') for name in ignored)}")
    checkpoint = None
    if (run_dir / "checkpoint.pt").exists():
        try:
            checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises many kinds on a damaged file
            fail(f"--resume {args.resume}: cannot read checkpoint.pt ({type(error).__name__})")
    return replace(default, run_dir=str(run_dir), resume=args.resume, **anew), checkpoint


def make_run_dir(args, env_name: str) -> Path:
    """The run folder: that of the run to resume, or a new one."""
    if args.resume is not None:
        return Path(args.resume)
    run_dir = Path(args.run_dir or f"runs/{env_name}__{args.exp_name}__{args.seed}__{int(time.time())}")
    try:
        run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
        empty = not any(run_dir.iterdir())
    except OSError as error:
        fail(f"--run-dir {run_dir}: must be a folder that can be written ({error.strerror})")
    if not empty:
        fail(f"--run-dir {run_dir}: must be new or empty; to continue the run in it, use --resume")
    return run_dir


def check_finite(name: str, value: torch.Tensor, iteration: int) -> None:
    """End the program, with the last good checkpoint kept, if a loss or the norm of a gradient is not finite."""
    if not math.isfinite(value.item()):
        fail(f"{name} is {value.item()} in iteration {iteration}; the last checkpoint is kept", code=1)


def replace_file(path: Path, write) -> None:
    """write(temporary path), then rename, so that `path` is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def write_config(run_dir: Path, args) -> None:
    """config.json: all flags, package versions, git commit; written whole or not at all.

    A resumed run keeps the versions and the commit it began with; only flags may have changed.
    """
    path = run_dir / "config.json"
    if path.exists():
        config = json.loads(path.read_text())
    else:
        here = os.path.dirname(os.path.abspath(__file__))
        command = ["git", "-C", here, "rev-parse", "-q", "--verify", "HEAD"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
        except OSError:  # no git on this machine
            commit = None
        packages = ("torch", "numpy", "pettingzoo", "mpe2", "tyro", "tensorboard")
        versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
        config = {"script": os.path.basename(__file__), "flags": None, "versions": versions, "git_commit": commit}
    config["flags"] = asdict(args)
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n"))


def open_metrics(run_dir: Path, columns: list[str], iterations: int) -> tuple:
    """metrics.csv, cut back to its first `iterations` rows: the open file and a csv writer that appends to it."""
    path, kept = run_dir / "metrics.csv", []
    if path.exists():
        with open(path, newline="") as file:
            kept = list(csv.DictReader(file))[:iterations]

    def rewrite(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            rows = csv.DictWriter(file, columns)
            rows.writeheader()
            rows.writerows(kept)

    replace_file(path, rewrite)
    file = open(path, "a", newline="")
    return file, csv.DictWriter(file, columns)


METRICS = (  # the columns of metrics.csv
    "iteration global_step wall_time charts/episodic_return charts/episodic_length charts/treasure_rate "
    "charts/agent_return_sum charts/SPS charts/learning_rate losses/value_loss losses/policy_loss losses/entropy "
    "losses/old_approx_kl losses/approx_kl losses/clipfrac losses/explained_variance decomposer/loss "
    "decomposer/explained_variance decomposer/credit_std decomposer/reward_correlation "
    "time/rollout time/decomposer time/ppo"
).split()


# ---------------------------------------------------------------------------------------------------------------------
# The training loop
# ---------------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    args, checkpoint = tyro.cli(Args), None
    if args.resume is not None:
        args, checkpoint = load_run(args)
    validate(args, AliceBob.num_agents)
    run_dir = make_run_dir(args, "alice_bob")
    write_config(run_dir, args)
    signals: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):  # finish the iteration, then stop
        signal.signal(signum, lambda signum, frame: signals.append(signum))

    # Set-up: device, seeds, environment, networks, and where they stood if the run is resumed.
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("--cuda: no CUDA device found, running on the CPU")
    if args.num_threads > 0:
        torch.set_num_threads(args.num_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism asks of CUDA
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.manual_seed(args.seed)  # the networks' initial weights
    generator = torch.Generator(device).manual_seed(args.seed)  # every draw of the learner

    env = EncodedAliceBob(args.num_envs, device)
    env.reset(seed=args.seed)
    N = env.num_agents
    agent = ActorCritic(env.obs_dim, env.num_actions, N, args.critic == "centralized").to(device)
    agent_optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    decomposer = None
    if args.credit in ("stas", "temporal"):  # the other credits need none
        decomposer = Decomposer(
            obs_dim=env.obs_dim,
            num_actions=env.num_actions,
            num_agents=N,
            horizon=env.horizon,
            emb_dim=args.emb_dim,
            num_heads=args.num_heads,
            num_layers=args.num_layers,
            mc_samples=args.mc_samples,
            coalition=args.coalition,
            continuous=env.continuous,
            spatial=args.credit == "stas",
            attention_window=args.attention_window,
        ).to(device)
        decomposer_optimizer = torch.optim.Adam(decomposer.parameters(), lr=args.decomposer_lr)
    buffer = ReplayBuffer(args.buffer_size, device)
    stateful = {"agent": agent, "agent_optimizer": agent_optimizer, "buffer": buffer}
    if decomposer is not None:
        stateful |= {"decomposer": decomposer, "decomposer_optimizer": decomposer_optimizer}
    iteration, global_step, wall_time = 0, 0, 0.0
    if checkpoint is not None:
        iteration, global_step, wall_time = (checkpoint[key] for key in ("iteration", "global_step", "wall_time"))
        for name, part in stateful.items():
            part.load_state_dict(checkpoint[name])
        if checkpoint["device"] == device.type:
            generator.set_state(checkpoint["generator"])
            env.generator.set_state(checkpoint["env_generator"])
        else:  # another kind of device draws other numbers
            generator.manual_seed(args.seed + iteration)
            env.generator.manual_seed(args.seed + iteration)
        checkpoint = None  # it holds a copy of the buffer

    if global_step < args.total_timesteps:
        (run_dir / "summary.json").unlink(missing_ok=True)  # of a shorter run
    csv_file, csv_writer = open_metrics(run_dir, METRICS, iteration)
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_dir.name,
            id=run_dir.name,
            resume="allow",
            config=asdict(args),
            sync_tensorboard=True,
        )
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=not sys.stderr.isatty())
    start_time, last_print = time.time() - wall_time, time.time()

    while global_step < args.total_timesteps:
        iteration += 1
        remaining = 1 - global_step / args.total_timesteps
        learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
        ent_coef = args.ent_coef * (remaining if args.anneal_ent else 1)
        agent_optimizer.param_groups[0]["lr"] = learning_rate
        clock = [time.time()]

        # 1, 2. Roll out one whole episode per environment; store the episodes with their returns.
        obs, act, logprob, team_reward, valid = rollout(env, agent, generator)
        returns = team_reward.sum(dim=1)  # (E,)
        if decomposer is not None:
            buffer.add(obs=obs, act=act, valid=valid, returns=returns)
        global_step += int(valid.sum())
        metrics = {
            "charts/episodic_return": returns.mean().item(),
            "charts/episodic_length": valid.sum(dim=1).float().mean().item(),
            "charts/treasure_rate": env.terminated.float().mean().item(),
            "charts/agent_return_sum": N * returns.mean().item(),  # the paper's figure
            "charts/learning_rate": learning_rate,
        }
        clock.append(time.time())

        # 3. Fit the decomposer to the returns of stored episodes.
        if decomposer is not None:
            # How well it predicts the fresh episodes, before it is trained on them.
            predicted = decompose(args, decomposer, obs, act, team_reward, valid, generator).sum(dim=(1, 2))
            metrics["decomposer/explained_variance"] = explained_variance(predicted, returns)
            losses = []
            for _ in range(args.decomposer_updates):
                batch = buffer.sample(args.decomposer_batch_size, generator)
                predicted = decomposer(batch["obs"], batch["act"], batch["valid"], generator).sum(dim=(1, 2))
                loss = F.mse_loss(predicted, batch["returns"] / args.reward_scale)
                check_finite("decomposer/loss", loss, iteration)
                decomposer_optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(decomposer.parameters(), math.inf)  # measured, not clipped
                check_finite("the decomposer's gradient", norm, iteration)
                decomposer_optimizer.step()
                losses.append(loss.item())
            metrics["decomposer/loss"] = np.mean(losses) * args.reward_scale**2

        # 4. Decompose the fresh episodes' returns.
        credits = decompose(args, decomposer, obs, act, team_reward, valid, generator)  # (E, T, N)
        if decomposer is not None:  # for the log
            # The noise of the coalition draws, over four more of them, on 32 episodes.
            some = [x[:32] for x in (obs, act, team_reward, valid)]
            draws = torch.stack([decompose(args, decomposer, *some, generator) for _ in range(4)])
            metrics["decomposer/credit_std"] = draws.std(dim=0)[valid[:32]].mean().item()
            # When: is credit higher in the steps that earned reward?
            metrics["decomposer/reward_correlation"] = centred_correlation(credits.sum(dim=2), team_reward, valid)
        credits = conserve(credits, returns, valid, args.conserve)
        clock.append(time.time())

        # 5. Independent PPO on the credits, over the S valid steps of all episodes.
        if iteration * args.num_envs >= args.learning_starts:
            with torch.no_grad():
                values = agent.value(obs)  # (E, T, N)
            advantages, targets = compute_gae(credits / args.reward_scale, values, valid, args.gamma, args.gae_lambda)
            b_obs, b_act, b_logprob, b_values = (x[valid] for x in (obs, act, logprob, values))  # (S, N, ...)
            b_advantages, b_targets = advantages[valid], targets[valid]  # (S, N)
            clipfracs = []
            for _ in range(args.update_epochs):
                for mb in torch.randperm(len(b_obs), generator=generator, device=device).chunk(args.num_minibatches):
                    newlogprob, entropy = agent.evaluate(b_obs[mb], b_act[mb])
                    logratio = newlogprob - b_logprob[mb]
                    ratio = logratio.exp()
                    with torch.no_grad():
                        old_approx_kl = (-logratio).mean()
                        approx_kl = ((ratio - 1) - logratio).mean()
                        clipfracs.append(((ratio - 1).abs() > args.clip_coef).float().mean().item())
                    mb_advantages = b_advantages[mb]
                    if args.norm_adv:
                        mb_advantages = mb_advantages - mb_advantages.mean()
                        mb_advantages = mb_advantages / (mb_advantages.std(correction=0) + 1e-8)
                    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped_ratio).mean()

                    newvalue = agent.value(b_obs[mb])
                    v_loss = (newvalue - b_targets[mb]).square()
                    if args.clip_vloss:
                        change = (newvalue - b_values[mb]).clamp(-args.clip_coef, args.clip_coef)
                        v_loss = torch.max(v_loss, (b_values[mb] + change - b_targets[mb]).square())
                    v_loss = 0.5 * v_loss.mean()

                    loss = pg_loss - ent_coef * entropy.mean() + args.vf_coef * v_loss
                    check_finite("PPO's loss", loss, iteration)
                    agent_optimizer.zero_grad()
                    loss.backward()
                    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    check_finite("PPO's gradient", norm, iteration)
                    agent_optimizer.step()
                if args.target_kl is not None and approx_kl > args.target_kl:
                    break
            metrics |= {
                "losses/value_loss": v_loss.item() * args.reward_scale**2,
                "losses/policy_loss": pg_loss.item(),
                "losses/entropy": entropy.mean().item(),
                "losses/old_approx_kl": old_approx_kl.item(),
                "losses/approx_kl": approx_kl.item(),
                "losses/clipfrac": np.mean(clipfracs),
                "losses/explained_variance": explained_variance(b_values, b_targets),
            }
        clock.append(time.time())

        # Log; save now and then.
        wall_time = time.time() - start_time
        metrics |= zip(("time/rollout", "time/decomposer", "time/ppo"), np.diff(clock))
        metrics["charts/SPS"] = round(global_step / wall_time)
        metrics = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}  # nan: does not apply
        csv_writer.writerow({"iteration": iteration, "global_step": global_step, "wall_time": wall_time} | metrics)
        csv_file.flush()
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step)
        finished = global_step >= args.total_timesteps
        report = f"return {metrics['charts/episodic_return']:.1f}, treasure {metrics['charts/treasure_rate']:.2f}"
        bar.set_postfix_str(report, refresh=False)
        bar.update(global_step - bar.n)
        if bar.disable and (finished or time.time() - last_print > 10):
            last_print, left = time.time(), max(args.total_timesteps - global_step, 0) / global_step * wall_time
            speed = f"{metrics['charts/SPS']:,.0f} steps/s, {left:.0f} s left"
            print(f"{global_step:,} of {args.total_timesteps:,} steps, {report}, {speed}", flush=True)
        stopping = finished or bool(signals)
        if stopping or iteration % args.checkpoint_every == 0:
            writer.flush()
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= {"iteration": iteration, "global_step": global_step, "wall_time": wall_time, "device": device.type}
            state |= {"generator": generator.get_state(), "env_generator": env.generator.get_state()}
            replace_file(run_dir / "checkpoint.pt", partial(torch.save, state))
            del state  # it holds a copy of the buffer
        if stopping:
            break

    for output in (bar, csv_file, writer):
        output.close()

    def stop(signum: int, frame=None) -> None:
        command = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        print(f"stopped; to continue: {command}", file=sys.stderr)
        sys.exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    if signals:
        stop(signals[0])

    # Evaluate on the PettingZoo environment, beside a team that plays at random; draw.
    eval_generator = torch.Generator(device).manual_seed(args.seed)

    def policy(obs: torch.Tensor) -> torch.Tensor:
        return agent.act(encode_obs(obs.to(device)), eval_generator)[0]

    summary = {}
    for name, player in (("eval", policy), ("random", None)):
        figures, terminated = evaluate(parallel_env(), player, args.eval_episodes, args.seed)
        summary |= {f"{name}/{key}": value for key, value in figures.items()} | {f"{name}/treasure_rate": terminated}
    summary |= {"global_step": global_step, "wall_time": wall_time}
    replace_file(run_dir / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))

    draw_learning_curve(run_dir, {"charts/episodic_return": "team return", "charts/treasure_rate": "treasure rate"})
    frames: list[np.ndarray] = []
    picture_env = parallel_env("rgb_array")
    played = play_episode(picture_env, policy, args.seed, watch=lambda env: frames.append(env.render()))
    episode = {name: x.to(device) for name, x in played.items()}
    team_reward, valid = episode["team_reward"], episode["valid"]
    encoded = encode_obs(episode["obs"])
    credits = decompose(args, decomposer, encoded, episode["act"], team_reward, valid, eval_generator)
    credits = conserve(credits, team_reward.sum(dim=1), valid, args.conserve)[0].cpu().numpy()
    # An observation tells the event of the step before it.
    events = torch.cat((episode["obs"][0, 1:, :, EVENT].cpu(), picture_env.env.event))
    names = {-1: "bump", 2: "key", 3: "key", 7: "$"}
    marks = [(t, i, names[int(events[t, i])]) for t, i in events.nonzero().tolist()]
    setting = f"credit={args.credit}" + (f", conserve={args.conserve}" if decomposer is not None else "")
    title = f"Alice & Bob, one episode after training ({setting})"
    draw_credits(run_dir / "credit.png", credits, team_reward[0].cpu().numpy(), ["Alice", "Bob"], title, marks)
    save_gif(run_dir / "episode.gif", frames, picture_env.metadata["render_fps"])
    results = {key: (summary[f"eval/{key}"], summary[f"random/{key}"]) for key in ("treasure_rate", "episodic_return")}
    report = ", ".join(f"{key} {own:.2f} (random team {chance:.2f})" for key, (own, chance) in results.items())
    print(f"{report} over {args.eval_episodes} episodes; see {run_dir}")
