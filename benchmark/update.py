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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from common import RESULTS, ROOT, append, medians_in_turns, missing, random_episodes, read, updater

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
        module.fused = b"fused=True" in source.stdout  # its Adam; today's is
    return module


def update_of(module, num_agents: int, samples: int, size: str):
    """A function that makes one update of a new decomposer on random episodes, and returns its milliseconds."""
    args = module.Args(num_agents=num_agents, mc_samples=samples, **SIZES[size])
    obs_dim = module.make_env(args, 1).obs_dim
    env = SimpleNamespace(obs_dim=obs_dim, num_actions=5, num_agents=num_agents, horizon=25, continuous=False)
    episodes = random_episodes(args.decomposer_batch_size, 25, num_agents, obs_dim)
    return partial(updater(module.Decomposer(args, env), getattr(module, "fused", True)), *episodes)


def measure(args: Args, earlier, num_agents: int, threads: int, size: str) -> dict[str, float]:
    """Median milliseconds of an update: earlier, now, and now with one and with ten coalitions."""
    torch.set_num_threads(threads)
    compared = {"earlier": (earlier, 5), "now": (stas_ippo_mpe, 5), "M = 1": (stas_ippo_mpe, 1)}
    compared |= {"M = 10": (stas_ippo_mpe, 10)}
    updates = [update_of(module, num_agents, samples, size) for module, samples in compared.values()]
    medians = medians_in_turns(updates, args.updates, warm_up=3)
    return {name: round(ms, 2) for name, ms in zip(compared, medians)}


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
