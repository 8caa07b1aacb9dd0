"""Steps per second with random actions: the batched environments, and PettingZoo stepped one episode at a time.

    python benchmark/simulator.py              # measure all, then the table and the figure
    python benchmark/simulator.py --report     # only the table and the figure

PettingZoo is mpe2's world in the particle environments, and in Alice & Bob our own gridworld with one episode. All
sizes of one environment and number of agents are measured in turns in one run; benchmark/results/simulator.csv holds
the medians over the turns, the ratios to PettingZoo being medians of the turns' ratios. benchmark/results/simulator.png
draws them. On mpe2 the prey of tag move at random, which spares it their script.
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
from common import RESULTS, ROOT, check_flags, rates_in_turns, read

sys.path.insert(0, str(ROOT))

from envs import alice_bob  # noqa: E402
from envs.mpe import make, make_pettingzoo  # noqa: E402

ALICEBOB = "Alice & Bob"


@dataclass
class Args:
    environments: tuple[str, ...] = ("spread", "tag", "push", ALICEBOB)
    """environments"""
    num_agents: tuple[int, ...] = (3, 6, 15)
    """numbers of agents, but for Alice & Bob, who are two"""
    num_envs: tuple[int, ...] = (1, 16, 256, 1024, 4096)
    """batch sizes"""
    turns: int = 5
    """times each is measured"""
    min_seconds: float = 0.5
    """length of one measurement"""
    results: Path = RESULTS
    """folder of the results"""
    report: bool = False
    """measure nothing"""


def batched(name: str, num_envs: int, num_agents: int):
    env = alice_bob.AliceBob(num_envs) if name == ALICEBOB else make(name, num_envs, num_agents)
    act = torch.randint(
        env.num_actions, (env.horizon, num_envs, num_agents), generator=torch.Generator().manual_seed(0)
    )

    def episode() -> None:
        env.reset()
        for t in range(env.horizon):
            env.step(act[t])

    return episode, num_envs * env.horizon


def one_at_a_time(name: str, num_agents: int):
    if name == ALICEBOB:
        env, steps = alice_bob.parallel_env(), alice_bob.HORIZON
    else:
        env = make_pettingzoo(name, num_agents)
        steps = env.rules.horizon
        if name == "tag":
            numbers = {"num_adversaries": num_agents, "num_good": len(env.prey)}
            env = mpe2.simple_tag_v3.parallel_env(**numbers, num_obstacles=env.rules.num_obstacles)
    agents = env.possible_agents
    act = np.random.default_rng(0).integers(env.action_space(agents[0]).n, size=(steps, len(agents)))

    def episode() -> None:
        env.reset()
        for t in range(steps):
            env.step(dict(zip(agents, act[t])))

    return episode, steps


def measure(args: Args, name: str, num_agents: int) -> list[dict]:
    players = {"PettingZoo": one_at_a_time(name, num_agents)}
    players |= {n: batched(name, n, num_agents) for n in args.num_envs}
    rates = rates_in_turns(players, args.turns, args.min_seconds)
    base, key = rates["PettingZoo"], {"environment": name, "num_agents": num_agents}
    return [
        key | {"num_envs": n, "steps_per_second": round(np.median(r)), "ratio": round(float(np.median(r / base)), 1)}
        for n, r in rates.items()
    ]


def draw(games: dict[tuple[str, str], list[dict]], path: Path) -> None:
    names, colors = list(dict.fromkeys(name for name, _ in games)), {}
    figure = matplotlib.figure.Figure(figsize=(3.6 * len(names), 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for (name, n), (slow, *fast) in games.items():
        axis, color = axes[names.index(name)], colors.setdefault(n, f"C{len(colors)}")
        points = [(int(row["num_envs"]), int(row["steps_per_second"])) for row in fast]
        axis.plot(*zip(*points), marker="o", color=color, label=f"{n} agents")
        axis.axhline(int(slow["steps_per_second"]), color=color, linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="episodes side by side", title=name)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("environment steps per second\n(dashed: PettingZoo, one episode)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_flags(args)
    path = args.results / "simulator.csv"
    if not args.report:
        jobs = [(name, n) for name in args.environments for n in ((2,) if name == ALICEBOB else args.num_agents)]
        rows = [row for job in jobs for row in measure(args, *job)]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    games: dict[tuple[str, str], list[dict]] = {}  # of an environment and a number of agents, PettingZoo first
    for row in read(path):
        games.setdefault((row["environment"], row["num_agents"]), []).append(row)
    if not games:
        sys.exit(f"error: --results {args.results}: must be a folder with results to report")
    draw(games, args.results / "simulator.png")
    sizes = [int(row["num_envs"]) for row in next(iter(games.values()))[1:]]
    print("Steps per second (ratio to PettingZoo)\n")
    print(f"| environment | agents | PettingZoo | {' | '.join(f'{n:,} at once' for n in sizes)} |")
    print("|---" * (3 + len(sizes)) + "|")
    for (name, n), rows in games.items():
        cells = [f"{int(row['steps_per_second']):,} ({float(row['ratio']):.0f}x)" for row in rows]
        print(f"| {name} | {n} | {cells[0].removesuffix(' (1x)')} | {' | '.join(cells[1:])} |")
