"""evaluate.py as its users see it: a run of any script drawn, shown and played again, from the command line."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ALICEBOB, ML, MPE, ROOT, TINY, TORCHRUN
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stas_ippo_alicebob
from envs.alice_bob import parallel_env
from envs.mpe import make_pettingzoo
from evaluate import EvaluateArgs, caption, draw_credits, draw_learning_curve, draw_run, main, play_episode

PICTURES = ("learning_curve.png", "credit.png", "episode.gif")


def evaluate(flags: str, cwd, program=ROOT / "evaluate.py") -> tuple[int, str, str]:
    """python evaluate.py flags -> exit code, stdout, stderr without the frame of a box. Windows go nowhere."""
    command = [sys.executable, str(program), *flags.split()]
    env = os.environ | {"SDL_VIDEODRIVER": "dummy"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    return result.returncode, result.stdout, " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def evaluate_here():
    """The same in this process: evaluate_here(run_dir, episodes=2), and so on."""
    modules, path = dict(sys.modules), list(sys.path)
    yield lambda *args, **flags: main(EvaluateArgs(*args, **flags))
    sys.modules.update(modules)
    sys.path[:] = path


@pytest.mark.parametrize(
    "script, more",
    [
        (ALICEBOB, ""),
        (MPE, "--scenario tag --num-agents 2"),
        (ML, "--scenario push --continuous-actions --max-cycles 25"),
        (TORCHRUN, ""),
    ],
)
def test_any_run_is_drawn_and_evaluated_again(script, more, run_script, tmp_path):
    assert run_script(f"{TINY[script]} {more} --run-dir run", script)[0] == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert not any((run / name).exists() for name in PICTURES)
    for flags in ("run", "run --episodes 2"):
        code, out, err = evaluate(flags, tmp_path)
        assert code == 0 and f"drawn: {', '.join(f'run/{name}' for name in PICTURES)}\n" in out, err
        assert ("on PettingZoo over 2 episodes" in out) == ("--episodes" in flags) and "has changed" not in out
        assert ("after training: return " in out) == ("--episodes" not in flags)
        more = {"checkpoint": "run/checkpoint.pt"} if "--episodes" in flags else {}
        assert json.loads((run / "summary.json").read_text()) == summary | more  # as the script found
        assert all(Image.open(run / name).size[0] > 300 for name in PICTURES)
        assert Image.open(run / "episode.gif").n_frames > 10
        assert len(list(run.glob("events.*"))) == 2 and len(list(run.glob("events.*.evaluation"))) == 1
        events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
        for name in PICTURES:
            (image,) = events.Images(name)
            assert image.encoded_image_string == (run / name).read_bytes()
            assert image.step == summary["global_step"]
    if script == MPE:  # in real time
        code, out, err = evaluate("run --episodes 1 --render", tmp_path)
        assert code == 0 and out.count("return ") == 1, err
        assert json.loads((run / "summary.json").read_text()) == summary | more


def test_the_newest_run_is_the_default(run_script, tmp_path):
    code, _, err = evaluate("", tmp_path)
    assert code == 2 and "runs/config.json: must exist" in err
    runs = []
    for seed in (1, 2):
        assert run_script(f"{TINY[MPE]} --seed {seed}", MPE)[0] == 0
        (new,) = set((tmp_path / "runs").iterdir()) - set(runs)
        runs.append(new)
    for flags, run in (("", runs[1]), (str(runs[0]), runs[0]), ("", runs[1])):  # to draw a run does not make it newer
        code, out, err = evaluate(flags, tmp_path)
        assert code == 0 and f"{run.name}/credit.png" in out, err


def test_a_script_that_has_changed_is_told(run_script, tmp_path):
    assert run_script(f"{TINY[MPE]} --run-dir run", MPE)[0] == 0
    (tmp_path / "envs").symlink_to(ROOT / "envs")
    shutil.copy(ROOT / "evaluate.py", tmp_path)
    own, copy, change = tmp_path / MPE, tmp_path / "run" / MPE, "\nprint('changed')\n"
    copy.write_text(copy.read_text() + "\nprint('as it was')\n")
    own.write_text(copy.read_text() + change)
    program = tmp_path / "evaluate.py"
    code, out, err = evaluate("run", tmp_path, program)
    assert (
        code == 0
        and out.splitlines()[0] == f"{own} has changed since the run began; --script run/{MPE} is as it was then"
    )
    assert "\nchanged\n" in out, err
    code, out, err = evaluate(f"run --script run/{MPE}", tmp_path, program)
    assert code == 0 and "changed" not in out and "as it was" in out, err
    own.rename(tmp_path / "v1.1.py")
    code, out, err = evaluate("run", tmp_path, program)  # takes the copy
    assert code == 0 and "changed" not in out and "as it was" in out, err
    code, out, err = evaluate("run --script v1.1.py", tmp_path, program)
    assert code == 0 and "v1.1.py has changed" in out and "\nchanged\n" in out, err


def test_another_checkpoint_and_what_cannot_be_evaluated(run_script, no_pictures, evaluate_here, tmp_path):
    for name, seed in (("run", 1), ("other", 2)):
        assert run_script(f"{TINY[MPE]} --seed {seed} --run-dir {name}", MPE)[0] == 0
    own = json.loads((tmp_path / "run" / "summary.json").read_text())
    evaluate_here(tmp_path / "run", episodes=2, checkpoint=tmp_path / "other" / "checkpoint.pt")
    other = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert own["random/episodic_return"] == other["random/episodic_return"]  # the same episodes
    assert own["eval/episodic_return"] != other["eval/episodic_return"]  # played by others
    assert other["checkpoint"].endswith("other/checkpoint.pt") and "checkpoint" not in own

    (tmp_path / "young").mkdir()
    shutil.copy(tmp_path / "run" / "config.json", tmp_path / "young")
    torch.save({"agent": {}}, tmp_path / "wrong.pt")
    for name in ("bare", "foreign"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    (tmp_path / "bare" / "metrics.csv").unlink()
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config | {"script": "lost.py"}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags, why in (
        ("nowhere", "nowhere/config.json: must exist"),
        ("young", "young/checkpoint.pt: must exist"),
        ("bare", "bare/metrics.csv: must exist"),
        ("foreign", "must be the script that made the run, lost.py"),
        ("run --script nowhere.py", "--script nowhere.py: must be"),
        ("run --episodes 0", "--episodes 0: must be"),
        ("run --checkpoint nowhere.pt", "nowhere.pt: must exist"),
        ("run --checkpoint wrong.pt", "wrong.pt: must fit run/config.json"),
        ("run --checkpoint run/config.json", "run/config.json: must"),
    ):
        code, out, err = evaluate(flags, tmp_path)
        assert code == 2 and out == "" and "Traceback" not in err and why in err, err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.fixture
def looked_at(monkeypatch) -> tuple[dict, list]:
    """What is drawn as credits with its titles, and every team that plays with its episode."""
    drawn, played = {}, []

    def play(env, agent, *args) -> dict:
        played.append((agent, play_episode(env, agent, *args)))
        return played[-1][1]

    monkeypatch.setattr("evaluate.play_episode", play)
    monkeypatch.setattr("evaluate.draw_credits", lambda path, *args: drawn.update(credits=args[0], titles=args[3]))
    monkeypatch.setattr("evaluate.log_to_tensorboard", lambda *args: None)
    return drawn, played


def test_an_oracle_is_evaluated_with_the_credits_of_mpe2s_state(run_script, looked_at, evaluate_here, tmp_path):
    drawn, played = looked_at
    assert run_script(f"{TINY[MPE]} --credit difference --run-dir run", MPE)[0] == 0
    evaluate_here(tmp_path / "run")
    ((_, shown),) = played
    assert "leftover" not in drawn["titles"][2] and drawn["titles"][1].startswith("true reward (sum ")
    assert np.array_equal(drawn["credits"], shown["difference"][0].numpy())
    # Those of the first step depend on where the agents start and go: read them off mpe2's state.
    seed = int(np.random.SeedSequence((1, 0)).generate_state(1)[0]) // 2
    env, frames = make_pettingzoo("spread", 3, nearest_first=True, render_mode="rgb_array"), []
    still = SimpleNamespace(
        get_inputs=lambda obs, elapsed: obs, get_action_and_value=lambda inputs: (torch.zeros(3, dtype=torch.int64),)
    )
    episode = play_episode(env, still, seed, frames)
    assert len(frames) == 26 and episode["difference"].shape == (1, 25, 3)
    assert torch.equal(shown["obs"][0, 0], episode["obs"][0, 0])  # where the agents of the drawn episode start
    start = make_pettingzoo("spread", 3)
    start.reset(seed=seed)
    start.step(dict.fromkeys(start.agents, 0))
    assert torch.allclose(start.oracles()["difference"][0].float(), episode["difference"][0, 0])


@pytest.mark.parametrize("conserve", ["terminal", "none"])
def test_the_leftover_is_drawn_and_the_policy_is_sampled(conserve, run_script, looked_at, evaluate_here, tmp_path):
    drawn, played = looked_at
    assert run_script(f"{TINY[MPE]} --decomposer-lr 0.1 --conserve {conserve} --run-dir run", MPE)[0] == 0
    evaluate_here(tmp_path / "run")
    ((agent, episode),) = played
    team_return = episode["team_reward"].sum().item()
    assert abs(drawn["credits"].sum()) > 0.1
    total, paid = drawn["credits"].sum(), {"terminal": "paid at the last step", "none": "not paid"}[conserve]
    *_, above, below = drawn["titles"]
    assert above == f"reward that the agents never saw (sum {team_return:.2f})"
    assert below.endswith(f"(sum {total:.2f}; not shown: leftover {team_return - total:.2f}, {paid})")
    env = make_pettingzoo("spread", 3)
    acts = torch.stack([play_episode(env, agent, 1)["act"][0, 0] for _ in range(50)])
    assert len(acts.unique()) > 1 and (acts != acts[0]).any()


TITLES = ("title", "above", "below")


def test_the_colours_of_credit_png_are_those_of_the_learned_credits(tmp_path):
    credits = np.array([[-0.1, 0.1]] * 5)
    draw_credits(tmp_path / "credit.png", credits, np.ones(5), ["a", "b"], TITLES, [(0, 0, "o")])
    picture = np.asarray(Image.open(tmp_path / "credit.png").convert("RGB")).astype(int)

    def share(*colour: int) -> float:
        return (np.abs(picture - colour).sum(axis=2) < 30).mean()

    assert share(103, 0, 31) > 0.03 and share(5, 48, 97) > 0.03  # the two ends of the colour map


def test_a_picture_of_the_gif_tells_step_return_and_credits():
    """Each agent's box has the colour that its credit for the last step has in credit.png; before a step it is pale."""
    frame, credits = np.full((300, 500, 3), 255, np.uint8), np.array([[-0.1, 0.1], [0.05, 0.0], [0.0, 0.1]])

    def boxes(step: int) -> list[tuple]:
        picture = caption(frame, step, credits, np.array([1.0, 2.0, 4.0]), ["agent_0", "b"])
        assert picture.size == (500, 352)
        return [picture.getpixel((x, 332)) for x in (20, 270)]

    def colour(credit: float) -> tuple:
        return tuple(int(255 * x) for x in matplotlib.colormaps["RdBu"]((credit / 0.1 + 1) / 2)[:3])

    assert boxes(0) == [colour(0)] * 2
    for step in (1, 2, 3):
        assert boxes(step) == [colour(credit) for credit in credits[step - 1]]
    told = [caption(frame, 3, scale * credits, np.ones(3), ["a", "b"]).tobytes() for scale in (1, 1, 10)]
    assert told[0] == told[1] != told[2]  # numbers, beside colours that do not change
    assert caption(frame[:50, :50], 3, credits, np.ones(3), ["a", "b"]).size == (400, 102)
    for many in (60, 150, 1000):  # boxes narrower than their frames
        names = [f"agent_{i}" for i in range(many)]
        assert caption(frame, 1, np.ones((2, many)), np.ones(2), names).size == (500, 352)


def test_the_random_team_and_what_is_too_short_are_drawn(monkeypatch, tmp_path):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **more: figures.append(figure) or save(figure, *args, **more)
    )
    for n, summary in ((9, {"random/episodic_return": -27.5}), (10, {})):
        points = {"charts/episodic_return": "0.5", "decomposer/reward_correlation": ""}
        rows = [{"global_step": str(step)} | points for step in range(n)]
        draw_learning_curve(tmp_path / "learning_curve.png", rows, summary, "title $_{$")
        (axis,) = figures[-1].axes
        assert ("too short to tell" in axis.get_title()) == (n < 10)
        assert [line.get_ydata()[0] for line in axis.lines[1:]] == list(summary.values())


def test_long_episodes_give_a_picture_of_bounded_size(monkeypatch, tmp_path):
    """Of 2,000 steps ten at a time are added up; the last column of 2,003 has the rest."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **more: figures.append(figure) or save(figure, *args, **more)
    )
    for T, columns in ((200, 200), (2000, 200), (2003, 183)):
        credits, reward = np.random.default_rng(0).normal(size=(T, 14)), np.arange(T)
        names = [f"agent_{i}" for i in range(14)]
        draw_credits(tmp_path / "credit.png", credits, reward, names, TITLES, [(T - 1, 3, "o")])
        assert max(Image.open(tmp_path / "credit.png").size) <= 5000
        shown, bars = (
            figures[-1].axes[1].images[0].get_array(),
            [bar.get_height() for bar in figures[-1].axes[0].patches],
        )
        width = -(-T // 200)
        assert shown.shape == (14, columns) and len(bars) == columns
        for k in range(columns):
            np.testing.assert_allclose(shown[:, k], credits[k * width : (k + 1) * width].sum(axis=0), atol=1e-9)
            assert bars[k] == reward[k * width : (k + 1) * width].sum()
        assert len(figures[-1].axes[1].texts) == (width == 1)


@pytest.mark.parametrize("shape, kept", [((8, 9, 3), 41), ((8, 9, 4), 41), ((8, 9, 1), 0), ((3, 8, 9), 0)])
def test_frames_that_are_no_pictures_and_events_without_names(shape, kept, monkeypatch, tmp_path):
    """Those are left out, and these are drawn as numbers: names and a legend are optional."""
    marks, steps, env, script = [], [], parallel_env("rgb_array", one_hot=True), stas_ippo_alicebob
    env.render, args = lambda: np.zeros(shape, np.uint8), script.Args()
    del env.event_names, env.legend
    monkeypatch.setattr(script, "make_parallel_env", lambda *_: env)
    monkeypatch.setattr("evaluate.draw_credits", lambda *drawn: marks.extend(drawn[-1]))
    monkeypatch.setattr("evaluate.caption", lambda _, step, *more: steps.append(step) or Image.new("RGB", (9, 9)))
    networks = script.make_networks(args, script.make_env(args, 1))
    pictures = draw_run(tmp_path, script, args, networks, [{"global_step": 1, "charts/episodic_return": 1}], {}, 1)
    assert len(marks) > 0 and {text for _, _, text in marks} <= {"-1", "2", "3", "7"}
    assert pictures == list(PICTURES)[: 3 if kept else 2] and len(steps) == kept


def test_names_are_drawn_as_they_are(tmp_path):
    """Dollar signs begin no formula, which would be one that cannot be read."""
    credits, names, marks = np.ones((3, 2)), ["$_{$", "b"], [(0, 0, "$_{$")]
    draw_credits(tmp_path / "credit.png", credits, np.ones(3), names, ("$_{$", "$_{$", "$_{$"), marks)
    assert Image.open(tmp_path / "credit.png").size[0] > 300


@pytest.mark.parametrize("fps, milliseconds", [(0, 100), (None, 100), (4, 250)])
def test_the_pace_of_episode_gif(fps, milliseconds, monkeypatch, tmp_path):
    def build(args, render_mode):
        env = parallel_env(render_mode, one_hot=True)
        env.metadata = env.metadata | {"render_fps": fps}
        return env

    monkeypatch.setattr(stas_ippo_alicebob, "make_parallel_env", build)
    args, rows = stas_ippo_alicebob.Args(), [{"global_step": 1, "charts/episodic_return": 1}]
    networks = stas_ippo_alicebob.make_networks(args, stas_ippo_alicebob.make_env(args, 1))
    assert draw_run(tmp_path, stas_ippo_alicebob, args, networks, rows, {}, 1) == list(PICTURES)
    gif, durations = Image.open(tmp_path / "episode.gif"), []
    for i in range(gif.n_frames):
        gif.seek(i)
        durations.append(gif.info["duration"])
    assert all(duration % milliseconds == 0 for duration in (*durations[:-1], durations[-1] - 2000))
    assert durations[-1] >= 2000 and sum(durations) == 40 * milliseconds + 2000  # equal pictures are one frame


def test_a_kept_checkpoint_is_small_and_plays(run_script, no_pictures, evaluate_here, tmp_path):
    """What benchmark/checkpoints.py keeps of a run earns what the run did."""
    assert run_script(f"{TINY[MPE]} --run-dir run", MPE)[0] == 0
    program = [sys.executable, str(ROOT / "benchmark" / "checkpoints.py"), "run", "kept"]
    subprocess.run(program, check=True, cwd=tmp_path)
    kept = torch.load(tmp_path / "kept" / "checkpoint.pt", weights_only=True)
    assert set(kept) == {"agent", "decomposer", "iteration", "global_step", "wall_time"}
    assert (tmp_path / "kept" / "config.json").read_text().count(str(tmp_path)) == 0
    evaluate_here(tmp_path / "kept", episodes=2)
    kept, run = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("kept", "run"))
    assert kept == run | {"checkpoint": str(tmp_path / "kept" / "checkpoint.pt")}
    for folders, why in (("run kept", "must be a new folder"), ("nowhere new", "must have a checkpoint.pt")):
        result = subprocess.run([*program[:2], *folders.split()], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2 and why in result.stderr and not (tmp_path / "new").exists()


@pytest.mark.parametrize("folder", sorted((ROOT / "checkpoints").iterdir()), ids=lambda folder: folder.name)
def test_the_trained_teams_play(folder, no_pictures, evaluate_here, tmp_path):
    """Better than at random, in a few episodes; nothing in their folders is of the machine they come from."""
    assert sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".pt", ".csv", ".json")) < 10**6
    if "foraging" in folder.name:
        pytest.importorskip("lbforaging")
    for name in ("config.json", "metrics.csv", "checkpoint.pt"):
        shutil.copy(folder / name, tmp_path)
    assert json.loads((folder / "config.json").read_text())["flags"]["run_dir"] is None
    kept = json.loads((folder / "summary.json").read_text())
    (row,) = [line for line in (ROOT / "docs/checkpoints.md").read_text().splitlines() if f"`{folder.name}`" in line]
    assert row.endswith(f"| {kept['eval/episodic_return']:.2f} | {kept['random/episodic_return']:.2f} |")
    evaluate_here(tmp_path, episodes=4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval/episodic_return"] > summary["random/episodic_return"]
