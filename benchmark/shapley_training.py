"""Return against the number of coalitions M, against layers, and against what the critic sees, in training runs.

    python benchmark/shapley_training.py                   # all runs that are still missing, then tables and figures
    python benchmark/shapley_training.py --parts critic    # only this part
    python benchmark/shapley_training.py --report          # only the tables and the figures

Each run is a call of a script; its row goes into benchmark/results/shapley_training.csv as soon as it ends.
"""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, append, check_seeds, interval, late, missing, read, run_all, train

STAS, ML = "stas_ippo_mpe.py", "stas_ml_ippo_mpe.py"
PASSED = -20.0  # the training return that sample efficiency asks for


@dataclass
class Args:
    parts: list[Literal["training", "critic"]] = field(default_factory=lambda: ["training", "critic"])
    """M and layers, or the critic"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """seeds of the training runs, 1 to 10 of them"""
    mc_samples: list[int] = field(default_factory=lambda: [1, 3, 5, 10])
    """training: coalitions M"""
    num_layers: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    """training: layers"""
    scenarios: list[str] = field(default_factory=lambda: ["spread", "tag"])
    """critic: scenarios"""
    critic_agents: list[int] = field(default_factory=lambda: [3, 6])
    """critic: numbers of agents"""
    workers: int = 2
    """runs side by side, one CPU thread each"""
    flags: str = ""
    """more flags for every training run"""
    results: Path = RESULTS
    """folder of the results; give another one along with --flags"""
    report: bool = False
    """measure nothing"""


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
    critics = ("independent", "centralized")
    return [Setting(STAS, s, n, critic=c) for n in args.critic_agents for s in args.scenarios for c in critics]


def run_dir_of(args: Args, setting: Setting, seed: int) -> Path:
    return args.results / "runs" / "-".join(map(str, (*setting, seed))).replace(".py", "")


def flags_of(args: Args, setting: Setting, seed: int) -> list[str]:
    return ["--seed", str(seed), *setting.flags(), *args.flags.split()]


def steps_to_pass(steps: list[int], returns: list[float]) -> float:
    """Steps after which the mean return of the latest five iterations first reaches PASSED; inf if never."""
    passed = [step for i, step in enumerate(steps) if i >= 4 and np.mean(returns[i - 4 : i + 1]) >= PASSED]
    return passed[0] if passed else np.inf


def run(args: Args, *job) -> None:
    """One training run; its row goes into the results."""
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
    shutil.rmtree(run_dir)
    print(result, flush=True)


def measure_training(args: Args) -> None:
    settings = [s for part in args.parts for s in settings_of(args, part)]
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


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_seeds(args)
    if not args.report:
        measure_training(args)
    rows = read(args.results / "shapley_training.csv")
    for part, report in (("training", report_training), ("critic", report_critic)):
        if rows and part in args.parts:
            report(args, [row for row in rows if row["flags"] == args.flags])
