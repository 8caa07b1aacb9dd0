"""What worker processes and several learners bring on this machine, and what a network would leave of it.

    python benchmark/scaling.py             # what is missing, then the tables; to be run on an idle machine
    python benchmark/scaling.py --report    # only the tables

Three measurements: steps per second of 1, 4 and 16 copies of a slow environment, pursuit, with and without workers
(workers.csv); training on simple_reference in one process and in two (scaling.csv); and the number of bytes of an
iteration. From these follows, as a calculation, the efficiency to expect of many processes.
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, append, late, missing, rates_in_turns, read, train

sys.path.insert(0, str(ROOT))
import stas_ippo_pettingzoo_torchrun as script  # noqa: E402
from envs import pettingzoo  # noqa: E402

LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


@dataclass
class Args:
    env_id: str = "pettingzoo.sisl.pursuit_v5"
    """slow environment"""
    copies: tuple[int, ...] = (1, 4, 16)
    """copies of it"""
    workers: tuple[int, ...] = (0, 1, 2)
    """processes that play them"""
    turns: int = 3
    """times each is measured"""
    min_seconds: float = 2.0
    """length of one measurement"""
    total_timesteps: int = 100_000
    """steps of each training run"""
    seed: int = 11
    """its seed"""
    results: Path = RESULTS
    """folder of the results"""
    report: bool = False
    """run nothing"""


def player(env_id: str, copies: int, workers: int, steps: int = 10):
    """A function that plays the first `steps` steps of `copies` random episodes, and the number of steps in all."""
    env = pettingzoo.make(env_id, copies, steps, num_workers=workers)
    act = torch.randint(env.num_actions, (steps, copies, env.num_agents), generator=torch.Generator().manual_seed(0))

    def episode() -> None:
        env.reset(0)
        for t in range(steps):
            env.step(act[t])

    return episode, steps * copies


def measure_workers(args: Args, copies: int) -> list[dict]:
    """The rates of one number of copies by every number of workers, in turns; ratios are to the first."""
    players = {workers: player(args.env_id, copies, workers) for workers in args.workers}
    rates = rates_in_turns(players, args.turns, args.min_seconds)
    return [
        {
            "env_id": args.env_id,
            "copies": copies,
            "workers": workers,
            "steps_per_second": round(float(np.median(rate)), 1),
            "ratio": round(float(np.median(rate / rates[args.workers[0]])), 2),
        }
        for workers, rate in rates.items()
    ]


def bytes_sent() -> float:
    """By all processes of this machine to each other since it started; nan where no counter tells."""
    return float(LOOPBACK.read_text()) if LOOPBACK.exists() else math.nan


def measure_training(args: Args, processes: int, num_envs: int) -> dict:
    """One run with `num_envs` episodes in each process: steps per second after the first two iterations, if there are
    more, and median times of all."""
    run_dir = args.results / "runs" / f"scaling-{processes}-{num_envs}"
    flags = f"--seed {args.seed} --num-envs {num_envs} --total-timesteps {args.total_timesteps}".split()
    before = bytes_sent()
    metrics, _ = train(script.__file__, flags, run_dir, processes=processes)
    sent = bytes_sent() - before
    first, last = metrics[1] if len(metrics) > 2 else {"wall_time": 0, "global_step": 0}, metrics[-1]
    seconds, steps = (float(last[name]) - float(first[name]) for name in ("wall_time", "global_step"))
    times = {
        f"{name}_seconds": round(float(np.median([float(row[f"time/{name}"]) for row in metrics])), 3)
        for name in ("rollout", "decomposer", "ppo")
    }
    return {
        "processes": processes,
        "num_envs": num_envs,
        "total_timesteps": args.total_timesteps,
        "seed": args.seed,
        "steps_per_second": round(steps / seconds),
        "training_return": late(metrics, "charts/episodic_return"),
        "iterations": len(metrics),
        "megabytes_sent": round(sent / 1e6, 1),
    } | times


@functools.cache
def traffic() -> tuple[int, int]:
    """How often the processes sum something in an iteration of simple_reference, and the bytes of it all."""
    args = script.Args()
    agent, decomposer = script.make_networks(args, script.make_env(args, 1))
    weights = [sum(weights.numel() for weights in network.parameters()) for network in (decomposer, agent)]
    minibatches = args.update_epochs * args.num_minibatches
    # Of every update gradients; of PPO's also the size of the batch and two moments of the advantages; of every epoch
    # its six losses; of every iteration the decomposer's loss, three sums of episodes, and the number of signals.
    sums = args.decomposer_updates + 4 * minibatches + args.update_epochs + 3
    size = 4 * (args.decomposer_updates * weights[0] + minibatches * (weights[1] + 3) + 6 * args.update_epochs + 1)
    size += 3 * 8 + 8
    return sums, size


def efficiency(seconds: float, processes: int, gbits: float, latency: float, ring: bool) -> float:
    """The share of an iteration of `seconds` that is left for work if every process plays its own episodes.

    A sum over P processes takes 2 (P - 1) messages one after the other in a ring, 2 log2(P) in a tree; either way a
    process sends about 2 (P - 1) / P times its bytes. Waiting for the slowest process is not counted.
    """
    sums, size = traffic()
    messages = 2 * (processes - 1) if ring else 2 * math.log2(processes)
    sending = 2 * (processes - 1) / processes * 8 * size / (gbits * 1e9)
    return seconds / (seconds + sums * messages * latency + sending)


def report(args: Args) -> None:
    print("| copies | workers | steps per second | ratio |\n|---|---|---|---|")
    for row in [row for row in read(args.results / "workers.csv") if row["env_id"] == args.env_id]:
        print(f"| {row['copies']} | {row['workers']} | {row['steps_per_second']} | {row['ratio']} |")
    setting = (str(args.total_timesteps), str(args.seed))
    runs = [row for row in read(args.results / "scaling.csv") if (row["total_timesteps"], row["seed"]) == setting]
    print("\n| processes | episodes in each | steps per second | ratio | last training return | roll-out, fit, PPO |")
    print("|---" * 6 + "|")
    for row in runs:
        ratio = float(row["steps_per_second"]) / float(runs[0]["steps_per_second"])
        times = ", ".join(f"{float(row[f'{name}_seconds']):.2f}" for name in ("rollout", "decomposer", "ppo"))
        print(
            f"| {row['processes']} | {row['num_envs']} | {row['steps_per_second']} | {ratio:.2f} "
            f"| {float(row['training_return']):.2f} | {times} s |"
        )
    sums, size = traffic()
    print(f"\nAn iteration sums {sums} times over the processes, {size / 1e6:.1f} MB in all.", end=" ")
    seen = [float(row["megabytes_sent"]) / float(row["iterations"]) for row in runs if row["processes"] == "2"]
    if seen:
        print(
            f"Sent by both of two processes, as the machine counts: {', '.join(f'{each:.1f}' for each in seen)} MB.",
            end="",
        )
    print("\n")
    if not runs:
        return
    seconds = sum(float(runs[0][f"{name}_seconds"]) for name in ("rollout", "decomposer", "ppo"))
    print(f"Efficiency, calculated from an iteration of {seconds:.1f} s and 50 microseconds a message:\n")
    print("| processes | ring, 1 Gbit/s | 10 | 100 | tree, 1 Gbit/s | 10 | 100 |\n|---|---|---|---|---|---|---|")
    for processes in (8, 64, 512):
        cells = [efficiency(seconds, processes, gbits, 50e-6, ring) for ring in (True, False) for gbits in (1, 10, 100)]
        print(f"| {processes} | {' | '.join(f'{cell:.0%}' for cell in cells)} |")


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.report:
        jobs = [(args.env_id, copies) for copies in args.copies]
        for _, copies in missing(args.results / "workers.csv", ("env_id", "copies"), jobs):
            append(args.results / "workers.csv", measure_workers(args, copies))
        one, setting = script.Args.num_envs, (args.total_timesteps, args.seed)
        jobs = [(1, one, *setting), (2, one // 2, *setting), (2, one, *setting)]
        keys = ("processes", "num_envs", "total_timesteps", "seed")
        for job in missing(args.results / "scaling.csv", keys, jobs):
            append(args.results / "scaling.csv", [measure_training(args, *job[:2])])
    report(args)
