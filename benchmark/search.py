"""The same search of PPO's settings for each kind of credit, on seeds other than those of the tables with intervals.

    python benchmark/search.py --tasks "tag 3, lambda 1" --settings "lambda 0.9" --rows episodic    # if it is missing
    python benchmark/search.py --report                                                            # only the tables
    python benchmark/search.py                                                                     # all, in 12 hours

Runs and files are those of learning.py, in benchmark/results/tuning.
"""

from dataclasses import dataclass, field
from typing import Literal

import learning
import numpy as np
import tuning
import tyro

SETTINGS = {  # name: flags after those of the task in learning.py
    "default": "",
    "learning rate 2.5e-4": "--learning-rate 2.5e-4",
    "learning rate 5e-4": "--learning-rate 5e-4",
    "learning rate 2e-3": "--learning-rate 2e-3",
    "lambda 0.98": "--gae-lambda 0.98",
    "lambda 0.95": "--gae-lambda 0.95",
    "lambda 0.95, learning rate 2.5e-4": "--gae-lambda 0.95 --learning-rate 2.5e-4",
    "lambda 0.95, learning rate 5e-4": "--gae-lambda 0.95 --learning-rate 5e-4",
    "lambda 0.9": "--gae-lambda 0.9",
    "lambda 0.9, learning rate 5e-4": "--gae-lambda 0.9 --learning-rate 5e-4",
    "lambda 1": "--gae-lambda 1",
    "gamma 1": "--gamma 1",
    "gamma 1, lambda 1": "--gamma 1 --gae-lambda 1",
    "gamma 1, lambda 0.9": "--gamma 1 --gae-lambda 0.9",
    "gamma 1, learning rate 5e-4": "--gamma 1 --learning-rate 5e-4",
    "64 episodes an iteration": "--num-envs 64",
    "entropy 0.03": "--ent-coef 0.03",
}
# The tasks' own settings: gamma 1, lambda 1, learning rate 1e-3; push: gamma 0.98, lambda 0.95.
TASKS = ["spread 3", "spread 6", "spread 15", "spread 3, 50 steps", "spread 3, 100 steps"]
TASKS += ["tag 3, lambda 1", "tag 6, learning rate 1e-3", "push 3, gamma 0.98"]
CREDITS = ["stas", "episodic", "dense"]


@dataclass
class Args(tuning.Args):
    tasks: list[Literal[tuple(TASKS)]] = field(default_factory=lambda: TASKS)
    """tasks to run"""
    settings: list[Literal[tuple(SETTINGS)]] = field(default_factory=lambda: list(SETTINGS))
    """settings to run"""
    rows: list[Literal[tuple(CREDITS)]] = field(default_factory=lambda: CREDITS)
    """kinds of credit to run"""


def table(args: Args, task: str, rows: list[dict]) -> str:
    """Last training return and, in brackets, the mean of the whole training by setting and credit, of those that there
    are results of; means over the seeds."""
    cells: dict[tuple[str, str], str] = {}
    for setting in SETTINGS:
        for credit in CREDITS:
            if some := tuning.select(args, rows, task, credit, SETTINGS[setting]):
                last, whole = (np.mean(learning.values(some, c)) for c in ("training_return", "mean_return"))
                cells[setting, credit] = f"{last:.2f} ({whole:.2f})"
    names = [credit for credit in CREDITS if any(credit == name for _, name in cells)]
    lines = [f"| {task} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for setting in SETTINGS:
        found = [cells.get((setting, credit), "") for credit in names]
        if any(found):
            lines.append(f"| {setting} | {' | '.join(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    args = tyro.cli(Args)
    wanted = [(task, row, SETTINGS[setting]) for task in args.tasks for setting in args.settings for row in args.rows]
    rows = tuning.results_of(args, wanted)
    for task in [task for task in args.tasks if any(row["task"] == task for row in rows)]:
        print(f"\n{table(args, task, rows)}")
