"""The tables of the particle environments: what a team earns after learning from each kind of credit.

    python benchmark/mpe.py                                           # all runs that are missing, tables, figure
    python benchmark/mpe.py --tasks "tag 3" --rows stas episodic      # only these
    python benchmark/mpe.py --report                                  # only the tables and the figure
    python benchmark/mpe.py --flags="--mc-samples 20" --results /tmp/mc20    # another setting

Each run is a call of a script. Its row is appended to benchmark/results/mpe.csv and its curve to mpe_curves.csv as soon
as it ends, so the benchmark can be stopped and started at any time.
"""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, append, check_flags, check_seeds, interval, late, read, run_all, train

STAS, ML, PETTINGZOO = "stas_ippo_mpe.py", "stas_ml_ippo_mpe.py", "stas_ippo_pettingzoo.py"
TASKS = {  # name: flags, seeds
    "spread 3": ("", 5),
    "spread 6": ("--num-agents 6 --total-timesteps 345000", 5),
    "tag 3": ("--scenario tag", 8),
    "push 3": ("--scenario push --num-envs 64 --gamma 0.98 --gae-lambda 0.95 --total-timesteps 1500000", 5),
    "spread 15": ("--num-agents 15 --total-timesteps 345000", 3),
    "spread 3, 50 steps": ("--max-cycles 50 --num-envs 64", 3),
    "spread 3, 100 steps": ("--max-cycles 100 --num-envs 32", 3),
    "simple_reference": ("--env-id mpe2.simple_reference_v3 --total-timesteps 200000", 3),
    "simple_speaker_listener": ("--env-id mpe2.simple_speaker_listener_v4 --total-timesteps 200000", 3),
}
DEFAULT_TASKS = ["spread 3", "spread 6", "tag 3"]
ROWS = {  # name: script, flags
    "stas": (STAS, ""),
    "STAS-ML": (ML, ""),
    "stas, coalition all": (STAS, "--coalition all"),
    "stas, half shared": (STAS, "--own-share 0.5"),
    "stas, shared equally": (STAS, "--own-share 0"),
    "stas, conserve none": (STAS, "--conserve none"),
    "temporal": (STAS, "--credit temporal"),
    "uniform": (STAS, "--credit uniform"),
    "episodic": (STAS, "--credit episodic"),
    "dense": (STAS, "--credit dense"),
    "shapley": (STAS, "--credit shapley"),
    "difference": (STAS, "--credit difference"),
}
DEFAULT_ROWS = ["stas", "STAS-ML", "episodic", "dense"]


@dataclass
class Args:
    tasks: list[Literal[tuple(TASKS)]] = field(default_factory=lambda: DEFAULT_TASKS)
    """tables to make"""
    rows: list[Literal[tuple(ROWS)]] = field(default_factory=lambda: DEFAULT_ROWS)
    """rows of each table"""
    seeds: list[int] = field(default_factory=list)
    """seeds to run, at most 10 (default: from 1 on, as many as the task has)"""
    workers: int = 2
    """runs side by side, one CPU thread each"""
    keep: bool = False
    """keep the run folders, in runs/ below the results, for TensorBoard and evaluate.py"""
    flags: str = ""
    """more flags for every run"""
    results: Path = RESULTS
    """folder of the results; give another one along with --flags"""
    report: bool = False
    """run nothing"""


def flags_of(args: Args, task: str, row: str) -> str:
    return " ".join(f"{TASKS[task][0]} {ROWS[row][1]} {args.flags}".split())


def any_env(task: str) -> bool:
    """Whether a task is played on PettingZoo itself, for which there is one script."""
    return "--env-id" in TASKS[task][0]


def fits(task: str, row: str) -> bool:
    """Exact Shapley values and differences are known in spread only; STAS-ML has no script for any environment."""
    if row in ("shapley", "difference"):
        return task.startswith("spread")
    return row != "STAS-ML" or not any_env(task)


def run(args: Args, task: str, row: str, seed: int) -> None:
    """One training run; its row and its curve go into the results."""
    flags = flags_of(args, task, row)
    script = PETTINGZOO if any_env(task) else ROWS[row][0]
    name = f"{task}-{row}-{args.flags.replace('--', '')}-{seed}"
    run_dir = args.results / "runs" / name.replace(",", "").replace(" ", "_")
    metrics, summary = train(script, ["--seed", str(seed), *flags.split()], run_dir)
    key = {"task": task, "row": row, "seed": seed, "flags": flags}
    result = key | {
        "return": round(summary["eval/episodic_return"], 3),
        "random_return": round(summary["random/episodic_return"], 3),
        "training_return": late(metrics, "charts/episodic_return"),
        "mean_return": round(float(np.mean([float(each["charts/episodic_return"]) for each in metrics])), 4),
        "entropy": late(metrics, "losses/entropy"),
        "explained_variance": late(metrics, "decomposer/explained_variance"),
        "reward_correlation": late(metrics, "decomposer/reward_correlation"),
        "shapley_correlation": late(metrics, "decomposer/shapley_correlation"),
        "credit_std": late(metrics, "decomposer/credit_std"),
        "decomposer_share": round(float(np.mean([share(each) for each in metrics])), 3),
        "steps": summary["global_step"],
        "seconds": round(summary["wall_time"], 1),
    }
    columns = {"step": "global_step", "return": "charts/episodic_return"}
    thin = metrics[:: max(1, len(metrics) // 60)]
    append(args.results / "mpe_curves.csv", [key | {k: each[v] for k, v in columns.items()} for each in thin])
    append(args.results / "mpe.csv", [result])
    if not args.keep:
        shutil.rmtree(run_dir)
    print(result, flush=True)


def share(row: dict) -> float:
    """The decomposer's share of an iteration's time."""
    parts = [float(row[f"time/{name}"]) for name in ("decomposer", "rollout", "ppo")]
    return parts[0] / sum(parts)


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """Results of one task with the same row and flags together, in the order of ROWS; other flags are named."""
    order = {name: i for i, name in enumerate(ROWS)}
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (order[row["row"]], row["flags"], int(row["seed"]))):
        usual = " ".join(f"{TASKS[row['task']][0]} {ROWS[row['row']][1]}".split())
        found.setdefault(f"{row['row']} {row['flags'].removeprefix(usual).strip()}".strip(), []).append(row)
    return found


def paired(runs: list[dict], others: list[dict], column: str) -> list[float]:
    """runs - others of the seeds that both have."""
    known = {row["seed"]: float(row[column]) for row in others}
    return [float(row[column]) - known[row["seed"]] for row in runs if row["seed"] in known]


def table(rows: list[dict]) -> str:
    """The table of one task."""
    head = "credit | seeds | return on mpe2 | last training return | more than `episodic` | the same, mean of training"
    head += " | of the way to `dense` | explained variance | *when* | *who* | seconds"
    lines = [f"| {head} |", "|---" * 11 + "|"]
    found = groups(rows)
    for name, runs in found.items():
        extra = name.removeprefix(runs[0]["row"])  # other flags are compared with rows of the same
        episodic, dense = (found.get(other + extra, []) for other in ("episodic", "dense"))
        seeds = {row["seed"] for row in runs}
        whole = paired([row for row in dense if row["seed"] in seeds], episodic, "training_return")
        gain = paired(runs, episodic, "training_return")
        cells = [interval([float(row[column]) for row in runs]) for column in ("return", "training_return")]
        if runs[0]["row"] == "episodic":
            cells += ["", "", ""]
        else:
            cells += [interval(gain), interval(paired(runs, episodic, "mean_return"))]
            cells += [f"{np.mean(gain) / np.mean(whole):.0%}" if gain and whole else "-"]
        for column in ("explained_variance", "reward_correlation", "shapley_correlation"):
            values = [float(row[column]) for row in runs if row[column]]
            cells.append(interval(values) if values else "")
        seconds = np.mean([float(row["seconds"]) for row in runs])
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def draw(curves: list[dict], path: Path) -> None:
    """Team return in training against environment steps: mean over seeds, band from the lowest to the highest seed."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in curves)]
    names = {name for task in tasks for name in groups([row for row in curves if row["task"] == task])}
    order = [name for name in ROWS if name in names] + sorted(names - set(ROWS))
    colors = {name: matplotlib.colormaps["tab20"](2 * i % 20 + i // 10) for i, name in enumerate(order)}
    figure = matplotlib.figure.Figure(figsize=(5 * len(tasks), 3.8), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for name, some in groups([row for row in curves if row["task"] == task]).items():
            runs = [[row for row in some if row["seed"] == seed] for seed in sorted({row["seed"] for row in some})]
            points = [sorted({float(row["step"]): float(row["return"]) for row in run}.items()) for run in runs]
            grid = np.linspace(max(p[0][0] for p in points), min(p[-1][0] for p in points), 100)
            values = np.array([np.interp(grid, *zip(*p)) for p in points])
            axis.plot(grid / 1000, values.mean(axis=0), color=colors[name], label=f"{name} ({len(runs)} seeds)")
            band = {"color": colors[name], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(grid / 1000, values.min(axis=0), values.max(axis=0), **band)
        axis.set(xlabel="environment steps (thousands)", ylabel="team return in training", title=task)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("By kind of credit: mean over seeds, band = lowest to highest seed", fontsize=10)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    (check_seeds if args.seeds else check_flags)(args)
    keys = ("task", "row", "flags", "seed")
    done = {tuple(row[key] for key in keys) for row in read(args.results / "mpe.csv")}
    seeds = {task: args.seeds or range(1, TASKS[task][1] + 1) for task in args.tasks}
    wanted = [(task, row, seed) for task in args.tasks for seed in seeds[task] for row in args.rows]
    wanted = [job for job in wanted if fits(*job[:2]) and (*job[:2], flags_of(args, *job[:2]), str(job[2])) not in done]
    if not args.report:
        run_all(partial(run, args), wanted, args.workers)
    rows = read(args.results / "mpe.csv")
    for task in dict.fromkeys(row["task"] for row in rows):
        some = [row for row in rows if row["task"] == task]
        one = next(iter(groups(some).values()))
        print(f"\n{task}: random team {interval([float(row['random_return']) for row in one])}\n\n{table(some)}")
    if rows:
        draw(read(args.results / "mpe_curves.csv"), args.results / "mpe.png")
