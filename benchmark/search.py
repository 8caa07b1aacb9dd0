"""The same search of PPO's settings for each kind of credit, on seeds other than those of the tables with intervals.

    python benchmark/search.py                                           # all that is missing, then the tables
    python benchmark/search.py --settings "lambda 0.9" --rows episodic   # only these
    python benchmark/search.py --report                                  # only the tables

One setting is changed at a time. Runs and files are those of learning.py, in benchmark/results/tuning.
"""

from dataclasses import dataclass, field
from typing import Literal

import learning
import numpy as np
import tuning
import tyro

SETTINGS = {  # name: flags after those of the task in learning.py; the tasks below
    "default": "",
    "learning rate 5e-4": "--learning-rate 5e-4",
    "learning rate 2e-3": "--learning-rate 2e-3",
    "lambda 0.95": "--gae-lambda 0.95",
    "lambda 0.9": "--gae-lambda 0.9",
    "64 episodes an iteration": "--num-envs 64",
    "entropy 0.03": "--ent-coef 0.03",
    "gamma 1": "--gamma 1",
    "lambda 1": "--gae-lambda 1",
    "gamma 1, lambda 1": "--gamma 1 --gae-lambda 1",
}
LONG = ["default", "gamma 1", "lambda 1", "gamma 1, lambda 1"]  # the default of push: gamma 0.98, lambda 0.95
SHORT = [name for name in SETTINGS if name not in LONG[1:]]  # of the others: gamma 1, lambda 1
TASKS = {"spread 3": SHORT, "tag 3, lambda 1": SHORT, "push 3": LONG}
CREDITS = ["stas", "episodic", "dense"]


@dataclass
class Args(tuning.Args):
    tasks: list[Literal[tuple(TASKS)]] = field(default_factory=lambda: list(TASKS))
    """tasks to run"""
    settings: list[Literal[tuple(SETTINGS)]] = field(default_factory=lambda: list(SETTINGS))
    """settings to run, of those that the task has"""
    rows: list[Literal[tuple(CREDITS)]] = field(default_factory=lambda: CREDITS)
    """kinds of credit to run"""


def table(args: Args, task: str, rows: list[dict]) -> str:
    """Last training return and, in brackets, the mean of the whole training by setting and credit, of those that there
    are results of; means over the seeds."""
    cells: dict[tuple[str, str], str] = {}
    for setting in TASKS[task]:
        for credit in CREDITS:
            if some := tuning.select(args, rows, task, credit, SETTINGS[setting]):
                last, whole = (np.mean(learning.values(some, c)) for c in ("training_return", "mean_return"))
                cells[setting, credit] = f"{last:.2f} ({whole:.2f})"
    names = [credit for credit in CREDITS if any(credit == name for _, name in cells)]
    lines = [f"| {task} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for setting in [each for each in TASKS[task] if any(each == known for known, _ in cells)]:
        found = " | ".join(cells.get((setting, credit), "") for credit in names)
        lines.append(f"| {setting} | {found} |")
    return "\n".join(lines)


if __name__ == "__main__":
    args = tyro.cli(Args)
    wanted = [
        (task, row, SETTINGS[setting])
        for task in args.tasks
        for setting in TASKS[task]
        if setting in args.settings
        for row in args.rows
    ]
    rows = tuning.results_of(args, wanted)
    for task in [task for task in args.tasks if any(row["task"] == task for row in rows)]:
        print(f"\n{table(args, task, rows)}")
