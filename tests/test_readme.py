"""Every command and snippet of the README is run, the long ones with only their budget reduced."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ALICEBOB, MPE, ROOT, TINY

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.removeprefix("pip install -r requirements.txt && ")
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


def test_the_first_two_set_up_commands_are_the_main_job_and_the_tests():
    one_liners = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(one_liners) == 2
    assert "python stas_ippo_" in one_liners[0] and "pytest" in one_liners[1]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python stas_")])
def test_training_commands(command, run_script, no_pictures, tmp_path):
    _, script, *flags = shlex.split(command)
    tiny = TINY[script]
    if "--resume" in flags:
        assert run_script(f"{tiny} --run-dir RUN_DIR", script)[0] == 0
        code, _, err = run_script(" ".join(flags), script)
    else:
        code, _, err = run_script(f"{' '.join(flags)} {tiny} --run-dir run", script)  # the last of two flags counts
        assert (tmp_path / "run" / "summary.json").exists()
    assert code == 0, err


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python benchmark/")])
def test_benchmark_commands(command, tmp_path):
    small = {
        "benchmark/alicebob.py": ["--variants", "stas", "uniform", "--seeds", "1", f"--flags={TINY[ALICEBOB]}"],
        "benchmark/gridworld.py": ["--num-envs", "1", "8", "--turns", "1", "--min-seconds", "0.01"],
        "benchmark/mpe.py": ["--credits", "stas", "shapley", "--seeds", "1", "2", f"--flags={TINY[MPE]}"],
        "benchmark/simulator.py": "--num-agents 3 --num-envs 1 8 --turns 1 --min-seconds 0.01".split(),
        "benchmark/shapley.py": (
            "--seeds 1 2 --mc-samples 5 --num-layers 1 --scenarios spread --critic-agents 3 --noise-agents 3 --draws 5 "
            "--cost-agents 3 --cost-steps 25 --updates 2 --game-agents 2 --game-updates 3"
        ).split()
        + [f"--flags={TINY[MPE]}"],
    }
    _, program, *flags = shlex.split(command)
    full = [sys.executable, str(ROOT / program), *flags, *small[program], "--results", str(tmp_path)]
    result = subprocess.run(full, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "|---|" in result.stdout and list(tmp_path.glob("*.csv"))


def test_no_other_commands():
    for command in COMMANDS:
        assert command.startswith(("python stas_", "python benchmark/", "python -m pytest"))


def test_the_snippet_that_plays_a_checkpoint(run_script, no_pictures, monkeypatch, tmp_path, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert run_script(f"{TINY[MPE]} --run-dir RUN_DIR", MPE)[0] == 0
    monkeypatch.syspath_prepend(ROOT)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_every_flag_and_file_that_is_named_exists():
    sources = "".join(path.read_text() for path in [*ROOT.glob("stas_*.py"), *ROOT.glob("benchmark/*.py")])
    assert not re.search(r"@\w+@", README)  # a place left to fill in
    for name in set(re.findall(r"--([a-z][a-z-]+[a-z])", README)) - {"help", "logdir"}:
        assert re.search(rf"\b{name.removeprefix('no-').replace('-', '_')}: ", sources), f"--{name} is no flag"
    for name in re.findall(r"`((?:benchmark|envs|tests|assets)/[\w./]*|\w+\.(?:py|txt|cff|toml))`", README):
        generated = ("checkpoint", "config", "metrics", "summary")
        assert (ROOT / name).exists() or name.startswith(generated), f"{name} does not exist"
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).exists(), f"{name} does not exist"
