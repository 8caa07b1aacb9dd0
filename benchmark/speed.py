"""Seconds of an iteration and steps per second, of this code and of an earlier commit, in turns; for an idle machine.

    python benchmark/speed.py                    # this code
    python benchmark/speed.py --commit HEAD~10   # against a commit (or a tag, or a branch)
    python benchmark/speed.py --cuda             # on a GPU, which takes two minutes

Each turn trains for some iterations and takes the median of each part over the later two thirds of them; the table has
the median over turns. Nothing is kept.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from common import ROOT, read

PARTS = ("time/rollout", "time/decomposer", "time/ppo")
TASKS = {  # flags of stas_ippo_mpe.py, iterations
    "spread 3": ("", 30),
    "spread 3, episodic": ("--credit episodic", 30),
    "spread 3, M = 1": ("--mc-samples 1", 30),
    "spread 3, M = 10": ("--mc-samples 10", 30),
    "spread 15": ("--num-agents 15", 8),
}
ON_GPU = {"spread 3": ("", 30), "spread 15": ("--num-agents 15", 20), "2,048 environments": ("--num-envs 2048", 20)}


@dataclass
class Args:
    commit: str | None = None  # an earlier commit to compare with
    tasks: list[str] = field(default_factory=lambda: list(TASKS))  # which of them
    threads: list[int] = field(default_factory=lambda: [1, 2])  # CPU threads
    turns: int = 3  # runs of each
    cuda: bool = False  # on a GPU instead, with tasks of its own
    flags: str = ""  # more flags for all


@contextlib.contextmanager
def checked_out(commit: str | None):
    """The folder of the code: this one, or a temporary one with a commit."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def measure(code: Path, flags: str, iterations: int) -> dict[str, float]:
    """One run: median seconds of each part of an iteration, and of the whole, and steps per second."""
    given = dict(re.findall(r"--(num-envs|max-cycles) (\d+)", flags))
    horizon = int(given.get("max-cycles", 50 if "--scenario push" in flags else 25))
    steps = int(given.get("num-envs", 128)) * horizon * iterations
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(code / "stas_ippo_mpe.py"), *flags.split(), "--run-dir", f"{folder}/run"]
        command += ["--eval-episodes", "1", "--total-timesteps", str(steps)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = read(Path(folder) / "run" / "metrics.csv")
    late = rows[len(rows) // 3 :]
    values = {name: float(np.median([float(row[name] or 0) for row in late])) for name in PARTS}
    seconds = (float(late[-1]["wall_time"]) - float(late[0]["wall_time"])) / (len(late) - 1)
    steps = (int(late[-1]["global_step"]) - int(late[0]["global_step"])) / (len(late) - 1)
    return values | {"iteration": seconds, "steps per second": steps / seconds}


if __name__ == "__main__":
    args = tyro.cli(Args)
    tasks = ON_GPU if args.cuda else {name: TASKS[name] for name in args.tasks}
    print(
        "| task | threads | code | roll-out | decomposer | PPO | iteration | steps per second |",
        "|---" * 8 + "|",
        sep="\n",
    )
    for name, (flags, iterations) in tasks.items():
        for threads in [0] if args.cuda else args.threads:
            where = "--cuda" if args.cuda else f"--num-threads {threads}"
            measured: dict[str, list] = {}
            for _ in range(args.turns):
                for commit in [None] if args.commit is None else [None, args.commit]:
                    with checked_out(commit) as code:
                        run = measure(code, f"{flags} {where} {args.flags}", iterations)
                    measured.setdefault(commit or "this", []).append(list(run.values()))
            for code, runs in measured.items():
                *seconds, speed = np.median(runs, axis=0)
                cells = [f"{value:.3f} s" for value in seconds] + [f"{speed:,.0f}"]
                print(f"| {name} | {'GPU' if args.cuda else threads} | {code} | {' | '.join(cells)} |", flush=True)
