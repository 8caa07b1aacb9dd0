"""The table of the particle environments: what a team earns on mpe2 after learning from each kind of credit.

    python benchmark/mpe.py                       # all runs that are still missing, then the tables and the figure
    python benchmark/mpe.py --scenarios spread    # only these
    python benchmark/mpe.py --report              # only the tables and the figure
    python benchmark/mpe.py --credits stas --flags="--mc-samples 20" --results /tmp/mc20    # another setting

Each run is a call of a script. Its row is appended to benchmark/results/mpe.csv and its curve to mpe_curves.csv as soon
as it ends, so the benchmark can be stopped and started at any time.
"""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, append, check_seeds, interval, late, read, run_all, train

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
    scenarios: list[Literal["spread", "tag", "push"]] = field(default_factory=lambda: ["spread", "tag"])
    """scenarios to run"""
    credits: list[Literal[tuple(CREDITS)]] = field(default_factory=lambda: list(CREDITS))
    """rows of the table to run"""
    script: Literal["stas_ippo_mpe.py", "stas_ml_ippo_mpe.py"] = "stas_ippo_mpe.py"
    """what to run: STAS or STAS-ML"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """seeds to run, at most 10"""
    keep: bool = False
    """keep the run folders, in runs/ below the results, for TensorBoard and evaluate.py"""
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
    name = f"{args.script.removesuffix('.py')}-{' '.join(flags).replace('--', '').replace(' ', '_')}-{seed}"
    run_dir = args.results / "runs" / name
    metrics, summary = train(args.script, ["--seed", str(seed), *flags], run_dir)
    key = {"script": args.script, "scenario": scenario, "credit": credit, "seed": seed, "flags": " ".join(flags)}
    result = key | {
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
    if not args.keep:
        shutil.rmtree(run_dir)
    print(result, flush=True)


def share(row: dict) -> float:
    """The decomposer's share of an iteration's time."""
    parts = [float(row[f"time/{name}"]) for name in ("decomposer", "rollout", "ppo")]
    return parts[0] / sum(parts)


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows with the same script and flags together, in the order of CREDITS; a name tells what they differ in."""
    order = {credit: i for i, credit in enumerate(CREDITS)}
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["script"], order[row["credit"]], row["flags"], int(row["seed"]))):
        usual = f"--scenario {row['scenario']} {CREDITS[row['credit']]}".strip()
        ml = "STAS-ML: " if row["script"].startswith("stas_ml") else ""
        found.setdefault(f"{ml}{row['credit']} {row['flags'].removeprefix(usual).strip()}".strip(), []).append(row)
    return found


def table(rows: list[dict]) -> str:
    """The table of one scenario."""
    head = (
        "credit | seeds | return on mpe2 | last training return | *when* | *who* | entropy | decomposer's share of time"
    )
    lines = [f"| {head} |", "|---" * 8 + "|"]
    for name, runs in groups(rows).items():
        columns = ("return", "training_return", "reward_correlation", "shapley_correlation", "entropy")
        cells = [interval([float(row[column]) for row in runs if row[column]]) for column in columns]
        part = f"{np.mean([float(row['decomposer_share']) for row in runs]):.0%}"
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {part} |")
    return "\n".join(lines)


def draw(curves: list[dict], rows: list[dict], path: Path) -> None:
    """Team return in training against environment steps: mean over seeds, band from the lowest to the highest seed."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(6.5 * len(scenarios), 4.4), layout="constrained")
    for axis, scenario in zip(figure.subplots(1, len(scenarios), squeeze=False)[0], scenarios):
        for i, (name, some) in enumerate(groups([row for row in curves if row["scenario"] == scenario]).items()):
            runs = [[row for row in some if row["seed"] == seed] for seed in sorted({row["seed"] for row in some})]
            points = [sorted({float(row["step"]): float(row["return"]) for row in run}.items()) for run in runs]
            grid = np.linspace(max(p[0][0] for p in points), min(p[-1][0] for p in points), 100)
            values = np.array([np.interp(grid, *zip(*p)) for p in points])
            axis.plot(grid / 1000, values.mean(axis=0), color=f"C{i}", label=f"{name} ({len(runs)} seeds)")
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
    check_seeds(args)
    keys = ("script", "flags", "credit", "seed")
    done = {tuple(row[key] for key in keys) for row in read(args.results / "mpe.csv")}
    wanted = [(scenario, credit, seed) for seed in args.seeds for scenario in args.scenarios for credit in args.credits]
    wanted = [job for job in wanted if job[0] == "spread" or job[1] not in ONLY_IN_SPREAD]
    wanted = [job for job in wanted if (args.script, flags_of(args, *job[:2]), job[1], str(job[2])) not in done]
    if not args.report:
        run_all(partial(run, args), wanted, args.workers)
    rows = read(args.results / "mpe.csv")
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        some = [row for row in rows if row["scenario"] == scenario]
        chance = interval([float(row["random_return"]) for row in some if row["credit"] == some[0]["credit"]])
        seconds = [float(row["seconds"]) for row in some if row["credit"] == "stas"]
        print(f"\n{scenario}: random team {chance}; a stas run trains for {interval(seconds, 0)} s\n\n{table(some)}")
    if rows:
        draw(read(args.results / "mpe_curves.csv"), rows, args.results / "mpe.png")
