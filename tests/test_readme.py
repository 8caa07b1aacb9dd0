"""Every command and program of the README and the documentation is run, the long ones with their budget reduced."""

import csv
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import MPE, PETTINGZOO, ROOT, TINY

PAGES = ["README.md", "benchmark/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
README, *OTHERS = ((ROOT / page).read_text() for page in PAGES)
DOCS = "\n".join(OTHERS)
COMMANDS = [
    re.sub(r"  # .*", "", line.removeprefix("pip install -r requirements.txt && "))
    for block in re.findall(r"```bash\n(.*?)```", README + DOCS, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
COMMANDS = list(dict.fromkeys(COMMANDS))


def test_the_first_two_set_up_commands_are_the_main_job_and_the_tests():
    one_liners = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(one_liners) == 2
    assert "python stas_ippo_" in one_liners[0] and "pytest" in one_liners[1]
    assert len(README.splitlines()) <= 150


PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODULES = {re.match(r"# (\w+\.py)\n", text)[1]: text for text in PROGRAMS if text.startswith("# ")}


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python stas_")])
def test_training_commands(command, run_script, tmp_path, monkeypatch):
    if "envs.vmas" in command:
        pytest.importorskip("vmas")
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", sys.path[:])  # to which the current folder is added
    _, script, *flags = shlex.split(command)
    tiny = TINY[script]
    if "--resume" in flags:
        assert run_script(f"{tiny} --run-dir RUN_DIR", script)[0] == 0
        code, _, err = run_script(" ".join(flags), script)
    else:
        flags = [flag.replace(" ", "") for flag in flags]  # those of JSON
        code, _, err = run_script(f"{' '.join(flags)} {tiny} --run-dir run", script)  # the last of two flags counts
        assert (tmp_path / "run" / "summary.json").exists()
    assert code == 0, err


def test_the_environment_of_the_readme_is_learned_in_ten_seconds(tmp_path):
    """In as many steps as its command says; the time is not measured."""
    (command,) = [command for command in COMMANDS if "--env-id signals" in command]
    (tmp_path / "signals.py").write_text(MODULES["signals.py"])
    _, script, *flags = shlex.split(command)
    full = [
        sys.executable,
        str(ROOT / script),
        *flags,
        "--num-threads",
        "1",
        "--run-dir",
        "run",
        "--eval-episodes",
        "20",
    ]
    subprocess.run(full, cwd=tmp_path, check=True, capture_output=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/episodic_return"] > 9.5 and 4 < summary["random/episodic_return"] < 6


def test_the_decomposer_alone():
    """The program of the README lowers its loss, and its rewards add up to the returns."""
    (text,) = [text for text in PROGRAMS if "import" in text and not text.startswith("# ")]
    torch.manual_seed(0)
    obs, act, valid = torch.rand(64, 5, 2, 3), torch.randint(4, (64, 5, 2)), torch.ones(64, 5, dtype=torch.bool)
    env = SimpleNamespace(num_agents=2, obs_dim=3, num_actions=4, continuous=False, horizon=5)
    names = dict(torch=torch, env=env, obs=obs, act=act, valid=valid, team_return=10 * obs.sum(dim=(1, 2, 3)))
    exec(text, names)
    torch.testing.assert_close(names["rewards"].sum(dim=(1, 2)), names["team_return"], rtol=1e-4, atol=1e-3)
    (update,) = [line for line in text.splitlines() if line.startswith("loss = ")]
    first = names["loss"]
    for _ in range(300):
        exec(update, names)
    assert names["loss"] < 0.05 * first


def tables_in(text: str) -> list[list[str]]:
    """The tables of a text, each a list of its lines."""
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)]


REPORTS = {  # programs that print the tables of results again: their least number
    **{"learning.py": 5, "search.py": 3, "frontier.py": 1},
    **{"constant.py": 1, "pace.py": 1, "scaling.py": 3, "shapley_games.py": 1, "simulator.py": 1, "update.py": 1},
}


@pytest.mark.parametrize("program, least", REPORTS.items())
def test_the_tables_are_those_of_the_results(program, least, tmp_path):
    """The README has the short table of scores that benchmark/learning.py prints from its CSV, docs/ has all others of
    the benchmarks, whole; and neither has one with these titles that they do not print."""
    results = ROOT / "benchmark" / "results" / ("tuning" if program in ("search.py", "frontier.py") else "")
    for path in results.glob("*.csv"):
        shutil.copy(path, tmp_path)
    command = [sys.executable, f"benchmark/{program}", "--report", "--results", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    there = tables_in(f"{README}\n{DOCS}")
    assert len(tables_in(printed)) >= least
    assert [table for table in tables_in(printed) if table not in there] == []
    titles = {title for table in tables_in(printed) for title in table[:1]}
    assert [table for table in there if table[0] in titles and table not in tables_in(printed)] == []


def test_the_table_of_a_gpu_is_that_of_its_results():
    with open(ROOT / "benchmark" / "results" / "cuda.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [line for table in tables_in(DOCS) if "H200" in table[0] for line in table[2:]]
    assert len(rows) == 2 * len(lines) > 0
    for line, *both in zip(lines, rows[::2], rows[1::2]):
        assert [row["device"] for row in both] == ["one core", "H200"] and both[0]["flags"] == both[1]["flags"]
        times = [", ".join(f"{float(row[part]):.2f}" for part in ("rollout", "decomposer", "ppo")) for row in both]
        speeds = [f"{int(row['steps_per_second']):,}" for row in both]
        assert line.endswith(f" | {' | '.join(times + speeds)} |") and (both[0]["flags"] or "none") in line


def test_the_table_of_scores_is_in_the_readme():
    assert any(table[0].startswith("| task | STAS |") for table in tables_in(README))


PARTS_OF_THE_GRID = [c for c in COMMANDS if c.startswith("python benchmark/learning.py ") and "--tasks" in c]


@pytest.mark.parametrize("command", PARTS_OF_THE_GRID)
def test_commands_for_parts_of_the_grid(command, no_pictures, monkeypatch, capsys, tmp_path):
    """They begin the runs that they name, with flags that the scripts take, once, and print their tables. What stands
    in for the runs here is made up, but for the names of metrics; test_benchmark_commands trains some of the grid."""
    begun, lock = [], threading.Lock()

    def train(script, flags, run_dir, *rest, **options):
        module = importlib.import_module(script.removesuffix(".py"))
        with lock:  # tyro is not made for threads
            begun.append(args := tyro.cli(module.Args, args=flags))
        run_dir.mkdir(parents=True)
        metrics = re.findall(r'"((?:charts|decomposer|time)/\w+)"', (ROOT / script).read_text())
        metrics += ["wall_time", "losses/entropy"]
        rows = [dict.fromkeys(metrics, str(args.seed + 10 * len(args.credit) + more)) for more in (0, 1)]
        summary = {"eval/episodic_return": 1.0, "random/episodic_return": 0.5, "eval/episodic_length": 20.0}
        summary |= {"eval/treasure_rate": 1.0, "global_step": 9, "wall_time": 7.0}
        return [row | {"global_step": step} for row, step in zip(rows, "59")], summary

    monkeypatch.syspath_prepend(str(ROOT / "benchmark"))
    monkeypatch.setattr("common.train", train)
    _, program, *flags = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *flags, "--results", str(tmp_path)])
    learning = runpy.run_path(str(ROOT / program), run_name="__main__")
    args, printed = learning["args"], capsys.readouterr().out
    cells = [(task, row) for task in args.tasks for row in args.rows]
    assert len(begun) == sum(len(args.seeds or learning["seeds_of"](args, *cell)) for cell in cells)
    assert all(f"\n| {row} " in printed for row in args.rows)
    assert len({args.seed for args in begun}) == len(args.seeds) or not args.seeds
    results = learning["read"](tmp_path / "learning.csv")
    for row in results:
        value = float(row["mean_return"]) - 0.5
        assert (float(row["training_return"]), float(row["explained_variance"])) == (value + 1, value + 1)
        known = {name: float(row[name]) for name in ("return", "random_return", "length", "steps", "seconds")}
        assert known == {"return": 1, "random_return": 0.5, "length": 20, "steps": 9, "seconds": 7}
        assert row["steps_to_found"] == "5" * (row["task"] == "Alice & Bob")
    runpy.run_path(str(ROOT / program), run_name="__main__")
    assert len(begun) == len(results) and learning["read"](tmp_path / "learning.csv") == results  # nothing was missing


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python benchmark/") and c not in PARTS_OF_THE_GRID]
)
def test_benchmark_commands(command, tmp_path):
    small = {
        "benchmark/search.py": [
            *["--tasks", "spread 3", "--rows", "episodic", "--settings", "default", "lambda 0.9"],
            f"--flags={TINY[MPE]}",
        ],
        "benchmark/frontier.py": ["--tasks", "spread 3", "--changes", "default", "dense", f"--flags={TINY[MPE]}"],
        "benchmark/aligned.py": ["--points", "21"],
        "benchmark/constant.py": [
            *"--constants 3 --horizons 10 --seeds 1".split(),
            f"--flags={TINY[PETTINGZOO]}",
        ],
        "benchmark/learning.py": [
            *["--tasks", "spread 3", "simple_reference", "Alice & Bob", "--rows", "stas", "shapley", "--seeds", "1"],
            f"--flags={TINY[MPE]}",
        ],
        "benchmark/update.py": "--num-agents 3 --threads 1 --updates 2".split(),
        "benchmark/pace.py": ["--tasks", "spread 3", "--turns", "1", "--iterations", "3"],
        "benchmark/scaling.py": (
            "--env-id mpe2.simple_reference_v3 --copies 1 2 --turns 1 --min-seconds 0.01 --total-timesteps 3300"
        ).split(),
        "benchmark/simulator.py": "--num-agents 3 --num-envs 1 8 --turns 1 --min-seconds 0.01".split(),
        "benchmark/shapley_noise.py": [*"--seeds 1 --num-agents 3 --draws 5".split(), f"--flags={TINY[MPE]}"],
        "benchmark/shapley_games.py": "--seeds 1 --num-agents 2 --updates 3".split(),
    }
    _, program, *flags = shlex.split(command)
    full = [sys.executable, str(ROOT / program), *flags, *small[program], "--results", str(tmp_path)]
    result = subprocess.run(full, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if program == "benchmark/aligned.py":  # measures nothing: it draws
        assert list(tmp_path.glob("*.png"))
    else:
        assert "|---|" in result.stdout and list(tmp_path.glob("*.csv"))


def test_no_other_commands():
    for command in COMMANDS:
        assert command.startswith(("python stas_", "python benchmark/", "python -m pytest", "python evaluate.py"))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python evaluate.py")])
def test_evaluation_commands(command, run_script, tmp_path):
    for folder in ("RUN_DIR", "OTHER", "runs/newest"):
        assert run_script(f"{TINY[MPE]} --run-dir {folder}", MPE)[0] == 0
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    _, program, *flags = shlex.split(command)
    few = ["--episodes", "10"] if "--episodes" in flags else []  # the last of two flags counts
    command = [sys.executable, str(ROOT / program), *flags, *few]
    env = os.environ | {"SDL_VIDEODRIVER": "dummy"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0 and "drawn: " in result.stdout, result.stderr
    assert bool(few) == ("over 10 episodes" in result.stdout)
    kept = {path.relative_to(ROOT) for path in (ROOT / "checkpoints").glob("*/*")}
    assert {path.relative_to(tmp_path) for path in (tmp_path / "checkpoints").glob("*/*")} == kept


def test_the_map_from_the_paper_to_the_code_points_at_the_right_lines():
    lines = (ROOT / MPE).read_text().splitlines()
    places = re.findall(r"`(\w+)`,\s+line (\d+)", README + DOCS)
    assert len(places) >= 9
    for name, number in places:
        assert re.match(rf"(class|def) {name}\b", lines[int(number) - 1]), f"{name} is not in line {number} of {MPE}"


def test_every_flag_and_file_that_is_named_exists():
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")])
    both = README + DOCS
    assert not re.search(r"@\w+@", both)  # a place left to fill in
    others = {"help", "logdir", "index-url", "nproc-per-node"}  # of other programs
    others |= {"own-share"}  # of the scripts that made some of the results
    for name in set(re.findall(r"(?<!\w)--([a-z][a-z-]+[a-z])", both)) - others:
        assert re.search(rf"\b{name.removeprefix('no-').replace('-', '_')}: ", sources), f"--{name} is no flag"
    for name in re.findall(r"`((?:benchmark|envs|tests|assets)/[\w./]*|\w+\.(?:py|txt|cff|toml))`", both):
        generated = ("checkpoint", "config", "metrics", "summary")
        assert (ROOT / name).exists() or name.startswith(generated), f"{name} does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([\w./]*)(?:#([\w-]+))?\)", (ROOT / page).read_text())
    for name, anchor in links:
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{name} does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor
