"""The script as its users see it: a run folder, living flags, clear errors, and runs that survive being killed."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALICEBOB, ML, MPE, PETTINGZOO, ROOT, SCRIPTS, TINY, TORCHRUN, read_metrics
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stas_ippo_alicebob
import stas_ippo_mpe
import stas_ippo_pettingzoo
import stas_ippo_pettingzoo_torchrun
import stas_ml_ippo_mpe
from envs.alice_bob import AliceBob
from envs.mpe import make
from evaluate import play_episode

ALL = (*SCRIPTS, TORCHRUN)
MODULES = {
    ALICEBOB: stas_ippo_alicebob,
    MPE: stas_ippo_mpe,
    ML: stas_ml_ippo_mpe,
    PETTINGZOO: stas_ippo_pettingzoo,
    TORCHRUN: stas_ippo_pettingzoo_torchrun,
}


def wait_until(holds: Callable[[], bool], what: str, process: subprocess.Popen | None = None) -> None:
    """A minute at most, and not beyond the end of the process."""
    end = time.monotonic() + 60
    while not holds():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"not within a minute: {what}"
        time.sleep(0.02)


def flags_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "config.json").read_text())["flags"]


@pytest.mark.parametrize("script", ALL)
def test_a_run_leaves_a_complete_folder(script, run_script, tiny, tmp_path):
    code, out, err = run_script(f"{tiny} --checkpoint-every 1 --run-dir run")
    assert code == 0 and err == ""
    assert len(re.findall(r"^step (?:200|400|600): (?:return|treasure rate) -?\d+\.\d\d$", out, re.MULTILINE)) == 3
    assert "over 2 episodes; draw: python evaluate.py run\n" in out
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {re.sub(r"tfevents.*", "tfevents", name) for name in names} == {
        "checkpoint.pt", "config.json", "lock", "metrics.csv", "summary.json", script, "events.out.tfevents",
    }  # fmt: skip
    assert (run / script).read_bytes() == (ROOT / script).read_bytes()

    config = json.loads((run / "config.json").read_text())
    assert set(config) == {"script", "flags", "versions", "git_commit"} and config["script"] == script
    assert set(config["flags"]) == {field.name for field in fields(MODULES[script].Args)}
    assert config["flags"]["emb_dim"] == 8 and config["flags"]["reward_scale"] > 0
    assert config["versions"]["torch"] == torch.__version__

    rows = read_metrics(run)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3]
    steps = [int(row["global_step"]) for row in rows]
    assert steps == [200, 400, 600]
    last, agents = rows[-1], 3 if script in (MPE, ML) else 2
    total = agents * float(last["charts/episodic_return"])
    assert float(last["charts/agent_return_sum"]) == pytest.approx(total, rel=1e-6)
    everywhere = [name for name in last if script != ALICEBOB or not name.startswith("decomposer/reward_correlation")]
    assert all(last[name] for name in everywhere)

    # TensorBoard shows them too, and the evaluation.
    events = EventAccumulator(str(run)).Reload()
    for name in (name for name in last if "/" in name):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step, float(row[name])) for step, row in zip(steps, rows) if row[name]]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]

    summary = json.loads((run / "summary.json").read_text())
    kinds = ["episodic_return", "episodic_return_std", "episodic_length", "episodes", "terminated"]
    kinds += ["treasure_rate"] if script == ALICEBOB else []
    scores = {f"{who}/{kind}" for who in ("eval", "random") for kind in kinds}
    assert set(summary) == scores | {"global_step", "wall_time"}
    assert summary["eval/episodes"] == summary["random/episodes"] == 2 and summary["global_step"] == steps[-1]
    for name in scores:
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(steps[-1], pytest.approx(summary[name]))]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_a_run_knows_the_commit_and_whether_it_was_changed(script, run_script, tiny, tmp_path):
    def git(command: str) -> str:
        me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        return subprocess.run(["git", *me, *command.split()], cwd=tmp_path, capture_output=True, text=True).stdout

    def commit_of_a_run(name: str) -> str:
        assert run_script(f"{tiny} --run-dir {name}", str(tmp_path / script))[0] == 0
        return json.loads((tmp_path / name / "config.json").read_text())["git_commit"]

    shutil.copy(ROOT / script, tmp_path)
    assert commit_of_a_run("alone") == ""
    git("init")
    git(f"add {script}")
    git("commit -m first")
    git("tag -a v1 -m v1")
    head = git("rev-parse HEAD").strip()
    assert len(head) == 40 and commit_of_a_run("clean") == head
    with open(tmp_path / script, "a") as file:
        file.write("# an idea\n")
    assert commit_of_a_run("changed") == f"{head}-dirty"


@pytest.mark.parametrize("script", ALL)
def test_checkpoint_loads_safely_and_plays(script, run_script, tiny, tmp_path):
    run_script(f"{tiny} --run-dir run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    states = {"agent", "agent_optimizer", "decomposer", "decomposer_optimizer"}
    states |= {"buffers", "processes"} if script == TORCHRUN else {"buffer"}
    states |= {"baseline"} if script in (PETTINGZOO, TORCHRUN) else set()
    assert set(checkpoint) == states | {"iteration", "global_step", "wall_time", "rows"}
    module = MODULES[script]
    args = module.Args(**flags_of(tmp_path / "run") | {"run_dir": None})
    agent, decomposer = module.make_networks(args, module.make_env(args, num_envs=1))
    agent.load_state_dict(checkpoint["agent"])
    decomposer.load_state_dict(checkpoint["decomposer"])
    episode = play_episode(module.make_parallel_env(args), agent, seed=0)
    credits = decomposer(episode["obs"], episode["act"], episode["valid"])
    assert credits.shape == episode["act"].shape
    (buffer,) = checkpoint["buffers"] if script == TORCHRUN else [checkpoint["buffer"]]
    stored = buffer["data"]
    assert len(stored["obs"]) == 12 and stored["obs"].dtype == torch.float16


def test_same_seed_same_numbers(run_script, tiny, tmp_path):
    for name, flags in (("a", "--seed 1"), ("b", "--seed 1"), ("c", "--seed 2")):
        assert run_script(f"{tiny} {flags} --run-dir {name}")[0] == 0
    a, b, c = (read_metrics(tmp_path / name) for name in "abc")
    assert a == b and a != c
    keys = ("eval/episodic_return", "random/episodic_return")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab"]
    assert all(summaries[0][key] == summaries[1][key] for key in keys)


@pytest.mark.parametrize("script", ALL)
def test_to_look_changes_nothing(script, run_script, tiny, tmp_path):
    """Diagnostics that draw more random numbers leave every other number as it was."""
    source, looks = (ROOT / script).read_text(), "            draws = torch.stack("
    assert source.count(looks) == 1
    (tmp_path / "curious.py").write_text(source.replace(looks, f"            torch.rand(3)\n{looks}"))
    assert run_script(f"{tiny} --run-dir plain")[0] == 0
    assert run_script(f"{tiny} --run-dir looked", str(tmp_path / "curious.py"))[0] == 0
    plain, looked = (read_metrics(tmp_path / name) for name in ("plain", "looked"))
    for row, other in zip(plain, looked):
        assert row.pop("decomposer/credit_std") != other.pop("decomposer/credit_std")
    assert plain == looked


def test_both_learning_rates_decay(script, run_script, tiny, tmp_path):
    """To a third before the last of three iterations."""
    assert run_script(f"{tiny} --num-envs 8 --total-timesteps 600 --run-dir run")[0] == 0
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    before = int(read_metrics(tmp_path / "run")[-2]["global_step"])
    for name, flag in (("agent_optimizer", "learning_rate"), ("decomposer_optimizer", "decomposer_lr")):
        expected = getattr(MODULES[script].Args, flag) * (1 - before / 600)
        assert float(state[name]["param_groups"][0]["lr"]) == pytest.approx(expected)


@pytest.fixture
def start(tmp_path):
    """start(script, flags, **environment) -> a running process that does not find the repository by itself and does not
    outlive the test."""
    processes = []

    def start(script: str | Path, flags: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / script), *flags.split()]
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | environment
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for_rows(rows: int, run_dir: Path, process: subprocess.Popen) -> None:
    path = run_dir / "metrics.csv"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) > rows, f"{rows} rows in {path}", process)


@pytest.mark.parametrize("script", ALL)
def test_a_copy_under_another_name_stands_alone(script, start, run_script, tiny, tmp_path):
    """In a folder with nothing but it and envs/ it trains, goes on after a kill as if nothing had happened, whatever is
    edited meanwhile, and evaluate.py, copied beside it, draws the newest run."""
    copy, source = tmp_path / "my_idea.py", (ROOT / script).read_bytes()
    copy.write_bytes(source)
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    long = tiny.replace("--total-timesteps 600", "--total-timesteps 5000 --checkpoint-every 3")
    process = start(copy, long)
    wait_until(lambda: list(tmp_path.glob("runs/*")), "the run folder", process)
    (run,) = tmp_path.glob("runs/*")
    wait_for_rows(5, run, process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert run_script(f"{long} --run-dir whole", str(copy))[0] == 0
    left, whole = read_metrics(run), read_metrics(tmp_path / "whole")
    assert 5 <= len(left) < len(whole) and left == whole[: len(left)]
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == len(left) // 3 * 3

    process = start(copy, f"--resume {run}")
    wait_for_rows(len(left) + 1, run, process)
    copy.write_text("half an idea (")
    assert process.poll() is None
    code, out, err = finish(process)
    assert code == 0 and f"python evaluate.py {run}\n" in out, err
    assert read_metrics(run) == whole
    assert (run / "my_idea.py").read_bytes() == source
    # TensorBoard shows every step once, too: what was logged after the checkpoint is purged.
    events = EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")
    assert [event.step for event in events] == [int(row["global_step"]) for row in whole]
    config = json.loads((run / "config.json").read_text())
    assert config["script"] == "my_idea.py" and config["flags"]["exp_name"] == "my_idea" and "__my_idea__" in run.name

    copy.write_bytes(source)
    code, _, err = finish(start(shutil.copy(ROOT / "evaluate.py", tmp_path), ""))
    assert code == 0, err
    pictures = ("learning_curve.png", "credit.png", "episode.gif")
    assert all(Image.open(run / name).size[0] > 100 for name in pictures)


@pytest.mark.parametrize("script", ALL)
def test_a_new_flag_and_a_new_number_are_one_edit(script, run_script, tiny, tmp_path):
    """Runs of the script as it was load under the edited one, and the other way round."""
    source = (ROOT / script).read_text()
    for old, new in (
        ("    seed: int = 1", "    my_flag: float = 0.5  # an idea"),
        ('            "charts/episodic_return":', '            "charts/my_number": 2 * args.my_flag,'),
    ):
        assert source.count(old) == 1
        source = source.replace(old, f"{new}\n{old}")
    (tmp_path / "edited.py").write_text(source)
    run = tmp_path / "run"

    def resume(flags: str, script: str) -> list[dict]:
        assert run_script(f"--resume run {flags}", script)[0] == 0
        return read_metrics(run)

    assert run_script(f"{tiny} --run-dir run")[0] == 0
    rows = read_metrics(run)
    longer = resume("--total-timesteps 1000", str(tmp_path / "edited.py"))
    assert [row["charts/my_number"] for row in longer] == [""] * len(rows) + ["1.0"] * (len(longer) - len(rows))
    assert len(longer) > len(rows) == 3 and flags_of(run)["my_flag"] == 0.5
    rows = resume("--total-timesteps 1400 --my-flag 3", str(tmp_path / "edited.py"))
    assert [row["charts/my_number"] for row in rows[2:]] == ["", "1.0", "1.0"] + ["6.0"] * (len(rows) - 5)
    assert flags_of(run)["my_flag"] == 3
    longer = resume("--total-timesteps 1800", script)
    assert len(longer) > len(rows) and "my_flag" not in flags_of(run)
    assert longer[: len(rows)] == rows and {row["charts/my_number"] for row in longer[len(rows) :]} == {""}


@pytest.mark.parametrize(
    "script, more, signum",
    [
        (ALICEBOB, "", signal.SIGTERM),
        (MPE, "", signal.SIGINT),
        (ML, "--scenario tag --continuous-actions", signal.SIGTERM),
        (PETTINGZOO, "", signal.SIGINT),
        (TORCHRUN, "", signal.SIGTERM),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(script, more, signum, start, run_script, tiny, tmp_path):
    long = tiny.replace("--total-timesteps 600", f"--total-timesteps 5000 --checkpoint-every 4 {more}")
    run = tmp_path / "run"
    process = start(script, f"{long} --run-dir run")
    wait_for_rows(5, run, process)
    process.send_signal(signum)
    code, _, err = finish(process)
    start_of = "torchrun --nproc-per-node 1" if script == TORCHRUN else "python"
    assert code == 128 + signum and f"stopped; to continue: {start_of} {ROOT / script} --resume run\n" in err
    assert "Traceback" not in err and not (run / "summary.json").exists()
    assert run_script(f"{long} --run-dir whole")[0] == 0
    left, whole = read_metrics(run), read_metrics(tmp_path / "whole")
    assert 5 <= len(left) < len(whole) and left == whole[: len(left)]
    assert torch.load(run / "checkpoint.pt", weights_only=True)["iteration"] == len(left)
    # TensorBoard orders files by the second they began in; a new process is never that quick.
    (second,) = (int(path.name.split(".")[3]) for path in run.glob("events.*"))
    wait_until(lambda: time.time() >= second + 1, "the next second")
    assert run_script("--resume run")[0] == 0
    assert read_metrics(run) == whole
    events = EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")
    assert [event.step for event in events] == [int(row["global_step"]) for row in whole]
    summaries = [json.loads((path / "summary.json").read_text()) for path in (tmp_path / "whole", run)]
    for name in ("eval/episodic_return", "random/episodic_return", "global_step"):
        assert summaries[0][name] == summaries[1][name]


@pytest.mark.parametrize("script", ALL)
def test_a_run_that_goes_on_is_not_resumed_meanwhile(script, start, run_script, tiny, tmp_path):
    """Two processes would mix their rows and overwrite each other's checkpoints."""
    long = tiny.replace("--total-timesteps 600", "--total-timesteps 3000 --checkpoint-every 1")
    process = start(script, f"{long} --run-dir run")
    wait_for_rows(2, tmp_path / "run", process)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before the other one tries
    code, _, err = finish(start(script, "--resume run"))
    assert code == 1 and str(Path("run", "lock")) in err.splitlines()[-1]
    process.send_signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == 0, err
    assert run_script(f"{long} --run-dir whole")[0] == 0
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
    assert run_script("--resume run")[0] == 0  # once it has ended


def test_a_run_killed_before_its_first_checkpoint_starts_anew(run_script, tiny, tmp_path):
    assert run_script(f"{tiny} --run-dir whole")[0] == 0
    whole, run = tmp_path / "whole", tmp_path / "early"
    run.mkdir()
    shutil.copy(whole / "config.json", run)
    (run / "metrics.csv").write_text("\n".join((whole / "metrics.csv").read_text().splitlines()[:2]) + "\n2,6")
    (run / "checkpoint.tmp").write_bytes(b"half")
    assert run_script("--resume early")[0] == 0
    assert read_metrics(run) == read_metrics(whole)
    assert not list(run.glob("*.tmp"))


def test_what_is_typed_beside_resume_wins(script, run_script, tiny, tmp_path):
    tiny += " --seed 2"  # with which nobody in Alice & Bob succeeds by luck and ends an episode early
    assert run_script(f"{tiny} --run-dir run --no-anneal-lr --no-anneal-ent")[0] == 0
    run, other = tmp_path / "run", tmp_path / "other"
    flags, rows = flags_of(run), read_metrics(run)
    # Nothing is left to train: only the evaluation is repeated.
    assert run_script("--resume run --eval-episodes 3")[0] == 0
    assert read_metrics(run) == rows and flags_of(run) == flags | {"eval_episodes": 3, "run_dir": None, "resume": "run"}
    assert json.loads((run / "summary.json").read_text())["eval/episodes"] == 3
    shutil.copytree(run, other)
    assert run_script("--resume run --total-timesteps 1000")[0] == 0
    assert run_script("--resume other --total-timesteps 1000 --gamma 0.5")[0] == 0
    longer, changed = read_metrics(run), read_metrics(other)
    assert len(longer) == len(changed) == 5 and longer[:3] == changed[:3] == rows and longer[3:] != changed[3:]
    assert flags_of(run)["gamma"] == MODULES[script].Args.gamma and flags_of(other)["gamma"] == 0.5
    assert run_script("--resume other --eval-episodes 2")[0] == 0
    assert flags_of(other)["gamma"] == 0.5  # it was saved
    flags = flags_of(other)
    for change in ("--critic centralized", "--emb-dim 16", "--credit temporal"):
        code, _, err = run_script(f"--resume other {change}")
        assert code != 0 and "error: --resume other: must have a checkpoint that fits the flags (" in err, err
        assert "Traceback" not in err and flags_of(other) == flags


# What each flag must change, beside the run above: anything but the times.
ALIVE = {
    "seed": "2",
    "num_envs": "7",
    "total_timesteps": "800",
    "learning_rate": "3e-3",
    "anneal_lr": "no",
    "gamma": "0.5",
    "gae_lambda": "0.5",
    "num_minibatches": "3",
    "update_epochs": "3",
    "norm_adv": "no",
    "adv_eps": "0.5",
    "clip_coef": "0.01",
    "clip_vloss": "yes",
    "ent_coef": "0.1",
    "anneal_ent": "no",
    "vf_coef": "0.9",
    "max_grad_norm": "0.01",
    "target_kl": "1e-9",
    "critic": "centralized",
    "mc_samples": "2",
    "embedding": "linear",
    "emb_dim": "12",
    "num_heads": "4",
    "num_layers": "3",
    "attention_window": "3",
    "decomposer_lr": "1e-2",
    "decomposer_batch_size": "9",
    "decomposer_updates": "3",
    "outcome": "no",
    "buffer_size": "4",
    "learning_starts": "9",
    "reward_scale": "30",
}
OPTIONS_OF_MPE = {
    "scenario": "push",
    "num_agents": "4",
    "continuous_actions": "yes",
    "num_agent_neighbors": "1",
    "num_landmark_neighbors": "1",
    "nearest_first": "no",
    "max_cycles": "7",
}
OPTIONS_OF_TAG = {"num_prey": "2", "num_obstacles": "0"}
OPTIONS_OF_PETTINGZOO = {
    "env_id": "mpe2.simple_speaker_listener_v4",
    "env_kwargs": '{"local_ratio":0.1}',
    "horizon": "7",
}
OPTIONS_OF_CONTINUOUS = {"init_std": "0.5"}


def flag(name: str, value: str) -> str:
    option = "--" + name.replace("_", "-")
    return {"yes": option, "no": option.replace("--", "--no-", 1)}.get(value, f"{option} {value}")


def test_every_flag_that_shapes_learning_changes_what_is_learned(script, run_script, tiny, tmp_path):
    base = tiny.replace("--total-timesteps 600", "--total-timesteps 400")
    base += " --learning-rate 0.01 --clip-coef 0.1"  # large enough to clip values and ratios
    changes = [("base", ""), *ALIVE.items()]
    changes += [("credit", kind) for kind in ("temporal", "uniform", "episodic", "dense")]
    changes += [("coalition", kind) for kind in ("permutation", "exact", "all")]
    changes += [("conserve", kind) for kind in ("none", "terminal", "uniform") if kind != MODULES[script].Args.conserve]
    if script == PETTINGZOO:
        changes += [*OPTIONS_OF_PETTINGZOO.items(), ("env_kwargs", '{"continuous_actions":true}')]
    elif script != ALICEBOB:
        changes += [("credit", "shapley"), ("credit", "difference"), *OPTIONS_OF_MPE.items()]
        changes += [("scenario", "tag"), *OPTIONS_OF_TAG.items()]
    changes += OPTIONS_OF_CONTINUOUS.items() if script != ALICEBOB else []
    needs = dict.fromkeys(OPTIONS_OF_TAG, "--scenario tag")
    continuous = '--env-kwargs {"continuous_actions":true}' if script == PETTINGZOO else "--continuous-actions"
    needs |= dict.fromkeys(OPTIONS_OF_CONTINUOUS, continuous)
    seen = {}
    for name, value in changes:
        change = flag(name, value) if value else ""
        code, _, err = run_script(f"{base} {needs.get(name, '')} {change} --run-dir {len(seen)}")
        assert code == 0, err
        agent = torch.load(tmp_path / str(len(seen)) / "checkpoint.pt", weights_only=True)["agent"]
        weights = next(weights for name, weights in agent.items() if name.startswith("actor."))
        for other, known in seen.items():
            assert not torch.equal(weights, known), f"{change} learns what {other or 'the defaults'} learned"
        seen[change] = weights


def test_every_other_flag_does_what_it_says(script, run_script, tiny, tmp_path, monkeypatch):
    """The flags that do not shape learning; with those above, these are all."""
    others = "exp_name torch_deterministic cuda track wandb_project_name wandb_entity num_threads run_dir resume"
    others += " checkpoint_every eval_episodes credit coalition conserve"
    options = {
        ALICEBOB: [],
        MPE: [*OPTIONS_OF_MPE, *OPTIONS_OF_TAG, *OPTIONS_OF_CONTINUOUS],
        ML: [*OPTIONS_OF_MPE, *OPTIONS_OF_TAG, *OPTIONS_OF_CONTINUOUS],
        PETTINGZOO: [*OPTIONS_OF_PETTINGZOO, *OPTIONS_OF_CONTINUOUS, "env_workers", "truncation_ends", "masked"],
    }[script]
    assert {*ALIVE, *options, *others.split()} == {field.name for field in fields(MODULES[script].Args)}

    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append(n))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: seen.append(on))
    code, out, _ = run_script(f"{tiny} --exp-name mine --seed 7 --cuda --no-torch-deterministic")
    assert code == 0 and [1, False] == seen[:2]
    (run,) = (tmp_path / "runs").iterdir()
    changes = r"torch_deterministic-False-cuda-True-[\w.-]*num_envs-\d"  # what differs from the defaults
    name = {ALICEBOB: "alice_bob", PETTINGZOO: r"mpe2\.simple_reference_v3"}.get(script, "spread_3")
    assert re.match(rf"{name}__mine__{changes}", run.name)
    assert re.search(r"__7__\d+$", run.name)
    if not torch.cuda.is_available():
        assert out.count("no CUDA device found") == 1


@pytest.mark.parametrize("script", ALL)
def test_runs_have_folders_and_names_of_their_own(script, run_script, tiny, tmp_path):
    """Made of letters that every file system takes."""
    few = "--eval-episodes 1 --credit episodic --gamma 0.5"  # names are cut at 100 characters of flags
    odd = '--exp-name a/../../b:*?"<>|~$ --wandb-entity \\é'
    for flags in ("", "", few, odd):
        assert run_script(f"{tiny} {flags}")[0] == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 4 and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert ["a-..-..-b" in name for name in names].count(True) == 1


@pytest.mark.parametrize("script", [MPE, PETTINGZOO], indirect=True)
def test_a_name_tells_what_differs_from_the_defaults(script, run_script, tmp_path):
    flags = "--total-timesteps 40 --num-envs 2 --eval-episodes 1 --credit dense --gamma 0.5"
    flags += ' --env-kwargs {"local_ratio":0.5}' if script == PETTINGZOO else " --scenario tag"
    assert run_script(flags)[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    start = {PETTINGZOO: "mpe2.simple_reference_v3", MPE: "tag_3"}[script]
    what = {PETTINGZOO: "env_kwargs--local_ratio-0.5", MPE: "scenario-tag"}[script]
    changes = f"eval_episodes-1-{what}-total_timesteps-40-num_envs-2-gamma-0.5-credit-dense"
    assert re.fullmatch(rf"{re.escape(f'{start}__{script[:-3]}__{changes}__1__')}\d+", run.name), run.name


@pytest.mark.parametrize("script", ALL)
def test_tracking_starts_wandb(script, run_script, tiny, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("calls = []\ndef init(**flags): calls.append(flags)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    code, _, err = run_script(f"{tiny} --track --wandb-project-name p --wandb-entity e --run-dir run")
    assert code == 0, err
    assert run_script("--resume run")[0] == 0
    first, second = sys.modules.pop("wandb").calls
    for call in (first, second):
        assert (call["project"], call["entity"], call["name"], call["id"]) == ("p", "e", "run", "run")
        assert call["sync_tensorboard"] and call["resume"] == "allow" and call["config"]["emb_dim"] == 8


def test_tracking_without_wandb_leaves_no_folder(run_script, tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb"):
        run_script(f"{tiny} --track")
    assert not list(tmp_path.iterdir())


def test_tracking_with_the_real_wandb(start, tmp_path):
    pytest.importorskip("wandb")
    offline = {f"WANDB_{name}": str(tmp_path) for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR")}
    offline["WANDB_MODE"] = "offline"

    def track(flags: str) -> Path:
        code, _, err = finish(start(MPE, flags, **offline))
        assert code == 0, err
        (run,) = tmp_path.glob("runs/*")
        return run

    run = track("--total-timesteps 800 --num-envs 8 --eval-episodes 2 --num-threads 1 --track --exp-name idea!")
    assert track(f"--resume {run} --total-timesteps 1000") == run
    first, second = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert first.name == second.name  # two parts of one run
    for part in (first, second):
        assert all(word in part.read_bytes() for word in (b"charts/episodic_return", b"eval/episodic_return", b"gamma"))


BAD = [
    f"--{name} {value}"
    for names, values in [
        (
            "total-timesteps num-envs num-minibatches update-epochs mc-samples num-heads emb-dim "
            "decomposer-batch-size decomposer-updates buffer-size eval-episodes checkpoint-every",
            "0 -1",
        ),
        ("num-threads num-layers learning-starts attention-window", "-1"),
        ("seed", f"-1 {2**32}"),
        ("learning-rate decomposer-lr adv-eps clip-coef max-grad-norm reward-scale target-kl", "0 -1 nan inf"),
        ("ent-coef vf-coef", "-0.1 nan inf"),
        ("gamma gae-lambda", "-0.1 1.1 nan inf"),
        ("resume", "nowhere full file"),
        ("run-dir", "full file"),
    ]
    for name in names.split()
    for value in values.split()
] + ["--num-heads 4 --emb-dim 30", "--num-heads 5 --emb-dim 64"]


BAD_MPE = [
    "--num-agents 0",
    "--max-cycles 0",
    "--num-agent-neighbors 0",
    "--num-landmark-neighbors 0",
    "--num-prey 0 --scenario tag",
    "--num-prey 2",
    "--num-obstacles -1 --scenario tag",
    "--num-obstacles 2 --scenario push",
    "--num-landmark-neighbors 2 --scenario push",
    "--credit shapley --scenario tag",
    "--credit difference --scenario push",
    "--coalition exact --num-agents 15",
]
BAD_PETTINGZOO = ["--horizon 0", "--env-workers -1", "--env-id nowhere", "--env-kwargs {", "--env-kwargs [1]"]
BAD_OF = {MPE: BAD_MPE, ML: [*BAD_MPE, "--num-layers 0"], PETTINGZOO: BAD_PETTINGZOO, TORCHRUN: BAD_PETTINGZOO}


def unwrapped(stderr: str) -> str:
    """The text of tyro's box on one line."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", stderr)


@pytest.mark.parametrize("script, flags", [(script, flags) for script in ALL for flags in BAD + BAD_OF.get(script, [])])
def test_bad_values_end_with_a_message_and_leave_nothing(script, flags, run_script, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    code, out, err = run_script(flags, script)
    assert code == 2 and out == "" and "Traceback" not in err
    name, value = flags.split()[:2]
    assert re.search(rf"{name} {re.escape(value)}(\.0)?: must ", unwrapped(err)), err
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"full", "full/thesis.tex", "file"}


@pytest.mark.parametrize(
    "flags",
    "--credit all,--coalition some,--conserve some,--critic two,--num-envs x,--seed 1.5,--no-such-flag 1".split(","),
)
def test_what_cannot_be_parsed_gets_exit_code_2(script, flags, run_script, tmp_path):
    code, out, err = run_script(flags)
    assert code == 2 and out == "" and flags.split()[0] in unwrapped(err) and not list(tmp_path.iterdir())


class Touch:
    """When it is unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_runs_no_code(run_script, tiny, tmp_path):
    assert run_script(f"{tiny} --run-dir run")[0] == 0
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"agent": Touch(str(tmp_path / "touched"))}, path)
    with pytest.raises(Exception, match="(?i)weights.only"):
        run_script("--resume run --total-timesteps 1000")
    assert not (tmp_path / "touched").exists()


def test_lost_logs_do_not_keep_a_run_from_going_on(run_script, tiny, tmp_path):
    """metrics.csv comes back whole; the event file cannot."""
    tiny += " --seed 2"  # with which nobody in Alice & Bob succeeds by luck and ends an episode early
    assert run_script(f"{tiny} --run-dir run --no-anneal-lr --no-anneal-ent")[0] == 0
    run = tmp_path / "run"
    rows = read_metrics(run)
    with open(run / "metrics.csv", "a") as file:
        file.write("4,99,1.")
    assert run_script("--resume run --total-timesteps 800")[0] == 0
    longer = read_metrics(run)
    assert longer[:3] == rows and len(longer) == 4
    for path in [run / "metrics.csv", *run.glob("events.*")]:
        path.unlink()
    assert run_script("--resume run --total-timesteps 1000")[0] == 0
    whole = read_metrics(run)
    assert whole[:4] == longer and len(whole) == 5
    assert EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")[0].step == 1000


@pytest.mark.parametrize("script", ALL)
def test_columns_may_come_later(script, run_script, tiny, tmp_path):
    """Those of PPO, when the policy begins to learn."""
    assert run_script(f"{tiny} --learning-starts 9 --run-dir run")[0] == 0
    rows = read_metrics(tmp_path / "run")
    assert [bool(row["losses/value_loss"]) for row in rows] == [False, True, True]
    assert all(row["charts/episodic_return"] for row in rows)


@pytest.mark.parametrize("script", ALL)
def test_a_second_signal_ends_at_once(script, start, tmp_path):
    """In the middle of the second iteration, which would take very long: the policy learns from then on."""
    flags = f"{TINY[script]} --total-timesteps 100000000 --num-envs 8 --learning-starts 9 --update-epochs 1000000"
    process = start(script, f"{flags} --checkpoint-every 1 --run-dir run")
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, "checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)  # it finishes the iteration
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process, 20)
    assert code == 128 + signal.SIGTERM and "Traceback" not in err


@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_ctrl_c_ends_the_evaluation_at_once(script, start, run_script, tiny, tmp_path):
    process = start(script, f"{tiny} --eval-episodes 3000 --run-dir run")
    wait_until((tmp_path / "run" / "checkpoint.pt").exists, "checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process, 20)
    assert code == 130 and "Traceback" not in err and not (tmp_path / "run" / "summary.json").exists()
    assert run_script("--resume run --eval-episodes 2")[0] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval/episodes"] == 2


@pytest.mark.parametrize(
    "script, flags",
    [
        *[(script, "--decomposer-lr 1e30") for script in ALL],
        *[(script, "--learning-rate 1e30 --credit dense") for script in ALL],
        (MPE, "--learning-rate 1e36 --continuous-actions"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(script, flags, run_script, tiny, tmp_path):
    code, _, err = run_script(f"{tiny} {flags} --run-dir run")
    assert code == 1 and re.fullmatch(r"error: a loss is not finite in iteration \d; [\w ]+\n", err)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_the_last_good_checkpoint_survives_a_bad_loss(factor, run_script, tiny, monkeypatch, tmp_path):
    """With a factor of inf the loss of a zero head is nan; with a finite loss, its gradient is what fails."""
    assert run_script(f"{tiny} --run-dir run")[0] == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    good, rows = checkpoint.read_bytes(), read_metrics(tmp_path / "run")

    def bad_loss(predicted, target):
        if factor == "nan":
            return predicted.sum() * float("nan")
        return (predicted - predicted.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    monkeypatch.setattr("torch.nn.functional.mse_loss", bad_loss)
    # With --learning-starts the policy takes no part in it.
    code, _, err = run_script("--resume run --total-timesteps 1000 --learning-starts 1000")
    assert code == 1 and "not finite in iteration 4" in err and "the last checkpoint is kept" in err
    assert checkpoint.read_bytes() == good and read_metrics(tmp_path / "run") == rows


@pytest.mark.parametrize("script", ALL)
def test_a_full_disk_leaves_the_last_checkpoint(script, run_script, tiny, tmp_path):
    """A limit on the size of files stands in for the disk; it binds where checkpoint.pt has grown beyond it."""
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    assert run_script(f"{tiny} --no-anneal-lr --no-anneal-ent --run-dir whole")[0] == 0
    shutil.copytree(tmp_path / "whole", run)
    good = (run / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) - 100, limits[1]))
    try:
        with pytest.raises((RuntimeError, OSError)):
            run_script("--resume run --total-timesteps 1000 --checkpoint-every 1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "checkpoint.pt").read_bytes() == good
    for name in ("whole", "run"):
        assert run_script(f"--resume {name} --total-timesteps 1000")[0] == 0
    assert read_metrics(run) == read_metrics(tmp_path / "whole") and not list(run.glob("*.tmp"))


@pytest.mark.parametrize("script", ALL)
def test_a_checkpoint_is_written_whole_or_not_at_all(script, run_script, tiny, monkeypatch, tmp_path):
    assert run_script(f"{tiny} --run-dir run")[0] == 0
    run = tmp_path / "run"
    good, rows = (run / "checkpoint.pt").read_bytes(), read_metrics(run)

    def die_half_way(state, path):
        Path(path).write_bytes(b"half")
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", die_half_way)
        with pytest.raises(MemoryError):
            run_script("--resume run --total-timesteps 1000")
    assert (run / "checkpoint.pt").read_bytes() == good
    assert run_script("--resume run --total-timesteps 1000")[0] == 0
    assert read_metrics(run)[:3] == rows and len(read_metrics(run)) > 3 and not list(run.glob("*.tmp"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "script, more",
    [
        (ALICEBOB, ""),
        (MPE, ""),
        (MPE, "--scenario tag"),
        (MPE, "--scenario push --continuous-actions"),
        (MPE, "--credit difference --critic centralized"),
        (ML, "--attention-window 5"),
        (PETTINGZOO, ""),
        (TORCHRUN, ""),
    ],
)
def test_a_run_on_cuda_resumes_there_and_on_the_cpu(script, more, run_script, tiny, tmp_path):
    assert run_script(f"{tiny} --cuda {more} --run-dir run")[0] == 0
    assert run_script("--resume run --total-timesteps 1000")[0] == 0
    assert run_script("--resume run --total-timesteps 1400 --no-cuda")[0] == 0


@pytest.mark.parametrize(
    "script, more",
    [
        (ALICEBOB, ""),
        (MPE, "--credit shapley"),
        (ML, "--scenario tag --coalition permutation"),
        *[(s, "") for s in ALL[3:]],
    ],
)
def test_everything_stays_on_its_device(script, more, run_script, tiny, tmp_path):
    """On a pretended device, for there may be no other here, a run and its continuation have the numbers of the CPU."""
    for flags in (f"{tiny} {more} --run-dir away", "--resume away --total-timesteps 1000")[: 1 + (script == MPE)]:
        command = [sys.executable, str(ROOT / "tests" / "pretend_device.py"), str(ROOT / script), *flags.split()]
        away = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert away.returncode == 0, away.stderr[-3000:]
        assert run_script(flags.replace("away", "here"), script)[0] == 0
    here, away = (read_metrics(tmp_path / name) for name in ("here", "away"))
    assert len(here) == len(away) > 2
    for row, other in zip(here, away):
        for name, value in row.items():
            assert float(other[name] or 0) == pytest.approx(float(value or 0), rel=0.01, abs=1e-4), name


@pytest.mark.parametrize("script", [ALICEBOB], indirect=True)
def test_frozen_steps_carry_no_weight(script, run_script, monkeypatch, tmp_path):
    """Episodes that start beside the treasure with open doors end after a few steps; what comes then is noise."""
    reset, step = AliceBob.reset, AliceBob.step

    def easy_reset(self, seed=None):
        reset(self, seed)
        self.agent_pos[:] = torch.tensor([[7, 5], [6, 6]])
        self.key_used[:] = True
        return self.observe()

    def noisy_step(self, act):
        obs, team_reward, terminated = step(self, act)
        obs[terminated] = 7
        return obs, team_reward, terminated

    monkeypatch.setattr(AliceBob, "reset", easy_reset)
    flags = f"{TINY[ALICEBOB].replace('600', '500')} --num-envs 8 --conserve none"
    assert run_script(f"{flags} --run-dir clean")[0] == 0
    monkeypatch.setattr(AliceBob, "step", noisy_step)
    assert run_script(f"{flags} --run-dir noisy")[0] == 0
    clean, noisy = (read_metrics(tmp_path / name) for name in ("clean", "noisy"))
    assert clean == noisy
    last = 0
    for row in clean:
        assert int(row["global_step"]) - last == round(8 * float(row["charts/episodic_length"])) < 8 * 40
        last = int(row["global_step"])
    assert max(float(row["charts/treasure_rate"]) for row in clean) > 0.5


def test_importing_a_script_runs_nothing(tmp_path):
    names = ", ".join(script.removesuffix(".py") for script in ALL)
    code = f"import sys; sys.argv = ['x', '--bad']; sys.path.insert(0, {str(ROOT)!r}); import {names}; print('quiet')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.returncode) == ("quiet\n", 0) and not list(tmp_path.iterdir())


def test_scripts_share_their_classes_and_functions_word_for_word():
    """A class or function of the same name has the same syntax tree, but for the flags and the environment's."""
    differ = ("Args", "make_env", "make_parallel_env", "make_networks", "env_options")
    seen: dict[str, tuple[str, str]] = {}
    shared: dict[str, int] = {}
    assert {path.name for path in ROOT.glob("stas_*.py")} == set(ALL)
    for script in ALL:
        for node in ast.parse((ROOT / script).read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in differ:
                first, tree = seen.setdefault(node.name, (script, ast.dump(node)))
                assert tree == ast.dump(node), f"{node.name} differs between {first} and {script}"
                shared[node.name] = shared.get(node.name, 0) + 1
    everywhere = {name for name, count in shared.items() if count == len(ALL)}
    assert {"ShapleyAttention", "ReplayBuffer", "ActorCritic", "decompose", "rollout", "compute_gae"} <= everywhere


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_arrows_go_one_way():
    """Scripts know envs/ and nothing else of the project, and nobody but the tests imports evaluate.py."""
    files = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith((".", "runs"))]
    project = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files}
    assert {"envs", "evaluate", "benchmark", "stas_ippo_mpe"} <= project
    for script in ALL:
        assert imports(ROOT / script) & project == {"envs"}
    for path in (ROOT / "envs").glob("*.py"):
        assert imports(path) & project <= {"envs"}
    others = [path for path in files if path.parent != ROOT / "tests"]
    assert not [path for path in others if "evaluate" in imports(path)]


@pytest.mark.parametrize("script", ALL)
def test_help_documents_every_flag(script, run_script):
    code, help_text, _ = run_script("--help")
    assert code == 0
    for field in fields(MODULES[script].Args):
        _, text = re.split(rf"--{field.name.replace('_', '-')}(?=[, ])", help_text, maxsplit=1)
        text = text.split("(default:")[0]
        assert len(re.findall(r"[a-z]{2,}", text)) >= 2, f"{field.name} is not explained"
    for group in ("[the run]", "[PPO]", "[the method]"):
        assert group in help_text  # where it begins


@pytest.mark.parametrize("script", [ALICEBOB], indirect=True)
def test_a_short_run_learns_to_stop_bumping(script, run_script, tmp_path):
    """Bumps are learnt first: random agents lose 2.6 a game with a standard error below 0.1."""
    flags = "--num-envs 64 --total-timesteps 60000 --num-threads 1 --eval-episodes 2"
    assert run_script(f"{flags} --run-dir run")[0] == 0
    rows = read_metrics(tmp_path / "run")
    lost = [float(row["charts/episodic_return"]) - 100 * float(row["charts/treasure_rate"]) for row in rows]
    assert lost[0] < -2.2 and np.mean(lost[-3:]) > lost[0] + 0.5  # 0.6 to 2.2, by the seed


@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_a_short_run_learns_to_cover_landmarks(script, run_script, tmp_path):
    """Random teams earn -27 with a standard deviation of 8 an episode: 1.4 for the mean of an iteration."""
    flags = "--num-envs 32 --total-timesteps 24000 --credit dense --num-threads 1 --eval-episodes 2"
    assert run_script(f"{flags} --run-dir run")[0] == 0
    rows = read_metrics(tmp_path / "run")
    first, last = (float(rows[i]["charts/episodic_return"]) for i in (0, -1))
    assert first < -24 and last > first + 4


@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_correlations_are_logged_where_they_are_defined(script, run_script, tiny, tmp_path):
    when, who = "decomposer/reward_correlation", "decomposer/shapley_correlation"
    cases = {"stas": (True, True), "temporal": (True, False), "dense": (False, False), "shapley": (False, False)}
    for credit, defined in cases.items():
        assert run_script(f"{tiny} --credit {credit} --run-dir {credit}")[0] == 0
        rows = read_metrics(tmp_path / credit)
        assert all((bool(row.get(when)), bool(row.get(who))) == defined for row in rows)
    assert run_script(f"{tiny} --scenario push --run-dir push")[0] == 0
    assert all(row[when] and not row.get(who) for row in read_metrics(tmp_path / "push"))


@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_correlations_against_a_replay_of_the_stored_episodes(script, run_script, tiny, tmp_path):
    """The last iteration's episodes stand in the buffer: act again from every stored observation, and correlate."""
    assert run_script(f"{tiny} --coalition exact --run-dir run")[0] == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    obs, act = (checkpoint["buffer"]["data"][name][-8:] for name in ("obs", "act"))  # 24 episodes in a ring of 12
    args = stas_ippo_mpe.Args(**flags_of(tmp_path / "run") | {"run_dir": None})
    _, decomposer = stas_ippo_mpe.make_networks(args, stas_ippo_mpe.make_env(args, num_envs=1))
    decomposer.load_state_dict(checkpoint["decomposer"])
    with torch.no_grad():
        credits = decomposer(obs, act, torch.ones(8, 25, dtype=torch.bool)).double().numpy()
    reward, shares = np.zeros((8, 25)), np.zeros((8, 25, 3))
    for t in range(25):
        env = make("spread", 8, 3)
        env.agent_vel, env.agent_pos = obs[:, t, :, 0:2].float(), obs[:, t, :, 2:4].float()
        env.landmark_pos = env.agent_pos[:, :1] + obs[:, t, 0, 4:10].float().view(8, 3, 2)
        reward[:, t] = env.step(act[:, t].long())[1]
        shares[:, t] = env.shapley_reward()

    def correlation(x: np.ndarray, y: np.ndarray, axis: int) -> float:
        x, y = (z - z.mean(axis=axis, keepdims=True) for z in (x, y))
        return np.corrcoef(x.flatten(), y.flatten())[0, 1]

    last = read_metrics(tmp_path / "run")[-1]
    when, who = correlation(credits.sum(axis=2), reward, 1), correlation(credits, shares, 2)
    assert float(last["decomposer/reward_correlation"]) == pytest.approx(when, abs=0.01)
    assert float(last["decomposer/shapley_correlation"]) == pytest.approx(who, abs=0.01)
