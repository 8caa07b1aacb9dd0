"""The script as its users see it: a run folder, living flags, clear errors, and runs that survive being killed."""

import ast
import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALICEBOB, ML, MPE, PETTINGZOO, ROOT, SCRIPTS, TINY, read_metrics
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stas_ippo_alicebob
import stas_ippo_mpe
import stas_ippo_pettingzoo
import stas_ml_ippo_mpe
from envs.alice_bob import AliceBob
from envs.mpe import make
from evaluate import play_episode
from run_folder import COUNTERS, parse_flags, save_checkpoint

MODULES = {
    ALICEBOB: stas_ippo_alicebob,
    MPE: stas_ippo_mpe,
    ML: stas_ml_ippo_mpe,
    PETTINGZOO: stas_ippo_pettingzoo,
}


def test_a_run_leaves_a_complete_folder(script, run_script, tiny, tmp_path):
    code, out, err = run_script(f"{tiny} --run-dir run")
    assert code == 0 and "over 2 episodes; see run" in out
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {re.sub(r"tfevents.*", "tfevents", name) for name in names} == {
        "checkpoint.pt", "config.json", "metrics.csv", "summary.json", "learning_curve.png", "credit.png",
        "episode.gif", "events.out.tfevents",
    }  # fmt: skip

    config = json.loads((run / "config.json").read_text())
    assert set(config["flags"]) == {field.name for field in fields(MODULES[script].Args)}
    assert config["flags"]["emb_dim"] == 8 and config["flags"]["reward_scale"] > 0
    assert config["versions"]["torch"] == torch.__version__

    rows = read_metrics(run)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3]
    steps = [int(row["global_step"]) for row in rows]
    assert steps == [200, 400, 600]
    last, agents = rows[-1], 2 if script in (ALICEBOB, PETTINGZOO) else 3
    total = agents * float(last["charts/episodic_return"])
    assert float(last["charts/agent_return_sum"]) == pytest.approx(total, rel=1e-6)
    everywhere = [name for name in last if script != ALICEBOB or not name.startswith("decomposer/reward_correlation")]
    assert all(last[name] for name in everywhere)

    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    for name in (name for name in last if "/" in name):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step, float(row[name])) for step, row in zip(steps, rows) if row[name]]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]

    summary = json.loads((run / "summary.json").read_text())
    kinds = ["episodic_return", "episodic_return_std", "episodic_length", "episodes"]
    kinds += ["treasure_rate"] if script == ALICEBOB else []
    assert set(summary) == {f"{who}/{kind}" for who in ("eval", "random") for kind in kinds} | {
        "global_step",
        "wall_time",
    }
    assert summary["eval/episodes"] == summary["random/episodes"] == 2 and summary["global_step"] == steps[-1]

    for name in ("learning_curve.png", "credit.png"):
        assert Image.open(run / name).size[0] > 300
    assert Image.open(run / "episode.gif").n_frames > 10

    # TensorBoard also shows the flags, the evaluation and the pictures.
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|emb_dim|8|" in table and "|credit|stas|" in table
    for name in ("eval/episodic_return", "random/episodic_length"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(steps[-1], pytest.approx(summary[name]))]
    for name in ("learning_curve.png", "credit.png", "episode.gif"):
        (image,) = events.Images(name)
        assert image.encoded_image_string == (run / name).read_bytes() and image.step == steps[-1]


def test_checkpoint_loads_safely_and_plays(script, run_script, tiny, no_evaluation, tmp_path):
    run_script(f"{tiny} --run-dir run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    states = {"agent", "agent_optimizer", "decomposer", "decomposer_optimizer", "buffer"}
    assert set(checkpoint) == states | set(COUNTERS)
    assert states <= set(re.findall(r"\w+", save_checkpoint.__doc__))
    module = MODULES[script]
    args = module.Args(**json.loads((tmp_path / "run" / "config.json").read_text())["flags"])
    agent, decomposer = module.make_networks(args, module.make_env(args, num_envs=1))
    agent.load_state_dict(checkpoint["agent"])
    decomposer.load_state_dict(checkpoint["decomposer"])
    episode = play_episode(module.make_parallel_env(args), lambda obs: agent.policy(obs).sample(), seed=0)
    credits = decomposer(episode["obs"], episode["act"], episode["valid"])
    assert credits.shape == episode["act"].shape
    stored = checkpoint["buffer"]["data"]
    assert len(stored["obs"]) == 12 and stored["obs"].dtype == torch.float16


def test_same_seed_same_numbers(run_script, tiny, no_pictures, tmp_path):
    for name, flags in (("a", "--seed 1"), ("b", "--seed 1"), ("c", "--seed 2")):
        assert run_script(f"{tiny} {flags} --run-dir {name}")[0] == 0
    a, b, c = (read_metrics(tmp_path / name) for name in "abc")
    assert a == b and a != c
    keys = ("eval/episodic_return", "random/episodic_return")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab"]
    assert all(summaries[0][key] == summaries[1][key] for key in keys)


def test_to_look_changes_nothing(script, run_script, tiny, no_evaluation, tmp_path):
    """Diagnostics that draw more random numbers leave every other number as it was."""
    (tmp_path / "curious").mkdir()
    source = (ROOT / script).read_text()
    for old in (r"predicted = decompose\(", r"metrics \|= measure_credits\("):
        source, count = re.subn(rf"^( *)({old})", r"\1torch.rand(3)\n\1\2", source, flags=re.MULTILINE)
        assert count == 1
    (tmp_path / "curious" / script).write_text(source)
    assert run_script(f"{tiny} --run-dir plain")[0] == 0
    assert run_script(f"{tiny} --run-dir looked", str(tmp_path / "curious" / script))[0] == 0
    plain, looked = (read_metrics(tmp_path / name) for name in ("plain", "looked"))
    diagnostics = ("decomposer/credit_std", "decomposer/explained_variance")
    for name in diagnostics:
        assert any(row[name] != other[name] for row, other in zip(plain, looked))
    for row in (*plain, *looked):
        for name in diagnostics:
            del row[name]
    assert plain == looked


def test_both_learning_rates_decay(script, run_script, tiny, no_evaluation, tmp_path):
    """To a third before the last of three iterations."""
    assert run_script(f"{tiny} --num-envs 8 --total-timesteps 600 --run-dir run")[0] == 0
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    before = int(read_metrics(tmp_path / "run")[-2]["global_step"])
    for name, flag in (("agent_optimizer", "learning_rate"), ("decomposer_optimizer", "decomposer_lr")):
        expected = getattr(MODULES[script].Args, flag) * (1 - before / 600)
        assert state[name]["param_groups"][0]["lr"] == pytest.approx(expected)


def test_shares_of_credits_keep_their_sum(run_script, no_evaluation, tmp_path):
    """What is equal stays as it is; the oracle `difference`, which is not, varies less the more is shared."""

    def value_loss(credit: str, share: str) -> float:
        flags = f"{TINY[MPE]} --credit {credit} --own-share {share} --total-timesteps 200 --learning-rate 1e-12"
        assert run_script(f"{flags} --run-dir {credit}{share}", MPE)[0] == 0
        (row,) = read_metrics(tmp_path / f"{credit}{share}")
        return float(row["losses/value_loss"])

    none, half, own = (value_loss("dense", share) for share in ("0", "0.5", "1"))
    assert none == pytest.approx(own, rel=1e-5) and half == pytest.approx(own, rel=1e-5) and own > 0
    assert value_loss("difference", "0") < value_loss("difference", "0.5") < value_loss("difference", "1")


@pytest.fixture
def start(tmp_path):
    """start(script, flags) -> a running process, which does not outlive the test."""
    processes = []

    def start(script: str, flags: str) -> subprocess.Popen:
        command, pipes = (
            [sys.executable, str(ROOT / script), *flags.split()],
            dict.fromkeys(("stdout", "stderr"), subprocess.PIPE),
        )
        processes.append(subprocess.Popen(command, cwd=tmp_path, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for_rows(path, rows: int) -> None:
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) > rows:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not reach {rows} rows")


@pytest.mark.parametrize("script, more", [(ALICEBOB, ""), (MPE, ""), (ML, "--scenario tag --continuous-actions")])
def test_interrupted_runs_continue_as_if_nothing_had_happened(
    script, more, start, run_script, tiny, no_pictures, tmp_path
):
    long = tiny.replace("--total-timesteps 600", f"--total-timesteps 7600 --checkpoint-every 4 {more}")
    assert run_script(f"{long} --run-dir whole")[0] == 0
    whole = read_metrics(tmp_path / "whole")
    # SIGKILL comes without warning, between two checkpoints; the others finish the iteration and save.
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = tmp_path / signum.name
        process = start(script, f"{long} --run-dir {run.name}")
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
            assert f"{script} --resume {run.name}" in err
        time.sleep(1)  # TensorBoard orders files by the second they began in; a new process is never that quick
        assert run_script(f"--resume {run.name}")[0] == 0
        assert read_metrics(run) == whole
        # TensorBoard shows every step once, too: what was logged after the checkpoint is purged.
        events = EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")
        assert [event.step for event in events] == [int(row["global_step"]) for row in whole]
        summaries = [json.loads((path / "summary.json").read_text()) for path in (tmp_path / "whole", run)]
        for name in ("eval/episodic_return", "random/episodic_return", "global_step"):
            assert summaries[0][name] == summaries[1][name]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(run_script, tiny, no_evaluation, tmp_path):
    assert run_script(f"{tiny} --run-dir whole")[0] == 0
    run = tmp_path / "early"
    run.mkdir()
    (run / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    (run / "metrics.csv").write_text(
        "\n".join((tmp_path / "whole" / "metrics.csv").read_text().splitlines()[:2]) + "\n2,6"
    )
    assert run_script("--resume early")[0] == 0
    assert read_metrics(run) == read_metrics(tmp_path / "whole")


def test_resuming_a_finished_run_redoes_the_pictures_and_may_prolong_it(script, run_script, tiny, tmp_path):
    tiny += " --seed 2"  # with which nobody in Alice & Bob succeeds by luck and ends an episode early
    assert run_script(f"{tiny} --run-dir run --no-anneal-lr")[0] == 0
    rows = read_metrics(tmp_path / "run")
    for name in ("summary.json", "credit.png", "learning_curve.png", "episode.gif"):
        (tmp_path / "run" / name).unlink()
    code, out, _ = run_script("--resume run --eval-episodes 3 --gamma 0.5")
    assert code == 0 and read_metrics(tmp_path / "run") == rows
    assert "--gamma" in out and "ignored" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval/episodes"] == 3
    assert (tmp_path / "run" / "credit.png").exists() and (tmp_path / "run" / "episode.gif").exists()
    assert run_script("--resume run --total-timesteps 1000")[0] == 0
    longer = read_metrics(tmp_path / "run")
    assert len(longer) == 5 and longer[:3] == rows
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["gamma"] == MODULES[script].Args.gamma


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
    "own_share": "0.5",
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
    "buffer_size": "10",
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


def flag(name: str, value: str) -> str:
    option = "--" + name.replace("_", "-")
    return {"yes": option, "no": option.replace("--", "--no-", 1)}.get(value, f"{option} {value}")


def test_every_flag_that_shapes_learning_changes_what_is_learned(script, run_script, tiny, no_evaluation, tmp_path):
    base = f"{tiny} --learning-rate 0.01 --clip-coef 0.1"  # large enough to clip values and ratios
    changes = [("base", ""), *ALIVE.items()]
    changes += [("credit", kind) for kind in ("temporal", "uniform", "episodic", "dense")]
    changes += [("coalition", kind) for kind in ("permutation", "exact", "all")]
    changes += [("conserve", kind) for kind in ("none", "terminal", "uniform") if kind != MODULES[script].Args.conserve]
    if script == PETTINGZOO:
        changes += OPTIONS_OF_PETTINGZOO.items()
    elif script != ALICEBOB:
        changes += [("credit", "shapley"), ("credit", "difference"), *OPTIONS_OF_MPE.items()]
        changes += [("scenario", "tag"), *OPTIONS_OF_TAG.items()]
    seen = {}
    for name, value in changes:
        change = flag(name, value) if value else ""
        scenario = "--scenario tag" if name in OPTIONS_OF_TAG else ""
        assert run_script(f"{base} {scenario} {change} --run-dir {name}{value}")[0] == 0
        agent = torch.load(tmp_path / f"{name}{value}" / "checkpoint.pt", weights_only=True)["agent"]
        weights = agent["actor.0.weight"]
        for other, known in seen.items():
            assert not torch.equal(weights, known), f"{change} learns what {other or 'the defaults'} learned"
        seen[change] = weights


def test_every_other_flag_does_what_it_says(script, run_script, tiny, no_pictures, tmp_path, monkeypatch):
    """The flags that do not shape learning; with those above, these are all."""
    others = "exp_name torch_deterministic cuda track wandb_project_name wandb_entity num_threads run_dir resume"
    others += " checkpoint_every eval_episodes credit coalition conserve"
    options = {
        ALICEBOB: [],
        MPE: [*OPTIONS_OF_MPE, *OPTIONS_OF_TAG],
        ML: [*OPTIONS_OF_MPE, *OPTIONS_OF_TAG],
        PETTINGZOO: [*OPTIONS_OF_PETTINGZOO, "env_workers"],
    }[script]
    assert {*ALIVE, *options, *others.split()} == {field.name for field in fields(MODULES[script].Args)}

    seen = []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append(n))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: seen.append(on))
    code, out, _ = run_script(f"{tiny} --exp-name mine --seed 7 --cuda --no-torch-deterministic")
    assert code == 0 and [1, False] == seen[:2]
    (run,) = (tmp_path / "runs").iterdir()
    changes = r"torch_deterministic=False,[\w.=,]*num_envs=\d"  # what differs from the defaults
    name = {ALICEBOB: "alice_bob", PETTINGZOO: r"mpe2\.simple_reference_v3"}.get(script, "spread_3")
    assert re.match(rf"{name}__mine__{changes}", run.name)
    assert re.search(r"__7__\d+$", run.name)
    if not torch.cuda.is_available():
        assert out.count("no CUDA device found") == 1


def test_errors_of_our_own_keep_their_traceback():
    """Only a full disk or memory is one line."""

    def reported(code: str) -> str:
        hook = "import sys, run_folder; sys.excepthook = run_folder.report_error\n"
        return subprocess.run([sys.executable, "-c", hook + code], cwd=ROOT, capture_output=True, text=True).stderr

    for code in ("open('nowhere')", "try:\n open('nowhere')\nexcept OSError:\n {}['bug']", "raise RuntimeError('x')"):
        assert "Traceback" in reported(code)
    for code in ("raise MemoryError", "import torch; torch.zeros(10**15)", "raise OSError(28, 'No space left')"):
        text = reported(code)
        assert text.startswith("error: ") and len(text.splitlines()) == 1


def test_tracking_starts_wandb(run_script, tiny, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("calls = []\ndef init(**flags): calls.append(flags)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    code, _, err = run_script(f"{tiny} --track --wandb-project-name p --wandb-entity e --run-dir run")
    assert code == 0, err
    (call,) = sys.modules.pop("wandb").calls
    assert (call["project"], call["entity"], call["name"], call["sync_tensorboard"]) == ("p", "e", "run", True)


BAD = [
    f"--{name} {value}"
    for names, values in [
        (
            "total-timesteps num-envs num-minibatches update-epochs mc-samples num-heads emb-dim "
            "decomposer-batch-size decomposer-updates buffer-size eval-episodes checkpoint-every",
            "0 -1",
        ),
        ("num-threads num-layers learning-starts attention-window seed", "-1"),
        ("learning-rate decomposer-lr adv-eps clip-coef max-grad-norm reward-scale target-kl", "0 -1 nan inf"),
        ("ent-coef vf-coef", "-0.1 nan inf"),
        ("gamma gae-lambda own-share", "-0.1 1.1 nan"),
        ("resume", "nowhere"),
        ("run-dir", "full file"),
    ]
    for name in names.split()
    for value in values.split()
] + [
    "--emb-dim 30 --num-heads 4",
    "--emb-dim 64 --num-heads 5",
    "--exp-name a/../../x",
    "--exp-name ..",
    *(  # beyond all reason
        f"--{name} {value}"
        for names, value in [
            ("emb-dim num-envs buffer-size mc-samples num-minibatches num-threads total-timesteps seed", 10**20),
            ("emb-dim num-layers num-heads", 10**9),
            ("num-envs buffer-size mc-samples update-epochs decomposer-updates decomposer-batch-size", 10**8),
            ("num-threads", 100_000),
            ("reward-scale clip-coef learning-rate decomposer-lr ent-coef vf-coef max-grad-norm target-kl", "1e300"),
        ]
        for name in names.split()
    ),
]


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
    "--num-agents 100000",
    "--num-obstacles 100000000 --scenario tag",
    "--num-prey 100000 --scenario tag",
    "--num-agent-neighbors 100000",
]


@pytest.mark.parametrize(
    "script, flags",
    [
        (s, f)
        for s in SCRIPTS
        for f in BAD + (BAD_MPE if s in (MPE, ML) else []) + (["--num-layers 0"] if s == ML else [])
    ],
)
def test_bad_values_end_with_one_line_and_leave_nothing(script, flags, run_script, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    code, out, err = run_script(flags, script)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1
    name, value = flags.split()[:2]
    assert f"{name} " in err and (value if value.isalpha() else value.split("e")[0]) in err and "must be" in err
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}


def test_a_copy_that_evaluate_would_not_find_ends_at_once(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_flags(stas_ippo_alicebob.Args, "/elsewhere/mine.py")
    assert capsys.readouterr().err.startswith("error: mine.py: must be named stas_*.py")


def test_tracking_without_wandb_is_an_error(script, run_script, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run_script("--track")
    assert code == 2 and len(err.splitlines()) == 1 and "wandb" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    ["--credit all", "--coalition some", "--conserve some", "--critic two", "--num-envs x", "--no-such-flag"],
)
def test_what_cannot_be_parsed_gets_exit_code_2(script, flags, run_script, tmp_path):
    code, _, err = run_script(flags)
    assert code == 2 and err and not list(tmp_path.iterdir())


class Touch:
    """When it is unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_resume_refuses_what_is_not_a_run(run_script, tiny, no_evaluation, tmp_path):
    def refused(why: str) -> None:
        code, out, err = run_script("--resume run")
        assert code == 2 and len(err.splitlines()) == 1 and "--resume" in err and why in err and "must be" in err

    run = tmp_path / "run"
    refused("config.json")  # there is none
    run.mkdir()
    refused("config.json")
    assert run_script(f"{tiny} --run-dir whole")[0] == 0
    config, checkpoint = ((tmp_path / "whole" / name).read_bytes() for name in ("config.json", "checkpoint.pt"))
    flags = json.loads(config)["flags"]
    other = next(name for name in SCRIPTS if name != json.loads(config)["script"])
    wrong_configs = [
        "hello", "[]", "{}", '{"flags": {"no_such_flag": 1}}', json.dumps(json.loads(config) | {"script": other}),
        json.dumps(json.loads(config) | {"script": "../x.py"}), json.dumps(json.loads(config) | {"flags": [1]}),
    ]  # fmt: skip
    without = {name: value for name, value in flags.items() if name != "gamma"}
    for changed in ({"num_envs": None}, {"credit": "all"}, {"emb_dim": "wide"}, {"no_such_flag": 1}, {"cuda": 3}):
        wrong_configs.append(json.dumps(json.loads(config) | {"flags": flags | changed}))
    wrong_configs.append(json.dumps(json.loads(config) | {"flags": without}))
    for text in wrong_configs:
        (run / "config.json").write_text(text)
        refused("config.json")
    (run / "config.json").write_text(json.dumps(json.loads(config) | {"flags": flags | {"num_envs": 0}}))
    code, _, err = run_script("--resume run")
    assert code == 2 and "--num-envs 0: must be" in err

    # A checkpoint that is damaged, or of something else.
    (run / "config.json").write_bytes(config)
    (run / "checkpoint.pt").write_bytes(b"damaged")
    refused("checkpoint.pt")
    rng = np.random.default_rng(0)
    state = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    with zipfile.ZipFile(tmp_path / "whole" / "checkpoint.pt") as archive:
        stored = [info for info in archive.infolist() if info.file_size > 1000]
    for info in stored[:3]:  # one flipped bit in the middle of what is stored
        flipped = bytearray(checkpoint)
        at = info.header_offset + 200 + int(rng.integers(info.file_size - 200))
        flipped[at] ^= 1 << int(rng.integers(8))
        (run / "checkpoint.pt").write_bytes(flipped)
        refused("checkpoint.pt")
    for wrong in ([1, 2], {}, state | {"agent": {}}, state | {"buffer": None}, state | {"iteration": "three"}, 7):
        torch.save(wrong, run / "checkpoint.pt")
        refused("checkpoint.pt")
    torch.save(state | {"agent": Touch(str(tmp_path / "touched"))}, run / "checkpoint.pt")  # to load it runs no code
    refused("checkpoint.pt")
    assert not (tmp_path / "touched").exists()
    (run / "checkpoint.pt").write_bytes(checkpoint)
    (run / "config.json").write_text(json.dumps(json.loads(config) | {"flags": flags | {"emb_dim": 16}}))
    refused("checkpoint.pt")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.pt", "config.json"]


def test_a_folder_with_nothing_but_what_a_kill_left_can_be_used(run_script, tiny, no_evaluation, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text("{")
    assert run_script(f"{tiny} --run-dir run")[0] == 0
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("script", [ALICEBOB], indirect=True)
def test_runs_have_folders_and_names_of_their_own(script, run_script, tiny, no_evaluation, tmp_path):
    for flags in ("", "", "--credit episodic --gamma 0.5 --num-minibatches 8"):  # names are cut at 100 characters
        assert run_script(f"{tiny} {flags}")[0] == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 3 and ["credit=episodic" in name and "gamma=0.5" in name for name in names].count(True) == 1


def test_lost_logs_do_not_keep_a_run_from_going_on(run_script, tiny, no_evaluation, tmp_path):
    """Without metrics.csv and the event file it starts new ones; a torn last line is cut off."""
    tiny += " --seed 2"  # with which nobody in Alice & Bob succeeds by luck and ends an episode early
    long = tiny.replace("--total-timesteps 600", "--total-timesteps 1000")
    assert run_script(f"{long} --run-dir whole")[0] == 0
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
    assert [row["iteration"] for row in read_metrics(run)] == ["5"]
    assert EventAccumulator(str(run)).Reload().Scalars("charts/episodic_return")[0].step == 1000


def wait_for_flags(process) -> None:
    """Until the script, which reads its flags, has given SIGINT back to the system; Python catches it at first."""
    caught = False
    for _ in range(60_000):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # not on Linux
            return
        before, caught = caught, bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & 1 << signal.SIGINT - 1)
        if before and not caught:
            return
        time.sleep(0.001)
    raise TimeoutError("the script has not read its flags")


@pytest.mark.parametrize("moment", [0.05, 0.3, 0.8, 1.5])
def test_ctrl_c_between_flags_and_training_is_quiet(moment, start):
    process = start(MPE, f"{TINY[MPE]} --total-timesteps 100000000 --run-dir run")
    wait_for_flags(process)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (-2, 130) and "Traceback" not in err


def test_a_second_ctrl_c_ends_at_once(start, tmp_path):
    """In the middle of an iteration that would take very long."""
    flags = f"{TINY[MPE]} --total-timesteps 100000000 --num-envs 4000 --update-epochs 10000 --run-dir run"
    process = start(MPE, flags)
    while not (tmp_path / "run" / "metrics.csv").exists():
        time.sleep(0.1)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it finishes the iteration
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == -2 and "Traceback" not in err


@pytest.mark.parametrize(
    "script, flags, loss",
    [
        *[(script, "--decomposer-lr 1e30", "decomposer/loss") for script in SCRIPTS],
        *[(script, "--learning-rate 1e30 --credit dense", "PPO's (loss|gradient)") for script in SCRIPTS],
        (MPE, "--learning-rate 1e36 --continuous-actions", "PPO's (loss|gradient)"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(script, flags, loss, run_script, tiny, tmp_path):
    code, _, err = run_script(f"{tiny} {flags} --run-dir run")
    assert code == 1 and len(err.splitlines()) == 1
    assert re.search(rf"{loss} is .*iteration \d", err)
    assert "checkpoint" not in err and not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_the_last_good_checkpoint_survives_a_bad_loss(factor, run_script, tiny, no_pictures, monkeypatch, tmp_path):
    """With a factor of inf the loss of a zero head is nan; with a finite loss, its gradient is what fails."""
    assert run_script(f"{tiny} --run-dir run")[0] == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    good = checkpoint.read_bytes()

    def bad_loss(predicted, target):
        if factor == "nan":
            return predicted.sum() * float("nan")
        return (predicted - predicted.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    monkeypatch.setattr("torch.nn.functional.mse_loss", bad_loss)
    code, _, err = run_script("--resume run --total-timesteps 1000")
    assert code == 1 and len(err.splitlines()) == 1 and "iteration 4" in err and "the last checkpoint is kept" in err
    assert checkpoint.read_bytes() == good
    assert not (tmp_path / "run" / "summary.json").exists()  # that of the shorter run no longer holds


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(script, start, tiny, tmp_path):
    """A limit on the size of files stands in for the disk; it binds where checkpoint.pt has grown beyond it."""
    run = tmp_path / "run"
    assert start(script, f"{tiny} --run-dir run").wait(120) == 0
    good = (run / "checkpoint.pt").read_bytes()
    code = f"import resource, runpy, sys; sys.path.insert(0, '{ROOT}')\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, 2 * [{len(good) - 100}])\n"
    code += f"sys.argv = ['{script}', '--resume', 'run', '--total-timesteps', '1000']\n"
    code += f"runpy.run_path('{ROOT / script}', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and len(errors(result.stderr)) == 1
    assert result.stderr.startswith("error: ") and result.stderr.endswith("; the last checkpoint is kept\n")
    assert (run / "checkpoint.pt").read_bytes() == good and not list(run.glob("*.tmp"))


def errors(stderr: str) -> list[str]:
    """The lines on stderr but for warnings of packages."""
    return [line for line in stderr.splitlines() if "arning" not in line and not line.startswith("  ")]


def test_a_checkpoint_is_written_whole_or_not_at_all(run_script, tiny, no_evaluation, monkeypatch, tmp_path):
    assert run_script(f"{tiny} --run-dir run")[0] == 0
    good = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def die_half_way(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("torch.save", die_half_way)
    with pytest.raises(OSError, match="no space"):
        run_script("--resume run --total-timesteps 1000")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == good
    assert not list((tmp_path / "run").glob("*.tmp"))


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
    ],
)
def test_a_run_on_cuda_resumes_there_and_on_the_cpu(script, more, run_script, tiny, no_pictures, tmp_path):
    assert run_script(f"{tiny} --cuda {more} --run-dir run")[0] == 0
    assert run_script("--resume run --total-timesteps 1000")[0] == 0
    assert run_script("--resume run --total-timesteps 1400 --no-cuda")[0] == 0


@pytest.mark.parametrize(
    "script, more",
    [(ALICEBOB, ""), (MPE, "--credit shapley"), (ML, "--scenario tag --coalition permutation"), (PETTINGZOO, "")],
)
def test_everything_stays_on_its_device(script, more, run_script, tiny, no_pictures, tmp_path):
    """On a pretended device, for there may be no other here, a run and its continuation have the numbers of the CPU."""
    for flags in (f"{tiny} {more} --run-dir away", "--resume away --total-timesteps 1000")[: 1 + (script == MPE)]:
        command = [sys.executable, str(ROOT / "tests" / "pretend_device.py"), str(ROOT / script), *flags.split()]
        away = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert away.returncode == 0, away.stderr[-3000:]
        assert run_script(flags.replace("away", "here"), script)[0] == 0
    here, away = (read_metrics(tmp_path / name) for name in ("here", "away"))
    assert len(here) == len(away) > 2
    for row, other in zip(here, away):
        for name, value in row.items():
            assert float(other[name] or 0) == pytest.approx(float(value or 0), rel=0.01, abs=1e-4), name


@pytest.mark.parametrize("script", [ALICEBOB], indirect=True)
def test_frozen_steps_carry_no_weight(script, run_script, no_evaluation, monkeypatch, tmp_path):
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


def test_importing_the_script_runs_nothing(script, tmp_path):
    code = f"import sys; sys.argv = ['x', '--bad']; import {script.removesuffix('.py')}; print('quiet')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "quiet\n" and result.returncode == 0


def test_scripts_share_their_classes_and_functions_word_for_word():
    """A class or function of the same name has the same syntax tree in all scripts.

    But for the flags, and what evaluate.py asks every script for by one name.
    """
    differ = ("Args", "make_env", "make_parallel_env", "make_networks")
    seen: dict[str, tuple[str, str]] = {}
    for path in sorted(ROOT.glob("stas_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in differ:
                script, tree = seen.setdefault(node.name, (path.name, ast.dump(node)))
                assert tree == ast.dump(node), f"{node.name} differs between {script} and {path.name}"
    assert {"Decomposer", "ShapleyAttention", "compute_gae"} <= set(seen)


def test_help_documents_every_flag(script):
    result = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for field in fields(MODULES[script].Args):
        _, text = re.split(rf"--{field.name.replace('_', '-')}(?=[, ])", result.stdout, maxsplit=1)
        text = text.split("(default:")[0]
        assert len(re.findall(r"[a-z]{2,}", text)) >= 2, f"{field.name} is not explained"
    for group in ("[the run]", "[PPO]", "[the method]"):
        assert len(re.findall(re.escape(group), result.stdout)) == 2  # where it is announced, and where it begins


@pytest.mark.parametrize("script", [ALICEBOB], indirect=True)
def test_a_short_run_learns_to_stop_bumping(script, run_script, no_evaluation, tmp_path):
    """Bumps are learnt first: random agents lose 2.6 a game with a standard error below 0.1."""
    flags = "--num-envs 64 --total-timesteps 60000"
    assert run_script(f"{flags} --run-dir run")[0] == 0
    rows = read_metrics(tmp_path / "run")
    first, last = (
        float(rows[i]["charts/episodic_return"]) - 100 * float(rows[i]["charts/treasure_rate"]) for i in (0, -1)
    )
    assert first < -2.2 and last > first + 1.2


@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_a_short_run_learns_to_cover_landmarks(script, run_script, no_evaluation, tmp_path):
    """Random teams earn -27 with a standard deviation of 8 an episode: 1.4 for the mean of an iteration."""
    flags = "--num-envs 32 --total-timesteps 24000 --credit dense"
    assert run_script(f"{flags} --run-dir run")[0] == 0
    rows = read_metrics(tmp_path / "run")
    first, last = (float(rows[i]["charts/episodic_return"]) for i in (0, -1))
    assert first < -24 and last > first + 4


@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_correlations_are_logged_where_they_are_defined(script, run_script, tiny, no_evaluation, tmp_path):
    when, who = "decomposer/reward_correlation", "decomposer/shapley_correlation"
    cases = {"stas": (True, True), "temporal": (True, False), "dense": (False, False), "shapley": (False, False)}
    for credit, defined in cases.items():
        assert run_script(f"{tiny} --credit {credit} --run-dir {credit}")[0] == 0
        assert all((bool(row[when]), bool(row[who])) == defined for row in read_metrics(tmp_path / credit))
    assert run_script(f"{tiny} --scenario push --run-dir push")[0] == 0
    assert all(row[when] and not row[who] for row in read_metrics(tmp_path / "push"))


@pytest.mark.parametrize("script", [MPE], indirect=True)
def test_correlations_against_a_replay_of_the_stored_episodes(script, run_script, tiny, no_evaluation, tmp_path):
    """The last iteration's episodes stand in the buffer: act again from every stored observation, and correlate."""
    assert run_script(f"{tiny} --coalition exact --run-dir run")[0] == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    obs, act = (checkpoint["buffer"]["data"][name][-8:] for name in ("obs", "act"))  # 24 episodes in a ring of 12
    flags = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    args = stas_ippo_mpe.Args(**flags)
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
