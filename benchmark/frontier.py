"""Where the decomposer's time is well spent: return against seconds over its updates, batch size and buffer.

    python benchmark/frontier.py              # all runs that are missing, then the table and the figure
    python benchmark/frontier.py --report     # only the table and the figure

Every run makes the same number of environment steps with one setting changed. The seed is one of those on which the
defaults were chosen. Runs and files are those of learning.py, in benchmark/results/tuning.
"""

from dataclasses import dataclass, field
from typing import Literal

import learning
import matplotlib.figure
import numpy as np
import tuning
import tyro

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
class Args(tuning.Args):
    tasks: list[Literal[tuple(learning.TASKS)]] = field(default_factory=lambda: ["spread 3", "tag 3, lambda 1"])
    """tasks to run"""
    changes: list[Literal[tuple(CHANGES)]] = field(default_factory=lambda: list(CHANGES))
    """what to change, one at a time"""


def report(args: Args, rows: list[dict]) -> None:
    """A table of all tasks, and a panel for each; both are of means over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(args.tasks), 4), layout="constrained")
    cells: dict[str, list[str]] = {change: [] for change in CHANGES}
    for axis, task in zip(figure.subplots(1, len(args.tasks), squeeze=False)[0], args.tasks):
        for change in CHANGES:
            some = tuning.select(args, rows, task, *CHANGES[change])
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
    wanted = [(task, *CHANGES[change]) for task in args.tasks for change in args.changes]
    if rows := tuning.results_of(args, wanted):
        report(args, rows)
