"""What the paper leaves open about the Shapley estimate, measured: the figures and tables of that README section.

    python benchmark/shapley.py                        # all that is still missing, then the tables and the figures
    python benchmark/shapley.py --parts noise games    # only these parts
    python benchmark/shapley.py --report               # only the tables and the figures

Each part has its own benchmark/results/shapley_{part}.csv and .png (training and critic share the former):
    training  return against the number of coalitions M and against layers, STAS and STAS-ML
    critic    return with an independent and with a centralized critic on the learned credits
    noise     what is random and what is biased in a credit, against M, on decomposers trained on spread
    cost      time and memory of a decomposer update against M, agents and steps; measured on an idle machine only
    games     learned credits against the Shapley values of team rewards that do not add up over agents
"""

import json
import multiprocessing
import re
import resource
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from common import RESULTS, ROOT, T_95, append, interval, late, read, run_all, train

sys.path.insert(0, str(ROOT))
from stas_ippo_mpe import Decomposer, explained_variance, sample_coalitions, shapley_weights
from stas_ml_ippo_mpe import MLDecomposer

STAS, ML = "stas_ippo_mpe.py", "stas_ml_ippo_mpe.py"
NAMES = {STAS: "STAS", ML: "STAS-ML"}
PARTS = ("training", "critic", "noise", "cost", "games")
PASSED = -20.0  # the training return that sample efficiency asks for


@dataclass
class Args:
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    """what to measure: training, critic, noise, cost, games"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """seeds of the training runs, 2 to 10 of them"""
    mc_samples: list[int] = field(default_factory=lambda: [1, 3, 5, 10])
    """training: coalitions M"""
    num_layers: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """training: layers"""
    scenarios: list[str] = field(default_factory=lambda: ["spread", "tag"])
    """critic: scenarios"""
    critic_agents: list[int] = field(default_factory=lambda: [3, 6])
    """critic: numbers of agents"""
    noise_agents: list[int] = field(default_factory=lambda: [3, 6, 15])
    """noise: numbers of agents"""
    draws: int = 200
    """noise: repeated draws in each of 48 states"""
    cost_agents: list[int] = field(default_factory=lambda: [2, 3, 6, 10, 15, 30, 60])
    """cost: numbers of agents, in episodes of 25 steps"""
    cost_steps: list[int] = field(default_factory=lambda: [25, 50, 100, 200, 400])
    """cost: lengths of episodes of 3 agents"""
    updates: int = 30
    """cost: updates in which M is compared (all else takes 7)"""
    game_agents: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6])
    """games: numbers of agents"""
    game_updates: int = 1000
    """games: decomposer updates"""
    workers: int = 2
    """runs side by side, one CPU thread each (cost: one at a time)"""
    flags: str = ""
    """more flags for every training run"""
    results: Path = RESULTS
    """folder of the results; give another one along with other settings"""
    report: bool = False
    """measure nothing"""


def in_processes(function, jobs: list[tuple], workers: int, path: Path, fresh: bool = False) -> None:
    """Append the rows of function(*job) to a CSV file for every job, `workers` at a time (`fresh`: a process each)."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1 if fresh else None) as pool:
        try:
            for future in as_completed([pool.submit(function, *job) for job in jobs]):
                append(path, future.result())
                print(*future.result(), sep="\n", flush=True)
        except BaseException:  # stop at the first failure, or at Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


def missing(path: Path, keys: tuple[str, ...], jobs: list[tuple]) -> list[tuple]:
    """The jobs of which a CSV file has no row; `keys` names the columns that tell them apart."""
    done = {tuple(row[key] for key in keys) for row in read(path)}
    return [job for job in dict.fromkeys(jobs) if tuple(map(str, job)) not in done]


def draw_ranges(axis, x: list[int], values: list[list[float]], style: str, color: str, label: str) -> None:
    """A line through the means of `values`, one list for every x, with bars from the lowest to the highest."""
    low, middle, high = (np.array([f(each) for each in values]) for f in (min, np.mean, max))
    bars = (middle - low, high - middle)
    axis.errorbar(x, middle, bars, fmt=style, color=color, label=label, capsize=3, markersize=3)


# ---------------------------------------------------------------------------------------------------------------------
# Training runs: M, layers, critic
# ---------------------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What training runs differ in, beside the seed."""

    script: str
    scenario: str = "spread"
    num_agents: int = 3
    num_layers: int = 1
    mc_samples: int = 5
    critic: str = "independent"
    total_timesteps: int = 300_000

    def flags(self) -> list[str]:
        pairs = list(self._asdict().items())[1:]
        return [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", str(value))]


def settings_of(args: Args, part: str) -> list[Setting]:
    if part == "training":  # with one block STAS-ML is STAS, so that M is varied at two
        settings = [Setting(STAS, mc_samples=m) for m in args.mc_samples]
        settings += [Setting(ML, num_layers=2, mc_samples=m) for m in args.mc_samples]
        settings += [Setting(STAS, num_layers=n) for n in args.num_layers]
        return settings + [Setting(ML, num_layers=n) for n in args.num_layers if n > 1]
    if part == "critic":
        critics = ("independent", "centralized")
        return [Setting(STAS, s, n, critic=c) for n in args.critic_agents for s in args.scenarios for c in critics]
    # The longer the better, but 15 agents take long.
    return [Setting(STAS, num_agents=n, total_timesteps=150_000 if n > 6 else 300_000) for n in args.noise_agents]


def run_dir_of(args: Args, setting: Setting, seed: int) -> Path:
    return args.results / "runs" / "-".join(map(str, (*setting, seed))).replace(".py", "")


def flags_of(args: Args, setting: Setting, seed: int) -> list[str]:
    return ["--seed", str(seed), *setting.flags(), *args.flags.split()]


def steps_to_pass(steps: list[int], returns: list[float]) -> float:
    """Steps after which the mean return of the latest five iterations first reaches PASSED; inf if never."""
    passed = [step for i, step in enumerate(steps) if i >= 4 and np.mean(returns[i - 4 : i + 1]) >= PASSED]
    return passed[0] if passed else np.inf


def run(args: Args, *job) -> None:
    """One training run; its row goes into the results, its checkpoint stays if the noise part needs it."""
    setting, seed = Setting(*job[:-2]), job[-2]
    run_dir = run_dir_of(args, setting, seed)
    metrics, summary = train(setting.script, flags_of(args, setting, seed), run_dir)
    returns = [float(row["charts/episodic_return"]) for row in metrics]
    steps = [int(row["global_step"]) for row in metrics]
    result = setting._asdict() | {
        "seed": seed,
        "flags": args.flags,
        "return": round(summary["eval/episodic_return"], 3),
        "random_return": round(summary["random/episodic_return"], 3),
        "training_return": late(metrics, "charts/episodic_return"),
        "mean_return": round(float(np.mean(returns)), 4),
        "steps_to_pass": steps_to_pass(steps, returns),
        "entropy": late(metrics, "losses/entropy"),
        "reward_correlation": late(metrics, "decomposer/reward_correlation"),
        "shapley_correlation": late(metrics, "decomposer/shapley_correlation"),
        "explained_variance": late(metrics, "decomposer/explained_variance"),
        "credit_std": late(metrics, "decomposer/credit_std"),
        "steps": summary["global_step"],
        "seconds": round(summary["wall_time"], 1),
    }
    append(args.results / "shapley_training.csv", [result])
    if setting in settings_of(args, "noise"):
        for path in run_dir.iterdir():
            if path.name not in ("checkpoint.pt", "config.json", "summary.json"):
                path.unlink()
    else:
        shutil.rmtree(run_dir)
    print(result, flush=True)


def measure_training(args: Args) -> None:
    settings = [s for part in ("training", "critic", "noise") if part in args.parts for s in settings_of(args, part)]
    jobs = [(*setting, seed, args.flags) for seed in args.seeds for setting in settings]
    keys = (*Setting._fields, "seed", "flags")
    run_all(partial(run, args), missing(args.results / "shapley_training.csv", keys, jobs), args.workers)


def rows_of(rows: list[dict], setting: Setting) -> list[dict]:
    return [row for row in rows if all(row[name] == str(value) for name, value in setting._asdict().items())]


def report_training(args: Args, rows: list[dict]) -> None:
    sweeps = {
        "coalitions M": {
            "STAS, 1 layer": {m: Setting(STAS, mc_samples=m) for m in args.mc_samples},
            "STAS-ML, 2 blocks": {m: Setting(ML, num_layers=2, mc_samples=m) for m in args.mc_samples},
        },
        "layers (STAS-ML: blocks)": {
            "STAS": {n: Setting(STAS, num_layers=n) for n in args.num_layers},
            "STAS-ML": {n: Setting(ML, num_layers=n) for n in args.num_layers},  # the row of 1 is that of STAS
        },
    }
    figure = matplotlib.figure.Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (label, lines) in enumerate(sweeps.items()):
        ticks = sorted({x for line in lines.values() for x in line})
        print(
            f"\n| {label} | variant | seeds | return on mpe2 | last training return | mean training return "
            f"| thousand steps to {PASSED:.0f} | *when* | *who* | credit_std |\n" + "|---" * 10 + "|"
        )
        for k, (name, settings) in enumerate(lines.items()):
            for x, setting in settings.items():
                runs = rows_of(rows, setting)
                if not runs:
                    continue
                passed = [float(row["steps_to_pass"]) / 1000 for row in runs]
                columns = ("return", "training_return", "mean_return")
                cells = [interval([float(row[c]) for row in runs]) for c in columns]
                cells.append(
                    f"{np.median(passed):.0f} ({min(passed):.0f} to {max(passed):.0f})".replace("inf", "never")
                )
                columns = {"reward_correlation": 2, "shapley_correlation": 2, "credit_std": 3}
                cells += [f"{np.mean([float(row[c]) for row in runs]):.{digits}f}" for c, digits in columns.items()]
                print(f"| {x} | {name} | {len(runs)} | " + " | ".join(cells) + " |")
                place = ticks.index(x) + (k - 0.5) * 0.2
                for axis, quantity in zip(axes[:, column], ("training_return", "mean_return")):
                    values = [float(row[quantity]) for row in runs]
                    axis.plot([place] * len(values), values, ".", color=f"C{k}", alpha=0.6)
                    axis.plot(place, np.mean(values), "_", color=f"C{k}", markersize=18, markeredgewidth=2)
            axes[0, column].plot([], [], "_", color=f"C{k}", label=name, markeredgewidth=2)
        axes[1, column].set(xlabel=label, xticks=range(len(ticks)), xticklabels=ticks)
        axes[0, column].legend(fontsize=8)
    axes[0, 0].set_ylabel("team return, last tenth of training")
    axes[1, 0].set_ylabel("team return, mean of the whole training")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle("spread, 3 agents, 300,000 steps: one dot a seed, bar = mean over seeds", fontsize=10)
    figure.savefig(args.results / "shapley_training.png", dpi=120)


def report_critic(args: Args, rows: list[dict]) -> None:
    settings = settings_of(args, "critic")
    figure = matplotlib.figure.Figure(figsize=(1.5 * len(settings), 3.6), layout="constrained")
    tasks = list(dict.fromkeys((setting.scenario, setting.num_agents) for setting in settings))
    axes = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0]))
    print("\n| scenario | agents | critic | seeds | return on mpe2 | last training return |\n" + "|---" * 6 + "|")
    for setting in settings:
        axis, x = axes[setting.scenario, setting.num_agents], int(setting.critic == "centralized")
        runs = rows_of(rows, setting)
        values = {name: [float(row[name]) for row in runs] for name in ("return", "training_return")}
        cells = " | ".join(interval(each) for each in values.values())
        print(f"| {setting.scenario} | {setting.num_agents} | {setting.critic} | {len(runs)} | {cells} |")
        if runs:
            axis.plot([x] * len(runs), values["training_return"], ".", color=f"C{x}")
            axis.plot(x, np.mean(values["training_return"]), "_", color=f"C{x}", markersize=30, markeredgewidth=2)
        axis.set(xticks=(0, 1), xticklabels=("independent", "centralized"), xlim=(-0.5, 1.5))
        axis.set_title(f"{setting.scenario}, {setting.num_agents} agents", fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("team return, last tenth of training")
    figure.suptitle("Critic on STAS credits, 300,000 steps: one dot a seed, bar = mean over seeds", fontsize=10)
    figure.savefig(args.results / "shapley_critic.png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Noise and bias of the coalition draws
# ---------------------------------------------------------------------------------------------------------------------


def load_states(run_dir: Path, count: int) -> tuple[Decomposer, torch.Tensor, float]:
    """A trained decomposer, what its Shapley block sees in `count` random steps of late episodes, the reward scale.

    The states are (count, N, D).
    """
    flags = json.loads((run_dir / "config.json").read_text())["flags"]
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    generator, buffer = torch.Generator().manual_seed(0), checkpoint["buffer"]
    latest = buffer["position"] - 1 - torch.randperm(min(1024, buffer["size"]), generator=generator)[:64]
    obs, act, valid = (buffer["data"][name][latest % buffer["size"]] for name in ("obs", "act", "valid"))
    names = ("emb_dim", "num_heads", "num_layers", "mc_samples", "attention_window")
    decomposer = Decomposer(
        obs.shape[-1], 5, flags["num_agents"], valid.shape[1], **{name: flags[name] for name in names}
    )
    decomposer.load_state_dict(checkpoint["decomposer"])
    seen = []
    hook = decomposer.shapley.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        decomposer(obs, act, valid, generator)
    hook.remove()
    return decomposer, seen[0][torch.randperm(len(seen[0]), generator=generator)[:count]], flags["reward_scale"]


def independent_coalitions(kind: str, num_samples: int, batch: int, num_agents: int, generator) -> torch.Tensor:
    """`sample_coalitions` without its antithetic pairs: as many draws of one."""
    return torch.cat([sample_coalitions(kind, 1, batch, num_agents, generator) for _ in range(num_samples)])


@torch.no_grad()
def noise_of(num_agents: int, seed: int, run_dir: Path, draws: int) -> list[dict]:
    """Rows of the noise and the error of a credit for every sampler and M, in raw reward units."""
    torch.set_num_threads(1)
    decomposer, states, reward_scale = load_states(run_dir, 48)
    S, N, _ = states.shape

    def credits(x: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        return reward_scale * decomposer.scale * decomposer.head(decomposer.shapley(x, masks, weights)).squeeze(-1)

    everyone = sample_coalitions("exact", 1, 1, N)
    limits = {}
    for kind, weights in (("shapley", shapley_weights(N)), ("banzhaf", torch.full((2 ** (N - 1),), 0.5 ** (N - 1)))):
        # A few states at a time, for there are 2^(N-1) coalitions.
        limits[kind] = torch.cat([credits(x, everyone, weights) for x in states.split(4)])  # (S, N)
    exact = limits["shapley"]
    key = {
        "num_agents": num_agents,
        "seed": seed,
        "total_std": exact.std().item(),
        "who_std": (exact - exact.mean(dim=1, keepdim=True)).square().mean().sqrt().item(),
        "bias": (limits["banzhaf"] - exact).square().mean().sqrt().item(),
    }
    generator, rows = torch.Generator().manual_seed(0), []
    samplers = {"pairs": sample_coalitions, "independent": independent_coalitions}
    for M in (1, 3, 5, 10, 30):
        for kind in ("bernoulli", "permutation"):
            for name, sampler in samplers.items():
                at_once = max(1, 20_000_000 // (S * M * N * N))
                parts = [min(at_once, draws - first) for first in range(0, draws, at_once)]
                drawn = [credits(states.repeat(r, 1, 1), sampler(kind, M, r * S, N, generator)) for r in parts]
                drawn = torch.cat(drawn).view(draws, S, N)
                noise, error = drawn.var(dim=0).mean().sqrt(), (drawn - exact).square().mean().sqrt()
                result = {"noise": noise.item(), "error": error.item()}
                rows.append(key | {"mc_samples": M, "coalition": kind, "draws": name} | result)
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def measure_noise(args: Args) -> None:
    """On the checkpoints that `measure_training` left; trained again where they are gone."""
    path = args.results / "shapley_noise.csv"
    wanted = [(setting, seed) for setting in settings_of(args, "noise") for seed in args.seeds]
    jobs = missing(path, ("num_agents", "seed"), [(setting.num_agents, seed) for setting, seed in wanted])
    wanted = [(setting, seed) for setting, seed in wanted if (setting.num_agents, seed) in jobs]
    run_dirs = {(setting.num_agents, seed): run_dir_of(args, setting, seed) for setting, seed in wanted}
    runs = [(s.script, flags_of(args, s, seed), run_dir_of(args, s, seed)) for s, seed in wanted]
    run_all(train, [job for job in runs if not (job[-1] / "summary.json").exists()], args.workers)
    in_processes(noise_of, [(*job, run_dir, args.draws) for job, run_dir in run_dirs.items()], args.workers, path)
    for setting in settings_of(args, "noise"):
        for seed in args.seeds:
            shutil.rmtree(run_dir_of(args, setting, seed), ignore_errors=True)


def report_noise(args: Args, rows: list[dict]) -> None:
    agents = sorted({int(row["num_agents"]) for row in rows})
    samples = sorted({int(row["mc_samples"]) for row in rows})
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(agents), 3.9), layout="constrained")
    columns = "agents | M | coalition | distance, independent draws | distance, pairs | noise, pairs | bias"
    print(f"\n| {columns} |\n" + "|---" * 7 + "|")
    for axis, N in zip(figure.subplots(1, len(agents), squeeze=False, sharey=True)[0], agents):
        for k, kind in enumerate(("bernoulli", "permutation")):
            distances: dict[str, list] = {"independent": [], "pairs": []}
            for M in samples:
                percent = {}
                for draws in distances:
                    key = {"num_agents": str(N), "mc_samples": str(M), "coalition": kind, "draws": draws}
                    some = [row for row in rows if key.items() <= row.items()]
                    for name in ("noise", "error", "bias"):
                        percent[name, draws] = [100 * float(row[name]) / float(row["who_std"]) for row in some]
                    distances[draws].append(percent["error", draws])
                order = [("error", "independent"), ("error", "pairs"), ("noise", "pairs")]
                cells = [f"{np.mean(v):.0f}% ({min(v):.0f} to {max(v):.0f})" for v in (percent[key] for key in order)]
                bias = np.mean(percent["bias", "pairs"]) if kind == "bernoulli" else 0
                print(f"| {N} | {M} | {kind} | " + " | ".join(cells) + f" | {bias:.0f}% |")
            for draws, style in (("pairs", "o-"), ("independent", "o:")):
                label = f"{kind}, {'antithetic pairs' if draws == 'pairs' else 'independent draws'}"
                draw_ranges(axis, samples, distances[draws], style, f"C{k}", label)
            if kind == "bernoulli":
                axis.axhline(bias, color="C0", linewidth=0.8, linestyle="--", label="bias of bernoulli")
        axis.set(xscale="log", yscale="log", xlabel="coalitions M", title=f"{N} agents")
        axis.set_xticks(samples, [str(m) for m in samples])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(
        "rms distance to the credit of all coalitions,\nin % of the std of credits between agents"
    )
    figure.axes[0].legend(fontsize=7)
    seeds = len({row["seed"] for row in rows})
    title = f"Decomposers trained on spread with bernoulli, M = 5: mean of {seeds} for each N, bars = lowest to highest"
    figure.suptitle(title, fontsize=10)
    figure.savefig(args.results / "shapley_noise.png", dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Cost of a decomposer update
# ---------------------------------------------------------------------------------------------------------------------


def peak_mib() -> float:
    """Peak resident memory of this process so far, MiB."""
    status = Path("/proc/self/status")  # Linux; getrusage would count the parent's memory there
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS


def cost_of(num_agents: int, steps: int, window: int, threads: int, samples: str, updates: int) -> list[dict]:
    """Median milliseconds of an update of 128 episodes with every M of `samples`, in turns; peak memory of all."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(128, steps, num_agents, 18, generator=generator)
    act = torch.randint(5, (128, steps, num_agents), generator=generator)
    valid, returns = torch.ones(128, steps, dtype=torch.bool), torch.randn(128, generator=generator)
    build = partial(Decomposer, 18, 5, num_agents, steps, 64, 4, 1, attention_window=window)
    decomposers = {int(M): build(int(M)) for M in samples.split()}
    optimizers = {M: torch.optim.Adam(decomposer.parameters(), lr=3e-3) for M, decomposer in decomposers.items()}

    def update(M: int, episodes: int) -> float:
        start = time.perf_counter()
        predicted = decomposers[M](obs[:episodes], act[:episodes], valid[:episodes], generator).sum(dim=(1, 2))
        loss = F.mse_loss(predicted, returns[:episodes])
        optimizers[M].zero_grad()
        loss.backward()
        optimizers[M].step()
        return 1000 * (time.perf_counter() - start)

    for M in decomposers:
        update(M, 1)  # loads what torch loads late
    before = peak_mib()
    times = np.array([[update(M, 128) for M in decomposers] for _ in range(updates + 2)])[2:]  # the first two warm up
    key = {"num_agents": num_agents, "steps": steps, "window": window, "threads": threads, "samples": samples}
    memory, medians = round(peak_mib() - before, 1), np.median(times, axis=0).round(2).tolist()
    return [key | {"mc_samples": M, "ms": ms, "peak_mib": memory} for M, ms in zip(decomposers, medians)]


def measure_cost(args: Args) -> None:
    jobs = [(n, 25, 0, 1, "5") for n in args.cost_agents]
    jobs += [(3, steps, window, 1, "5") for steps in args.cost_steps for window in (0, 25)]
    compared = [(n, threads) for n in (3, 15) if n in args.cost_agents for threads in (1, 2)]
    jobs += [(n, 25, 0, threads, "1 3 5 10") for n, threads in compared]
    path = args.results / "shapley_cost.csv"
    jobs = missing(path, ("num_agents", "steps", "window", "threads", "samples"), jobs)
    in_processes(cost_of, [(*job, 7 if job[-1] == "5" else args.updates) for job in jobs], 1, path, fresh=True)


def exponent(x: list[float], y: list[float]) -> float:
    """b of the least-squares fit y = a x^b."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def report_cost(args: Args, rows: list[dict]) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Team rewards that do not add up over agents
# ---------------------------------------------------------------------------------------------------------------------


def game(kind: str, given: torch.Tensor) -> torch.Tensor:
    """Shapley values of the team reward of one step, which is their sum; whoever is outside a coalition gives nothing.

    Args:
        kind: team reward, from what every agent gives. "additive": its mean; "pairwise": the mean of the products of
            all pairs; "multiplicative": the product of all, so that v(C) = 0 unless C is everyone.
        given: (..., N), from 0 to 1.
    Returns:
        (..., N)
    """
    N = given.shape[-1]
    if kind == "additive":
        return given / N
    if kind == "pairwise":  # each pair splits its product
        return given * (given.sum(dim=-1, keepdim=True) - given) / (N * (N - 1))
    if kind == "multiplicative":  # all are needed alike
        return (given.prod(dim=-1, keepdim=True) / N).expand_as(given)
    raise ValueError(f"no such game: {kind!r}")


def play_game(script: str, kind: str, num_agents: int, seed: int, updates: int) -> list[dict]:
    """Fit a decomposer to the returns of 5 random steps of a game; compare its credits with the Shapley values."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator, steps = torch.Generator().manual_seed(seed), 5

    def episodes(count: int) -> tuple[torch.Tensor, ...]:
        """obs (E, T, N, 1) that tell nothing, act (E, T, N) that give 0 to 1 in quarters, valid, Shapley values."""
        obs = torch.randn(count, steps, num_agents, 1, generator=generator)
        act = torch.randint(5, (count, steps, num_agents), generator=generator)
        return obs, act, torch.ones(count, steps, dtype=torch.bool), game(kind, act / 4)

    scale = episodes(10_000)[-1].sum(dim=(1, 2)).std()
    build, num_layers = (Decomposer, 1) if script == STAS else (MLDecomposer, 2)
    decomposer = build(1, 5, num_agents, steps, emb_dim=32, num_heads=4, num_layers=num_layers)
    optimizer = torch.optim.Adam(decomposer.parameters(), lr=3e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        obs, act, valid, true = episodes(128)
        predicted = decomposer(obs, act, valid, generator).sum(dim=(1, 2))
        loss = F.mse_loss(predicted, true.sum(dim=(1, 2)) / scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs, act, valid, true = episodes(4000)
    noiseless = build(1, 5, num_agents, steps, emb_dim=32, num_heads=4, num_layers=num_layers, coalition="exact")
    noiseless.load_state_dict(decomposer.state_dict())
    with torch.no_grad():
        credits = scale * decomposer(obs, act, valid, generator)
        exact = scale * noiseless(obs, act, valid)
    equal = true.mean(dim=2, keepdim=True)
    errors = {"error": credits - true, "exact_error": exact - true, "equal_error": equal - true}
    result = {name: (error.square().mean().sqrt() / true.std()).item() for name, error in errors.items()}
    result["explained_variance"] = explained_variance(credits.sum(dim=(1, 2)), true.sum(dim=(1, 2)))
    key = {"script": script, "game": kind, "num_agents": num_agents, "seed": seed, "updates": updates}
    return [key | {name: round(value, 4) for name, value in result.items()}]


def measure_games(args: Args) -> None:
    kinds, path = ("additive", "pairwise", "multiplicative"), args.results / "shapley_games.csv"
    jobs = [(script, kind, n) for script in NAMES for kind in kinds for n in args.game_agents]
    jobs = [(*job, seed, args.game_updates) for seed in args.seeds for job in jobs]
    jobs = missing(path, ("script", "game", "num_agents", "seed", "updates"), jobs)
    in_processes(play_game, jobs, args.workers, path)


def report_games(args: Args, rows: list[dict]) -> None:
    agents = sorted({int(row["num_agents"]) for row in rows})
    figure = matplotlib.figure.Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    head = " | ".join(f"{n} agents" for n in agents)
    print(f"\n| team reward | credits | {head} |\n" + "|---" * (2 + len(agents)) + "|")
    for k, kind in enumerate(dict.fromkeys(row["game"] for row in rows)):
        for script, style in ((STAS, "o-"), (ML, "o--")):
            some = [row for row in rows if (row["game"], row["script"]) == (kind, script)]
            values = {
                name: [[float(row[name]) for row in some if row["num_agents"] == str(n)] for n in agents]
                for name in ("error", "exact_error", "equal_error", "explained_variance")
            }
            if not all(values["error"]):  # unfinished
                continue
            cells = " | ".join(
                f"{np.mean(error):.2f}, {np.mean(exact):.2f} ({np.mean(explained):.2f})"
                for error, exact, explained in zip(values["error"], values["exact_error"], values["explained_variance"])
            )
            print(f"| {kind} | {NAMES[script]} | {cells} |")
            for axis, name in ((left, "error"), (right, "explained_variance")):
                draw_ranges(axis, agents, values[name], style, f"C{k}", f"{kind}, {NAMES[script]}")
            if script == STAS:
                equal = [np.mean(v) for v in values["equal_error"]]
                print(f"| {kind} | equal shares of the true reward | " + " | ".join(f"{v:.2f}" for v in equal) + " |")
                left.plot(agents, equal, ":", color=f"C{k}", label=f"{kind}, equal shares of the true reward")
    left.axhline(1, color="gray", linewidth=0.8, label="the same credit everywhere")
    left.set_ylabel("distance to the Shapley values\n(rms, in their standard deviations)")
    right.set_ylabel("explained variance of the return")
    for axis in (left, right):
        axis.set(xlabel="agents", xticks=agents)
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    seeds = len({row["seed"] for row in rows})
    title = (
        f"Credits learned from returns alone, by kind of team reward: mean of {seeds} seeds, bars = lowest to highest"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(args.results / "shapley_games.png", dpi=120)


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown or not 2 <= len(set(args.seeds)) <= max(T_95):
        sys.exit(f"error: --parts must be of {', '.join(PARTS)}, and --seeds 2 to {max(T_95)} different seeds")
    if not args.report:
        measure_training(args)
        for part, measure in (("noise", measure_noise), ("cost", measure_cost), ("games", measure_games)):
            if part in args.parts:
                measure(args)
    reports = {
        "training": (report_training, "training"),
        "critic": (report_critic, "training"),
        "noise": (report_noise, "noise"),
        "cost": (report_cost, "cost"),
        "games": (report_games, "games"),
    }
    for part in args.parts:
        report, name = reports[part]
        rows = read(args.results / f"shapley_{name}.csv")
        if rows:
            report(args, rows)
