"""Where the decomposer's time is well spent: return against seconds over its updates, batch size and buffer.

    python benchmark/frontier.py              # all runs that are missing, then the table and the figure
    python benchmark/frontier.py --report     # only the table and the figure

Every run makes the same number of environment steps with one setting changed. The seed is one of those on which the
defaults were chosen. Runs and files are those of learning.py, in benchmark/results/tuning.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import learning
import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, check_flags, missing, read, run_all

CHANGES = {  # name: row of learning.py, flags
    "default": ("stas", ""),
    "2 updates": ("stas", "--decomposer-updates 2"),
    "8 updates": ("stas", "--decomposer-updates 8"),
    "64 updates": ("stas", "--decomposer-updates 64"),
    "batch 8": ("stas", "--decomposer-batch-size 8"),
    "batch 128": ("stas", "--decomposer-batch-size 128"),
    "buffer 1,024": ("stas", "--buffer-size 1024"),
    "episodic": ("episodic", ""),
    "dense": ("dense", ""),
}
KEYS = ("task", "row", "flags", "threads", "seed")  # the columns of learning.csv that tell runs apart


@dataclass
class Args:
    tasks: list[Literal[tuple(learning.TASKS)]] = field(default_factory=lambda: ["spread 3", "tag 3, lambda 1"])
    """tasks to run"""
    changes: list[Literal[tuple(CHANGES)]] = field(default_factory=lambda: list(CHANGES))
    """what to change, one at a time"""
    seeds: list[int] = field(default_factory=lambda: [11])
    """seeds to run and report"""
    workers: int = 2
    """runs side by side, one CPU thread each"""
    flags: str = ""
    """more flags for every run"""
    results: Path = RESULTS / "tuning"
    """folder of the results"""
    report: bool = False
    """run nothing"""


def args_of(args: Args, flags: str) -> learning.Args:
    """What learning.py is to run with the flags of a change."""
    return learning.Args(flags=f"{flags} {args.flags}".strip(), results=args.results)


def key_of(args: Args, task: str, change: str) -> tuple[str, str, str]:
    """Task, row and flags by which learning.csv knows the runs of a change."""
    row, flags = CHANGES[change]
    return task, row, learning.flags_of(args_of(args, flags), task, row)


def run(args: Args, task: str, change: str, seed: int) -> None:
    row, flags = CHANGES[change]
    learning.run(args_of(args, flags), task, row, seed)


def report(args: Args, rows: list[dict]) -> None:
    """A table of all tasks, and a panel for each; both are of means over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(args.tasks), 4), layout="constrained")
    cells: dict[str, list[str]] = {change: [] for change in CHANGES}
    for axis, task in zip(figure.subplots(1, len(args.tasks), squeeze=False)[0], args.tasks):
        for change in CHANGES:
            key = key_of(args, task, change)
            some = [row for row in rows if tuple(row[each] for each in KEYS[:-1]) == (*key, "1")]
            some = [row for row in some if int(row["seed"]) in args.seeds]
            if not some:
                cells[change] += ["", "", ""]
                continue
            columns = ("training_return", "mean_return", "explained_variance", "seconds")
            last, mean, fitted, seconds = (np.mean(learning.values(some, c) or [np.nan]) for c in columns)
            fit = "" if np.isnan(fitted) else f"{fitted:.2f}"
            cells[change] += [f"{last:.2f} ({mean:.2f})", fit, f"{seconds:.0f}"]
            axis.plot(seconds, last, "k*" if change == "default" else "o", markersize=9)
            offset = (6, 4) if change in ("default", "2 updates", "64 updates", "batch 128") else (6, -11)
            axis.annotate(change, (seconds, last), xytext=offset, textcoords="offset points", fontsize=8)
        title = f"{task} (star: the default, others change one thing)"
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="seconds of training, one thread", ylabel="last training return")
        axis.margins(0.15)
        axis.set_xlim(0, 1.1 * axis.get_xlim()[1])  # room for names
        axis.grid(alpha=0.3)
    figure.savefig(args.results / "frontier.png", dpi=110)
    print(f"| | {' | '.join(f'{task} | explained variance | seconds' for task in args.tasks)} |")
    print("|---" * (1 + 3 * len(args.tasks)) + "|")
    for change in [change for change in CHANGES if any(cells[change])]:
        print(f"| {change} | {' | '.join(cells[change])} |")


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_flags(args)
    file = args.results / "learning.csv"
    wanted = {
        (*key_of(args, task, change), 1, seed): (task, change, seed)
        for seed in args.seeds
        for task in args.tasks
        for change in args.changes
    }
    jobs = [wanted[key] for key in missing(file, KEYS, list(wanted))]
    if not args.report:
        run_all(partial(run, args), jobs, args.workers)
    rows = read(file)
    if rows:
        report(args, rows)
