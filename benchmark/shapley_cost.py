"""Time and memory of a decomposer update against coalitions M, agents and steps; to be run on an idle machine.

    python benchmark/shapley_cost.py             # what is still missing, then the tables and the figure
    python benchmark/shapley_cost.py --report    # only the tables and the figure

Rows go into benchmark/results/shapley_cost.csv.
"""

import re
import resource
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, in_processes, medians_in_turns, missing, random_episodes, read, updater

sys.path.insert(0, str(ROOT))
from stas_ippo_mpe import Args as Flags
from stas_ippo_mpe import Decomposer


@dataclass
class Args:
    num_agents: list[int] = field(default_factory=lambda: [2, 3, 6, 10, 15, 30, 60])
    """numbers of agents, in episodes of 25 steps"""
    steps: list[int] = field(default_factory=lambda: [25, 50, 100, 200, 400])
    """lengths of episodes of 3 agents"""
    updates: int = 30
    """updates in which M is compared (all else takes 7)"""
    results: Path = RESULTS
    """folder of the results"""
    report: bool = False
    """measure nothing"""


def peak_mib() -> float:
    """Peak resident memory of this process so far, MiB."""
    status = Path("/proc/self/status")  # Linux; getrusage would count the parent's memory there
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS


def cost_of(num_agents: int, steps: int, window: int, threads: int, samples: str, updates: int) -> list[dict]:
    """Median milliseconds of an update of 128 episodes with every M of `samples`, in turns; peak memory of all."""
    torch.set_num_threads(threads)
    episodes = random_episodes(128, steps, num_agents, 18)
    env = SimpleNamespace(obs_dim=18, num_actions=5, num_agents=num_agents, horizon=steps, continuous=False)
    coalitions = [int(M) for M in samples.split()]
    update_of = [updater(Decomposer(Flags(mc_samples=M, attention_window=window), env)) for M in coalitions]
    for update in update_of:
        update(*(x[:1] for x in episodes))  # loads what torch loads late
    before = peak_mib()
    medians = medians_in_turns([partial(update, *episodes) for update in update_of], updates, warm_up=2)
    key = {"num_agents": num_agents, "steps": steps, "window": window, "threads": threads, "samples": samples}
    memory = round(peak_mib() - before, 1)
    return [key | {"mc_samples": M, "ms": round(ms, 2), "peak_mib": memory} for M, ms in zip(coalitions, medians)]


def measure(args: Args) -> None:
    jobs = [(n, 25, 0, 1, "5") for n in args.num_agents]
    jobs += [(3, steps, window, 1, "5") for steps in args.steps for window in (0, 25)]
    compared = [(n, threads) for n in (3, 15) if n in args.num_agents for threads in (1, 2)]
    jobs += [(n, 25, 0, threads, "1 3 5 10") for n, threads in compared]
    path = args.results / "shapley_cost.csv"
    jobs = missing(path, ("num_agents", "steps", "window", "threads", "samples"), jobs)
    in_processes(cost_of, [(*job, 7 if job[-1] == "5" else args.updates) for job in jobs], 1, path, fresh=True)


def exponent(x: list[float], y: list[float]) -> float:
    """b of the least-squares fit y = a x^b."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def report(args: Args, rows: list[dict]) -> None:
    rows = [{k: v if k == "samples" else float(v) for k, v in row.items()} for row in rows]
    print("\n| agents | threads | M = 1 | M = 3 | M = 5 | M = 10 |\n|---|---|---|---|---|---|")
    compared = [row for row in rows if " " in row["samples"]]
    for n, threads in sorted({(row["num_agents"], row["threads"]) for row in compared}):
        ms = {row["mc_samples"]: row["ms"] for row in compared if (row["num_agents"], row["threads"]) == (n, threads)}
        cells = " | ".join(f"{value:.1f} ms ({value / ms[1]:.3f}x)" for value in ms.values())
        print(f"| {n:.0f} | {threads:.0f} | {cells} |")
    alone = [row for row in rows if " " not in row["samples"]]
    lines = {
        ("num_agents", "agents"): {
            "full attention": [row for row in alone if row["steps"] == 25 and row["window"] == 0]
        },
        ("steps", "steps of an episode"): {
            "full attention": [row for row in alone if row["num_agents"] == 3 and row["window"] == 0],
            "attention window 25": [row for row in alone if row["num_agents"] == 3 and row["window"] == 25],
        },
    }
    figure = matplotlib.figure.Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    print("\n| against | variant | values | ms | exponent | MiB | exponent |\n" + "|---" * 7 + "|")
    for column, ((name, label), variants) in enumerate(lines.items()):
        for k, (variant, some) in enumerate(variants.items()):
            some = sorted(some, key=lambda row: row[name])
            x, cells = [row[name] for row in some], []
            if not x:  # unfinished
                continue
            for axis, quantity in zip(axes[:, column], ("ms", "peak_mib")):
                y = [row[quantity] for row in some]
                fitted = (
                    f"{exponent(x, y):.2f}, {exponent(x[-2:], y[-2:]):.2f} over the last two" if len(x) > 1 else "-"
                )
                axis.plot(x, y, "o-", color=f"C{k}", label=f"{variant}, exponent {fitted}")
                cells += [", ".join(f"{value:.0f}" for value in y), fitted]
            print(f"| {label} | {variant} | {', '.join(f'{value:.0f}' for value in x)} | {' | '.join(cells)} |")
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log")
            ticks = sorted({row[name] for some in variants.values() for row in some})
            axis.set_xticks(ticks, [f"{value:.0f}" for value in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("milliseconds an update (median)")
    axes[1, 0].set_ylabel("peak memory of the process\nbeyond its start (MiB)")
    axes[0, 0].set_title("25 steps", fontsize=10)
    axes[0, 1].set_title("3 agents", fontsize=10)
    title = "A decomposer update of 128 episodes (18 numbers an observation, M = 5, one CPU thread), log-log fits"
    figure.suptitle(title, fontsize=10)
    figure.savefig(args.results / "shapley_cost.png", dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.report:
        measure(args)
    rows = read(args.results / "shapley_cost.csv")
    if rows:
        report(args, rows)
