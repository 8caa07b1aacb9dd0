"""Time of a decomposer update now against that of an earlier commit, in turns; to be run on an idle machine.

    python benchmark/update.py                      # what is missing, against the commit before updates were made fast
    python benchmark/update.py --against HEAD~3
    python benchmark/update.py --report             # only the table

"same size" updates both on 128 episodes with one temporal layer, width 64, 4 heads and M = 5. "default" takes each
script's own settings, of which today's are a batch of 32 episodes and a width of 32. Needs the repository's history.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from common import RESULTS, ROOT, append, missing, read

sys.path.insert(0, str(ROOT))
import stas_ippo_mpe

SIZES = {"same size": dict(emb_dim=64, num_heads=4, num_layers=1, decomposer_batch_size=128), "default": {}}


@dataclass
class Args:
    against: str = "53beed2"
    """commit to compare with"""
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


def load(commit: str):
    """The script stas_ippo_mpe.py of a commit, as a module beside today's environments."""
    source = subprocess.run(["git", "show", f"{commit}:stas_ippo_mpe.py"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "earlier.py"
        path.write_bytes(source.stdout)
        spec = importlib.util.spec_from_file_location("earlier", path)
        module = sys.modules["earlier"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.fused = {"fused": True} if b"fused=True" in source.stdout else {}
    return module


def updater(module, num_agents: int, samples: int, flags: dict):
    """A function that makes one update of a new decomposer on random episodes of spread, and returns its seconds."""
    args = module.Args(num_agents=num_agents, mc_samples=samples, **flags)
    E, obs_dim = args.decomposer_batch_size, module.make_env(args, 1).obs_dim
    env = SimpleNamespace(obs_dim=obs_dim, num_actions=5, num_agents=num_agents, horizon=25, continuous=False)
    obs, act = torch.randn(E, 25, num_agents, obs_dim), torch.randint(5, (E, 25, num_agents))
    valid, returns = torch.ones(E, 25, dtype=torch.bool), torch.randn(E)
    decomposer = module.Decomposer(args, env)
    optimizer = torch.optim.Adam(decomposer.parameters(), lr=3e-3, **getattr(module, "fused", {"fused": True}))

    def update() -> float:
        start = time.perf_counter()
        loss = F.mse_loss(decomposer(obs, act, valid).sum(dim=(1, 2)), returns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return update


def measure(args: Args, earlier, num_agents: int, threads: int, size: str) -> dict[str, float]:
    """Median milliseconds of an update: earlier, now, and now with one and with ten coalitions."""
    torch.set_num_threads(threads)
    flags = SIZES[size]
    updates = {
        "earlier": updater(earlier, num_agents, 5, flags),
        "now": updater(stas_ippo_mpe, num_agents, 5, flags),
        "M = 1": updater(stas_ippo_mpe, num_agents, 1, flags),
        "M = 10": updater(stas_ippo_mpe, num_agents, 10, flags),
    }
    times = [[1000 * update() for update in updates.values()] for _ in range(args.updates + 3)][3:]
    return dict(zip(updates, np.median(times, axis=0).round(2).tolist()))


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    path, keys = args.results / "update.csv", ("against", "num_agents", "threads", "size")
    jobs = [(args.against, n, threads, size) for size in SIZES for n in args.num_agents for threads in args.threads]
    jobs = [] if args.report else missing(path, keys, jobs)
    earlier = load(args.against) if jobs else None
    for job in jobs:
        append(path, [dict(zip(keys, job)) | measure(args, earlier, *job[1:])])
    print("| size | agents | threads | earlier | now | now / earlier | M = 10 / M = 1 |", "|---" * 7 + "|", sep="\n")
    for row in read(path):
        ratios = f"{float(row['now']) / float(row['earlier']):.2f} | {float(row['M = 10']) / float(row['M = 1']):.3f}"
        times = f"{float(row['earlier']):.1f} ms | {float(row['now']):.1f} ms"
        print(f"| {row['size']} | {row['num_agents']} | {row['threads']} | {times} | {ratios} |")
