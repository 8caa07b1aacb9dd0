"""Time of a decomposer update now against that of an earlier commit, in turns; to be run on an idle machine.

    python benchmark/update.py                      # against the release before decomposers were made fast
    python benchmark/update.py --against HEAD~3

"same size" updates both on 128 episodes with one temporal layer, width 64, 4 heads and M = 5; "default" takes each
script's own settings. Needs the repository's history.
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
from common import RESULTS, ROOT, append

sys.path.insert(0, str(ROOT))
import stas_ippo_mpe

SAME = dict(emb_dim=64, num_heads=4, num_layers=1, decomposer_batch_size=128)


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


def load(commit: str):
    """The script stas_ippo_mpe.py of a commit, as a module beside today's environments."""
    source = subprocess.run(["git", "show", f"{commit}:stas_ippo_mpe.py"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "earlier.py"
        path.write_bytes(source.stdout)
        spec = importlib.util.spec_from_file_location("earlier", path)
        module = sys.modules["earlier"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def updater(module, num_agents: int, samples: int, flags: dict):
    """A function that makes one update of a new decomposer on random episodes of spread, and returns its seconds."""
    args = module.Args(num_agents=num_agents, mc_samples=samples, **flags)
    E, obs_dim = args.decomposer_batch_size, module.make_env(args, 1).obs_dim
    env = SimpleNamespace(obs_dim=obs_dim, num_actions=5, num_agents=num_agents, horizon=25, continuous=False)
    obs, act = torch.randn(E, 25, num_agents, obs_dim), torch.randint(5, (E, 25, num_agents))
    valid, returns = torch.ones(E, 25, dtype=torch.bool), torch.randn(E)
    decomposer = module.Decomposer(args, env)
    fused = {"fused": True} if module is stas_ippo_mpe else {}
    optimizer = torch.optim.Adam(decomposer.parameters(), lr=3e-3, **fused)

    def update() -> float:
        start = time.perf_counter()
        loss = F.mse_loss(decomposer(obs, act, valid).sum(dim=(1, 2)), returns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return update


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    earlier = load(args.against)
    print("milliseconds an update, median: earlier, now (ratio), now with M = 10 against M = 1")
    for num_agents in args.num_agents:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for size, flags in (("same size", SAME), ("default", {})):
                updates = {
                    "earlier": updater(earlier, num_agents, 5, flags),
                    "now": updater(stas_ippo_mpe, num_agents, 5, flags),
                    "M = 1": updater(stas_ippo_mpe, num_agents, 1, flags),
                    "M = 10": updater(stas_ippo_mpe, num_agents, 10, flags),
                }
                times = [[1000 * update() for update in updates.values()] for _ in range(args.updates + 3)][3:]
                ms = dict(zip(updates, np.median(times, axis=0).round(2).tolist()))
                row = {"against": args.against, "num_agents": num_agents, "threads": threads, "size": size} | ms
                append(args.results / "update.csv", [row])
                ratios = f"({ms['now'] / ms['earlier']:.2f}x), M: {ms['M = 10'] / ms['M = 1']:.3f}x"
                print(f"N = {num_agents}, {threads} threads, {size}: {ms['earlier']}, {ms['now']} {ratios}", flush=True)
