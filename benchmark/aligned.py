"""Why fair is not aligned: what each kind of credit makes one agent of cooperative navigation do.

    python benchmark/aligned.py

Nothing is trained. Three agents are to cover three landmarks. Two of them already sit on theirs; the third, A, stands
between those and the free one. Colour is A's credit for one step if it stood there, by the exact oracles of
envs/mpe.py; arrows lead uphill, the way that learning leads A, the longer the steeper. Prints what A gains by going to
the free landmark; draws benchmark/results/aligned.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import tyro
from common import RESULTS, ROOT

sys.path.insert(0, str(ROOT))
from envs.mpe import make  # noqa: E402

LANDMARKS = ((-0.7, 0.25), (0.75, 0.0), (-0.7, -0.25))  # covered by B; free; covered by C
START = (-0.05, 0.0)
TITLES = {
    "dense": "dense: the team's reward,\nthe same for everyone",
    "difference": "difference: what the team\nwould lose without A",
    "shapley": "Shapley: A's fair share,\nover all orders of arrival",
}


@dataclass
class Args:
    points: int = 161
    """points along each side"""
    results: Path = RESULTS
    """folder of the results"""


def credits_at(positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """A's credit of each kind, (P,), if it stands at `positions` (P, 2) while B and C sit on their landmarks."""
    env = make("spread", num_envs=len(positions), num_agents=3, dtype=torch.float64)
    env.reset(0)
    env.landmark_pos[:] = torch.tensor(LANDMARKS)
    env.agent_pos = torch.stack((positions, env.landmark_pos[:, 0], env.landmark_pos[:, 2]), dim=1)
    return {"dense": env.team_reward()} | {name: env.oracles()[name][:, 0] for name in ("difference", "shapley")}


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.results.mkdir(parents=True, exist_ok=True)
    axis = torch.linspace(-1, 1, args.points, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    fields = {
        name: credit.view(args.points, args.points).numpy()
        for name, credit in credits_at(torch.stack((x, y), -1).view(-1, 2)).items()
    }
    span = max(np.ptp(field) for field in fields.values())  # of colours, the same in all panels
    figure = matplotlib.figure.Figure(figsize=(12, 4.9), layout="constrained")
    for panel, (name, field) in zip(figure.subplots(1, 3), fields.items()):
        colours = {"cmap": "viridis", "vmin": field.max() - span, "vmax": field.max()}
        panel.imshow(field, extent=(-1, 1, -1, 1), origin="lower", **colours)
        uphill = np.gradient(field, axis.numpy(), axis.numpy())[::-1]
        steep = np.hypot(*uphill) > 2  # edges of the discs in which agents touch
        step = slice(args.points // 20, None, max(1, args.points // 10))
        arrows = [np.where(steep, np.nan, direction)[step, step] for direction in uphill]
        panel.quiver(x[step, step], y[step, step], *arrows, color="white", scale=6, width=0.006)
        for place, who in zip(LANDMARKS, ("B", "", "C")):
            panel.plot(*place, "s", color="black", markersize=13)
            panel.annotate(who, place, color="white", ha="center", va="center")
        panel.plot(*START, "o", color="tab:red", markersize=15)
        panel.annotate("A", START, color="white", ha="center", va="center")
        panel.set(title=TITLES[name], xticks=[], yticks=[])
    text = "A's credit by where it stands: bright is more, arrows lead uphill. Squares: landmarks; B and C cover theirs"
    figure.supxlabel(text, fontsize=11)
    figure.savefig(args.results / "aligned.png", dpi=100)
    for name, (now, then) in credits_at(torch.tensor([START, LANDMARKS[1]], dtype=torch.float64)).items():
        print(f"{name}: {now:.2f} where A stands, {then:.2f} on the free landmark")
