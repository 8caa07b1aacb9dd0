"""Steps per second of the particle environments with random actions: batched, and mpe2 stepped one episode at a time.

    python benchmark/simulator.py

All sizes of one scenario and number of agents are measured in turns in one run; benchmark/results/simulator.csv holds
the medians over the turns, the ratios to mpe2 being medians of the turns' ratios. benchmark/results/simulator.png draws
them. On mpe2 the prey of tag move at random, which spares it their script.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import mpe2.simple_tag_v3
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, rates_in_turns

sys.path.insert(0, str(ROOT))

from envs.mpe import HORIZON, make, make_pettingzoo  # noqa: E402


@dataclass
class Args:
    scenarios: tuple[str, ...] = ("spread", "tag", "push")
    """scenarios"""
    num_agents: tuple[int, ...] = (3, 6, 15)
    """numbers of agents"""
    num_envs: tuple[int, ...] = (1, 16, 256, 1024, 4096)
    """batch sizes"""
    turns: int = 5
    """times each is measured"""
    min_seconds: float = 0.5
    """length of one measurement"""
    results: Path = RESULTS
    """folder of the results"""


def batched(scenario: str, num_envs: int, num_agents: int):
    env = make(scenario, num_envs, num_agents)
    act = torch.randint(5, (HORIZON, num_envs, num_agents), generator=torch.Generator().manual_seed(0))

    def episode() -> None:
        env.reset()
        for t in range(HORIZON):
            env.step(act[t])

    return episode, num_envs * HORIZON


def one_at_a_time(scenario: str, num_agents: int):
    env = make_pettingzoo(scenario, num_agents)
    if scenario == "tag":
        numbers = {"num_adversaries": num_agents, "num_good": len(env.prey), "num_obstacles": env.rules.num_obstacles}
        env = mpe2.simple_tag_v3.parallel_env(**numbers)
    act = np.random.default_rng(0).integers(5, size=(HORIZON, len(env.possible_agents)))

    def episode() -> None:
        env.reset()
        for t in range(HORIZON):
            env.step(dict(zip(env.possible_agents, act[t])))

    return episode, HORIZON


def measure(args: Args, scenario: str, num_agents: int) -> list[dict]:
    players = {"mpe2": one_at_a_time(scenario, num_agents)}
    players |= {n: batched(scenario, n, num_agents) for n in args.num_envs}
    rates = rates_in_turns(players, args.turns, args.min_seconds)
    base, key = rates["mpe2"], {"scenario": scenario, "num_agents": num_agents}
    return [
        key | {"num_envs": name, "steps_per_second": round(np.median(r)), "ratio": round(float(np.median(r / base)), 1)}
        for name, r in rates.items()
    ]


def draw(rows: list[dict], args: Args) -> None:
    figure = matplotlib.figure.Figure(figsize=(4 * len(args.scenarios), 3.6), layout="constrained")
    axes = figure.subplots(1, len(args.scenarios), sharey=True, squeeze=False)[0]
    for axis, scenario in zip(axes, args.scenarios):
        for i, n in enumerate(args.num_agents):
            some = [row for row in rows if (row["scenario"], row["num_agents"]) == (scenario, n)]
            points = [(row["num_envs"], row["steps_per_second"]) for row in some if row["num_envs"] != "mpe2"]
            axis.plot(*zip(*points), marker="o", color=f"C{i}", label=f"{n} agents")
            axis.axhline(some[0]["steps_per_second"], color=f"C{i}", linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="episodes side by side", title=scenario)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("environment steps per second\n(dashed: mpe2, one episode)")
    axes[0].legend()
    figure.savefig(args.results / "simulator.png", dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    rows = [row for scenario in args.scenarios for n in args.num_agents for row in measure(args, scenario, n)]
    with open(args.results / "simulator.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args)
    sizes = ["mpe2", *args.num_envs]
    print(f"{torch.get_num_threads()} threads; steps per second (ratio to mpe2)\n")
    print(f"| scenario | agents | mpe2 | {' | '.join(f'{n:,} at once' for n in args.num_envs)} |")
    print("|---" * (2 + len(sizes)) + "|")
    for scenario in args.scenarios:
        for n in args.num_agents:
            some = [row for row in rows if (row["scenario"], row["num_agents"]) == (scenario, n)]
            cells = [f"{some[0]['steps_per_second']:,}"]
            cells += [f"{row['steps_per_second']:,} ({row['ratio']:.0f}x)" for row in some[1:]]
            print(f"| {scenario} | {n} | {' | '.join(cells)} |")
