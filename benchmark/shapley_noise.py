"""What is random and what is biased in a credit, against the number of coalitions M, on decomposers trained on spread.

    python benchmark/shapley_noise.py             # what is still missing, then the table and the figure
    python benchmark/shapley_noise.py --report    # only the table and the figure

Rows go into benchmark/results/shapley_noise.csv; runs that were trained for them are removed afterwards.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, check_flags, draw_ranges, in_processes, load_run, missing, read, run_all, train

sys.path.insert(0, str(ROOT))
import stas_ippo_mpe
from stas_ippo_mpe import Decomposer, make_env, make_networks, sample_coalitions


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """seeds of the training runs"""
    num_agents: list[int] = field(default_factory=lambda: [3, 6, 15])
    """numbers of agents"""
    draws: int = 200
    """repeated draws in each of 48 states"""
    workers: int = 2
    """runs side by side, one CPU thread each"""
    flags: str = ""
    """more flags for every training run"""
    results: Path = RESULTS
    """folder of the results; give another one along with --flags"""
    report: bool = False
    """measure nothing"""


def load_states(run_dir: Path, count: int) -> tuple[Decomposer, torch.Tensor, float]:
    """A trained decomposer, what its Shapley block sees in `count` random steps of late episodes, the reward scale.

    The states are (count, N, D).
    """
    args, checkpoint = load_run(run_dir, stas_ippo_mpe)
    _, decomposer = make_networks(args, make_env(args, num_envs=1))
    decomposer.load_state_dict(checkpoint["decomposer"])
    torch.manual_seed(0)
    buffer = checkpoint["buffer"]["data"]
    latest = checkpoint["buffer"]["count"] - 1 - torch.randperm(min(1024, len(buffer["obs"])))[:64]
    obs, act, valid = (buffer[name][latest % len(buffer["obs"])] for name in ("obs", "act", "valid"))
    seen = []
    hook = decomposer.shapley.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        decomposer(obs, act, valid)
    hook.remove()
    return decomposer, seen[0][torch.randperm(len(seen[0]))[:count]], args.reward_scale


def independent_coalitions(kind: str, num_samples: int, batch: int, num_agents: int) -> tuple:
    """`sample_coalitions` without its antithetic pairs: as many draws of one."""
    masks = torch.cat([sample_coalitions(kind, 1, batch, num_agents)[0] for _ in range(num_samples)])
    return masks, torch.full((num_samples,), 1 / num_samples)


@torch.no_grad()
def noise_of(num_agents: int, seed: int, run_dir: Path, draws: int) -> list[dict]:
    """Rows of the noise and the error of a credit for every sampler and M, in raw reward units."""
    torch.set_num_threads(1)
    decomposer, states, reward_scale = load_states(run_dir, 48)
    S, N, _ = states.shape

    def credits(x: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return reward_scale * decomposer.scale * decomposer.head(decomposer.shapley(x, masks, weights)).squeeze(-1)

    everyone, shapley_weights = sample_coalitions("exact", 1, 1, N)
    limits = {}
    for kind, weights in (("shapley", shapley_weights), ("banzhaf", torch.full((len(everyone),), 1 / len(everyone)))):
        # A few states at a time, for there are 2^(N-1) coalitions.
        limits[kind] = torch.cat([credits(x, everyone, weights) for x in states.split(4)])  # (S, N)
    exact = limits["shapley"]
    key = {
        "num_agents": num_agents,
        "seed": seed,
        "total_std": exact.std().item(),
        "who_std": (exact - exact.mean(dim=1, keepdim=True)).square().mean().sqrt().item(),
        "bias": (limits["banzhaf"] - exact).square().mean().sqrt().item(),
    }
    rows = []
    samplers = {"pairs": sample_coalitions, "independent": independent_coalitions}
    for M in (1, 3, 5, 10, 30):
        for kind in ("bernoulli", "permutation"):
            for name, sampler in samplers.items():
                at_once = max(1, 20_000_000 // (S * M * N * N))
                parts = [min(at_once, draws - first) for first in range(0, draws, at_once)]
                drawn = [credits(states.repeat(r, 1, 1), *sampler(kind, M, r * S, N)) for r in parts]
                drawn = torch.cat(drawn).view(draws, S, N)
                noise, error = drawn.var(dim=0).mean().sqrt(), (drawn - exact).square().mean().sqrt()
                result = {"noise": noise.item(), "error": error.item()}
                rows.append(key | {"mc_samples": M, "coalition": kind, "draws": name} | result)
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def measure(args: Args) -> None:
    path = args.results / "shapley_noise.csv"
    jobs = missing(path, ("num_agents", "seed"), [(n, seed) for n in args.num_agents for seed in args.seeds])
    run_dirs = {job: args.results / "runs" / f"shapley_noise-{job[0]}-{job[1]}" for job in jobs}
    runs = []
    for (n, seed), run_dir in run_dirs.items():
        steps = 150_000 if n > 6 else 300_000  # the longer the better, but 15 agents take long
        flags = f"--seed {seed} --num-agents {n} --total-timesteps {steps} {args.flags}".split()
        if not (run_dir / "summary.json").exists():
            runs.append(("stas_ippo_mpe.py", flags, run_dir))
    run_all(train, runs, args.workers)
    in_processes(noise_of, [(*job, run_dir, args.draws) for job, run_dir in run_dirs.items()], args.workers, path)
    for run_dir in run_dirs.values():
        shutil.rmtree(run_dir)


def report(args: Args, rows: list[dict]) -> None:
    agents = sorted({int(row["num_agents"]) for row in rows})
    samples = sorted({int(row["mc_samples"]) for row in rows})
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(agents), 3.9), layout="constrained")
    columns = "agents | M | coalition | distance, independent draws | distance, pairs | noise, pairs | bias"
    print(f"\n| {columns} |\n" + "|---" * 7 + "|")
    for axis, N in zip(figure.subplots(1, len(agents), squeeze=False, sharey=True)[0], agents):
        for k, kind in enumerate(("bernoulli", "permutation")):
            distances: dict[str, list] = {"independent": [], "pairs": []}
            for M in samples:
                percent = {}
                for draws in distances:
                    key = {"num_agents": str(N), "mc_samples": str(M), "coalition": kind, "draws": draws}
                    some = [row for row in rows if key.items() <= row.items()]
                    for name in ("noise", "error", "bias"):
                        percent[name, draws] = [100 * float(row[name]) / float(row["who_std"]) for row in some]
                    distances[draws].append(percent["error", draws])
                order = [("error", "independent"), ("error", "pairs"), ("noise", "pairs")]
                cells = [f"{np.mean(v):.0f}% ({min(v):.0f} to {max(v):.0f})" for v in (percent[key] for key in order)]
                bias = np.mean(percent["bias", "pairs"]) if kind == "bernoulli" else 0
                print(f"| {N} | {M} | {kind} | " + " | ".join(cells) + f" | {bias:.0f}% |")
            for draws, style in (("pairs", "o-"), ("independent", "o:")):
                label = f"{kind}, {'antithetic pairs' if draws == 'pairs' else 'independent draws'}"
                draw_ranges(axis, samples, distances[draws], style, f"C{k}", label)
            if kind == "bernoulli":
                axis.axhline(bias, color="C0", linewidth=0.8, linestyle="--", label="bias of bernoulli")
        axis.set(xscale="log", yscale="log", xlabel="coalitions M", title=f"{N} agents")
        axis.set_xticks(samples, [str(m) for m in samples])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(
        "rms distance to the credit of all coalitions,\nin % of the std of credits between agents"
    )
    figure.axes[0].legend(fontsize=7)
    seeds = len({row["seed"] for row in rows})
    title = f"Decomposers trained on spread with bernoulli, M = 5: mean of {seeds} for each N, bars = lowest to highest"
    figure.suptitle(title, fontsize=10)
    figure.savefig(args.results / "shapley_noise.png", dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_flags(args)
    if not args.report:
        measure(args)
    rows = read(args.results / "shapley_noise.csv")
    if rows:
        report(args, rows)
