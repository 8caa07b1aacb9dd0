"""What the benchmarks compute themselves, against definitions."""

import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PETTINGZOO, ROOT, TINY, TORCHRUN


@pytest.fixture
def benchmark_of(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    return importlib.import_module


@pytest.mark.parametrize("kind", ["additive", "pairwise", "multiplicative"])
@pytest.mark.parametrize("num_agents", [2, 3, 5])
def test_shapley_values_of_the_games_by_enumeration(benchmark_of, kind, num_agents):
    given = torch.rand(num_agents, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(coalition: tuple[int, ...]) -> float:
        """The team reward if only the coalition gives something."""
        parts = [given[i].item() if i in coalition else 0.0 for i in range(num_agents)]
        if kind == "additive":
            return sum(parts) / num_agents
        if kind == "pairwise":
            products = [a * b for a, b in itertools.combinations(parts, 2)]
            return sum(products) / len(products)
        return math.prod(parts)

    game = benchmark_of("shapley_games").game
    values = game(kind, given)
    orders = list(itertools.permutations(range(num_agents)))
    for i in range(num_agents):
        before = [order[: order.index(i)] for order in orders]
        expected = sum(value((*some, i)) - value(some) for some in before) / len(orders)
        assert values[i].item() == pytest.approx(expected)
    assert values.sum().item() == pytest.approx(value(tuple(range(num_agents))))
    batch = game(kind, given.expand(4, 2, -1))
    assert torch.allclose(batch, values.expand(4, 2, -1))


def test_what_pays_an_agent_that_goes_to_the_free_landmark(benchmark_of):
    """Shapley values of the one moving agent by enumeration of all orders; all of dense is its own difference."""
    aligned = benchmark_of("aligned")
    places = torch.tensor([aligned.START, aligned.LANDMARKS[1], (0.1, -0.9)], dtype=torch.float64)
    credits = aligned.credits_at(places)
    for position, shapley in zip(places, credits["shapley"]):
        bodies = [position.tolist(), aligned.LANDMARKS[0], aligned.LANDMARKS[2]]

        def reward(coalition, bodies=bodies) -> float:
            reach = [[math.dist(mark, bodies[i]) for i in coalition] for mark in aligned.LANDMARKS]
            return -0.5 * sum(min(each, default=2 * math.sqrt(2)) for each in reach)  # nobody touches

        orders = list(itertools.permutations(range(3)))
        before = [order[: order.index(0)] for order in orders]
        value = sum(reward((*some, 0)) - reward(some) for some in before) / len(orders)
        assert shapley.item() == pytest.approx(value)
    assert (credits["dense"] - credits["difference"]).std().item() == pytest.approx(0, abs=1e-9)


def test_a_credit_that_never_changes_is_one_deviation_from_the_values(benchmark_of, monkeypatch):
    class Constant(torch.nn.Module):
        def __init__(self, args, env):
            super().__init__()
            self.credit = torch.nn.Parameter(torch.tensor(0.2))

        def forward(self, obs, act, valid):
            return self.credit.expand(act.shape)

    games = benchmark_of("shapley_games")
    monkeypatch.setattr(games, "Decomposer", Constant)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    (row,) = games.play_game(games.STAS, "additive", 2, 1, 300)
    assert row["error"] == row["exact_error"] == pytest.approx(1, abs=0.01) and row["explained_variance"] == 0
    assert row["equal_error"] == pytest.approx(math.sqrt(1 / 2), abs=0.02)  # half the variance is between the agents


def test_the_last_tenth_of_a_training(benchmark_of):
    metrics = [{"return": str(i), "sometimes": str(i) if i == 18 else "", "never": ""} for i in range(20)]
    assert [benchmark_of("common").late(metrics, name) for name in metrics[0]] == [18.5, 18.0, ""]


def test_unknown_game(benchmark_of):
    with pytest.raises(ValueError, match="game"):
        benchmark_of("shapley_games").game("chess", torch.ones(3))


def test_independent_coalitions_have_no_pairs(benchmark_of):
    masks, weights = benchmark_of("shapley_noise").independent_coalitions("bernoulli", 2, 500, 4)
    assert weights.tolist() == [0.5, 0.5]
    both = (masks[0] == masks[1])[:, ~torch.eye(4, dtype=torch.bool)]
    assert masks.shape == (2, 500, 4, 4) and both.double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_traffic_is_what_an_iteration_sums(benchmark_of, run_script, monkeypatch):
    """Two iterations that believe to be one of two processes, whose sums are counted instead of made."""
    sums, size = benchmark_of("scaling").traffic()
    sizes = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, function in {
        "init_process_group": lambda backend: None,
        "destroy_process_group": lambda: None,
        "all_reduce": lambda values: sizes.append(values.nbytes),
        "gather_object": lambda part, parts: parts.__setitem__(0, part),
    }.items():
        monkeypatch.setattr(torch.distributed, name, function)
    flags = "--total-timesteps 500 --num-envs 16 --reward-scale 1 --eval-episodes 2 --run-dir run"
    assert run_script(flags, TORCHRUN)[0] == 0
    baseline = 2 * 25 * 4  # bytes, of two sums over the steps of an episode, in the first iteration only
    assert (len(sizes), sum(sizes)) == (2 * sums + 2, 2 * size + baseline)


def test_efficiency_by_hand(benchmark_of, monkeypatch):
    scaling = benchmark_of("scaling")
    monkeypatch.setattr(scaling, "traffic", lambda: (100, 10**6))
    # 100 sums of 2 * 3 messages of 1 ms take 0.6 s; 2 * 3 / 4 MB at 8 Mbit/s take 1.5 s.
    assert scaling.efficiency(2.1, 4, 0.008, 1e-3, ring=True) == pytest.approx(0.5)
    assert scaling.efficiency(1.9, 4, 0.008, 1e-3, ring=False) == pytest.approx(0.5)


def test_gains_are_paired_by_seed(benchmark_of):
    runs = [{"seed": seed, "return": value} for seed, value in (("1", "5"), ("2", "7"), ("4", "0"))]
    others = [{"seed": seed, "return": value} for seed, value in (("3", "9"), ("2", "3"), ("1", "4"))]
    assert benchmark_of("learning").paired(runs, others, "return") == [1, 4]


def test_statistics_over_tasks_by_counting(benchmark_of):
    """Scores, the interquartile mean and the probability of improvement against loops; the interval holds the value."""
    learning, scores = benchmark_of("learning"), [[0.0, 0.5, 1.0, 9.0], [0.5, 0.68, 0.6, -9.0]]
    drawn = learning.normalised(np.array([[-5.0, -1.0], [0.0, 1.0]]), -10.0, np.array([[-2.0, 2.0], [-10.0, 30.0]]))
    assert drawn.tolist() == [[0.5, 0.9], [0.5, 0.55]]
    assert learning.iqm([np.array(each) for each in scores]) == pytest.approx((0.5 + 0.5 + 0.6 + 0.68) / 4)
    assert learning.mean_over_tasks([np.array([1.0]), np.array([0.0, 0.0, 6.0])]) == pytest.approx((1 + 2) / 2)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[0] for b in scores[1]]
    assert learning.better(*map(np.array, scores)) == pytest.approx(sum(pairs) / 16)
    value, low, high = map(float, re.findall(r"[-\d.]+", learning.with_interval(lambda *s: learning.iqm(s), scores)))
    assert low <= value == 0.57 <= high and low < high


def test_how_many_seeds_a_cell_has(benchmark_of):
    learning = benchmark_of("learning")
    cells = [("Alice & Bob", "stas"), ("tag 6", "uniform"), ("spread 3", "stas, coalition all"), ("tag 3", "dense")]
    args = learning.Args()
    assert [len(learning.seeds_of(args, *cell)) for cell in cells] == [10, 3, 6, 10]
    assert learning.seeds_of(args, "spread 3, released settings", "stas, conserve none") == [1]
    assert learning.seeds_of(learning.Args(smoke=True), "tag 3", "dense") == [1, 2]
    assert learning.seeds_of(learning.Args(seeds=[7, 9]), "tag 6", "uniform") == [7, 9]


def test_the_table_of_scores_by_hand(benchmark_of):
    """Random teams earn -2 and -4, `dense` 5 and 9: a score is (return + 3) / 10. Other flags stay out."""
    kinds = {
        ("dense", ""): (5, 9),
        ("episodic", ""): (2, 2),
        ("stas", ""): (6, 8, 7),
        ("stas", "--mc-samples 20"): (0,),
    }
    rows = [
        {"task": "spread 6", "row": row, "seed": str(seed), "threads": "1", "training_return": str(value)}
        | {"random_return": str(-2 - 2 * seed)}
        | {"flags": f"{benchmark_of('learning').usual_flags('spread 6', row)} {more}".strip()}
        for (row, more), some in kinds.items()
        for seed, value in enumerate(some)
    ]
    *_, line = benchmark_of("learning").score_table(rows).splitlines()
    assert line == "| spread 6 | 1.00 ± 0.25 (3) | 0.50 ± 0.00 (2) |"


def test_the_table_of_gains_by_hand(benchmark_of):
    """Pairs of the seeds that both have: (6 - 2, 8 - 5), over the training one less each; rows with other flags stay
    out, and so does a task without pairs."""
    learning, rows = benchmark_of("learning"), []
    for task, row, seed, value, more in (
        *[("tag 6", "stas", seed, value, "") for seed, value in ((1, 6), (2, 8), (3, 7))],
        *[("tag 6", "episodic", seed, value, "") for seed, value in ((2, 5), (1, 2), (4, 0))],
        ("tag 6", "dense", 1, 9, "--ent-coef 1"),
        *[("push 3", "stas", 1, 5, ""), ("push 3", "dense", 2, 5, "")],
    ):
        flags = f"{learning.usual_flags(task, row)} {more}".strip()
        rows.append({"task": task, "row": row, "seed": str(seed), "threads": "1", "flags": flags})
        rows[-1] |= {"training_return": str(value), "mean_return": str(value - (row == "stas"))}
    head, _, *lines = learning.gain_table(rows, "stas", ["episodic", "dense"]).splitlines()
    assert (head, lines) == ("| `stas` less | episodic | dense |", ["| tag 6 | 3.50 ± 6.35 (2.50 ± 6.35) |  |"])
    assert learning.gain_table(rows, "shapley", ["episodic"]) == ""


def test_a_run_that_was_broken_off_is_continued(benchmark_of, tmp_path, monkeypatch):
    """With the seed it began with, by the same code only; one that has ended is taken as it is."""
    common, run_dir = benchmark_of("common"), tmp_path / "run"
    flags = f"{TINY[PETTINGZOO]} --total-timesteps 2000 --checkpoint-every 1".split()
    begun = subprocess.Popen([sys.executable, str(ROOT / PETTINGZOO), "--run-dir", str(run_dir), *flags])
    while not (run_dir / "checkpoint.pt").exists():
        assert begun.poll() is None
        time.sleep(0.02)
    begun.kill()
    begun.wait()
    config = json.loads((run_dir / "config.json").read_text())
    for began, now, same in (
        *[("abc", "echo abc", True), ("abc-dirty", "echo abc", True), ("another", "echo abc", False)],
        *[("abc", "false", False), ("", "false", False)],  # the code has changed, or is no clone
    ):
        (run_dir / "config.json").write_text(json.dumps(config | {"git_commit": began}))
        monkeypatch.setattr(common, "COMMIT", now)
        assert common.resumable(run_dir) == same
    monkeypatch.setattr(common, "resumable", lambda run_dir: True)
    for _ in range(2):  # to the end; then there is nothing left to do
        metrics, summary = common.train(PETTINGZOO, [*flags, "--seed", "5"], run_dir, resume=True)
        assert json.loads((run_dir / "config.json").read_text())["flags"]["seed"] == 1
        assert int(metrics[-1]["global_step"]) == summary["global_step"] >= 2000
    monkeypatch.setattr(common, "resumable", lambda run_dir: False)
    common.train(PETTINGZOO, [*flags, "--seed", "5"], run_dir, resume=True)
    assert json.loads((run_dir / "config.json").read_text())["flags"]["seed"] == 5


def test_a_script_that_differs_from_its_commit_is_seen(benchmark_of, tmp_path):
    command = benchmark_of("common").COMMIT
    (tmp_path / "tests").mkdir()
    for name in ("script.py", "tests/test.py", "notes.md"):
        (tmp_path / name).write_text("")
    commit = "git init -q && git add . && git -c user.name=a -c user.email=a commit -qm begin"
    assert subprocess.run(commit, shell=True, cwd=tmp_path).returncode == 0
    for name, code in (("tests/test.py", 0), ("notes.md", 0), ("script.py", 1)):
        (tmp_path / name).write_text("# more")
        assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == code


def test_two_programs_do_not_share_a_run(benchmark_of, tmp_path):
    common = benchmark_of("common")
    with common.locked(tmp_path / "run.lock"), pytest.raises(SystemExit, match="another program is at this run"):
        common.train(PETTINGZOO, [], tmp_path / "run")


def test_settings_are_never_averaged_in_silently(benchmark_of, tmp_path):
    """Rows of other flags or another script are rows of their own; the published table takes no other flags."""
    rows = [
        {"task": "spread 3", "row": row, "seed": seed, "flags": flags, "threads": "1"}
        for row in ("stas", "STAS-ML")
        for flags in ("", "--mc-samples 20")
        for seed in ("1", "2")
    ]
    names = benchmark_of("learning").groups(rows)
    assert {name: len(runs) for name, runs in names.items()} == dict.fromkeys(
        ("stas", "stas --mc-samples 20", "STAS-ML", "STAS-ML --mc-samples 20"), 2
    )
    for program in ("learning", "shapley_noise"):
        command = [sys.executable, str(ROOT / "benchmark" / f"{program}.py"), "--flags=--mc-samples 20"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1 and "--results" in result.stderr and len(result.stderr.splitlines()) == 1
    for flags, message in (
        (["--flags=--seed 3"], "must be without --seed"),
        (["--report", "--results", "nowhere"], "must be a folder"),
        (["--tasks", "tag 3", "--rows", "shapley"], "must be some of these tasks"),
    ):
        command = [sys.executable, str(ROOT / "benchmark" / "learning.py"), "--results", str(tmp_path), *flags]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1
    for row in ("nonsense", *benchmark_of("learning").PAST):
        bad = [sys.executable, str(ROOT / "benchmark" / "learning.py"), "--rows", row, "--results", str(tmp_path)]
        result = subprocess.run(bad, capture_output=True, text=True)
        assert result.returncode == 2 and "Traceback" not in result.stderr


def test_results_of_a_flag_that_is_gone_are_still_told(benchmark_of):
    learning = benchmark_of("learning")
    rows = learning.read(ROOT / "benchmark" / "results" / "tuning" / "learning.csv")
    table = learning.table([row for row in rows if row["task"] == "spread 3" and row["threads"] == "1"])
    assert all(f"\n| {row} (1) | " in table for row in learning.PAST)


def test_kinds_of_credit_are_compared_with_the_settings_of_the_grid(benchmark_of):
    """Rows with other settings and variants of tasks are left out."""
    learning = benchmark_of("learning")
    named = [("spread 3", "stas"), ("spread 3", "stas, no outcome"), ("tag 3, lambda 1", "stas"), ("tag 3", "episodic")]
    rows = [{"task": task, "row": row} for task, row in named]
    assert learning.compared(rows) == [rows[0], rows[3]]
