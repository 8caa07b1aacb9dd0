"""Where the decomposer's time is well spent: return against seconds over its updates, batch size and buffer.

    python benchmark/frontier.py              # all runs that are missing, then the tables and the figure
    python benchmark/frontier.py --report     # only the tables and the figure

Every run makes the same number of environment steps with one setting changed. The seed is one of those on which the
defaults were chosen. Each row goes into benchmark/results/frontier.csv as soon as its run ends.
"""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, append, check_seeds, late, missing, read, run_all, train

CHANGES = {  # name: flags
    "default": "",
    "2 updates": "--decomposer-updates 2",
    "8 updates": "--decomposer-updates 8",
    "64 updates": "--decomposer-updates 64",
    "batch 8": "--decomposer-batch-size 8",
    "batch 128": "--decomposer-batch-size 128",
    "buffer 1,024": "--buffer-size 1024",
    "episodic": "--credit episodic",
    "dense": "--credit dense",
}


@dataclass
class Args:
    scenarios: list[str] = field(default_factory=lambda: ["spread", "tag"])
    """scenarios to run"""
    changes: list[Literal[tuple(CHANGES)]] = field(default_factory=lambda: list(CHANGES))
    """what to change, one at a time"""
    seeds: list[int] = field(default_factory=lambda: [11])
    """seeds to run"""
    workers: int = 2
    """runs side by side, one CPU thread each"""
    flags: str = ""
    """more flags for every run"""
    results: Path = RESULTS
    """folder of the results; give another one along with --flags"""
    report: bool = False
    """run nothing"""


def run(args: Args, scenario: str, change: str, seed: int) -> None:
    """One training run; its row goes into the results."""
    run_dir = args.results / "runs" / f"frontier-{scenario}-{change}-{seed}".replace(" ", "_").replace(",", "")
    flags = f"--scenario {scenario} --seed {seed} {CHANGES[change]} {args.flags}".split()
    metrics, summary = train("stas_ippo_mpe.py", flags, run_dir)
    result = {
        "scenario": scenario,
        "change": change,
        "seed": seed,
        "training_return": late(metrics, "charts/episodic_return"),
        "mean_return": round(float(np.mean([float(row["charts/episodic_return"]) for row in metrics])), 4),
        "explained_variance": late(metrics, "decomposer/explained_variance"),
        "steps": summary["global_step"],
        "seconds": round(summary["wall_time"], 1),
    }
    append(args.results / "frontier.csv", [result])
    shutil.rmtree(run_dir)
    print(result, flush=True)


def report(rows: list[dict], path: Path) -> None:
    """A table and a panel for each scenario; points are means over the seeds."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(scenarios), 4), layout="constrained")
    for axis, scenario in zip(figure.subplots(1, len(scenarios), squeeze=False)[0], scenarios):
        print(f"\n{scenario}:\n\n| | seeds | last training return | mean of training | explained variance | seconds |")
        print("|---" * 6 + "|")
        for change in CHANGES:
            some = [row for row in rows if (row["scenario"], row["change"]) == (scenario, change)]
            if not some:
                continue
            columns = ("training_return", "mean_return", "explained_variance", "seconds")
            values = [np.mean([float(row[column]) for row in some if row[column]] or [np.nan]) for column in columns]
            fitted = "" if np.isnan(values[2]) else f"{values[2]:.2f}"
            print(f"| {change} | {len(some)} | {values[0]:.2f} | {values[1]:.2f} | {fitted} | {values[3]:.0f} |")
            axis.plot(values[3], values[0], "k*" if change == "default" else "o", markersize=9)
            axis.annotate(change, (values[3], values[0]), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axis.set(
            title=scenario, xlabel="seconds of training, one thread", ylabel="last training return", xlim=(0, None)
        )
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_seeds(args)
    jobs = [(scenario, change, seed) for seed in args.seeds for scenario in args.scenarios for change in args.changes]
    jobs = missing(args.results / "frontier.csv", ("scenario", "change", "seed"), jobs)
    if not args.report:
        run_all(partial(run, args), jobs, args.workers)
    rows = read(args.results / "frontier.csv")
    if rows:
        report(rows, args.results / "frontier.png")
