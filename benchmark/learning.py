"""What a team earns after learning from each kind of credit, on every task: a grid of task x credit x seed.

    python benchmark/learning.py                                          # the grid: what is missing, then all tables
    python benchmark/learning.py --tasks "tag 3" --rows stas episodic     # only these
    python benchmark/learning.py --report                                 # only the tables and the figures
    python benchmark/learning.py --smoke --results /tmp/smoke             # all of it, in short
    python benchmark/learning.py --flags="--mc-samples 20" --results /tmp/mc20    # another setting

Each run is a call of a script. When it ends its row is added to learning.csv and its curve to learning_curves.csv, so
the benchmark can be stopped and started at any time; a run that was broken off is resumed from its last checkpoint.
A task or a row of your own is one more line in TASKS or ROWS.
"""

import math
import re
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.figure
import numpy as np
import tyro
from common import RESULTS, append, check_flags, interval, late, missing, read, run_all, train
from scipy.stats import bootstrap, trim_mean, ttest_1samp

ALICEBOB, MPE, ANY = "stas_ippo_alicebob.py", "stas_ippo_mpe.py", "stas_ippo_pettingzoo.py"
NEAREST_FIRST = '{"num_agent_neighbors":2,"num_landmark_neighbors":3}'
SMALL_PURSUIT = '{"max_cycles":100,"x_size":10,"y_size":10,"n_evaders":10}'
PURSUIT = f"--env-id pettingzoo.sisl.pursuit_v5 --env-kwargs {SMALL_PURSUIT} --horizon 100 --num-envs 16"
VMAS = """--env-id envs.vmas --env-kwargs {"scenario":"%s"} --num-envs 64 --gae-lambda 0.95 --total-timesteps"""
SMAX = """--env-id envs.smax --env-kwargs {"map":"3m"} --num-envs 64 --gae-lambda 0.95 --total-timesteps 150000"""
CHEETAH = """--env-id gymnasium_robotics.mamujoco_v1 --env-kwargs {"scenario":"HalfCheetah","agent_conf":"2x3"}"""
RELEASED = (  # the released code's settings in MPE, as far as there are flags for them, and the steps of its script
    "--num-envs 82 --total-timesteps 2050000 --no-nearest-first --learning-rate 1e-4 --gae-lambda 0.95 "
    "--num-minibatches 48 --clip-coef 0.5 --clip-vloss --max-grad-norm 10 --no-anneal-ent --embedding linear "
    "--no-outcome --emb-dim 128 --num-heads 4 --num-layers 3 --decomposer-lr 5e-4 --decomposer-batch-size 256 "
    "--decomposer-updates 5 --buffer-size 15000 --learning-starts 4000"
)
TASKS = {  # name: script, flags, seeds
    "Alice & Bob": (ALICEBOB, "", 10),
    "spread 3": (MPE, "", 10),
    "tag 3": (MPE, "--scenario tag --gae-lambda 0.95", 10),
    "spread 6": (MPE, "--num-agents 6 --total-timesteps 345000", 5),
    "tag 6": (MPE, "--scenario tag --num-agents 6 --learning-rate 5e-4", 5),
    "push 3": (MPE, "--scenario push --num-envs 64 --gae-lambda 0.95 --total-timesteps 1500000", 5),
    "spread 3, 50 steps": (MPE, "--max-cycles 50 --num-envs 64", 5),
    "spread 3, 100 steps": (MPE, "--max-cycles 100 --num-envs 32", 5),
    "spread 15": (MPE, "--num-agents 15 --total-timesteps 345000", 3),
    "tag 3, lambda 1": (MPE, "--scenario tag", 8),
    "tag 6, learning rate 1e-3": (MPE, "--scenario tag --num-agents 6", 5),
    "push 3, gamma 0.98": (
        MPE,
        "--scenario push --num-envs 64 --gamma 0.98 --gae-lambda 0.95 --total-timesteps 1500000",
        5,
    ),
    "spread 3, released settings": (MPE, RELEASED, 1),
    "simple_spread": (ANY, f"--env-id mpe2.simple_spread_v3 --env-kwargs {NEAREST_FIRST}", 3),
    "simple_reference": (ANY, "--env-id mpe2.simple_reference_v3 --total-timesteps 200000", 3),
    "simple_speaker_listener": (ANY, "--env-id mpe2.simple_speaker_listener_v4 --total-timesteps 200000", 3),
    "foraging": (ANY, "--env-id envs.foraging --horizon 50 --num-envs 64 --total-timesteps 400000", 3),
    "pursuit": (
        ANY,
        f"{PURSUIT} --buffer-size 2048 --attention-window 10 --gamma 0.99 --gae-lambda 0.95 --total-timesteps 60000",
        3,
    ),
    "VMAS balance": (ANY, f"{VMAS % 'balance'} 300000", 3),
    "VMAS navigation": (ANY, f"{VMAS % 'navigation'} 200000", 3),
    "VMAS reverse transport": (ANY, f"{VMAS % 'reverse_transport'} 200000", 3),
    "SMAX 3m": (ANY, SMAX, 3),
    "HalfCheetah 2x3": (
        ANY,
        f"{CHEETAH} --horizon 100 --learning-rate 4e-3 --gae-lambda 0.95 --total-timesteps 400000",
        3,
    ),
    "spread 3, continuous": (MPE, "--continuous-actions", 5),
    "tag 3, continuous": (MPE, "--continuous-actions --scenario tag --gae-lambda 0.95", 5),
}
VARIANTS = {  # with other settings: the task of the grid
    "tag 3, lambda 1": "tag 3",
    "tag 6, learning rate 1e-3": "tag 6",
    "push 3, gamma 0.98": "push 3",
    "spread 3, released settings": "spread 3",
}
CONTINUOUS = [task for task in TASKS if task.endswith("continuous")]
GRID = [task for task, (script, *_) in TASKS.items() if script != ANY and task not in (*VARIANTS, *CONTINUOUS)]
SPREAD = [task for task in GRID if task.startswith("spread")]
LEARNED = ["stas", "STAS-ML", "stas, conserve none", "stas, coalition all", "temporal"]
OWN = {(task, "dense"): "--gae-lambda 0.9" for task in SPREAD}  # what search.py found to be better for some rows
OWN |= {("spread 3, continuous", "dense"): "--gae-lambda 0.9"}
OWN |= dict.fromkeys(((task, "episodic") for task in ("HalfCheetah 2x3", "VMAS reverse transport")), "--gae-lambda 1")
OWN |= {("spread 3, 100 steps", row): "--gae-lambda 0.95" for row in LEARNED}
# How many steps `episodic` makes in the time of one of `stas`, if not 2; some by earlier scripts (docs/speed.md).
PACE = {"Alice & Bob": 2.2, "tag 3": 2.3, "spread 6": 2.2, "push 3": 3, "push 3, gamma 0.98": 2.3}
PACE |= {"spread 3, 50 steps": 2.5, "spread 3, 100 steps": 4}
ROWS = {  # name: flags
    "stas": "",
    "STAS-ML": "",
    "stas, conserve none": "--conserve none",
    "stas, coalition all": "--coalition all",
    "stas, half shared": "--own-share 0.5",
    "stas, shared equally": "--own-share 0",
    "temporal": "--credit temporal",
    "uniform": "--credit uniform",
    "episodic": "--credit episodic",
    "episodic, equal time": "--credit episodic",  # and more steps
    "dense": "--credit dense",
    "difference": "--credit difference",
    "shapley": "--credit shapley",
}
SETTINGS = {  # in place of our defaults or of OWN: flags, tasks; first those of the paper or its code
    "stas, linear embedding": ("--embedding linear", ["Alice & Bob", "spread 3"]),
    "stas, no outcome": ("--no-outcome", ["Alice & Bob", "spread 3"]),
    "stas, lambda 0.95": ("--gae-lambda 0.95", ["Alice & Bob", "spread 3"]),
    "stas, learning rate 1e-4": ("--learning-rate 1e-4", ["Alice & Bob", "spread 3"]),
    "stas, gamma 1": ("--gamma 1", ["Alice & Bob"]),
    "stas, adv-eps 1e-8": ("--adv-eps 1e-8", ["Alice & Bob"]),
}
ALL = " ".join([ROWS["stas, conserve none"], *(flags for flags, _ in SETTINGS.values())])
SETTINGS |= {
    "stas, all of these": (ALL, ["Alice & Bob", "spread 3"]),
    "stas, 1 coalition": ("--mc-samples 1", ["spread 3"]),
    "stas, 3 coalitions": ("--mc-samples 3", ["spread 3"]),
    "stas, 10 coalitions": ("--mc-samples 10", ["spread 3"]),
    "stas, centralized critic": ("--critic centralized", ["spread 3"]),
    "stas, lambda 1": ("", ["spread 3, 100 steps"]),
    "dense, lambda 1": ("--credit dense", SPREAD),
    "stas, 8 updates": ("--decomposer-updates 8", ["pursuit", "Alice & Bob"]),
    "stas, 32 updates": ("--decomposer-updates 32", ["Alice & Bob"]),
}
ROWS |= {name: flags for name, (flags, _) in SETTINGS.items()}
HEADLINE = ["stas", "episodic", "episodic, equal time"]
HEADLINE += ["STAS-ML", "stas, conserve none", "stas, coalition all", "temporal", "uniform"]
PARTS = HEADLINE[2:]  # rows with fewer seeds than TASKS say
SEEDS = dict.fromkeys(((task, row) for task in TASKS for row in PARTS), 3)
SEEDS |= {("spread 3", "STAS-ML"): 5, ("spread 3", "stas, coalition all"): 6}
SEEDS |= dict.fromkeys((("spread 3", row) for row in ("stas, lambda 0.95", "dense, lambda 1")), 8)
SEEDS |= dict.fromkeys((("spread 3", row) for row in ("shapley", "difference")), 5)
MORE = ("spread 3", "spread 6", "tag 6", "push 3", "spread 3, 50 steps")
SEEDS |= dict.fromkeys(((task, "episodic, equal time") for task in MORE), 5)
SEEDS |= dict.fromkeys((("tag 3, lambda 1", row) for row in ("stas, coalition all", "episodic, equal time")), 6)
SEEDS["tag 3", "episodic, equal time"] = 10
PAST = ("stas, half shared", "stas, shared equally")  # there are results of them, but the flag is gone
KEYS = ("task", "row", "flags", "threads", "seed")  # the columns of learning.csv that tell runs apart
FOUND = 0.9  # the treasure rate in Alice & Bob that counts as learned


@dataclass
class Args:
    tasks: list[Literal[tuple(TASKS)]] = field(default_factory=lambda: GRID)
    """tasks to run; tables are made of all that there are results of"""
    rows: list[Literal[tuple(row for row in ROWS if row not in PAST)]] = field(
        default_factory=lambda: [row for row in ROWS if row not in (*PAST, *SETTINGS)]
    )
    """rows of each table"""
    seeds: list[int] = field(default_factory=list)
    """seeds to run (default: from 1 on, as many as the grid has)"""
    workers: int = 2
    """runs side by side; for times that are to be compared 1, with nothing else running"""
    threads: int = 1
    """CPU threads of each run"""
    keep: bool = False
    """keep the run folders, in runs/ below the results, for TensorBoard and evaluate.py"""
    smoke: bool = False
    """a hundredth of the steps, and two seeds; give another folder of results"""
    flags: str = ""
    """more flags for every run"""
    results: Path = RESULTS
    """folder of the results; give another one along with --flags"""
    report: bool = False
    """run nothing"""
    own: tyro.conf.Suppress[bool] = True
    """with OWN; search.py: without"""


def seeds_of(args: Args, task: str, row: str) -> list[int]:
    """The seeds to run."""
    most = 2 if args.smoke else TASKS[task][2]
    return args.seeds or list(range(1, min(most, SEEDS.get((task, row), most)) + 1))


def usual_flags(task: str, row: str, own: bool = True) -> str:
    flags = f"{TASKS[task][1]} {ROWS[row]} {OWN.get((task, row), '') if own else ''}"
    if row == "episodic, equal time":
        flags += f" --total-timesteps {round(PACE.get(task, 2) * steps_of(flags))}"
    return " ".join(flags.split())


def steps_of(flags: str) -> int:
    return int((600_000, *re.findall(r"--total-timesteps (\d+)", flags))[-1])


def flags_of(args: Args, task: str, row: str) -> str:
    flags = f"{usual_flags(task, row, args.own)} {args.flags}"
    if args.smoke:
        flags += f" --total-timesteps {steps_of(flags) // 100} --eval-episodes 2"
    return " ".join(flags.split())


def fits(task: str, row: str) -> bool:
    """SETTINGS name their tasks; exact Shapley values and differences are known in spread; STAS-ML is for MPE. With
    the released settings a run takes hours."""
    if TASKS[task][1] == RELEASED:
        return row in ("stas", "stas, conserve none", "episodic", "dense")
    if task in CONTINUOUS:
        return row in ("stas", "episodic", "dense")
    if row == "episodic, equal time":
        return TASKS[task][0] != ANY
    if row in SETTINGS:
        return task in SETTINGS[row][1]
    if row in ("shapley", "difference"):
        return task.startswith("spread")
    return row != "STAS-ML" or TASKS[task][0] == MPE


def run(args: Args, task: str, row: str, seed: int) -> None:
    """One training run; its row and its curve go into the results."""
    flags = flags_of(args, task, row)
    run_dir = (
        args.results
        / "runs"
        / re.sub(r"\W+", "_", f"{task} {row} {seed} {args.threads} {zlib.crc32(flags.encode()):x}")
    )
    script = "stas_ml_ippo_mpe.py" if row == "STAS-ML" else TASKS[task][0]
    metrics, summary = train(script, ["--seed", str(seed), *flags.split()], run_dir, args.threads, resume=True)
    key = {"task": task, "row": row, "seed": seed, "flags": flags, "threads": args.threads}
    found = [each for each in metrics if float(each.get("charts/treasure_rate") or 0) >= FOUND]
    result = key | {
        "return": round(summary["eval/episodic_return"], 3),
        "random_return": round(summary["random/episodic_return"], 3),
        "length": round(summary["eval/episodic_length"], 2),
        "treasure_rate": summary.get("eval/treasure_rate", ""),
        "steps_to_found": found[0]["global_step"] if found else "",
        "seconds_to_found": round(float(found[0]["wall_time"]), 1) if found else "",
        "training_return": late(metrics, "charts/episodic_return"),
        "mean_return": round(float(np.mean([float(each["charts/episodic_return"]) for each in metrics])), 4),
        "entropy": late(metrics, "losses/entropy"),
        "explained_variance": late(metrics, "decomposer/explained_variance"),
        "reward_correlation": late(metrics, "decomposer/reward_correlation"),
        "shapley_correlation": late(metrics, "decomposer/shapley_correlation"),
        "credit_std": late(metrics, "decomposer/credit_std"),
        "decomposer_share": round(float(np.mean([share(each) for each in metrics])), 3),
        "steps": summary["global_step"],
        "seconds": round(summary["wall_time"], 1),
    }
    columns = {"step": "global_step", "return": "charts/episodic_return"}
    thin = metrics[:: max(1, len(metrics) // 60)]
    append(args.results / "learning_curves.csv", [key | {k: each[v] for k, v in columns.items()} for each in thin])
    append(args.results / "learning.csv", [result])  # last: this row says that the run is done
    if not args.keep:
        shutil.rmtree(run_dir)
    print(result, flush=True)


def share(row: dict) -> float:
    """The decomposer's share of an iteration's time."""
    parts = [float(row[f"time/{name}"]) for name in ("decomposer", "rollout", "ppo")]
    return parts[0] / sum(parts)


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """Results of one task with the same row, flags and threads together, in the order of ROWS; other flags named."""
    order = {name: i for i, name in enumerate(ROWS)}
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (order[row["row"]], row["flags"], row["threads"], int(row["seed"]))):
        usual = usual_flags(row["task"], row["row"])
        more = [row["flags"].removeprefix(usual).strip(), f"{row['threads']} threads" * (row["threads"] != "1")]
        found.setdefault(" ".join(filter(None, [row["row"], *more])), []).append(row)
    return found


def paired(runs: list[dict], others: list[dict], column: str) -> list[float]:
    """runs - others of the seeds that both have."""
    known = {row["seed"]: float(row[column]) for row in others if row[column]}
    return [float(row[column]) - known[row["seed"]] for row in runs if row["seed"] in known and row[column]]


def gains(runs: list[dict], others: list[dict]) -> list[list[float]]:
    """What runs earn more than others, `paired`: last training return, mean of the whole training."""
    return [paired(runs, others, column) for column in ("training_return", "mean_return")]


def values(runs: list[dict], column: str) -> list[float]:
    return [float(row[column]) for row in runs if row[column]]


def normalised(returns: np.ndarray, low: float, dense: np.ndarray) -> np.ndarray:
    """Returns (..., n) as scores: 0 is `low`, what random teams earn, and 1 the mean of `dense` (..., m)."""
    return (returns - low) / (np.mean(dense, axis=-1, keepdims=True) - low)


def scores_of(runs: list[dict], dense: list[dict]) -> list[float]:
    """The scores of runs by the last training return, as `normalised` by those of `dense` on the same task."""
    own, high = (values(each, "training_return") for each in (runs, dense))
    return list(normalised(np.array(own), np.mean(values(dense, "random_return")), high)) if own and high else []


def table(rows: list[dict]) -> str:
    """The table of one task."""
    head = "credit (seeds) | return on PettingZoo | last training return | more than `episodic` (mean of training)"
    lines = [f"| {head} | score | *when*, *who* |", "|---" * 6 + "|"]
    found = groups(rows)
    for name, runs in found.items():
        extra = name.removeprefix(runs[0]["row"])  # other flags are compared with rows of the same
        episodic, dense = (found.get(other + extra, []) for other in ("episodic", "dense"))
        cells = [interval(values(runs, column)) for column in ("return", "training_return")]
        last, whole = map(interval, gains(runs, episodic))
        cells.append("" if runs[0]["row"] == "episodic" else f"{last} ({whole})")
        cells.append(interval(scores_of(runs, dense)))
        known = [values(runs, f"{kind}_correlation") for kind in ("reward", "shapley")]
        cells.append(", ".join(f"{np.mean(numbers):.2f}" for numbers in known if numbers))
        lines.append(f"| {name} ({len(runs)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def treasure_table(rows: list[dict]) -> str:
    """Medians over seeds with ranges, in Alice & Bob. A run that never found it counts as later than all."""
    head = "credit | final rate >= 0.9 | final treasure rate | episode length | thousand steps to 0.9 | seconds to 0.9"
    lines = [f"| {head} |", "|---" * 6 + "|"]
    for name, runs in groups(rows).items():
        steps, seconds = (
            [float(row[f"{unit}_to_found"] or "inf") / scale for row in runs]
            for unit, scale in (("steps", 1000), ("seconds", 1))
        )
        cells = [spread(values(runs, "treasure_rate")), spread(values(runs, "length"), "{:.1f}")]
        cells += [
            "never" if min(x) == math.inf else spread(x, "{:.0f}").replace("inf", "never") for x in (steps, seconds)
        ]
        reached = sum(rate >= FOUND for rate in values(runs, "treasure_rate"))
        lines.append(f"| {name} | {reached} of {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(numbers: list[float], form: str = "{:.2f}") -> str:
    """median (smallest to largest)"""
    low, middle, high = (form.format(x) for x in (min(numbers), np.median(numbers), max(numbers)))
    return f"{middle} ({low} to {high})"


def iqm(scores: list[np.ndarray]) -> np.ndarray:
    """Interquartile mean over the runs of all tasks together (Agarwal et al. 2021, arXiv 2108.13264); the last axes."""
    return trim_mean(np.concatenate(scores, axis=-1), 0.25, axis=-1)


def mean_over_tasks(scores: list[np.ndarray]) -> np.ndarray:
    """Every task counts the same, however many seeds it has; over the last axes."""
    return np.mean([each.mean(axis=-1) for each in scores], axis=0)


def better(runs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The probability that a run earns more than another's, ties half; over the last axes."""
    above = np.sign(runs[..., :, None] - others[..., None, :]).mean(axis=(-1, -2))
    return (1 + above) / 2


def with_interval(statistic, samples: list[list[float]]) -> str:
    """A statistic of samples with its 95% bootstrap interval, in which every sample is drawn anew."""
    samples = [np.asarray(sample) for sample in samples]
    options = {"vectorized": True, "method": "percentile", "rng": 0, "n_resamples": 5000}
    drawn = bootstrap(samples, lambda *draws, axis=-1: statistic(*draws), **options).confidence_interval
    return f"{statistic(*samples):.2f} ({drawn.low:.2f} to {drawn.high:.2f})"


def summary_table(rows: list[dict], tasks: list[str]) -> str:
    """Over all tasks on which `episodic` and `dense` have two seeds or more, the rows that have as many on each."""
    head = "credit | tasks | interquartile mean of the score | mean over tasks"
    head += " | probability of a better end than `episodic`"
    lines = [f"| {head} |", "|---" * 5 + "|"]
    found = [groups([row for row in rows if row["task"] == task]) for task in tasks]
    found = [some for some in found if min(len(some.get(name, [])) for name in ("episodic", "dense")) > 1]
    lows = [np.mean(values(some["dense"], "random_return")) for some in found]

    def score(average, *draws) -> np.ndarray:
        """The average score, from the returns of a row and of `dense` in turns, task by task."""
        return average([normalised(*each) for each in zip(draws[::2], lows, draws[1::2])])

    def chance(*draws) -> np.ndarray:
        """Of the returns of a row and of `episodic` in turns; every task counts the same."""
        return np.mean([better(*each) for each in zip(draws[::2], draws[1::2])], axis=0)

    def returns(*names: str) -> list[list[float]]:
        """Of these rows in turns, task by task."""
        return [values(some[name], "training_return") for some in found for name in names]

    for name in [name for name in ROWS if found and all(len(some.get(name, [])) > 1 for some in found)]:
        cells = [f"{name} | {len(found)}"]
        cells += [with_interval(partial(score, average), returns(name, "dense")) for average in (iqm, mean_over_tasks)]
        cells.append("" if name == "episodic" else with_interval(chance, returns(name, "episodic")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def score_table(rows: list[dict]) -> str:
    """The scores of every task, with the number of seeds, of the kinds of credit in HEADLINE that have some.

    Runs with other flags or threads are not in it; if there are only such, it is empty.
    """
    cells: dict[str, dict[str, str]] = {}  # of every task, by the row of ROWS
    for task in TASKS:
        found = groups([row for row in rows if row["task"] == task])
        scores = {name: scores_of(found.get(name, []), found.get("dense", [])) for name in HEADLINE}
        cells[task] = {name: f"{interval(some)} ({len(some)})" for name, some in scores.items() if some}
    names = [name for name in HEADLINE if any(name in some for some in cells.values())]
    return "\n\n".join(filter(None, (cells_table("task", names[i : i + 4], cells) for i in range(0, len(names), 4))))


def cells_table(title: str, names: list[str], cells: dict[str, dict[str, str]]) -> str:
    """A line for each task that has some of these cells."""
    lines = [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for task, some in cells.items():
        if any(some.get(name) for name in names):
            lines.append(f"| {task} | {' | '.join(some.get(name, '') for name in names)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def headline_table(rows: list[dict]) -> str:
    """For the README: mean scores of the tasks of the grid, and whether `stas` ends higher, paired by seed, with a 95%
    interval that excludes 0, than plain PPO with the same steps, and in the same time."""
    columns = {"stas": "STAS", "episodic": "PPO", "episodic, equal time": "PPO, equal time"}
    lines = [f"| task | {' | '.join(columns.values())} | STAS ahead: equal steps, equal time |", "|---" * 5 + "|"]
    for task in GRID:
        found = groups([row for row in rows if row["task"] == task])
        scores = [scores_of(found.get(name, []), found.get("dense", [])) for name in columns]
        if not all(scores):
            continue
        verdicts = []
        for other in list(columns)[1:]:
            more = paired(found["stas"], found[other], "training_return")
            shown = len(more) > 1 and ttest_1samp(more, 0).pvalue < 0.05
            verdicts.append(("yes" if np.mean(more) > 0 else "behind") if shown else "unclear")
        lines.append(f"| {task} | {' | '.join(f'{np.mean(each):.2f}' for each in scores)} | {', '.join(verdicts)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def gain_table(rows: list[dict], name: str, others: list[str]) -> str:
    """What the row `name` earns more than others on the tasks of the grid and their variants, paired by seed: last
    training return and, in brackets, the mean of the whole training."""
    cells: dict[str, dict[str, str]] = {}
    for task in [*GRID, *VARIANTS]:
        found, cells[task] = groups([row for row in rows if row["task"] == task]), {}
        for other in others:
            last, whole = gains(found.get(name, []), found.get(other, []))
            cells[task][other] = f"{interval(last)} ({interval(whole)})" if last else ""
    tables = (cells_table(f"`{name}` less", others[i : i + 4], cells) for i in range(0, len(others), 4))
    return "\n\n".join(filter(None, tables))


def compared(rows: list[dict]) -> list[dict]:
    """Without SETTINGS and VARIANTS."""
    return [row for row in rows if row["row"] not in SETTINGS and row["task"] not in VARIANTS]


def curves_of(some: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (100,) and the returns (seeds, 100) of a row's runs at these."""
    runs = [[row for row in some if row["seed"] == seed] for seed in sorted({row["seed"] for row in some})]
    points = [sorted({float(row["step"]): float(row["return"]) for row in run}.items()) for run in runs]
    steps = np.linspace(max(p[0][0] for p in points), min(p[-1][0] for p in points), 100)
    return steps, np.array([np.interp(steps, *zip(*p)) for p in points])


def draw_band(axis, x: np.ndarray, lines: np.ndarray, color):
    """The mean of lines (K, len(x)), and a band from the lowest to the highest."""
    axis.fill_between(x, lines.min(axis=0), lines.max(axis=0), color=color, alpha=0.15, linewidth=0)
    (line,) = axis.plot(x, lines.mean(axis=0), color=color)
    return line


def draw(rows: list[dict], curves: list[dict], tasks: list[str], path: Path) -> None:
    """Team return in training against steps, below against seconds; up to four tasks side by side."""
    tasks = [task for task in tasks if any(row["task"] == task for row in curves)]
    if not tasks:
        return
    names = {name for task in tasks for name in groups([row for row in curves if row["task"] == task])}
    order = [name for name in ROWS if name in names] + sorted(names - set(ROWS))
    colors = {name: matplotlib.colormaps["tab20"](2 * i % 20 + i // 10) for i, name in enumerate(order)}
    bands = -(-len(tasks) // 4)  # two rows of panels each
    columns = -(-len(tasks) // bands)
    figure = matplotlib.figure.Figure(figsize=(max(9, 4.2 * columns), 6 * bands), layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    shown = {}
    for i, task in enumerate(tasks):
        upper, lower = axes[2 * (i // columns) :, i % columns][:2]
        lower.sharey(upper)
        results = groups([row for row in rows if row["task"] == task])
        for name, some in groups([row for row in curves if row["task"] == task]).items():
            if name not in results:
                continue  # all its runs were broken off between the two files
            steps, lines = curves_of(some)
            pace = np.mean([float(row["seconds"]) / float(row["steps"]) for row in results[name]])
            for axis, x in zip((upper, lower), (steps / 1000, steps * pace)):
                shown[name] = draw_band(axis, x, lines, colors[name])
        upper.set(xlabel="environment steps (thousands)", title=task)
        lower.set(xlabel="seconds (on days of unequal speed)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for i in range(len(tasks), bands * columns):
        for axis in axes[2 * (i // columns) :, i % columns][:2]:
            axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("team return in training")
    figure.suptitle(
        "Learning by kind of credit: mean over seeds, band from the lowest to the highest seed", fontsize=11
    )
    order = [name for name in order if name in shown]
    figure.legend([shown[name] for name in order], order, loc="outside lower center", ncols=min(6, 1 + columns))
    figure.savefig(path, dpi=110)


def draw_overview(curves: list[dict], path: Path) -> None:
    """Small panels, one for each task of the grid: STAS between the delayed and the true reward."""
    labels = {
        "stas": "STAS, from the return at the end",
        "episodic": "plain PPO on the same return",
        "dense": "PPO on the true reward of every step",
    }
    found = {task: groups([row for row in curves if row["task"] == task]) for task in GRID}
    found = {task: some for task, some in found.items() if set(labels) <= set(some)}
    if not found:
        return
    lines = 1 + (len(found) > 3)
    columns = -(-len(found) // lines)
    figure = matplotlib.figure.Figure(figsize=(max(9, 2.6 * columns), 2.3 * lines + 0.5), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (task, some) in zip(axes, found.items()):
        for name, color in zip(labels, ("tab:blue", "tab:orange", "tab:gray")):
            steps, returns = curves_of(some[name])
            draw_band(axis, steps / 1000, returns, color).set_label(labels[name])
        axis.set_title(task, fontsize=11)
        axis.grid(alpha=0.3)
    for axis in axes[len(found) :]:
        axis.axis("off")
    figure.supxlabel("environment steps in thousands (line: mean over seeds, band: lowest to highest)", fontsize=10)
    figure.supylabel("team return", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    args = tyro.cli(Args)
    check_flags(args)
    if args.smoke and args.results.resolve().is_relative_to(RESULTS):
        sys.exit("error: --smoke: must come with a --results folder of its own")
    cells = [(task, row) for task in args.tasks for row in args.rows if fits(task, row)]
    jobs = [(*cell, seed) for cell in cells for seed in seeds_of(args, *cell)]
    jobs.sort(key=lambda job: (args.tasks.index(job[0]), job[2]))  # every row of a task before the next seed
    keyed = {(task, row, flags_of(args, task, row), args.threads, seed): (task, row, seed) for task, row, seed in jobs}
    wanted = [keyed[key] for key in missing(args.results / "learning.csv", KEYS, list(keyed))]
    if not jobs and not args.report:
        sys.exit("error: --rows: must be some of these tasks; SETTINGS, oracles and STAS-ML are not of all")
    if not args.report:
        run_all(partial(run, args), wanted, args.workers)
    rows, curves = (read(args.results / f"{name}.csv") for name in ("learning", "learning_curves"))
    for task in [task for task in TASKS if any(row["task"] == task for row in rows)]:
        some = [row for row in rows if row["task"] == task]
        one = next(iter(groups(some).values()))
        print(f"\n{task}: random team {interval(values(one, 'random_return'))}\n\n{table(some)}")
        if TASKS[task][0] == ALICEBOB:
            print(f"\n{treasure_table(some)}")
    oracles = dict.fromkeys(("shapley", "difference"), ["dense, lambda 1", "episodic"])
    for name, others in ({"stas": [*HEADLINE[1:], "dense"]} | oracles).items():
        if paired_table := gain_table(rows, name, others):
            print(f"\nPaired by seed, last training return (mean of the training):\n\n{paired_table}")
    # Settings have their lines in the tables above; from here on kinds of credit are compared.
    rows, curves = compared(rows), compared(curves)
    if short := headline_table(rows):
        print(f"\nIn short:\n\n{short}")
    if scores := score_table(rows):
        print(f"\nScores:\n\n{scores}")
        print(f"\nOver all tasks of the grid:\n\n{summary_table(rows, GRID)}")
    if rows:
        draw_overview(curves, args.results / "overview.png")
        draw(rows, curves, GRID, args.results / "learning.png")
        others = [task for task, (script, *_) in TASKS.items() if script == ANY]
        draw(rows, curves, others, args.results / "learning_pettingzoo.png")
