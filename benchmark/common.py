"""What the benchmarks share: results that survive being stopped, runs side by side, and timing in turns."""

import csv
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

LOCK = threading.Lock()


def read(path: Path) -> list[dict]:
    """The rows of a CSV file, none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a header if it is new."""
    with LOCK, open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if file.tell() == 0:
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
