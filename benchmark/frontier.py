"""Where the decomposer's time is well spent: return against seconds over its updates, batch size and buffer.

    python benchmark/frontier.py              # all runs that are missing, then the tables and the figure
    python benchmark/frontier.py --report     # only the tables and the figure

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


@dataclass
class Args:
    tasks: list[Literal[tuple(learning.TASKS)]] = field(default_factory=lambda: ["spread 3", "tag 3"])
    """tasks to run"""
    changes: list[Literal[tuple(CHANGES)]] = field(default_factory=lambda: list(CHANGES))
    """what to change, one at a time"""
    seeds: list[int] = field(default_factory=lambda: [11])
    """seeds to run"""
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
    """A table and a panel for each task; points are means over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(args.tasks), 4), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(args.tasks), squeeze=False)[0], args.tasks):
        print(f"\n{task}:\n\n| | seeds | last training return | mean of training | explained variance | seconds |")
        print("|---" * 6 + "|")
        for change in CHANGES:
            key = key_of(args, task, change)
            some = [row for row in rows if (row["task"], row["row"], row["flags"], row["threads"]) == (*key, "1")]
            if not some:
                continue
            columns = ("training_return", "mean_return", "explained_variance", "seconds")
            values = [np.mean([float(row[column]) for row in some if row[column]] or [np.nan]) for column in columns]
            fitted = "" if np.isnan(values[2]) else f"{values[2]:.2f}"
            print(f"| {change} | {len(some)} | {values[0]:.2f} | {values[1]:.2f} | {fitted} | {values[3]:.0f} |")
            axis.plot(values[3], values[0], "k*" if change == "default" else "o", markersize=9)
            offset = (6, 4) if change in ("default", "2 updates", "64 updates", "batch 128") else (6, -11)
            axis.annotate(change, (values[3], values[0]), xytext=offset, textcoords="offset points", fontsize=8)
        title = f"{task}: star = the default, the others change one thing"
        axis.set(title=title, xlabel="seconds of training, one thread", ylabel="last training return")
        axis.margins(0.15)
        axis.set_xlim(0, 1.1 * axis.get_xlim()[1])  # room for names
        axis.grid(alpha=0.3)
    figure.savefig(args.results / "frontier.png", dpi=110)


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
    keys = ("task", "row", "flags", "threads", "seed")
    jobs = [wanted[key] for key in missing(file, keys, list(wanted))]
    if not args.report:
        run_all(partial(run, args), jobs, args.workers)
    rows = read(file)
    if rows:
        report(args, rows)
