"""Time of a decomposer update against the number of coalitions, with the default settings; for an idle machine.

python benchmark/update.py
python benchmark/update.py --report    # only the table
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, append, missing, read

sys.path.insert(0, str(ROOT))
from stas_ippo_mpe import Args as Flags
from stas_ippo_mpe import Decomposer, make_env, update_decomposer

SAMPLES = (1, 5, 10)  # coalitions


@dataclass
class Args:
    num_agents: list[int] = field(default_factory=lambda: [3, 6, 15])
    """numbers of agents"""
    threads: list[int] = field(default_factory=lambda: [1, 2])
    """CPU threads"""
    updates: int = 15
    """updates of each, in turns"""
    results: Path = RESULTS
    """folder of the results"""
    report: bool = False
    """run nothing"""


def updater(num_agents: int, samples: int):
    """update() makes one update of a new decomposer on random episodes of `spread`, and returns its milliseconds."""
    args = Flags(num_agents=num_agents, mc_samples=samples, reward_scale=1.0)
    env = make_env(args, args.decomposer_batch_size)
    E, T, N = env.num_envs, env.horizon, env.num_agents
    batch = {"obs": torch.randn(E, T, N, env.obs_dim), "act": torch.randint(env.num_actions, (E, T, N))}
    batch |= {"valid": torch.ones(E, T, dtype=torch.bool), "team_return": torch.randn(E)}
    decomposer = Decomposer(args, env)
    optimizer = torch.optim.Adam(decomposer.parameters(), lr=args.decomposer_lr, fused=True)

    def update() -> float:
        start = time.perf_counter()
        update_decomposer(args, decomposer, optimizer, batch)
        return 1000 * (time.perf_counter() - start)

    return update


def measure(num_agents: int, threads: int, turns: int) -> dict[str, float]:
    """Median milliseconds of an update with each number of coalitions, in turns, the first three to warm up."""
    torch.set_num_threads(threads)
    updates = [updater(num_agents, samples) for samples in SAMPLES]
    times = np.median([[update() for update in updates] for _ in range(turns + 3)][3:], axis=0)
    return {f"M = {samples}": round(ms, 2) for samples, ms in zip(SAMPLES, times.tolist())}


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    path, keys = args.results / "update.csv", ("num_agents", "threads")
    jobs = [(n, threads) for n in args.num_agents for threads in args.threads]
    for job in [] if args.report else missing(path, keys, jobs):
        append(path, [dict(zip(keys, job)) | measure(*job, args.updates)])
    names = [f"M = {samples}" for samples in SAMPLES]
    print(f"| agents | threads | {' | '.join(names)} | M = 10 / M = 1 |", "|---" * 6 + "|", sep="\n")
    for row in read(path):
        cells = [f"{float(row[name]):.1f} ms" for name in names]
        ratio = float(row["M = 10"]) / float(row["M = 1"])
        print(f"| {row['num_agents']} | {row['threads']} | {' | '.join(cells)} | {ratio:.3f} |")
