"""Draw what a run learned, and play it on PettingZoo.

    python evaluate.py                                           # the newest run
    python evaluate.py RUN_DIR --episodes 1000                   # play more episodes, for a new summary.json
    python evaluate.py RUN_DIR --render                          # watch some in a window
    python evaluate.py RUN_DIR --checkpoint OTHER/checkpoint.pt  # other weights of the same shape

Writes learning_curve.png, credit.png and episode.gif into the run folder (for a team in checkpoints/: one in runs/).
"""

import contextlib
import csv
import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import NoReturn

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

PANELS = {  # of learning_curve.png: column of metrics.csv, title, figure of summary.json that the random team has
    "charts/episodic_return": ("team return", "random/episodic_return"),
    "charts/treasure_rate": ("treasure rate", "random/treasure_rate"),
    "decomposer/reward_correlation": ("when: credits over time against the\ntrue reward (1 = perfect)", None),
    "decomposer/shapley_correlation": ("who: credits over agents against\nShapley values (1 = perfect)", None),
}
UNSEEN = ("stas", "temporal", "uniform", "episodic")  # kinds of credit that are made of the return alone
COLOURS = matplotlib.colormaps["RdBu"]  # of credits: red below zero, blue above
matplotlib.rcParams["text.parse_math"] = False  # a "$" in a name is a dollar


@dataclass
class EvaluateArgs:
    run_dir: tyro.conf.Positional[Path | None] = None  # folder of a run (None: the newest in runs/)
    episodes: int | None = None  # episodes to play for a new summary.json (None: play none)
    render: bool = False  # show episodes in a window, three if --episodes is not given
    checkpoint: Path | None = None  # weights to play with, instead of the run's checkpoint.pt
    script: Path | None = None  # the script of the run (None: the one of its name beside this file, or the run's copy)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load_script(run_dir: Path, name: str, path: Path | None) -> ModuleType:
    """The script of a run: `path`, or the one beside this file, or the run's copy; tells if the copy is another."""
    beside, copy = Path(__file__).parent / name, run_dir / name
    path = path or (beside if beside.exists() else copy)
    if not path.exists() or path.suffix != ".py":
        fail(f"--script {path}: must be the script that made the run, {name}")
    if copy.exists() and copy.read_text() != path.read_text():
        print(f"{path} has changed since the run began; --script {quote(str(copy))} is as it was then")
    sys.path[:0] = [str(path.parent), str(Path(__file__).parent)]
    spec = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def play_episode(env, agent, seed: int, frames: list | None = None) -> dict[str, torch.Tensor]:
    """One episode of a PettingZoo ParallelEnv, as `rollout` of the scripts returns it, E = 1: obs, act, team_reward,
    valid and the environment's oracles. `frames` collects (step, picture), of 200 states at most."""
    names, steps, every = env.possible_agents, [], math.ceil(getattr(env, "horizon", 1) / 200)  # steps a picture

    def look() -> None:
        with contextlib.suppress(Exception):  # whatever rendering code that is not ours raises
            frame = np.asarray(env.render()) if frames is not None and len(steps) % every == 0 else None
            if frame is not None and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] in (3, 4):
                frames.append((len(steps), frame))

    next_obs, _ = env.reset(seed=seed)
    while env.agents:
        look()
        obs = torch.as_tensor(np.stack([next_obs[name] for name in names]), dtype=torch.float32)
        act, *_ = agent.get_action_and_value(agent.get_inputs(obs, torch.zeros(())))
        next_obs, reward, _, _, _ = env.step(dict(zip(names, act.numpy())))
        team_reward = torch.tensor(float(np.mean([reward[name] for name in names])))
        oracles = {name: values[0].float() for name, values in env.oracles().items()} if hasattr(env, "oracles") else {}
        steps.append(dict(obs=obs, act=act, team_reward=team_reward, valid=torch.tensor(True)) | oracles)
    look()
    return {name: torch.stack([step[name] for step in steps]).unsqueeze(0) for name in steps[0]}


def draw_learning_curve(path: Path, rows: list[dict], summary: dict, title: str) -> None:
    """learning_curve.png: the columns of metrics.csv that PANELS names, where they hold anything."""
    curves = {c: [(int(row["global_step"]), float(row[c])) for row in rows if row.get(c)] for c in PANELS}
    curves = {column: points for column, points in curves.items() if points}
    figure = Figure(figsize=(5 * len(curves), 3.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, (column, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        axis.plot(*zip(*points), color="tab:blue", marker=".")
        name, random = PANELS[column]
        axis.set_title(name + "\n(under 10 points: too short to tell)" * (len(points) < 10), fontsize=10)
        axis.set_xlabel("environment steps")
        axis.xaxis.set_major_formatter(EngFormatter())
        if random in summary:
            axis.axhline(summary[random], color="tab:gray", linestyle="--", label="random team")
            axis.legend()
    figure.savefig(path, dpi=120)


def draw_credits(path: Path, credits: np.ndarray, reward: np.ndarray, names, titles: tuple[str, str, str], marks):
    """credit.png: one episode's credits (T, N), agents x time, under the true team reward of each step (T,). marks:
    (step, agent, text) in the heat map. Beyond 200 steps, neighbours are added up."""
    width = math.ceil(len(credits) / 200)  # steps a column
    starts = np.arange(0, len(credits), width)
    credits, reward = np.add.reduceat(credits, starts), np.add.reduceat(reward, starts)
    T, N = credits.shape
    title, above, below = titles
    figure = Figure(figsize=(min(max(0.32 * T + 3, 8), 40), min(3.2 + 0.45 * N, 20)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    top, heat = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 0.5 * N))
    top.bar(range(T), reward, color="tab:gray")
    top.set_title(above, fontsize=10, loc="left")
    limit = max(float(np.abs(credits).max()), 1e-8)
    image = heat.imshow(credits.T, aspect="auto", cmap=COLOURS, vmin=-limit, vmax=limit)
    heat.set_title(below, fontsize=10, loc="left")
    heat.set(xlabel="step" if width == 1 else f"{width} steps", xlim=(-0.5, T - 0.5))
    heat.set_yticks(range(N), map(str, names))
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    for step, agent, text in marks if width == 1 else []:
        colour = "white" if abs(credits[step, agent]) > 0.6 * limit else "black"
        heat.text(step, agent, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=heat, label="credit")
    figure.savefig(path, dpi=120)


def caption(frame: np.ndarray, step: int, credits: np.ndarray, reward: np.ndarray, names) -> Image.Image:
    """A picture of the state after `step` steps, numbered from 0, with the return so far and the agents' credits for
    the last of them: boxes in the colours of credit.png."""
    height, width = frame.shape[:2]
    total = max(width, 400)
    image = Image.new("RGB", (total, height + 52), "white")
    image.paste(Image.fromarray(frame), ((total - width) // 2, 0))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    text = f"{f'after step {step - 1}' if step else 'start'}    return {reward[:step].sum():.2f}"
    pen.text((8, height + 14), text, fill="black", font=font, anchor="lm")
    pen.text((total - 8, height + 14), "credit for this step", fill="black", font=font, anchor="rm")
    now = credits[step - 1] if step else np.zeros(len(names))
    strength = now / max(float(np.abs(credits).max()), 1e-8)
    side = total / len(names)
    for i, name in enumerate(names):
        left, right = i * side + 2, max((i + 1) * side - 3, i * side + 2)
        colour = tuple(int(255 * x) for x in COLOURS((strength[i] + 1) / 2)[:3])
        pen.rectangle((left, height + 28, right, height + 49), fill=colour, outline="gray")
        fill, text = "white" if abs(strength[i]) > 0.6 else "black", f"{name}: {now[i]:+.2f}"
        if pen.textlength(text, font) < side:
            pen.text(((i + 0.5) * side, height + 39), text, fill=fill, font=font, anchor="mm")
    return image


def log_to_tensorboard(run_dir: Path, summary: dict[str, float], pictures: list[str], step: int) -> None:
    """New figures and the pictures, in an event file of their own, in place of an earlier one."""
    for path in run_dir.glob("events.*.evaluation"):
        path.unlink()
    writer = SummaryWriter(run_dir, filename_suffix=".evaluation")
    for name in [name for name in summary if "/" in name]:
        writer.add_scalar(name, summary[name], step)
    for name in pictures:
        width, height = Image.open(run_dir / name).size
        image = Summary.Image(width=width, height=height, encoded_image_string=(run_dir / name).read_bytes())
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
    writer.close()


def draw_run(
    run_dir: Path, script: ModuleType, args, networks, rows: list[dict], summary: dict, seed: int
) -> list[str]:
    """Write learning_curve.png, credit.png and, if the environment has pictures, episode.gif; returns their names."""
    (agent, decomposer), env, frames = networks, script.make_parallel_env(args, "rgb_array"), []
    torch.manual_seed(seed)
    episode = play_episode(env, agent, seed, frames)
    env.close()
    task, marks = env.metadata.get("name", args.exp_name), []
    draw_learning_curve(run_dir / "learning_curve.png", rows, summary, f"{task}, --credit {args.credit}")
    credits, reward = script.decompose(args, decomposer, episode)[0].numpy(), episode["team_reward"][0].numpy()
    title, below = f"{task}: one episode after training", f"credit that each agent got (--credit {args.credit})"
    if decomposer is not None:
        who, leftover = "STAS" if args.credit == "stas" else "the decomposer", reward.sum() - credits.sum()
        when = {"terminal": "paid at the last step", "uniform": "paid at all steps", "none": "not paid"}[args.conserve]
        sums = f"sum {credits.sum():.2f}; not shown: leftover {leftover:.2f}, {when}"
        below = f"credit that {who} gave each agent ({sums})"
    if "event" in episode:
        events = episode["event"][0].int()  # (T, N)
        event_names, legend = getattr(env, "event_names", {}), getattr(env, "legend", "")
        marks = [(t, i, event_names.get(k := events[t, i].item(), str(k))) for t, i in events.nonzero().tolist()]
        title += f" ({legend})" if legend else ""
    above = "reward that the agents never saw" if args.credit in UNSEEN else "true reward"
    titles = title, f"{above} (sum {reward.sum():.2f})", below
    draw_credits(run_dir / "credit.png", credits, reward, env.possible_agents, titles, marks)
    if not frames:
        return ["learning_curve.png", "credit.png"]
    durations = [1000 // (env.metadata.get("render_fps") or 10)] * (len(frames) - 1) + [2000]  # rests on the last
    first, *others = [caption(frame, step, credits, reward, env.possible_agents) for step, frame in frames]
    first.save(run_dir / "episode.gif", save_all=True, append_images=others, duration=durations, loop=0)
    return ["learning_curve.png", "credit.png", "episode.gif"]


def main(flags: EvaluateArgs) -> None:
    if flags.episodes is not None and flags.episodes < 1:
        fail(f"--episodes {flags.episodes}: must be at least 1")
    newest = max(Path("runs").glob("*/config.json"), key=os.path.getmtime, default=Path("runs/none"))
    run_dir = flags.run_dir or newest.parent
    weights = flags.checkpoint or run_dir / "checkpoint.pt"
    for path in (run_dir / "config.json", weights, run_dir / "metrics.csv"):
        if not path.exists():
            fail(f"{path}: must exist, as it does after a run's first checkpoint")
    config = json.loads((run_dir / "config.json").read_text())
    script = load_script(run_dir, config["script"], flags.script)
    known = {field.name for field in fields(script.Args)} - {"run_dir", "resume"}
    try:
        args = script.Args(**{name: value for name, value in config["flags"].items() if name in known})
        env = script.side_by_side(lambda: script.make_parallel_env(args), 1)
        agent, decomposer = networks = script.make_networks(args, env)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        agent.load_state_dict(state["agent"])
        if decomposer is not None:
            decomposer.load_state_dict(state["decomposer"])
    except Exception as error:  # torch raises many kinds
        fail(f"{weights}: must fit {run_dir}/config.json and {script.__file__} ({error})")
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    kept = run_dir / "summary.json"  # of a run that has ended
    summary = json.loads(kept.read_text()) if kept.exists() else {}
    if run_dir.resolve().parent.name == "checkpoints":  # which stays as it is
        run_dir = Path("runs", f"{run_dir.name}__evaluated")
        run_dir.mkdir(parents=True, exist_ok=True)
    seed, evaluated = int(np.random.SeedSequence((args.seed, 0)).generate_state(1)[0]) // 2, {}
    if flags.render:
        env = script.make_parallel_env(args, "human")
        for i in range(flags.episodes or 3):
            print(f"return {play_episode(env, agent, seed + i)['team_reward'].sum().item():.2f}")
        env.close()
    elif flags.episodes is not None:
        summary = evaluated = script.evaluate(args, agent, flags.episodes)
        if any("charts/treasure_rate" in row for row in rows):
            summary |= {f"{who}/treasure_rate": summary[f"{who}/terminated"] for who in ("eval", "random")}
        summary |= {"global_step": state["global_step"], "wall_time": state["wall_time"], "checkpoint": str(weights)}
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        scores = f"return {summary['eval/episodic_return']:.2f} (random team {summary['random/episodic_return']:.2f})"
        print(f"{scores} on PettingZoo over {flags.episodes} episodes")
    elif "eval/episodic_return" in summary:
        scores = [f"{summary[f'{who}/episodic_return']:.2f}" for who in ("eval", "random")]
        print(f"after training: return {scores[0]} (random team {scores[1]})")
    pictures = draw_run(run_dir, script, args, networks, rows, summary, seed)
    log_to_tensorboard(run_dir, evaluated, pictures, state["global_step"])
    print(f"drawn: {', '.join(str(run_dir / name) for name in pictures)}")


if __name__ == "__main__":
    main(tyro.cli(EvaluateArgs))
