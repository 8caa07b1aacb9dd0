"""What the benchmarks share: results that survive being stopped, runs side by side, and timing in turns."""

import contextlib
import csv
import fcntl
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import scipy.stats
import torch

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "benchmark" / "results").resolve()
COMMIT = "git diff --quiet HEAD -- '*.py' ':!tests' ':!benchmark' && git rev-parse HEAD"  # if it is what trains


def read(path: Path) -> list[dict]:
    """The rows of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def locked(path: Path, wait: bool = True):
    """Hold a file's lock, which other programs and threads respect too; one line if it is taken and not waited for."""
    with open(path, "a+", newline="") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            sys.exit(f"error: {path}: another program is at this run, or one that was left over when this was killed")
        yield file


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a header if it is new; ValueError if it has other columns."""
    with locked(path) as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        if columns not in (None, list(rows[0])):
            raise ValueError(f"{path} has the columns {columns}, not {list(rows[0])}")
        writer = csv.DictWriter(file, list(rows[0]))
        if columns is None:
            writer.writeheader()
        writer.writerows(rows)


def run_all(run, jobs: list[tuple], workers: int) -> None:
    """run(*job) for every job, `workers` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:  # stop at the first failure, or at Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


def check_flags(args) -> None:
    """End with one line on --flags that would go into the published results or that are not for the user to set; make
    the folder of the results."""
    flags = getattr(args, "flags", "")
    if flags and args.results.resolve().is_relative_to(RESULTS):
        sys.exit(f"error: --flags {flags}: must come with a --results folder of its own")
    if re.search(r"--(seed|run[-_]dir|resume)\b", flags):
        sys.exit(f"error: --flags {flags}: must be without --seed, --run-dir and --resume")
    if getattr(args, "report", False) and not args.results.is_dir():
        sys.exit(f"error: --results {args.results}: must be a folder with results to report")
    args.results.mkdir(parents=True, exist_ok=True)


def in_processes(function, jobs: list[tuple], workers: int, path: Path) -> None:
    """Append the rows of function(*job) to a CSV file for every job, `workers` at a time."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                append(path, future.result())
                print(*future.result(), sep="\n", flush=True)
        except BaseException:  # stop at the first failure, or at Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


def missing(path: Path, keys: tuple[str, ...], jobs: list[tuple]) -> list[tuple]:
    """The jobs of which a CSV file has no row; `keys` names the columns that tell them apart."""
    done = {tuple(row[key] for key in keys) for row in read(path)}
    return [job for job in dict.fromkeys(jobs) if tuple(map(str, job)) not in done]


def train(
    script: str, flags: list[str], run_dir: Path, threads: int = 1, processes: int = 1, resume: bool = False
) -> tuple[list[dict], dict]:
    """One training run: the rows of its metrics.csv, and its summary.json.

    What is in `run_dir` is removed; with `resume` a run that was broken off there is continued instead, and one that
    has ended, continued by hand, is taken as it is, if the same code began it.
    """
    command = [sys.executable, str(ROOT / script)]
    if processes > 1:
        command[1:1] = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with locked(run_dir.with_name(run_dir.name + ".lock"), wait=False) as lock:
        if resume and resumable(run_dir):
            command += ["--resume", str(run_dir)]
        else:
            shutil.rmtree(run_dir, ignore_errors=True)
            command += ["--run-dir", str(run_dir), "--num-threads", str(threads), *flags]
        # The run holds the lock too, and keeps it if this program is killed. One that has ended only evaluates anew.
        done = subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()])
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command[1:])} ended with exit code {done.returncode}")
    return read(run_dir / "metrics.csv"), json.loads((run_dir / "summary.json").read_text())


def resumable(run_dir: Path) -> bool:
    """Whether `run_dir` holds a run of this commit, ended or not, and no script differs from it now."""
    if not (run_dir / "checkpoint.pt").exists():
        return False
    commit = subprocess.run(COMMIT, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    began = json.loads((run_dir / "config.json").read_text())["git_commit"]
    return commit != "" and began.removesuffix("-dirty") == commit  # files that do not train may have been changed


def load_run(run_dir: Path, script: ModuleType) -> tuple:
    """The flags and the checkpoint of a run of `script`."""
    flags = json.loads((run_dir / "config.json").read_text())["flags"] | {"run_dir": None, "resume": None}
    args = script.Args(**{field.name: flags[field.name] for field in fields(script.Args) if field.name in flags})
    return args, torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)


def late(metrics: list[dict], name: str) -> float | str:
    """Mean of a metric over the last tenth of the iterations; empty where it does not apply."""
    values = [float(row[name]) for row in metrics[-max(1, len(metrics) // 10) :] if row.get(name)]
    return round(float(np.mean(values)), 4) if values else ""


def interval(values: list[float], digits: int = 2) -> str:
    """mean +- half the width of its 95% confidence interval (Student's t over the seeds)"""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.{digits}f} ± {half:.{digits}f}"


def rate(episode, steps: int, min_seconds: float) -> float:
    """Environment steps per second of a function that plays whole episodes of `steps` steps together."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < min_seconds:
        episode()
        count += steps
    return count / (time.perf_counter() - start)


def rates_in_turns(players: dict, turns: int, min_seconds: float) -> dict:
    """The `rate` of every player (episode, steps), measured in turns: name -> array (turns,)."""
    rates: dict = {name: [] for name in players}
    for turn in range(turns + 1):
        for name, player in players.items():
            steps_per_second = rate(*player, min_seconds)
            if turn > 0:  # the first turn warms up
                rates[name].append(steps_per_second)
    return {name: np.array(values) for name, values in rates.items()}


def draw_ranges(axis, x: list[int], values: list[list[float]], style: str, color: str, label: str) -> None:
    """A line through the means of `values`, one list for every x, with bars from the lowest to the highest."""
    low, middle, high = (np.array([f(each) for each in values]) for f in (min, np.mean, max))
    bars = (middle - low, high - middle)
    axis.errorbar(x, middle, bars, fmt=style, color=color, label=label, capsize=3, markersize=3)
