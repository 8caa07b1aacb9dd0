"""Steps per second of Alice & Bob with random actions: the batched gridworld against a loop over its PettingZoo form.

    python benchmark/gridworld.py

Both are measured in turns in one run; the median of the turns goes into benchmark/results/gridworld.csv.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, rates_in_turns

sys.path.insert(0, str(ROOT))

from envs.alice_bob import AliceBob, parallel_env  # noqa: E402


@dataclass
class Args:
    num_envs: tuple[int, ...] = (1, 64, 512, 4096)
    """batch sizes"""
    turns: int = 7
    """times each is measured"""
    min_seconds: float = 0.5
    """length of one measurement"""
    results: Path = RESULTS
    """folder of the results"""


def batched(num_envs: int):
    env = AliceBob(num_envs)
    act = torch.randint(4, (env.horizon, num_envs, 2), generator=torch.Generator().manual_seed(0))

    def episode() -> None:
        env.reset()
        for t in range(env.horizon):
            env.step(act[t])

    return episode, num_envs * env.horizon


def pettingzoo():
    env, rng = parallel_env(), np.random.default_rng(0)
    act = rng.integers(4, size=(40, 2))

    def episode() -> None:
        env.reset()
        for alice, bob in act:
            env.step({"alice": alice, "bob": bob})

    return episode, 40


if __name__ == "__main__":
    args = tyro.cli(Args)
    players = {"PettingZoo loop": pettingzoo()} | {f"batch of {n:,}": batched(n) for n in args.num_envs}
    rates = rates_in_turns(players, args.turns, args.min_seconds)
    base = rates["PettingZoo loop"]
    rows = [
        {"environment": name, "steps_per_second": round(np.median(r)), "ratio": round(float(np.median(r / base)), 1)}
        for name, r in rates.items()
    ]
    args.results.mkdir(parents=True, exist_ok=True)
    with open(args.results / "gridworld.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{torch.get_num_threads()} threads\n\n| environment | steps per second | ratio |\n|---|---|---|")
    for row in rows:
        print(f"| {row['environment']} | {row['steps_per_second']:,} | {row['ratio']} |")
