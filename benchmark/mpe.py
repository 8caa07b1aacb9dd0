"""The MPE table of the README: what a team earns on mpe2 after learning from each kind of credit.

    python benchmark/mpe.py                       # all runs that are still missing, then the tables and the figure
    python benchmark/mpe.py --scenarios spread    # only these
    python benchmark/mpe.py --report              # only the tables and the figure

Each run is a call of stas_ippo_mpe.py. Its row is appended to benchmark/results/mpe.csv and its curve to mpe_curves.csv
as soon as it ends, so the benchmark can be stopped and started at any time.
"""

import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, T_95, append, interval, late, read, run_all, train

CREDITS = {  # name: flags
    "stas": "",
    "stas, conserve none": "--conserve none",
    "temporal": "--credit temporal",
    "uniform": "--credit uniform",
    "episodic": "--credit episodic",
    "dense": "--credit dense",
    "shapley": "--credit shapley",
    "difference": "--credit difference",
}
ONLY_IN_SPREAD = ("stas, conserve none", "shapley", "difference")


@dataclass
class Args:
    scenarios: list[str] = field(default_factory=lambda: ["spread", "tag"])
    """scenarios to run"""
    credits: list[str] = field(default_factory=lambda: list(CREDITS))
    """rows of the table to run"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """seeds to run, at most 10"""
    workers: int = 2
    """runs side by side, one CPU thread each"""
    flags: str = ""
    """more flags for every run"""
    results: Path = RESULTS
    """folder of the results; give another one along with --flags"""
    report: bool = False
    """run nothing"""


def flags_of(args: Args, scenario: str, credit: str) -> str:
    return " ".join(f"--scenario {scenario} {CREDITS[credit]} {args.flags}".split())


def run(args: Args, scenario: str, credit: str, seed: int) -> None:
    """One training run; its row and its curve go into the results."""
    flags = flags_of(args, scenario, credit).split()
    run_dir = args.results / "runs" / f"{scenario}-{credit.replace(', ', '-').replace(' ', '_')}-{seed}"
    metrics, summary = train("stas_ippo_mpe.py", ["--seed", str(seed), *flags], run_dir)
    key = {"scenario": scenario, "credit": credit, "seed": seed}
    result = key | {
        "flags": " ".join(flags),
        "return": round(summary["eval/episodic_return"], 3),
        "random_return": round(summary["random/episodic_return"], 3),
        "training_return": late(metrics, "charts/episodic_return"),
        "entropy": late(metrics, "losses/entropy"),
        "reward_correlation": late(metrics, "decomposer/reward_correlation"),
        "shapley_correlation": late(metrics, "decomposer/shapley_correlation"),
        "explained_variance": late(metrics, "decomposer/explained_variance"),
        "credit_std": late(metrics, "decomposer/credit_std"),
        "decomposer_share": round(float(np.mean([share(row) for row in metrics])), 3),
        "steps": summary["global_step"],
        "seconds": round(summary["wall_time"], 1),
    }
    columns = {"step": "global_step", "return": "charts/episodic_return"}
    thin = metrics[:: max(1, len(metrics) // 40)]
    append(args.results / "mpe_curves.csv", [key | {k: row[v] for k, v in columns.items()} for row in thin])
    append(args.results / "mpe.csv", [result])
    shutil.rmtree(run_dir)
    print(result, flush=True)


def share(row: dict) -> float:
    """The decomposer's share of an iteration's time."""
    parts = [float(row[f"time/{name}"]) for name in ("decomposer", "rollout", "ppo")]
    return parts[0] / sum(parts)


def table(rows: list[dict]) -> str:
    """The README's table of one scenario."""
    head = (
        "credit | seeds | return on mpe2 | last training return | *when* | *who* | entropy | decomposer's share of time"
    )
    lines = [f"| {head} |", "|---" * 8 + "|"]
    for credit in CREDITS:
        runs = [row for row in rows if row["credit"] == credit]
        if runs:
            names = ("return", "training_return", "reward_correlation", "shapley_correlation", "entropy")
            cells = [interval([float(row[name]) for row in runs if row[name]]) for name in names]
            part = f"{np.mean([float(row['decomposer_share']) for row in runs]):.0%}"
            lines.append(f"| {credit} | {len(runs)} | {' | '.join(cells)} | {part} |")
    return "\n".join(lines)


def draw(curves: list[dict], rows: list[dict], path: Path) -> None:
    """Team return in training against environment steps: mean over seeds, band from the lowest to the highest seed."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(6.5 * len(scenarios), 4.4), layout="constrained")
    for axis, scenario in zip(figure.subplots(1, len(scenarios), squeeze=False)[0], scenarios):
        for i, credit in enumerate(CREDITS):
            some = [row for row in curves if (row["scenario"], row["credit"]) == (scenario, credit)]
            runs = [[row for row in some if row["seed"] == seed] for seed in sorted({row["seed"] for row in some})]
            if not runs:
                continue
            points = [sorted({float(row["step"]): float(row["return"]) for row in run}.items()) for run in runs]
            grid = np.linspace(max(p[0][0] for p in points), min(p[-1][0] for p in points), 100)
            values = np.array([np.interp(grid, *zip(*p)) for p in points])
            axis.plot(grid / 1000, values.mean(axis=0), color=f"C{i}", label=f"{credit} ({len(runs)} seeds)")
            axis.fill_between(
                grid / 1000, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.1, linewidth=0
            )
        axis.set(xlabel="environment steps (thousands)", ylabel="team return in training", title=scenario)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("By kind of credit: mean over seeds, band = lowest to highest seed", fontsize=10)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    if not 1 <= len(set(args.seeds)) <= max(T_95):
        sys.exit(f"error: --seeds: must be 1 to {max(T_95)} different seeds")
    done = {(row["flags"], row["credit"], int(row["seed"])) for row in read(args.results / "mpe.csv")}
    wanted = [(scenario, credit, seed) for seed in args.seeds for scenario in args.scenarios for credit in args.credits]
    wanted = [job for job in wanted if job[0] == "spread" or job[1] not in ONLY_IN_SPREAD]
    wanted = [job for job in wanted if (flags_of(args, *job[:2]), *job[1:]) not in done]
    if not args.report:
        run_all(partial(run, args), wanted, args.workers)
    rows = sorted(read(args.results / "mpe.csv"), key=lambda row: int(row["seed"]))
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        some = [row for row in rows if row["scenario"] == scenario]
        chance = interval([float(row["random_return"]) for row in some if row["credit"] == some[0]["credit"]])
        seconds = [float(row["seconds"]) for row in some if row["credit"] == "stas"]
        print(f"\n{scenario}: random team {chance}; a stas run trains for {interval(seconds, 0)} s\n\n{table(some)}")
    if rows:
        draw(read(args.results / "mpe_curves.csv"), rows, args.results / "mpe.png")
