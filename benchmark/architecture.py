"""Draw assets/architecture.png: from an episode to credits.

python benchmark/architecture.py
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import tyro
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BOXES = (  # title, text, colour
    ("Episode", "what each agent saw and did,\nstep by step;\nthe team's return R at the end", "#eeeeee"),
    ("Time", "causal attention:\neach step looks back on\nthe same agent's steps", "#cfe3f7"),
    (
        "Agents",
        "each agent looks at itself and a\nrandom coalition of the others;\nmean over several coalitions",
        "#fde3c2",
    ),
    ("Credits", "one per agent and step, trained\nto add up to R; what is missing\ngoes to all at the end", "#d3ecd2"),
    ("PPO", "each agent learns from\nits own credits", "#eeeeee"),
)


@dataclass
class Args:
    output: Path = Path(__file__).parent.parent / "assets" / "architecture.png"
    """the picture"""


def draw(path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(13, 2.1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 5), ylim=(0, 1))
    axis.axis("off")
    for i, (title, text, color) in enumerate(BOXES):
        style = {"boxstyle": "round,pad=0,rounding_size=0.05", "facecolor": color, "edgecolor": "#555555"}
        axis.add_patch(FancyBboxPatch((i + 0.07, 0.12), 0.82, 0.76, mutation_aspect=3, **style))
        axis.text(i + 0.48, 0.74, title, ha="center", va="center", fontsize=13, weight="bold")
        axis.text(i + 0.48, 0.4, text, ha="center", va="center", fontsize=8.8, linespacing=1.5)
        if i:
            arrow = {"arrowstyle": "-|>", "mutation_scale": 16, "color": "#555555"}
            axis.add_patch(FancyArrowPatch((i - 0.11, 0.5), (i + 0.07, 0.5), **arrow))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(tyro.cli(Args).output)
