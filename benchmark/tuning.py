"""What frontier.py and search.py share: runs of learning.py with other flags, on a seed that settings are chosen on."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import learning
from common import RESULTS, check_flags, missing, read, run_all
from learning import KEYS


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [11])
    """seeds to run and report"""
    workers: int = 2
    """runs side by side, one CPU thread each"""
    flags: str = ""
    """more flags for every run"""
    results: Path = RESULTS / "tuning"
    """folder of the results"""
    report: bool = False
    """run nothing"""


def args_of(args: Args, flags: str) -> learning.Args:
    """What learning.py is to run with these flags besides those of its task and row."""
    return learning.Args(flags=f"{flags} {args.flags}".strip(), results=args.results, own=False)


def key_of(args: Args, task: str, row: str, flags: str) -> tuple[str, ...]:
    """KEYS without the seed."""
    return task, row, learning.flags_of(args_of(args, flags), task, row), "1"


def run(args: Args, task: str, row: str, flags: str, seed: int) -> None:
    learning.run(args_of(args, flags), task, row, seed)


def results_of(args: Args, wanted: list[tuple[str, str, str]]) -> list[dict]:
    """All results, after the runs of `wanted` (task, row, flags) that are missing."""
    check_flags(args)
    file = args.results / "learning.csv"
    jobs = {(*key_of(args, *each), seed): (*each, seed) for seed in args.seeds for each in wanted}
    if not args.report:
        run_all(partial(run, args), [jobs[key] for key in missing(file, KEYS, list(jobs))], args.workers)
    return read(file)


def select(args: Args, rows: list[dict], task: str, row: str, flags: str) -> list[dict]:
    """The results of one task, row and flags on the seeds to report."""
    key = key_of(args, task, row, flags)
    return [each for each in rows if tuple(each[k] for k in KEYS[:-1]) == key and int(each["seed"]) in args.seeds]
