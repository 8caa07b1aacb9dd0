"""Learned credits against the Shapley values of team rewards that do not add up over agents.

    python benchmark/shapley_games.py             # what is still missing, then the table and the figure
    python benchmark/shapley_games.py --report    # only the table and the figure

Rows go into benchmark/results/shapley_games.csv.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, check_flags, draw_ranges, in_processes, missing, read

sys.path.insert(0, str(ROOT))
from stas_ippo_mpe import Args as Flags
from stas_ippo_mpe import Decomposer, explained_variance, update_decomposer
from stas_ml_ippo_mpe import MLDecomposer

STAS, ML = "stas_ippo_mpe.py", "stas_ml_ippo_mpe.py"
NAMES = {STAS: "STAS", ML: "STAS-ML"}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """seeds"""
    num_agents: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6])
    """numbers of agents"""
    updates: int = 1000
    """decomposer updates"""
    workers: int = 2
    """games side by side, one CPU thread each"""
    results: Path = RESULTS
    """folder of the results"""
    report: bool = False
    """measure nothing"""


def game(kind: str, given: torch.Tensor) -> torch.Tensor:
    """Shapley values of the team reward of one step, which is their sum; whoever is outside a coalition gives nothing.

    Args:
        kind: team reward, from what every agent gives. "additive": its mean; "pairwise": the mean of the products of
            all pairs; "multiplicative": the product of all, so that v(C) = 0 unless C is everyone.
        given: (..., N), from 0 to 1.
    Returns:
        (..., N)
    """
    N = given.shape[-1]
    if kind == "additive":
        return given / N
    if kind == "pairwise":  # each pair splits its product
        return given * (given.sum(dim=-1, keepdim=True) - given) / (N * (N - 1))
    if kind == "multiplicative":  # all are needed alike
        return (given.prod(dim=-1, keepdim=True) / N).expand_as(given)
    raise ValueError(f"no such game: {kind!r}")


def play_game(script: str, kind: str, num_agents: int, seed: int, updates: int) -> list[dict]:
    """Fit a decomposer to the returns of 5 random steps of a game; compare its credits with the Shapley values."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    steps = 5

    def episodes(count: int) -> tuple[torch.Tensor, ...]:
        """obs (E, T, N, 1) that tell nothing, act (E, T, N) that give 0 to 1 in quarters, valid, Shapley values."""
        obs = torch.randn(count, steps, num_agents, 1)
        act = torch.randint(5, (count, steps, num_agents))
        return obs, act, torch.ones(count, steps, dtype=torch.bool), game(kind, act / 4)

    scale = episodes(10_000)[-1].sum(dim=(1, 2)).std()
    build, num_layers = (Decomposer, 1) if script == STAS else (MLDecomposer, 2)
    env = SimpleNamespace(obs_dim=1, num_actions=5, num_agents=num_agents, horizon=steps, continuous=False)
    flags = Flags(emb_dim=32, num_layers=num_layers, reward_scale=scale.item())
    decomposer = build(flags, env)
    optimizer = torch.optim.Adam(decomposer.parameters(), lr=3e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        obs, act, valid, true = episodes(128)
        batch = {"obs": obs, "act": act, "valid": valid, "team_return": true.sum(dim=(1, 2))}
        update_decomposer(flags, decomposer, optimizer, batch)
    obs, act, valid, true = episodes(4000)
    noiseless = build(Flags(emb_dim=32, num_layers=num_layers, coalition="exact"), env)
    noiseless.load_state_dict(decomposer.state_dict())
    with torch.no_grad():
        credits = scale * decomposer(obs, act, valid)
        exact = scale * noiseless(obs, act, valid)
    equal = true.mean(dim=2, keepdim=True)
    errors = {"error": credits - true, "exact_error": exact - true, "equal_error": equal - true}
    result = {name: (error.square().mean().sqrt() / true.std()).item() for name, error in errors.items()}
    result["explained_variance"] = explained_variance(credits.sum(dim=(1, 2)), true.sum(dim=(1, 2)))
    key = {"script": script, "game": kind, "num_agents": num_agents, "seed": seed, "updates": updates}
    return [key | {name: round(value, 4) for name, value in result.items()}]


def measure(args: Args) -> None:
    kinds, path = ("additive", "pairwise", "multiplicative"), args.results / "shapley_games.csv"
    jobs = [(script, kind, n) for script in NAMES for kind in kinds for n in args.num_agents]
    jobs = [(*job, seed, args.updates) for seed in args.seeds for job in jobs]
    jobs = missing(path, ("script", "game", "num_agents", "seed", "updates"), jobs)
    in_processes(play_game, jobs, args.workers, path)


def report(args: Args, rows: list[dict]) -> None:
    agents = sorted({int(row["num_agents"]) for row in rows})
    figure = matplotlib.figure.Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    head = " | ".join(f"{n} agents" for n in agents)
    print(f"\n| team reward | credits | {head} |\n" + "|---" * (2 + len(agents)) + "|")
    for k, kind in enumerate(dict.fromkeys(row["game"] for row in rows)):
        for script, style in ((STAS, "o-"), (ML, "o--")):
            some = [row for row in rows if (row["game"], row["script"]) == (kind, script)]
            values = {
                name: [[float(row[name]) for row in some if row["num_agents"] == str(n)] for n in agents]
                for name in ("error", "exact_error", "equal_error", "explained_variance")
            }
            if not all(values["error"]):  # unfinished
                continue
            cells = " | ".join(
                f"{np.mean(error):.2f}, {np.mean(exact):.2f} ({np.mean(explained):.2f})"
                for error, exact, explained in zip(values["error"], values["exact_error"], values["explained_variance"])
            )
            print(f"| {kind} | {NAMES[script]} | {cells} |")
            for axis, name in ((left, "error"), (right, "explained_variance")):
                draw_ranges(axis, agents, values[name], style, f"C{k}", f"{kind}, {NAMES[script]}")
            if script == STAS:
                equal = [np.mean(v) for v in values["equal_error"]]
                print(f"| {kind} | equal shares of the true reward | " + " | ".join(f"{v:.2f}" for v in equal) + " |")
                left.plot(agents, equal, ":", color=f"C{k}", label=f"{kind}, equal shares of the true reward")
    left.axhline(1, color="gray", linewidth=0.8, label="the same credit everywhere")
    left.set_ylabel("distance to the Shapley values\n(rms, in their standard deviations)")
    right.set_ylabel("explained variance of the return")
    for axis in (left, right):
        axis.set(xlabel="agents", xticks=agents)
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    seeds = len({row["seed"] for row in rows})
    title = (
        f"Credits learned from returns alone, by kind of team reward: mean of {seeds} seeds, bars = lowest to highest"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(args.results / "shapley_games.png", dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_flags(args)
    if not args.report:
        measure(args)
    rows = read(args.results / "shapley_games.csv")
    if rows:
        report(args, rows)
