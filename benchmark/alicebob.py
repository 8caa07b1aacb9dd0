"""The Alice & Bob table: how reliably and how fast each kind of credit finds the treasure.

    python benchmark/alicebob.py                  # all runs that are still missing, then the tables and the figure
    python benchmark/alicebob.py --variants stas  # only these
    python benchmark/alicebob.py --report         # only the tables and the figure

Each run is a call of stas_ippo_alicebob.py. Its row is appended to benchmark/results/alicebob.csv and its curve to
alicebob_curves.csv as soon as it ends, so the benchmark can be stopped and started at any time.
"""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, append, check_flags, read, run_all, train

VARIANTS = {  # name: flags, seeds
    "stas": ("", 10),
    "stas, conserve none": ("--conserve none", 5),
    "temporal": ("--credit temporal", 5),
    "uniform": ("--credit uniform", 5),
    "episodic": ("--credit episodic", 10),
    "dense": ("--credit dense", 5),
}
PASSED = 0.9


@dataclass
class Args:
    variants: list[Literal[tuple(VARIANTS)]] = field(default_factory=lambda: list(VARIANTS))
    """rows of the table to run"""
    seeds: int | None = None
    """seeds 1 to this (default: as many as the table needs)"""
    workers: int = 2
    """runs side by side; for the times of the README 1, on two threads, with nothing else running"""
    threads: int = 1
    """CPU threads of each run"""
    flags: str = ""
    """more flags for every run"""
    results: Path = RESULTS
    """folder of the results; give another one along with --flags"""
    keep: bool = False
    """keep the run folders, in runs/ below the results, for TensorBoard and evaluate.py"""
    report: bool = False
    """run nothing"""


def flags_of(args: Args, variant: str) -> str:
    return " ".join(f"{VARIANTS[variant][0]} {args.flags}".split())


def run(args: Args, variant: str, seed: int) -> None:
    """One training run; its row and its curve go into the results."""
    flags = flags_of(args, variant).split()
    run_dir = args.results / "runs" / f"{variant.replace(', ', '-').replace(' ', '_')}-{seed}"
    metrics, summary = train("stas_ippo_alicebob.py", ["--seed", str(seed), *flags], run_dir, args.threads)
    passed = next((row for row in metrics if float(row["charts/treasure_rate"]) >= PASSED), None)
    result = {
        "variant": variant,
        "seed": seed,
        "flags": " ".join(flags),
        "threads": args.threads,
        "treasure_rate": summary["eval/treasure_rate"],
        "length": round(summary["eval/episodic_length"], 2),
        "return": round(summary["eval/episodic_return"], 2),
        "steps_to_90": passed["global_step"] if passed else "",
        "seconds_to_90": round(float(passed["wall_time"]), 1) if passed else "",
        "steps": summary["global_step"],
        "seconds": round(summary["wall_time"], 1),
    }
    columns = {"step": "global_step", "treasure_rate": "charts/treasure_rate", "length": "charts/episodic_length"}
    key = {"variant": variant, "seed": seed, "threads": args.threads}
    append(args.results / "alicebob_curves.csv", [key | {k: row[v] for k, v in columns.items()} for row in metrics])
    append(args.results / "alicebob.csv", [result])
    if not args.keep:
        shutil.rmtree(run_dir)
    print(result, flush=True)


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """median (smallest to largest)"""
    low, middle, high = (form.format(x) for x in (min(values), np.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def table(rows: list[dict]) -> str:
    """Medians over seeds with ranges. A run that never passed 0.9 counts as later than all."""
    head = "credit | final rate >= 0.9 | final treasure rate | episode length | thousand steps to 0.9 | seconds to 0.9"
    lines = [f"| {head} |", "|---|---|---|---|---|---|"]
    for variant in VARIANTS:
        runs = [row for row in rows if row["variant"] == variant]
        if not runs:
            continue
        rates = [float(row["treasure_rate"]) for row in runs]
        steps = [float(row["steps_to_90"] or "inf") / 1000 for row in runs]
        seconds = [float(row["seconds_to_90"] or "inf") for row in runs]
        to_90 = " | ".join(spread(x, "{:.0f}").replace("inf", "never") for x in (steps, seconds))
        lengths = spread([float(row["length"]) for row in runs], "{:.1f}")
        reached = f"{sum(rate >= PASSED for rate in rates)} of {len(runs)}"
        lines.append(f"| {variant} | {reached} | {spread(rates)} | {lengths} | {to_90} |")
    return "\n".join(lines)


def draw(curves: list[dict], path: Path) -> None:
    """Treasure rate against environment steps: median over seeds, band from the lowest to the highest seed."""
    figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, variant in enumerate(VARIANTS):
        seeds = sorted({row["seed"] for row in curves if row["variant"] == variant}, key=int)
        if not seeds:
            continue
        runs = [[row for row in curves if row["variant"] == variant and row["seed"] == seed] for seed in seeds]
        runs = [[(float(row["step"]), float(row["treasure_rate"])) for row in run] for run in runs]
        grid = np.linspace(0, min(run[-1][0] for run in runs), 100)
        values = np.array([np.interp(grid, *zip(*run)) for run in runs])
        axis.plot(grid / 1000, np.median(values, axis=0), color=f"C{i}", label=f"{variant} ({len(runs)} seeds)")
        axis.fill_between(grid / 1000, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.12, linewidth=0)
    axis.set(xlabel="environment steps (thousands)", ylabel="treasure rate in training", ylim=(-0.02, 1.02))
    axis.set_title("Alice & Bob by kind of credit: median over seeds, band = lowest to highest seed", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_flags(args)
    rows = read(args.results / "alicebob.csv")
    done = {(row["variant"], int(row["seed"]), int(row["threads"]), row["flags"]) for row in rows}
    wanted = [(name, seed) for name in args.variants for seed in range(1, (args.seeds or VARIANTS[name][1]) + 1)]
    wanted = [job for job in wanted if (*job, args.threads, flags_of(args, job[0])) not in done]
    if not args.report:
        run_all(partial(run, args), wanted, args.workers)
    rows = sorted(read(args.results / "alicebob.csv"), key=lambda row: int(row["seed"]))
    rows = [row for row in rows if row["flags"] == flags_of(args, row["variant"])]  # never two settings in one row
    for threads in sorted({row["threads"] for row in rows}):
        print(f"\n{threads} CPU threads a run:\n\n{table([row for row in rows if row['threads'] == threads])}")
        for variant in VARIANTS:
            seconds = [float(row["seconds"]) for row in rows if (row["variant"], row["threads"]) == (variant, threads)]
            if seconds:
                print(f"\n{variant}: whole training {spread(seconds, '{:.0f}')} seconds", end="")
        print()
    curves = read(args.results / "alicebob_curves.csv")
    draw([row for row in curves if row["threads"] == str(args.threads)], args.results / "alicebob.png")
