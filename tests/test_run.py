"""The script as its users see it: a run folder, living flags, clear errors, and runs that survive being killed."""

import ast
import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, SCRIPT, TINY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stas_ippo_alicebob
from envs.alice_bob import AliceBob, parallel_env
from stas_ippo_alicebob import ActorCritic, Args, Decomposer, encode_obs, play_episode

TIMES = ("wall_time", "time/", "charts/SPS")


def read_metrics(run_dir) -> list[dict]:
    """The rows of metrics.csv without their times."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in csv.DictReader(file)]


def test_a_run_leaves_a_complete_folder(run_script, tmp_path):
    code, out, err = run_script(f"{TINY} --run-dir run")
    assert code == 0 and "treasure_rate" in out
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {re.sub(r"tfevents.*", "tfevents", name) for name in names} == {
        "checkpoint.pt", "config.json", "metrics.csv", "summary.json", "learning_curve.png", "credit.png",
        "episode.gif", "events.out.tfevents",
    }  # fmt: skip

    config = json.loads((run / "config.json").read_text())
    assert set(config["flags"]) == {field.name for field in fields(Args)} and config["flags"]["num_envs"] == 8
    assert config["versions"]["torch"] == torch.__version__

    rows = read_metrics(run)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3]
    steps = [int(row["global_step"]) for row in rows]
    assert steps == sorted(steps) and steps[-2] < 900 <= steps[-1] <= 3 * 8 * 40
    last = rows[-1]
    assert float(last["charts/agent_return_sum"]) == pytest.approx(2 * float(last["charts/episodic_return"]), rel=1e-6)
    everywhere = [name for name in last if not name.startswith("decomposer/reward_correlation")]
    assert all(last[name] for name in everywhere)

    events = EventAccumulator(str(run)).Reload()
    for name in (name for name in last if "/" in name):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step, float(row[name])) for step, row in zip(steps, rows) if row[name]]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]

    summary = json.loads((run / "summary.json").read_text())
    kinds = ("episodic_return", "episodic_return_std", "episodic_length", "episodes", "treasure_rate")
    assert set(summary) == {f"{who}/{kind}" for who in ("eval", "random") for kind in kinds} | {
        "global_step",
        "wall_time",
    }
    assert summary["eval/episodes"] == summary["random/episodes"] == 2 and summary["global_step"] == steps[-1]

    for name in ("learning_curve.png", "credit.png"):
        assert Image.open(run / name).size[0] > 300
    assert Image.open(run / "episode.gif").n_frames > 10


def test_checkpoint_loads_safely_and_plays(run_script, tmp_path):
    run_script(f"{TINY} --run-dir run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    documented = re.search(r"checkpoint.pt holds: (.*?) \(", stas_ippo_alicebob.__doc__, re.DOTALL).group(1)
    assert set(re.findall(r"\w+", documented)) == set(checkpoint)
    agent = ActorCritic(obs_dim=82, num_actions=4, num_agents=2)
    agent.load_state_dict(checkpoint["agent"])
    decomposer = Decomposer(82, 4, 2, 40, emb_dim=8, num_heads=2, num_layers=1)
    decomposer.load_state_dict(checkpoint["decomposer"])
    episode = play_episode(parallel_env(), lambda obs: agent.act(encode_obs(obs), torch.Generator())[0], seed=0)
    credits = decomposer(encode_obs(episode["obs"]), episode["act"], episode["valid"])
    assert credits.shape == episode["act"].shape
    assert len(checkpoint["buffer"]["data"]["obs"]) == 20


def test_same_seed_same_numbers(run_script, no_pictures, tmp_path):
    for name, flags in (("a", "--seed 1"), ("b", "--seed 1"), ("c", "--seed 2")):
        assert run_script(f"{TINY} {flags} --run-dir {name}")[0] == 0
    a, b, c = (read_metrics(tmp_path / name) for name in "abc")
    assert a == b and a != c
    keys = ("eval/episodic_return", "random/episodic_return")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab"]
    assert all(summaries[0][key] == summaries[1][key] for key in keys)


def start(tmp_path, flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT), *flags.split()],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_rows(path, rows: int) -> None:
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) > rows:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not reach {rows} rows")


LONG = TINY.replace("900", "12000") + " --checkpoint-every 4"


def test_interrupted_runs_continue_as_if_nothing_had_happened(run_script, no_pictures, tmp_path):
    assert run_script(f"{LONG} --run-dir whole")[0] == 0
    whole = read_metrics(tmp_path / "whole")
    # SIGKILL comes without warning, between two checkpoints; the others finish the iteration and save.
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = tmp_path / signum.name
        process = start(tmp_path, f"{LONG} --run-dir {run.name}")
        wait_for_rows(run / "metrics.csv", 10)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in err
        left = read_metrics(run)
        assert 10 <= len(left) < len(whole) and left == whole[: len(left)]
        saved = torch.load(run / "checkpoint.pt", weights_only=True)["iteration"]
        if signum == signal.SIGKILL:
            assert saved == len(left) // 4 * 4
        else:
            assert saved == len(left)
            assert f"stas_ippo_alicebob.py --resume {run.name}" in err
        time.sleep(1)  # TensorBoard orders files by the second they began in; a new process is never that quick
        assert run_script(f"--resume {run.name}")[0] == 0
        assert read_metrics(run) == whole
        # TensorBoard shows every step once, too: what was logged after the checkpoint is purged.
        events = EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")
        assert [event.step for event in events] == [int(row["global_step"]) for row in whole]
        summaries = [json.loads((path / "summary.json").read_text()) for path in (tmp_path / "whole", run)]
        for name in ("eval/episodic_return", "eval/treasure_rate", "global_step"):
            assert summaries[0][name] == summaries[1][name]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(run_script, no_pictures, tmp_path):
    assert run_script(f"{TINY} --run-dir whole")[0] == 0
    run = tmp_path / "early"
    run.mkdir()
    (run / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    (run / "metrics.csv").write_text(
        "\n".join((tmp_path / "whole" / "metrics.csv").read_text().splitlines()[:2]) + "\n2,6"
    )
    assert run_script("--resume early")[0] == 0
    assert read_metrics(run) == read_metrics(tmp_path / "whole")


def test_resuming_a_finished_run_redoes_the_pictures_and_may_prolong_it(run_script, tmp_path):
    assert run_script(f"{TINY} --run-dir run --no-anneal-lr")[0] == 0
    rows = read_metrics(tmp_path / "run")
    for name in ("summary.json", "credit.png", "learning_curve.png", "episode.gif"):
        (tmp_path / "run" / name).unlink()
    code, out, _ = run_script("--resume run --eval-episodes 3 --gamma 0.5")
    assert code == 0 and read_metrics(tmp_path / "run") == rows
    assert "--gamma" in out and "ignored" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval/episodes"] == 3
    assert (tmp_path / "run" / "credit.png").exists() and (tmp_path / "run" / "episode.gif").exists()
    assert run_script("--resume run --total-timesteps 1500")[0] == 0
    longer = read_metrics(tmp_path / "run")
    assert len(longer) == 5 and longer[:3] == rows
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["gamma"] == Args.gamma


# What each flag must change, beside the run above: anything but the times.
ALIVE = {
    "seed": "2",
    "num_envs": "9",
    "total_timesteps": "1200",
    "learning_rate": "1e-3",
    "anneal_lr": "no",
    "gamma": "0.5",
    "gae_lambda": "0.5",
    "num_minibatches": "3",
    "update_epochs": "3",
    "norm_adv": "no",
    "clip_coef": "0.01",
    "clip_vloss": "yes",
    "ent_coef": "0.1",
    "anneal_ent": "no",
    "vf_coef": "0.9",
    "max_grad_norm": "0.01",
    "target_kl": "1e-9",
    "critic": "centralized",
    "mc_samples": "2",
    "emb_dim": "12",
    "num_heads": "4",
    "num_layers": "2",
    "decomposer_lr": "1e-2",
    "decomposer_batch_size": "9",
    "decomposer_updates": "3",
    "buffer_size": "10",
    "learning_starts": "20",
    "reward_scale": "10",
}


def flag(name: str, value: str) -> str:
    option = "--" + name.replace("_", "-")
    return {"yes": option, "no": option.replace("--", "--no-", 1)}.get(value, f"{option} {value}")


def test_every_flag_that_shapes_learning_changes_what_is_learned(run_script, no_pictures, tmp_path):
    base = f"{TINY} --learning-rate 0.01 --clip-coef 0.1"  # large enough to clip values and ratios
    changes = [*ALIVE.items()]
    changes += [("credit", kind) for kind in ("temporal", "uniform", "episodic", "dense")]
    changes += [("coalition", kind) for kind in ("permutation", "exact")]
    changes += [("conserve", kind) for kind in ("none", "terminal", "uniform") if kind != Args.conserve]
    seen = {}
    for name, value in [("base", ""), *changes]:
        change = flag(name, value) if value else ""
        assert run_script(f"{base} {change} --run-dir {name}{value}")[0] == 0
        agent = torch.load(tmp_path / f"{name}{value}" / "checkpoint.pt", weights_only=True)["agent"]
        weights = agent["actor.0.weight"] if name != "critic" else agent["critic.0.weight"]
        for other, known in seen.items():
            assert not torch.equal(weights, known), f"{change} learns what {other or 'the defaults'} learned"
        if name != "critic":
            seen[change] = weights


def test_every_other_flag_does_what_it_says(run_script, no_pictures, tmp_path, monkeypatch):
    """The flags that do not shape learning; with those above, these are all."""
    others = "exp_name torch_deterministic cuda track wandb_project_name wandb_entity num_threads run_dir resume"
    others += " checkpoint_every eval_episodes credit coalition conserve"
    assert {*ALIVE, *others.split()} == {field.name for field in fields(Args)}

    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append(n))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: seen.append(on))
    code, out, _ = run_script(f"{TINY} --exp-name mine --seed 7 --cuda --no-torch-deterministic")
    assert code == 0 and [1, False] == seen[:2]
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"alice_bob__mine__7__\d+", run.name)
    if not torch.cuda.is_available():
        assert out.count("no CUDA device found") == 1


def test_tracking_starts_wandb(run_script, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("calls = []\ndef init(**flags): calls.append(flags)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    code, _, err = run_script(f"{TINY} --track --wandb-project-name p --wandb-entity e --run-dir run")
    assert code == 0, err
    (call,) = sys.modules.pop("wandb").calls
    assert (call["project"], call["entity"], call["name"], call["sync_tensorboard"]) == ("p", "e", "run", True)


BAD = [
    f"--{name} {value}"
    for names, values in [
        (
            "total-timesteps num-envs num-minibatches update-epochs mc-samples num-heads num-layers emb-dim "
            "decomposer-batch-size decomposer-updates buffer-size eval-episodes checkpoint-every",
            "0 -1",
        ),
        ("num-threads learning-starts seed", "-1"),
        ("learning-rate decomposer-lr clip-coef max-grad-norm reward-scale target-kl", "0 -1 nan inf"),
        ("ent-coef vf-coef", "-0.1 nan inf"),
        ("gamma gae-lambda", "-0.1 1.1 nan"),
        ("resume", "nowhere"),
        ("run-dir", "full file"),
    ]
    for name in names.split()
    for value in values.split()
] + ["--emb-dim 30", "--emb-dim 64 --num-heads 5"]


@pytest.mark.parametrize("flags", BAD)
def test_bad_values_end_with_one_line_and_leave_nothing(flags, run_script, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    code, out, err = run_script(flags)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1
    name, value = flags.split()[:2]
    assert f"{name} " in err and value.split("e")[0] in err and "must be" in err
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}


def test_tracking_without_wandb_is_an_error(run_script, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run_script("--track")
    assert code == 2 and len(err.splitlines()) == 1 and "wandb" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    ["--credit shapley", "--coalition all", "--conserve some", "--critic two", "--num-envs x", "--no-such-flag"],
)
def test_what_cannot_be_parsed_gets_exit_code_2(flags, run_script, tmp_path):
    code, _, err = run_script(flags)
    assert code == 2 and err and not list(tmp_path.iterdir())


def test_resume_refuses_what_is_not_a_run(run_script, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"flags": {"no_such_flag": 1}}')
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("hello")
    for name in ("empty", "odd", "text"):
        code, out, err = run_script(f"--resume {name}")
        assert code == 2 and len(err.splitlines()) == 1 and f"--resume {name}" in err
    assert run_script(f"{TINY} --run-dir run")[0] == 0
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    code, _, err = run_script("--resume run")
    assert code == 2 and len(err.splitlines()) == 1 and "checkpoint.pt" in err


@pytest.mark.parametrize(
    "flags, loss",
    [("--decomposer-lr 1e30", "decomposer/loss"), ("--learning-rate 1e30 --credit dense", "PPO's (loss|gradient)")],
)
def test_a_loss_that_is_not_finite_stops_the_run(flags, loss, run_script, tmp_path):
    code, _, err = run_script(f"{TINY} --checkpoint-every 1 {flags} --run-dir run")
    assert code == 1 and len(err.splitlines()) == 1
    assert re.search(rf"{loss} is .*iteration \d", err)


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_the_last_good_checkpoint_survives_a_bad_loss(factor, run_script, no_pictures, monkeypatch, tmp_path):
    """With a factor of inf the loss of a zero head is nan; with a finite loss, its gradient is what fails."""
    assert run_script(f"{TINY} --run-dir run")[0] == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    good = checkpoint.read_bytes()

    def bad_loss(predicted, target):
        if factor == "nan":
            return predicted.sum() * float("nan")
        return (predicted - predicted.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    monkeypatch.setattr("torch.nn.functional.mse_loss", bad_loss)
    code, _, err = run_script("--resume run --total-timesteps 1500")
    assert code == 1 and len(err.splitlines()) == 1 and "iteration 4" in err
    assert checkpoint.read_bytes() == good
    assert not (tmp_path / "run" / "summary.json").exists()  # that of the shorter run no longer holds


def test_a_checkpoint_is_written_whole_or_not_at_all(run_script, no_pictures, monkeypatch, tmp_path):
    assert run_script(f"{TINY} --run-dir run")[0] == 0
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def die_half_way(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("torch.save", die_half_way)
    with pytest.raises(OSError, match="no space"):
        run_script("--resume run --total-timesteps 1500")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good


def test_a_run_may_move_to_another_kind_of_device(run_script, no_pictures, tmp_path):
    """Its generators cannot move along, so it goes on with others."""
    assert run_script(f"{TINY} --run-dir run")[0] == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    other = {"generator": torch.zeros(16, dtype=torch.uint8), "device": "other"}
    torch.save(checkpoint | other | {"env_generator": other["generator"]}, tmp_path / "run" / "checkpoint.pt")
    assert run_script("--resume run --total-timesteps 1500")[0] == 0
    assert len(read_metrics(tmp_path / "run")) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_resumes_there_and_on_the_cpu(run_script, no_pictures, tmp_path):
    assert run_script(f"{TINY} --cuda --run-dir run")[0] == 0
    assert run_script("--resume run --total-timesteps 1500")[0] == 0
    assert run_script("--resume run --total-timesteps 2100 --no-cuda")[0] == 0


def test_frozen_steps_carry_no_weight(run_script, no_pictures, monkeypatch, tmp_path):
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
    flags = f"{TINY.replace('900', '500')} --conserve none"
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


def test_importing_the_script_runs_nothing(tmp_path):
    code = "import sys; sys.argv = ['x', '--bad']; import stas_ippo_alicebob; print('quiet')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "quiet\n" and result.returncode == 0


def test_scripts_share_their_classes_and_functions_word_for_word():
    """A class or function of the same name has the same syntax tree in all scripts. Args differ: their defaults do."""
    seen: dict[str, tuple[str, str]] = {}
    for path in sorted(ROOT.glob("stas_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name != "Args":
                script, tree = seen.setdefault(node.name, (path.name, ast.dump(node)))
                assert tree == ast.dump(node), f"{node.name} differs between {script} and {path.name}"
    assert {"Decomposer", "ShapleyAttention", "compute_gae"} <= set(seen)


def test_help_documents_every_flag():
    result = subprocess.run([sys.executable, str(ROOT / SCRIPT), "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for field in fields(Args):
        assert field.name.replace("_", "-") in result.stdout
    tree = ast.parse((ROOT / SCRIPT).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    for declaration, docstring in zip(body[::2], body[1::2], strict=True):
        assert isinstance(declaration, ast.AnnAssign) and isinstance(docstring.value.value, str)


def test_a_short_run_learns_to_stop_bumping(run_script, no_pictures, tmp_path):
    """Bumps are learnt first: random agents lose 2.6 a game with a standard error of 0.05."""
    flags = "--num-envs 128 --total-timesteps 80000 --learning-starts 0 --emb-dim 32 --eval-episodes 20"
    assert run_script(f"{flags} --run-dir run")[0] == 0
    rows = read_metrics(tmp_path / "run")
    first, last = (float(rows[i]["charts/episodic_return"]) for i in (0, -1))
    assert first < -2.2 and last > first + 0.5
