"""STAS-ML + independent PPO on multi-agent particle environments (MPE), the whole algorithm in one file.

STAS (Chen, Zhang, Yang, Du, AAAI 2024, https://arxiv.org/abs/2304.07520) learns from a team return R that is known only
when an episode ends. One iteration of the training loop, which is at the end of this file:
  1. roll out: every agent acts on its own observation, one whole episode in each of `num_envs` environments;
  2. store: the episodes go into a replay buffer, with nothing of the reward but their returns;
  3. fit the decomposer: causal attention over time for each agent, then attention over agents, in which agent i sees
     itself and a random coalition C of the others. A Shapley value averages v(C + i) - v(C) over coalitions; STAS
     averages the attention's output for C + i over `mc_samples` of them, and never computes a difference. STAS-ML, the
     multi-layer form, stacks `num_layers` blocks of the two. A linear head turns the joined outputs of all blocks into
     a credit, and the credits of all agents and steps are trained to add up to R (mean squared error);
  4. decompose: the fresh episodes get their credits, a dense reward for every agent at every step. Credits sum to the
     *predicted* return; the leftover, R minus that, is paid at the last step, in equal shares. This is our default and
     not the paper's, which drops it: `--conserve none`;
  5. PPO, independent but for shared weights: one actor and one critic serve all agents, told by a one-hot whom they
     serve, and each agent's advantages come from its own observations and credits.

Axes stand in the order (episode E, time T, agent N, feature): observations have O features, continuous actions A.
D is the embedding width, H the number of heads, M the number of coalitions, B any batch, L the longest episode of a
batch, S the valid steps of all episodes. `env` keeps the protocol of envs/__init__.py.
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Beta, Categorical, Distribution, Independent

import run_folder
from envs.mpe import make, make_pettingzoo
from evaluate import evaluate_run, explained_variance, measure_credits


@dataclass
class Args:
    """Flags in four groups, which begin at [the run], [the environment], [PPO] (with CleanRL's names), [the method]."""

    # The run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # [the run] name of the experiment
    seed: int = 1  # learner, environment and evaluation draw from three seeds derived from this one
    torch_deterministic: bool = True  # use deterministic torch algorithms only
    cuda: bool = False  # train on a CUDA device if there is one
    num_threads: int = 0  # CPU threads (0: torch's default)
    track: bool = False  # also log to Weights and Biases (needs wandb)
    wandb_project_name: str = "stas"  # project of Weights and Biases
    wandb_entity: str | None = None  # entity (team) of Weights and Biases
    run_dir: str | None = None  # run folder (default: runs/{environment}__{exp_name}__{changed flags}__{seed}__{time})
    resume: str | None = None
    """run folder to continue; its flags win, but total_timesteps, eval_episodes and cuda may be given anew. More
    total_timesteps for a finished run restart what anneals at a higher value"""
    checkpoint_every: int = 20  # iterations between two checkpoints
    eval_episodes: int = 100  # episodes of the final evaluation on mpe2

    # The environment
    scenario: Literal["spread", "tag", "push"] = "spread"
    """[the environment] cooperative navigation, predator-prey (the predators learn), cooperative push"""
    num_agents: int = 3  # agents that learn, N
    continuous_actions: bool = False  # actions are the strengths of the five moves, from 0 to 1, instead of one of them
    num_agent_neighbors: int | None = None  # others an agent sees, nearest first (None: all; 5 in spread with 15)
    num_landmark_neighbors: int | None = None  # the same for landmarks (None: all; 6 in spread with 15; not in push)
    nearest_first: bool = True  # in spread, list others and landmarks by distance, not by name (always with 15)
    num_prey: int | None = None  # prey in tag (None: a third of the agents, at least 1)
    num_obstacles: int | None = None  # obstacles in tag (None: 2 up to 3 agents, 3 up to 6, then 5)
    max_cycles: int | None = None  # steps of an episode (None: 25; 50 in push)

    # PPO
    total_timesteps: int = 600_000  # [PPO] environment steps (joint actions) to train for
    num_envs: int = 128  # episodes per iteration, played side by side
    learning_rate: float = 1e-3  # learning rate of the policy and the critic (Adam)
    anneal_lr: bool = True  # decay both learning rates, of PPO and of the decomposer, linearly to zero
    gamma: float = 1.0  # discount factor
    gae_lambda: float = 1.0  # lambda of generalised advantage estimation
    num_minibatches: int = 16  # minibatches per epoch
    update_epochs: int = 10  # epochs of policy updates per iteration
    norm_adv: bool = True  # normalise the advantages of each minibatch
    adv_eps: float = 1e-8  # added to their deviation: what is far below it, in units of reward_scale, teaches little
    clip_coef: float = 0.2  # clipping range of the surrogate objective
    clip_vloss: bool = False  # clip the value loss too
    ent_coef: float = 0.01  # weight of the entropy bonus
    anneal_ent: bool = True  # decay the weight of the entropy bonus linearly to zero
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient of policy and critic together
    target_kl: float | None = None  # stop an iteration's policy updates beyond this KL divergence
    critic: Literal["independent", "centralized"] = "independent"  # it sees its agent's observation, or all (MAPPO)

    # The method
    credit: Literal["stas", "temporal", "uniform", "episodic", "dense", "shapley", "difference"] = "stas"
    """[the method] what the agents learn from. stas: learned credits. In equal shares, temporal: credits learned with
    attention over time only; uniform: R / length at every step; episodic: R at the last step (plain PPO on the delayed
    return). Oracles, which the method may not see: dense, the true reward of every step in equal shares; in spread its
    exact Shapley values (shapley), and what it would lose without the agent (difference)"""
    conserve: Literal["none", "terminal", "uniform"] = "terminal"
    """where the leftover, R - sum of learned credits, goes in equal shares: nowhere (none, the paper), to the last step
    (terminal), or to all steps (uniform)"""
    own_share: float = 1.0  # part of an agent's credit that it is paid itself; all agents share the rest equally
    mc_samples: int = 5  # coalitions drawn per agent, step and block, M
    coalition: Literal["bernoulli", "permutation", "exact", "all"] = "bernoulli"
    """who is in an agent's coalitions. bernoulli: each other agent with probability 1/2 (the paper); permutation: those
    before it in a random order (Shapley's weights); exact: all coalitions with Shapley's weights (up to 8 agents); all:
    everyone always, which is plain attention"""
    embedding: Literal["mlp", "linear"] = "mlp"  # of the decomposer's inputs: two hidden layers of 2 D, or none (paper)
    outcome: bool = True  # the decomposer sees what an agent observes after a step too, not only before it (paper)
    emb_dim: int = 32  # width of the decomposer, D
    num_heads: int = 1  # attention heads of the decomposer
    num_layers: int = 2  # blocks of a temporal layer and Shapley attention (1: as STAS with one temporal layer)
    attention_window: int = 0  # steps each layer of temporal attention looks back on, the present one included (0: all)
    decomposer_lr: float = 3e-3  # learning rate of the decomposer (Adam)
    decomposer_batch_size: int = 32  # episodes per decomposer update
    decomposer_updates: int = 32  # decomposer updates per iteration
    buffer_size: int = 16_384  # episodes the replay buffer holds
    learning_starts: int = 0  # episodes collected before the policy learns from those of an iteration
    reward_scale: float | None = None
    """the decomposer's targets and PPO's rewards are divided by this; logs are in raw units (None: 10; 50 in push)"""


METRICS = (*run_folder.METRICS, "decomposer/shapley_correlation")  # the columns of metrics.csv


def env_options(args: Args) -> dict:
    names = "scenario num_agents continuous_actions num_agent_neighbors num_landmark_neighbors num_prey num_obstacles"
    options = {name: getattr(args, name) for name in (names + " max_cycles").split()}
    if args.nearest_first and args.scenario == "spread" and args.num_agents != 15:  # with 15 the defaults do so anyway
        everyone = {"num_agent_neighbors": max(1, args.num_agents - 1), "num_landmark_neighbors": args.num_agents}
        options |= {name: count for name, count in everyone.items() if options[name] is None}
    return options


def make_env(args: Args, num_envs: int, device: str | torch.device = "cpu"):
    """The batched environment to learn in."""
    return make(num_envs=num_envs, device=device, **env_options(args))


def make_parallel_env(args: Args, render_mode: str | None = None):
    """The PettingZoo environment to be evaluated on."""
    return make_pettingzoo(render_mode=render_mode, **env_options(args))


def sample_coalitions(
    kind: str, num_samples: int, batch: int, num_agents: int, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coalitions, drawn afresh for every (episode, step) pair (the paper's Monte Carlo), and their weights.

    Coin flips and orders come in antithetic pairs, m and m + ceil(M / 2): the second flips every coin, or reverses the
    order, of the first. Each is distributed as if drawn alone, but their mean varies less. A draw serves all agents.

    Args:
        kind: "bernoulli": every other agent joins with probability 1/2, which is uniform over coalitions and so
            estimates the Banzhaf weighting (the paper's choice). "permutation": the agents before i in a random order,
            which has Shapley's weights. "exact": no draw, all 2^(N-1) coalitions. "all": no draw, everyone.
        num_samples: M, of the kinds that are drawn. batch: number of (episode, step) pairs, B.
    Returns:
        masks (M, B, N, N) bool, [m, b, i, j]: agent j is in C_m + {i}, so the diagonal is always True; (M, 1, N, N) if
        nothing is drawn. weights (M,), which sum to 1.
    """
    self_mask = torch.eye(num_agents, dtype=torch.bool, device=device)
    pairs = (num_samples + 1) // 2
    if kind == "bernoulli":
        first = torch.rand(pairs, batch, num_agents, device=device) < 0.5
        masks = torch.cat((first, ~first))[:num_samples].unsqueeze(2) | self_mask
    elif kind == "permutation":
        # Agents arrive at uniformly random times, and so in a random order: before i come those who arrive earlier.
        arrival = torch.rand(pairs, batch, num_agents, device=device)
        first = arrival.unsqueeze(-2) < arrival.unsqueeze(-1)
        masks = torch.cat((first, first.transpose(-2, -1)))[:num_samples] | self_mask
    elif kind == "exact":
        masks = self_mask.repeat(2 ** (num_agents - 1), 1, 1, 1)
        members = torch.arange(len(masks), device=device).unsqueeze(1) >> torch.arange(num_agents - 1, device=device)
        masks[:, 0, ~self_mask] = (members & 1).bool().repeat(1, num_agents)  # row i: its N - 1 others, in order
        # |C|! (N-|C|-1)! / N! = 1 / (N binomial(N-1, |C|)), Shapley's weights
        weights = [1 / (num_agents * math.comb(num_agents - 1, int(m).bit_count())) for m in range(len(masks))]
        return masks, torch.tensor(weights, device=device)
    elif kind == "all":
        masks = torch.ones(1, 1, num_agents, num_agents, dtype=torch.bool, device=device)
    else:
        raise ValueError(f"coalition {kind}: must be bernoulli, permutation, exact or all")
    return masks, torch.full((len(masks),), 1 / len(masks), device=device)


class TemporalLayer(nn.Module):
    """One transformer layer along time: step t attends to steps <= t of the same agent, the last `window` if not 0."""

    def __init__(self, emb_dim: int, num_heads: int, window: int = 0):
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.norm1, self.norm2 = nn.LayerNorm(emb_dim), nn.LayerNorm(emb_dim)
        self.qkv = nn.Linear(emb_dim, 3 * emb_dim)
        self.proj = nn.Linear(emb_dim, emb_dim)
        self.mlp = nn.Sequential(nn.Linear(emb_dim, 2 * emb_dim), nn.ReLU(), nn.Linear(2 * emb_dim, emb_dim))
        for weights in (*self.proj.parameters(), *self.mlp[2].parameters()):
            nn.init.zeros_(weights)  # at first a step passes as it is: the past comes in where it pays

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)"""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        # Padding comes after the end of an episode, so causality alone keeps valid steps from seeing it.
        if 0 < self.window < T:
            steps = torch.arange(T, device=x.device)
            age = steps.unsqueeze(1) - steps  # (T, T), of each key for each query
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=(0 <= age) & (age < self.window))
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))


class ShapleyAttention(nn.Module):
    """Attention over agents, averaged over coalitions: the paper's stand-in for a Shapley value.

    phi_i = W_O sum_j P_ij v_j, with P_ij = sum_m w_m 1[j in C_m] e_ij / sum_{k in C_m} e_ik and e_ij = exp(score_ij),
    C_m with i itself. W_Q is agent-specific, W_K, W_V and W_O are shared; an identity is added to each agent's input.
    The same as attending anew under every coalition, but e and v are computed only once:

        phi = sum(w * W_O(softmax(scores.masked_fill(~mask.unsqueeze(1), -inf)) @ v) for mask, w in zip(masks, weights))
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
        B, N, D = x.shape
        x = x.transpose(0, 1) + self.identity.unsqueeze(1)  # (N, B, D), the order of the decomposer's tokens in memory
        query = x @ self.query
        key, value = self.key_value(x).chunk(2, dim=-1)
        query, key, value = (y.view(N, B, self.num_heads, -1).permute(1, 2, 0, 3) for y in (query, key, value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(key.shape[-1])  # (B, H, N, N)
        # A factor of e_i cancels in P_i. Relative to the agent's own score, its own e is 1, and in every coalition: no
        # sum is too small to divide by. The clamp prevents overflow; it binds beyond differences of 40.
        own = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        e = (scores - own).clamp(-40, 40).exp().permute(0, 2, 3, 1)  # (B, N, N, H)
        masks = masks.permute(1, 2, 0, 3).to(x.dtype, memory_format=torch.contiguous_format)  # (B or 1, N, M, N)
        sums = torch.einsum("bimj,bijh->bimh", masks, e)  # over the members of each coalition
        P = e * torch.einsum("bimj,bimh->bijh", masks, weights.to(x).unsqueeze(-1) / sums)  # (B, N, N, H)
        attended = (P.permute(0, 3, 1, 2) @ value).permute(2, 0, 1, 3).reshape(N, B, D)
        return self.proj(attended).transpose(0, 1)


class Embedding(nn.Module):
    """Tokens: what an agent sees and does in a step, sees next if `outcome` (at the end again the same), and who it is,
    embedded, plus a position for the step."""

    def __init__(self, args, env):
        super().__init__()
        D, N = args.emb_dim, env.num_agents
        self.outcome, self.continuous, self.num_actions = args.outcome, env.continuous, env.num_actions
        self.register_buffer("agent_id", torch.eye(N), persistent=False)
        inputs = (1 + args.outcome) * env.obs_dim + env.num_actions + N
        hidden = (nn.Linear(inputs, 2 * D), nn.ReLU(), nn.Linear(2 * D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))
        self.layers = nn.Sequential(*hidden) if args.embedding == "mlp" else nn.Linear(inputs, D)
        self.position = nn.Parameter(torch.zeros(env.horizon, D))

    def forward(self, obs: torch.Tensor, act: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """obs (E, T, N, O), act (E, T, N[, A]), valid (E, T) -> (N, E, T, D): one agent after another in memory"""
        if self.outcome:
            follows = F.pad(valid[:, 1:], (0, 1))[..., None, None]  # (E, T, 1, 1), whether the episode goes on
            obs = torch.cat((obs, torch.where(follows, obs.roll(-1, dims=1), obs)), dim=-1)
        if not self.continuous:
            act = F.one_hot(act.long(), self.num_actions)
        # A buffer may hold half precision and short integers. Scaled up, fine differences are learned much sooner.
        inputs = (5 * obs.to(self.position), act.to(self.position), self.agent_id.expand(*obs.shape[:3], -1))
        return self.layers(torch.cat(inputs, dim=-1).permute(2, 0, 1, 3)) + self.position[: obs.shape[1]]


class MLDecomposer(nn.Module):
    """Splits the team return into credits: blocks of a temporal layer and Shapley attention, each feeding the next by a
    gate that starts at zero, and a linear head on the outputs of all (STAS-ML). With one block it is STAS.

    Each block draws its own coalitions. From the second on, members of a coalition may have seen others through the
    block before, and a credit is no longer a plain mean over coalitions. With credit "temporal" Shapley attention is
    left out, the temporal layers feed each other, and the agents share each step's credit equally.
    """

    def __init__(self, args, env):
        super().__init__()
        D, N = args.emb_dim, env.num_agents
        self.mc_samples, self.coalition = args.mc_samples, args.coalition
        self.scale = 1 / math.sqrt(env.horizon * N)  # of a sum of T N credits, as Adam would overshoot
        self.embed = Embedding(args, env)
        layers = (TemporalLayer(D, args.num_heads, args.attention_window) for _ in range(args.num_layers))
        self.temporal = nn.ModuleList(layers)
        self.norm = nn.ModuleList(nn.LayerNorm(D) for _ in range(args.num_layers))
        shapley = (ShapleyAttention(D, args.num_heads, N) for _ in range(args.num_layers))
        self.shapley = nn.ModuleList(shapley) if args.credit != "temporal" else None
        self.gate = nn.Parameter(torch.zeros(args.num_layers - 1))
        self.head = nn.Linear(args.num_layers * D, 1)
        nn.init.zeros_(self.head.weight)  # credits start at zero
        nn.init.zeros_(self.head.bias)

    def forward(self, obs: torch.Tensor, act: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """obs (E, T, N, O), act (E, T, N[, A]), valid (E, T) -> credits (E, T, N) / reward scale, 0 where not valid"""
        E, T, N, _ = obs.shape
        L = int(valid.any(dim=0).sum())  # the longest episode: no work on steps that none reaches
        x = self.embed(obs[:, :L], act[:, :L], valid[:, :L]).view(N, E * L, -1)
        outputs = []
        for k, layer in enumerate(self.temporal):
            if outputs and self.shapley is not None:  # added, so that a token still tells whose it is
                x = x + self.gate[k - 1] * outputs[-1]
            x = layer(x.view(N * E, L, -1)).view(N, E * L, -1)  # one sequence per agent
            phi = self.norm[k](x)
            if self.shapley is not None:
                masks, weights = sample_coalitions(self.coalition, self.mc_samples, E * L, N, x.device)
                phi = self.shapley[k](phi.transpose(0, 1), masks, weights).transpose(0, 1)
            outputs.append(phi)
        credits = self.head(torch.cat(outputs, dim=-1)).view(N, E, L).permute(1, 2, 0)  # (E, L, N)
        if self.shapley is None:
            credits = credits.mean(dim=2, keepdim=True).expand(E, L, N)
        credits = F.pad(credits, (0, 0, 0, T - L))  # (E, T, N)
        return self.scale * credits * valid.unsqueeze(-1)


def distribute_return(returns: torch.Tensor, valid: torch.Tensor, num_agents: int, where: str) -> torch.Tensor:
    """Spread one number per episode, (E,), over its valid steps, (E, T), and equally over the agents: (E, T, N).

    where: "terminal", all at the last valid step; "uniform", the same at every valid step of the episode.
    """
    length = valid.sum(dim=1, keepdim=True)  # (E, 1)
    last = torch.arange(valid.shape[1], device=valid.device) == length - 1  # (E, T)
    share = last if where == "terminal" else valid / length
    return (returns.unsqueeze(1) * share / num_agents).unsqueeze(-1).expand(-1, -1, num_agents)


@torch.no_grad()
def decompose(args, decomposer: nn.Module | None, episodes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Credits of `args.credit` for whole episodes as `rollout` returns them: (E, T, N) in raw reward units.

    Learned ones (named here and in `make_networks`) see nothing of the reward; `conserve` places what they leave over.
    """
    team_reward, valid, N = episodes["team_reward"], episodes["valid"], episodes["obs"].shape[2]
    if args.credit in ("stas", "temporal"):
        return args.reward_scale * decomposer(episodes["obs"], episodes["act"], valid)
    if args.credit == "dense":
        return (team_reward / N).unsqueeze(-1).expand(-1, -1, N)
    if args.credit in ("episodic", "uniform"):
        where = "terminal" if args.credit == "episodic" else "uniform"
        return distribute_return(team_reward.sum(dim=1), valid, N, where)
    return episodes[args.credit]  # an oracle of the environment


def conserve(credits: torch.Tensor, returns: torch.Tensor, valid: torch.Tensor, where: str) -> torch.Tensor:
    """Add what the credits (E, T, N) leave of the returns (E,), placed by `distribute_return`, or not if "none"."""
    if where == "none":
        return credits
    return credits + distribute_return(returns - credits.sum(dim=(1, 2)), valid, credits.shape[2], where)


class ReplayBuffer:
    """A ring of the latest `capacity` episodes, each a row in tensors of the names given to `add`."""

    def __init__(self, capacity: int, device: str | torch.device):
        self.capacity, self.device, self.count = capacity, device, 0  # the next row is count % capacity
        self.data: dict[str, torch.Tensor] = {}

    def add(self, **episodes: torch.Tensor) -> None:
        """Append episodes; every tensor has the same number of rows."""
        for name, rows in episodes.items():
            rows = rows[-self.capacity :].to(self.device)
            if name not in self.data:
                self.data[name] = rows.new_zeros((self.capacity, *rows.shape[1:]))
            index = (self.count + torch.arange(len(rows), device=self.device)) % self.capacity
            self.data[name][index] = rows
        self.count += len(rows)

    def sample(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Episodes drawn uniformly with replacement, so that any batch size works from the first episode on."""
        index = torch.randint(min(self.count, self.capacity), (batch_size,), device=self.device)
        return {name: rows[index] for name, rows in self.data.items()}

    def state_dict(self) -> dict:
        return {"count": self.count, "data": {name: rows[: self.count].clone() for name, rows in self.data.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.data, self.count = {}, 0
        if state["data"]:
            self.add(**state["data"])
        self.count = state["count"]


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    """Two hidden layers of 64, tanh."""
    hidden = (layer_init(nn.Linear(inputs, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh())
    return nn.Sequential(*hidden, layer_init(nn.Linear(64, outputs), std))


class ActorCritic(nn.Module):
    """One actor and one critic shared by all agents, each told which agent it serves by a one-hot.

    The actor sees the agent's own observation. The critic sees it too, or those of all agents if centralized, and the
    time, for only the horizon ends an episode that is not solved.
    """

    def __init__(self, args, env):
        super().__init__()
        self.centralized = args.critic == "centralized"
        self.register_buffer("agent_id", torch.eye(env.num_agents), persistent=False)
        outputs = 2 * env.num_actions if env.continuous else env.num_actions
        self.actor = mlp(env.obs_dim + env.num_agents, outputs, std=0.01)
        seen = env.obs_dim * (env.num_agents if self.centralized else 1)
        self.critic = mlp(seen + env.num_agents + 1, 1, std=1.0)

    def policy(self, obs: torch.Tensor) -> Distribution:
        """obs (..., N, O) -> distribution of the actions (..., N) or (..., N, A)"""
        return self.distribution(self.actor(torch.cat((obs, self.agent_id.expand(*obs.shape[:-1], -1)), dim=-1)))

    def distribution(self, outputs: torch.Tensor) -> Distribution:
        return Categorical(logits=outputs, validate_args=False)

    def sample(self, policy: Distribution) -> torch.Tensor:
        return policy.sample()

    def get_value(self, obs: torch.Tensor, elapsed: torch.Tensor) -> torch.Tensor:
        """obs (..., N, O), elapsed (...), the share of the horizon that is over -> (..., N)"""
        shape = obs.shape[:-1]
        seen = obs.flatten(-2).unsqueeze(-2).expand(*shape, -1) if self.centralized else obs
        inputs = (seen, self.agent_id.expand(*shape, -1), elapsed[..., None, None].expand(*shape, -1))
        return self.critic(torch.cat(inputs, dim=-1)).squeeze(-1)

    def get_action_and_value(self, obs: torch.Tensor, elapsed: torch.Tensor, action: torch.Tensor | None = None):
        """obs (..., N, O), elapsed (...) -> action (drawn if None), logprob, the policy's entropy, value: (..., N)"""
        policy = self.policy(obs)
        if action is None:
            action = self.sample(policy)
        return action, policy.log_prob(action), policy.entropy(), self.get_value(obs, elapsed)


class ContinuousActorCritic(ActorCritic):
    """Actions in [0, 1]^A, drawn from Beta distributions with parameters above 1, which have a single mode."""

    def distribution(self, outputs: torch.Tensor) -> Distribution:
        alpha, beta = (1 + F.softplus(outputs).clamp(max=1000)).chunk(2, dim=-1)  # larger ones lose float32's precision
        return Independent(Beta(alpha, beta, validate_args=False), 1, validate_args=False)

    def sample(self, policy: Distribution) -> torch.Tensor:
        return policy.sample().clamp(1e-4, 1 - 1e-4)  # where log-probabilities are finite


def make_networks(args: Args, env) -> tuple[nn.Module, nn.Module | None]:
    """The agents' networks, and the decomposer where the credit is learned; ValueError if a flag does not fit."""
    if args.credit == "stas" and args.coalition == "exact" and env.num_agents > 8:
        raise ValueError("coalition exact: must be bernoulli, permutation or all with more than 8 agents")
    if args.credit in ("shapley", "difference") and args.credit not in env.oracles():
        raise ValueError(f"credit {args.credit}: must be another with scenario {args.scenario}")
    if args.num_layers == 0:
        raise ValueError("num_layers 0: must be at least 1")
    agent = (ContinuousActorCritic if env.continuous else ActorCritic)(args, env)
    return agent, MLDecomposer(args, env) if args.credit in ("stas", "temporal") else None


@torch.no_grad()
def rollout(env, agent: nn.Module, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Play one whole episode in every environment.

    Returns obs (E, T, N, O), elapsed (E, T), act (E, T, N) or (E, T, N, A), logprob and value (E, T, N), team_reward
    (0 where not valid) and valid (E, T), and what the environment's `oracles` tell after every step, (E, T, N) each.
    """
    next_obs, steps = env.reset(seed), []
    for t in range(env.horizon):
        obs, valid = next_obs, ~env.terminated
        elapsed = torch.full((env.num_envs,), t / env.horizon, device=obs.device)
        act, logprob, _, value = agent.get_action_and_value(obs, elapsed)
        next_obs, team_reward, _ = env.step(act)
        step = dict(obs=obs, elapsed=elapsed, act=act, logprob=logprob, value=value)
        step |= dict(team_reward=team_reward, valid=valid)
        steps.append(step | (env.oracles() if hasattr(env, "oracles") else {}))
    return {name: torch.stack([step[name] for step in steps], dim=1) for name in steps[0]}


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), where the value after the last valid step is 0.

    rewards, values (E, T, N), valid (E, T) -> advantages, returns (E, T, N), zero where not valid
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


if __name__ == "__main__":
    sys.excepthook = run_folder.report_error
    args, config, checkpoint = run_folder.parse_flags(Args, __file__)
    run_name = run_folder.name_run(args, f"{args.scenario}_{args.num_agents}")
    args.reward_scale = args.reward_scale or (50.0 if args.scenario == "push" else 10.0)

    # Device, environment, networks, and where they stood if the run is resumed.
    device = run_folder.choose_device(args)
    torch.manual_seed(args.seed)
    try:
        env = make_env(args, args.num_envs, device)
        agent, decomposer = make_networks(args, env)
    except ValueError as error:
        run_folder.fail_flag(error)
    agent_optimizer = torch.optim.Adam(agent.to(device).parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    parts = {"agent": agent, "agent_optimizer": agent_optimizer}
    if decomposer is not None:
        decomposer_optimizer = torch.optim.Adam(decomposer.to(device).parameters(), lr=args.decomposer_lr, fused=True)
        buffer = ReplayBuffer(args.buffer_size, device)
        parts |= {"decomposer": decomposer, "decomposer_optimizer": decomposer_optimizer, "buffer": buffer}
    iteration, global_step, wall_time, csv_position = run_folder.restore(checkpoint, parts)

    # The run folder and the logs.
    run_dir = run_folder.open_run_dir(args, run_name, config)
    csv_file, csv_writer, writer, bar = run_folder.open_logs(args, run_dir, METRICS, global_step, csv_position)
    start_time = time.time() - wall_time
    signals = run_folder.catch_signals()

    while global_step < args.total_timesteps:
        iteration += 1
        remaining = 1 - global_step / args.total_timesteps
        agent_optimizer.param_groups[0]["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
        ent_coef = args.ent_coef * (remaining if args.anneal_ent else 1)
        clock = [time.time()]

        # 1. Roll out one whole episode per environment. All draws follow from the seed and the iteration's number, so
        # that no generator needs to be saved.
        learner_seed, env_seed = np.random.SeedSequence((args.seed, iteration)).generate_state(2).tolist()
        torch.manual_seed(learner_seed)
        episodes = rollout(env, agent, env_seed)
        valid, returns = episodes["valid"], episodes["team_reward"].sum(dim=1)  # (E, T), (E,)
        global_step += int(valid.sum())
        metrics = {
            "charts/episodic_return": returns.mean().item(),
            "charts/episodic_length": valid.sum(dim=1).float().mean().item(),
            "charts/agent_return_sum": env.num_agents * returns.mean().item(),  # the paper's figure
            "charts/learning_rate": agent_optimizer.param_groups[0]["lr"],
        }
        clock.append(time.time())

        # 2. Store the episodes, with nothing of the reward but their returns; half precision is enough.
        if decomposer is not None:
            # How well does it predict fresh episodes, before it is trained on them? (To look must not change the run.)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                predicted = decompose(args, decomposer, episodes).sum(dim=(1, 2))
            metrics["decomposer/explained_variance"] = explained_variance(predicted, returns)
            act = episodes["act"].half() if env.continuous else episodes["act"].short()
            buffer.add(obs=episodes["obs"].half(), act=act, valid=valid, returns=returns)

            # 3. Fit the decomposer to the returns of stored episodes.
            decomposer_optimizer.param_groups[0]["lr"] = args.decomposer_lr * (remaining if args.anneal_lr else 1)
            losses = []
            for _ in range(args.decomposer_updates):
                batch = buffer.sample(args.decomposer_batch_size)
                predicted = decomposer(batch["obs"], batch["act"], batch["valid"]).sum(dim=(1, 2))
                loss = F.mse_loss(predicted, batch["returns"] / args.reward_scale)
                decomposer_optimizer.zero_grad()
                loss.backward()
                decomposer_optimizer.step()
                losses.append(loss.detach())
            metrics["decomposer/loss"] = torch.stack(losses).mean().item() * args.reward_scale**2

        # 4. Decompose the fresh episodes' returns into credits; pay the leftover.
        credits = decompose(args, decomposer, episodes)  # (E, T, N)
        rewards = args.own_share * credits + (1 - args.own_share) * credits.mean(dim=2, keepdim=True)
        if decomposer is not None:
            rewards = conserve(rewards, returns, valid, args.conserve)
        clock.append(time.time())

        # 5. Independent PPO on these rewards, over the S valid steps of all episodes.
        if iteration * args.num_envs >= args.learning_starts:
            values = episodes["value"]  # (E, T, N)
            advantages, targets = compute_gae(rewards / args.reward_scale, values, valid, args.gamma, args.gae_lambda)
            names = ("obs", "elapsed", "act", "logprob", "value")
            b_obs, b_elapsed, b_act, b_logprob, b_values = (episodes[name][valid] for name in names)  # (S, ...)
            b_advantages, b_targets = advantages[valid], targets[valid]  # (S, N)
            clipfracs = []
            for _ in range(args.update_epochs):
                for mb in torch.randperm(len(b_obs), device=device).chunk(args.num_minibatches):
                    _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb], b_elapsed[mb], b_act[mb])
                    logratio = newlogprob - b_logprob[mb]
                    ratio = logratio.exp()
                    with torch.no_grad():
                        old_approx_kl = (-logratio).mean()
                        approx_kl = ((ratio - 1) - logratio).mean()
                        clipfracs.append(((ratio - 1).abs() > args.clip_coef).float().mean())
                    mb_advantages = b_advantages[mb]
                    if args.norm_adv:
                        mb_advantages = mb_advantages - mb_advantages.mean()
                        mb_advantages = mb_advantages / (mb_advantages.std(correction=0) + args.adv_eps)
                    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped_ratio).mean()

                    v_loss = (newvalue - b_targets[mb]).square()
                    if args.clip_vloss:
                        change = (newvalue - b_values[mb]).clamp(-args.clip_coef, args.clip_coef)
                        v_loss = torch.max(v_loss, (b_values[mb] + change - b_targets[mb]).square())
                    v_loss = 0.5 * v_loss.mean()
                    loss = pg_loss - ent_coef * entropy.mean() + args.vf_coef * v_loss
                    agent_optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                    agent_optimizer.step()
                if args.target_kl is not None and approx_kl > args.target_kl:
                    break
            metrics |= {
                "losses/value_loss": v_loss.item() * args.reward_scale**2,
                "losses/policy_loss": pg_loss.item(),
                "losses/entropy": entropy.mean().item(),
                "losses/old_approx_kl": old_approx_kl.item(),
                "losses/approx_kl": approx_kl.item(),
                "losses/clipfrac": torch.stack(clipfracs).mean().item(),
                "losses/explained_variance": explained_variance(b_values, b_targets),
            }
        clock.append(time.time())

        # Log; save now and then, but never what a loss that is not finite has done to the weights.
        run_folder.check_finite({"decomposer/loss": decomposer, "PPO's loss": agent}, iteration, run_dir)
        if decomposer is not None:
            metrics |= measure_credits(args, partial(decompose, args, decomposer), episodes, credits)
        wall_time = time.time() - start_time
        metrics |= zip(("time/rollout", "time/decomposer", "time/ppo"), np.diff(clock))
        metrics["charts/SPS"] = round(global_step / wall_time)
        metrics = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}  # nan: does not apply
        csv_writer.writerow({"iteration": iteration, "global_step": global_step, "wall_time": wall_time} | metrics)
        csv_file.flush()
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step)
        stopped, finished = bool(signals), global_step >= args.total_timesteps
        run_folder.show_progress(bar, global_step, f"return {metrics['charts/episodic_return']:.2f}")
        if stopped or finished or iteration % args.checkpoint_every == 0:
            writer.flush()
            run_folder.save_checkpoint(run_dir, parts, (iteration, global_step, wall_time, csv_file.tell()))
        if stopped:
            run_folder.stop(run_dir, signals)

    for output in (bar, csv_file, writer):
        output.close()
    run_folder.release_signals()
    print(evaluate_run(run_dir))
