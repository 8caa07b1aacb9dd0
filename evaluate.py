"""Evaluate a run of any script on PettingZoo, beside a team that plays at random, and draw what it learned.

    python evaluate.py RUN_DIR                                   # redo what the script did at its end
    python evaluate.py RUN_DIR --episodes 10 --render            # watch ten episodes in a window
    python evaluate.py RUN_DIR --checkpoint OTHER/checkpoint.pt  # other weights of the same shape

Writes summary.json, learning_curve.png, credit.png and episode.gif into the run folder and shows them in TensorBoard.
The scripts also take from here how well credits and predictions fit (`measure_credits`, `explained_variance`).
From the script that config.json names it takes `Args`, `METRICS`, `make_env`, `make_parallel_env`, `make_networks` and
`decompose`.
"""

import contextlib
import csv
import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from run_folder import fail, fail_flag, load_checkpoint, load_run, report_error, write_file

PANELS = {  # of learning_curve.png: column of metrics.csv, label
    "charts/episodic_return": "team return",
    "charts/treasure_rate": "treasure rate",
    "decomposer/reward_correlation": "when: correlation of credits\nwith the true reward",
    "decomposer/shapley_correlation": "who: correlation of credits\nwith exact Shapley values",
}


def centred_correlation(x: torch.Tensor, y: torch.Tensor, valid: torch.Tensor) -> float:
    """Pearson correlation of the valid entries of x and y (B, K), both centred within each row; nan if constant."""
    count = valid.sum(dim=1, keepdim=True).clamp(min=1)
    x, y = ((z - (z * valid).sum(dim=1, keepdim=True) / count) * valid for z in (x, y))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def explained_variance(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """1 - Var(true - predicted) / Var(true); nan if `true` is constant."""
    variance = true.var(correction=0)
    return (1 - (true - predicted).var(correction=0) / variance).item() if variance > 0 else math.nan


def measure_credits(args, decompose: Callable, episodes: dict, credits: torch.Tensor) -> dict[str, float]:
    """How well learned credits (E, T, N) tell when and to whom reward is due, and the noise of their coalitions.

    decompose: maps episodes to their credits, with coalitions drawn afresh.
    """
    valid = episodes["valid"]
    metrics = {"decomposer/reward_correlation": centred_correlation(credits.sum(2), episodes["team_reward"], valid)}
    if args.credit != "temporal" and "shapley" in episodes:
        by_step = (x.flatten(0, 1) for x in (credits, episodes["shapley"], valid.unsqueeze(2).expand_as(credits)))
        metrics["decomposer/shapley_correlation"] = centred_correlation(*by_step)  # rows are steps: (E T, N) each
    few = {name: x[:32] for name, x in episodes.items()}  # to save time
    draws = torch.stack([decompose(few) for _ in range(4)])
    return metrics | {"decomposer/credit_std": draws.std(dim=0)[valid[:32]].mean().item()}


def picture_of(env) -> np.ndarray | None:
    """What env.render() shows, None if it cannot; a run must not lose its evaluation over that."""
    with contextlib.suppress(Exception):  # whatever code that is not ours raises
        frame = np.asarray(env.render())
        return frame if frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] in (3, 4) else None


@torch.no_grad()
def play_episode(env, policy=None, seed: int | None = None, frames: list | None = None) -> dict[str, torch.Tensor]:
    """Play one episode of a PettingZoo ParallelEnv.

    Args:
        policy: maps obs (N, O) to act (N,) or (N, A); None plays uniformly at random.
        frames: collects the picture of every state or None, and then the environment's `oracles` are collected too.
    Returns:
        obs (1, T, N, O), act (1, T, N) or (1, T, N, A), team_reward and valid (1, T), terminated (1,), oracles
        (1, T, N).
    """
    agents, steps, terminated = env.possible_agents, [], False
    next_obs, _ = env.reset(seed=seed)
    while True:
        if frames is not None:
            frames.append(picture_of(env))
        if not env.agents:
            break
        obs = torch.as_tensor(np.stack([next_obs[name] for name in agents]), dtype=torch.float32)
        act = np.stack([env.action_space(name).sample() for name in agents]) if policy is None else policy(obs)
        act = torch.as_tensor(act)
        next_obs, reward, termination, _, _ = env.step(dict(zip(agents, act.numpy())))
        team_reward = torch.tensor(float(np.mean([reward[name] for name in agents])))
        terminated = any(termination.values())
        oracles = env.oracles() if frames is not None and hasattr(env, "oracles") else {}
        oracles = {name: values[0].float() for name, values in oracles.items()}
        steps.append(dict(obs=obs, act=act, team_reward=team_reward, valid=torch.tensor(True)) | oracles)
    episode = {name: torch.stack([step[name] for step in steps]).unsqueeze(0) for name in steps[0]}
    return episode | {"terminated": torch.tensor([terminated])}


def play_episodes(env, policy, num_episodes: int, seed: int) -> dict[str, float]:
    """Play episodes of a PettingZoo ParallelEnv; the summary's figures, and the fraction that terminated."""
    for i, name in enumerate(env.possible_agents):
        env.action_space(name).seed(seed + i)
    episodes = [play_episode(env, policy, seed=seed if i == 0 else None) for i in range(num_episodes)]
    returns = torch.stack([episode["team_reward"].sum() for episode in episodes])
    return {
        "episodic_return": returns.mean().item(),
        "episodic_return_std": returns.std(correction=0).item(),
        "episodic_length": float(np.mean([int(episode["valid"].sum()) for episode in episodes])),
        "episodes": num_episodes,
        "terminated": float(np.mean([bool(episode["terminated"]) for episode in episodes])),
    }


def draw_learning_curve(run_dir: Path) -> None:
    """learning_curve.png: the columns of metrics.csv that PANELS names, where they hold anything."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {c: [(int(row["global_step"]), float(row[c])) for row in rows if row.get(c)] for c in PANELS}
    curves = {column: points for column, points in curves.items() if points}
    figure = Figure(figsize=(5 * len(curves), 3.5), layout="constrained")
    for axis, (column, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        axis.plot(*zip(*points), color="tab:blue", marker=".")
        axis.set(xlabel="environment steps", ylabel=PANELS[column])
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
    write_file(run_dir / "learning_curve.png", lambda path: figure.savefig(path, dpi=120, format="png"))


def draw_credits(path: Path, credits: np.ndarray, leftover: float | None, reward: np.ndarray, env, title: str, marks):
    """credit.png: one episode's credits, agents x time, under the true team reward of each step.

    Args:
        credits: (T, N), without the leftover, which gets a bar of its own if it is not None. reward: (T,).
        marks: (step, agent index, text) to write into the cells of the heat map.
    """
    T, N = credits.shape
    figure = Figure(figsize=(0.32 * T + 3.5, 2.6 + 0.45 * N), layout="constrained")
    ratios = {"width_ratios": (0.3 * T, 1), "height_ratios": (1.6, 0.5 * N)}
    (top, corner), (heat, side) = figure.subplots(2, 2, sharex="col", **ratios)
    top.bar(range(T), reward, color="tab:gray")
    top.axhline(0, color="black", linewidth=0.5)
    top.set_ylabel("true team\nreward")
    figure.suptitle(title, fontsize=10)
    limit = max(float(np.abs(credits).max()), 1e-8)
    image = heat.imshow(credits.T, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
    heat.set(xlabel="step", yticks=range(N), yticklabels=env.possible_agents, xlim=(-0.5, T - 0.5))
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    for step, agent, text in marks:
        dark = abs(credits[step, agent]) > 0.6 * limit
        heat.text(step, agent, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=heat, label="credit")
    corner.axis("off")
    if leftover is None:
        side.axis("off")
    else:
        side.bar(0, leftover, color="tab:orange")
        side.axhline(0, color="black", linewidth=0.5)
        side.set(xlim=(-1, 1), xticks=[0], xticklabels=["leftover"])
    write_file(path, lambda path: figure.savefig(path, dpi=120, format="png"))


def log_to_tensorboard(run_dir: Path, summary: dict[str, float], pictures: list[str]) -> None:
    """The summary's figures and the pictures, in an event file of their own, in place of an earlier one."""
    for path in run_dir.glob("events.*.evaluation"):
        path.unlink()
    writer = SummaryWriter(run_dir, filename_suffix=".evaluation")
    for name in (name for name in summary if "/" in name):
        writer.add_scalar(name, summary[name], summary["global_step"])
    for name in pictures:
        width, height = Image.open(run_dir / name).size
        image = Summary.Image(width=width, height=height, encoded_image_string=(run_dir / name).read_bytes())
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), summary["global_step"])
    writer.close()


def evaluate_run(run_dir: Path, episodes: int | None = None, render=False, checkpoint: Path | None = None) -> str:
    """What the module's docstring says; returns a line to print."""
    args, config, state = load_run(run_dir, "RUN_DIR")
    state = load_checkpoint(checkpoint, "--checkpoint") if checkpoint else state
    if state is None or not (run_dir / "metrics.csv").exists():
        fail(f"RUN_DIR {run_dir}: must have a checkpoint.pt, which a run that ended early has not, and a metrics.csv")
    script = importlib.import_module(config["script"].removesuffix(".py"))
    try:
        agent, decomposer = script.make_networks(args, script.make_env(args, num_envs=1))
    except ValueError as error:  # such as a package that is no longer installed
        fail_flag(error)
    try:
        agent.load_state_dict(state["agent"])
        if decomposer is not None:
            decomposer.load_state_dict(state["decomposer"])
    except (KeyError, TypeError, RuntimeError):
        source = f"--checkpoint {checkpoint}" if checkpoint else f"RUN_DIR {run_dir}"
        fail(f"{source}: must hold the networks that config.json tells of")
    seed = int(np.random.SeedSequence((args.seed, 0)).generate_state(1)[0])  # no iteration has number 0
    torch.manual_seed(seed)

    def policy(obs: torch.Tensor) -> torch.Tensor:
        return agent.policy(obs).sample()

    episodes, summary = episodes or args.eval_episodes, {}
    for name, player in (("eval", policy), ("random", None)):
        env = script.make_parallel_env(args, "human" if render and player else None)
        figures = play_episodes(env, player, episodes, seed)
        env.close()
        if "charts/treasure_rate" in script.METRICS:
            figures["treasure_rate"] = figures["terminated"]
        summary |= {f"{name}/{key}": value for key, value in figures.items() if key != "terminated"}
    summary |= {"global_step": state["global_step"], "wall_time": state["wall_time"]}
    summary |= {"checkpoint": str(checkpoint)} if checkpoint else {}
    write_file(run_dir / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))

    draw_learning_curve(run_dir)
    env, frames = script.make_parallel_env(args, "rgb_array"), []
    episode = play_episode(env, policy, seed, frames)
    env.close()
    credits = script.decompose(args, decomposer, episode)
    leftover, setting = None, f"credit={args.credit}"
    if decomposer is not None and args.conserve != "none":
        leftover = (episode["team_reward"].sum() - credits.sum()).item()
        setting += f", leftover paid at {'the last step' if args.conserve == 'terminal' else 'all steps'}"
    marks = []
    if "event" in episode:
        events = episode["event"][0].int()  # (T, N)
        marks = [(t, i, env.event_names[events[t, i].item()]) for t, i in events.nonzero().tolist()]
        setting += f"; {env.legend}" if env.legend else ""
    title = f"{env.metadata.get('name', args.exp_name)}, one episode after training; {setting}"
    reward = episode["team_reward"][0].numpy()
    draw_credits(run_dir / "credit.png", credits[0].numpy(), leftover, reward, env, title, marks)
    pictures = ["learning_curve.png", "credit.png"]
    images = [Image.fromarray(frame) for frame in frames if frame is not None]
    if images:
        durations = [1000 // env.metadata.get("render_fps", 10)] * len(images)
        durations[-1] = 2000  # rest on the last picture
        gif = dict(save_all=True, append_images=images[1:], duration=durations, loop=0, format="gif")
        write_file(run_dir / "episode.gif", lambda path: images[0].save(path, **gif))
        pictures.append("episode.gif")
    log_to_tensorboard(run_dir, summary, pictures)
    shown = [key for key in ("treasure_rate", "episodic_return") if f"eval/{key}" in summary]
    report = ", ".join(
        f"{key} {summary[f'eval/{key}']:.2f} (random team {summary[f'random/{key}']:.2f})" for key in shown
    )
    none = "" if images else " (no episode.gif: its render() gives no pictures)"
    return f"{report} on PettingZoo over {episodes} episodes; see {run_dir}{none}"


@dataclass
class EvaluateArgs:
    run_dir: tyro.conf.Positional[Path]  # folder of a run
    episodes: int | None = None  # episodes to play (None: as many as --eval-episodes of the run says)
    render: bool = False  # show the team's episodes in a window
    checkpoint: Path | None = None  # weights to play with, instead of the run's checkpoint.pt


if __name__ == "__main__":
    sys.excepthook = report_error
    args = tyro.cli(EvaluateArgs)
    if args.episodes is not None and args.episodes < 1:
        fail(f"--episodes {args.episodes}: must be at least 1")
    print(evaluate_run(**vars(args)))
