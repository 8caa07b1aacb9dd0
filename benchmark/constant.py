"""Does a constant part of the reward do harm? Two agents, and a step earns a constant and the share of agents whose
action is 1; observations are noise and the time. Resumable; the rows are in constant.csv.

    python benchmark/constant.py
    python benchmark/constant.py --report

The task is Stable-Baselines3's issue 2240 and CleanRL's issue 441 for teams: alive bonuses and base costs.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

KEYS = ("constant", "horizon", "credit", "seed")


class Toggle(ParallelEnv):
    """Ends after `horizon` steps."""

    metadata = {"name": "toggle"}
    possible_agents = ["a", "b"]

    def __init__(self, constant: float, horizon: int):
        self.constant, self.horizon, self.agents = constant, horizon, []

    def observation_space(self, agent: str) -> Box:
        return Box(-1, 1, (3,), np.float32)

    def action_space(self, agent: str) -> Discrete:
        return Discrete(3)

    def observe(self) -> dict:
        now = self.t / self.horizon
        return {agent: np.array([*self.rng.uniform(-1, 1, 2), now], np.float32) for agent in self.possible_agents}

    def reset(self, seed=None, options=None) -> tuple[dict, dict]:
        self.rng, self.t, self.agents = np.random.default_rng(seed), 0, list(self.possible_agents)
        return self.observe(), {}

    def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
        self.t += 1
        earned = self.constant + np.mean([act == 1 for act in actions.values()])
        before, over = self.agents, self.t == self.horizon
        self.agents = [] if over else before
        told = (dict.fromkeys(before, value) for value in (earned, False, over))
        return self.observe(), *told, {}


parallel_env = Toggle  # which --env-id benchmark.constant finds


@dataclass
class Args:
    constants: list[int] = field(default_factory=lambda: [0, 1, 3, 10])
    """what every step earns in any case"""
    horizons: list[int] = field(default_factory=lambda: [10, 200])
    """steps of an episode"""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """seeds of each"""
    flags: str = ""
    """more flags for every run"""
    results: Path = Path(__file__).parent / "results"
    """folder of the results; give another one along with --flags"""
    report: bool = False
    """run nothing"""


def run(args: Args, constant: int, horizon: int, credit: str, seed: int) -> None:
    """One run, and its row."""
    kwargs = f'{{"constant":{constant},"horizon":{horizon}}}'
    flags = f"--env-id benchmark.constant --env-kwargs {kwargs} --horizon {horizon} --num-envs 16 --credit {credit}"
    flags += f" --total-timesteps 64000 --buffer-size 2000 --eval-episodes 20 --seed {seed} {args.flags}"
    run_dir = args.results / "runs" / f"constant_{constant}_{horizon}_{credit}_{seed}"
    _, summary = train("stas_ippo_pettingzoo.py", flags.split(), run_dir)
    found = {name: summary[f"{who}/episodic_return"] for name, who in (("random_return", "random"), ("return", "eval"))}
    append(args.results / "constant.csv", [dict(zip(KEYS, (constant, horizon, credit, seed))) | found])


def table(rows: list[dict]) -> str:
    """Returns without the constant: means over seeds, and their lowest."""
    lines = ["| steps | constant | random team | stas: mean, lowest | dense: mean, lowest |", "|---" * 5 + "|"]
    for horizon, constant in sorted({(int(row["horizon"]), float(row["constant"])) for row in rows}):
        some = [row for row in rows if (int(row["horizon"]), float(row["constant"])) == (horizon, constant)]
        cells = [f"{np.mean([float(row['random_return']) for row in some]) - constant * horizon:.1f}"]
        for credit in ("stas", "dense"):
            earned = [float(row["return"]) - constant * horizon for row in some if row["credit"] == credit]
            cells.append(f"{np.mean(earned):.1f}, {min(earned):.1f} ({len(earned)})" if earned else "")
        lines.append(f"| {horizon} | {constant:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro
    from common import append, check_flags, missing, read, run_all, train

    args = tyro.cli(Args)
    check_flags(args)
    cells = [(constant, horizon) for constant in args.constants for horizon in args.horizons]
    jobs = [(*cell, credit, seed) for seed in args.seeds for cell in cells for credit in ("stas", "dense")]
    if not args.report:
        run_all(partial(run, args), missing(args.results / "constant.csv", KEYS, jobs), 1)
    rows = read(args.results / "constant.csv")
    if not rows:
        sys.exit("error: there are no results")
    print(table(rows))
