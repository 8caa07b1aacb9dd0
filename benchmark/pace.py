"""How many steps `episodic` makes in the time of one of `stas`: PACE in learning.py. For an idle machine; resumable.

    python benchmark/pace.py            # every particle task of the grid, twice, in ten minutes
    python benchmark/pace.py --report

A turn trains `stas`, then `episodic`, and takes the median of each part of an iteration over the later two thirds of
them. In Alice & Bob the steps of an iteration shrink while it is learned, so the first iterations say nothing there.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from common import RESULTS, ROOT, append, missing, read
from learning import ALICEBOB, GRID, TASKS, usual_flags
from speed import measure

ROWS, PARTS = ("stas", "episodic"), ("rollout", "decomposer", "ppo")
TIMED = [task for task in GRID if TASKS[task][0] != ALICEBOB]


@dataclass
class Args:
    tasks: list[Literal[tuple(TIMED)]] = field(default_factory=lambda: TIMED)  # which of them
    turns: int = 2  # runs of each
    iterations: int = 9  # of a run
    results: Path = RESULTS  # folder of pace.csv
    report: bool = False  # time nothing


def run(args: Args, task: str, turn: int) -> None:
    """One turn, and its row."""
    flags = {row: f"{usual_flags(task, row)} --seed 1 --num-threads 1" for row in ROWS}
    times = {row: measure(ROOT, flags[row], args.iterations) for row in ROWS}
    parts = {f"{row} {part}": round(times[row][f"time/{part}"], 4) for row in ROWS for part in PARTS}
    append(args.results / "pace.csv", [{"task": task, "turn": turn} | parts])


def table(rows: list[dict]) -> str:
    """The ratio of each turn, and the parts of `stas`, means over turns."""
    lines = ["| task | `stas` / `episodic` | roll-out, fit, PPO of `stas` |", "|---" * 3 + "|"]
    for task in TIMED:
        turns = [row for row in rows if row["task"] == task]
        if turns:
            whole = {row: [sum(float(turn[f"{row} {part}"]) for part in PARTS) for turn in turns] for row in ROWS}
            ratios = ", ".join(f"{stas / episodic:.2f}" for stas, episodic in zip(*whole.values()))
            parts = ", ".join(f"{np.mean([float(turn[f'stas {part}']) for turn in turns]):.2f}" for part in PARTS)
            lines.append(f"| {task} | {ratios} | {parts} s |")
    return "\n".join(lines)


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    jobs = [(task, turn) for turn in range(1, args.turns + 1) for task in args.tasks]
    for job in [] if args.report else missing(args.results / "pace.csv", ("task", "turn"), jobs):
        run(args, *job)
    print(table(read(args.results / "pace.csv")))
