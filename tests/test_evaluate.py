"""evaluate.py as its users see it: a run of any script played again, drawn and shown, from the command line."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ALICEBOB, ML, MPE, ROOT, TINY
from PIL import Image

from envs.mpe import make_pettingzoo
from evaluate import draw_credits, evaluate_run, play_episode


def evaluate(flags: str, cwd) -> tuple[int, str, str]:
    """python evaluate.py flags -> exit code, stdout, stderr. Windows go nowhere."""
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags.split()]
    env = os.environ | {"SDL_VIDEODRIVER": "dummy"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "script, more",
    [(ALICEBOB, ""), (MPE, "--scenario tag --num-agents 2"), (ML, "--scenario push --continuous-actions")],
)
def test_any_run_can_be_evaluated_again(script, more, run_script, tmp_path):
    assert run_script(f"{TINY[script]} {more} --run-dir run", script)[0] == 0
    run = tmp_path / "run"
    names = ("summary.json", "learning_curve.png", "credit.png", "episode.gif")
    first = {name: (run / name).read_bytes() for name in names}
    files = {path.name.split(".")[-1] for path in run.iterdir()}
    for name in names:
        (run / name).unlink()
    code, out, err = evaluate("run --episodes 2", tmp_path)
    assert code == 0, err
    assert "over 2 episodes; see run" in out
    assert {name: (run / name).read_bytes() for name in names} == first  # the same as the script did
    assert {path.name.split(".")[-1] for path in run.iterdir()} == files  # in place of the first evaluation's
    assert len(list(run.glob("events.*"))) == 2
    if script == MPE:  # in real time
        code, out, err = evaluate("run --episodes 1 --render", tmp_path)
        assert code == 0 and json.loads((run / "summary.json").read_text())["eval/episodes"] == 1, err


def test_another_checkpoint_and_what_cannot_be_evaluated(run_script, no_pictures, tmp_path):
    for name, seed in (("run", 1), ("other", 2)):
        assert run_script(f"{TINY[MPE]} --seed {seed} --run-dir {name}", MPE)[0] == 0
    own = json.loads((tmp_path / "run" / "summary.json").read_text())
    os.chdir(tmp_path)
    evaluate_run(tmp_path / "run", checkpoint=tmp_path / "other" / "checkpoint.pt")
    other = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert own["random/episodic_return"] == other["random/episodic_return"]  # the same episodes
    assert own["eval/episodic_return"] != other["eval/episodic_return"]  # played by others
    assert other["checkpoint"].endswith("other/checkpoint.pt") and "checkpoint" not in own

    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_bytes((tmp_path / "run" / "config.json").read_bytes())
    torch.save({"agent": {}}, tmp_path / "wrong.pt")
    shutil.copytree(tmp_path / "run", tmp_path / "bare", ignore=shutil.ignore_patterns("metrics.csv"))
    for flags, why in (
        ("nowhere", "must be the folder of a run"),
        ("young", "must have a checkpoint.pt"),
        ("bare", "and a metrics.csv"),
        ("run --episodes 0", "--episodes 0: must be"),
        ("run --checkpoint nowhere.pt", "--checkpoint nowhere.pt: must be"),
        ("run --checkpoint wrong.pt", "--checkpoint wrong.pt: must hold the networks"),
    ):
        code, out, err = evaluate(flags, tmp_path)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and why in err


@pytest.fixture
def looked_at(monkeypatch) -> tuple[dict, list]:
    """What evaluations draw as credits and leftover, and every policy that they play with its episode."""
    drawn, played = {}, []

    def play(env, policy, *args, **options) -> dict:
        played.append((policy, play_episode(env, policy, *args, **options)))
        return played[-1][1]

    monkeypatch.setattr("evaluate.play_episode", play)
    monkeypatch.setattr("evaluate.draw_credits", lambda path, *args: drawn.update(credits=args[0], leftover=args[1]))
    monkeypatch.setattr("evaluate.log_to_tensorboard", lambda *args: None)
    return drawn, played


def test_an_oracle_is_evaluated_with_the_credits_of_mpe2s_state(run_script, looked_at, tmp_path):
    drawn, played = looked_at
    assert run_script(f"{TINY[MPE]} --credit difference --run-dir run", MPE)[0] == 0
    assert drawn["leftover"] is None and np.array_equal(drawn["credits"], played[-1][1]["difference"][0].numpy())
    # Those of the first step depend on where the agents start and go: read them off mpe2's state.
    seed = int(np.random.SeedSequence((1, 0)).generate_state(1)[0])
    env, frames = make_pettingzoo("spread", 3, render_mode="rgb_array"), []
    episode = play_episode(env, lambda obs: torch.zeros(3, dtype=torch.int64), seed, frames)
    assert len(frames) == 26 and episode["difference"].shape == (1, 25, 3)
    start = make_pettingzoo("spread", 3)
    start.reset(seed=seed)
    places = [each["obs"][0, 0, :, 2:4] for each in (played[-1][1], episode)]
    assert torch.equal(*places)  # where the agents of the drawn episode start
    start.step(dict.fromkeys(start.agents, 0))
    assert torch.allclose(start.oracles()["difference"][0].float(), episode["difference"][0, 0])


def test_the_leftover_is_drawn_and_the_policy_is_sampled(run_script, looked_at, tmp_path):
    drawn, played = looked_at
    assert run_script(f"{TINY[MPE]} --decomposer-lr 0.1 --run-dir run", MPE)[0] == 0
    policy, episode = played[-1]
    team_return = episode["team_reward"].sum().item()
    assert abs(drawn["credits"].sum()) > 0.1
    assert drawn["leftover"] == pytest.approx(team_return - drawn["credits"].sum(), abs=1e-3)
    acts = torch.stack([policy(torch.zeros(3, episode["obs"].shape[-1])) for _ in range(50)])
    assert len(acts.unique()) > 1 and (acts != acts[0]).any()


@pytest.mark.parametrize("leftover", [None, -40.0])
def test_the_colours_of_credit_png_are_those_of_the_learned_credits(leftover, tmp_path):
    """A large leftover must not make everything else pale."""
    env, credits = make_pettingzoo("spread", 2), np.array([[-0.1, 0.1]] * 5)
    draw_credits(tmp_path / "credit.png", credits, leftover, np.ones(5), env, "title", [(0, 0, "o")])
    picture = np.asarray(Image.open(tmp_path / "credit.png").convert("RGB")).astype(int)

    def share(*colour: int) -> float:
        return (np.abs(picture - colour).sum(axis=2) < 30).mean()

    assert share(103, 0, 31) > 0.03 and share(5, 48, 97) > 0.03  # the two ends of the colour map
    assert (share(255, 127, 14) > 0.005) == (leftover is not None)


def test_a_kept_checkpoint_is_small_and_plays(run_script, no_pictures, tmp_path):
    """What benchmark/checkpoints.py keeps of a run earns what the run did; it cannot be trained further."""
    assert run_script(f"{TINY[MPE]} --run-dir run", MPE)[0] == 0
    program = [sys.executable, str(ROOT / "benchmark" / "checkpoints.py"), "run", "kept"]
    subprocess.run(program, check=True, cwd=tmp_path)
    assert sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) < 10**6
    assert (tmp_path / "kept" / "config.json").read_text().count(str(tmp_path)) == 0
    evaluate_run(tmp_path / "kept")
    kept, run = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("kept", "run"))
    assert kept == run
    code, _, err = run_script("--resume kept --total-timesteps 9000", MPE)
    assert code == 2 and len(err.splitlines()) == 1
    for other in ("kept", "run", "run/config.json"):
        result = subprocess.run([*program[:-1], other], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2 and "must be a new folder" in result.stderr


@pytest.mark.parametrize("folder", sorted((ROOT / "checkpoints").iterdir()), ids=lambda folder: folder.name)
def test_the_trained_teams_play(folder, no_pictures, tmp_path):
    """Better than at random, in a few episodes; nothing in their folders is of the machine they come from."""
    assert sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".pt", ".csv", ".json")) < 10**6
    if "foraging" in folder.name:
        pytest.importorskip("lbforaging")
    for name in ("config.json", "metrics.csv", "checkpoint.pt"):
        shutil.copy(folder / name, tmp_path)
    assert json.loads((folder / "config.json").read_text())["flags"]["run_dir"] is None
    evaluate_run(tmp_path, episodes=4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval/episodic_return"] > summary["random/episodic_return"]
