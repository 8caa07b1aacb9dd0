"""Keep a trained team: the networks of a finished run, without optimizers and buffer, for evaluate.py to play.

python benchmark/checkpoints.py RUN_DIR checkpoints/spread_3_stas
python evaluate.py checkpoints/spread_3_stas
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]  # folder of a run
    folder: tyro.conf.Positional[Path]  # folder to make

    def __post_init__(self):
        if not (self.run_dir / "checkpoint.pt").exists():
            raise ValueError(f"RUN_DIR {self.run_dir}: must have a checkpoint.pt")
        if self.folder.exists():
            raise ValueError(f"FOLDER {self.folder}: must be a new folder")


if __name__ == "__main__":
    args = tyro.cli(Args)
    checkpoint = torch.load(args.run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    config = json.loads((args.run_dir / "config.json").read_text())
    config["flags"] |= {"run_dir": None, "resume": None}
    args.folder.mkdir(parents=True)
    for name in ("metrics.csv", "summary.json"):  # which evaluate.py draws
        if (args.run_dir / name).exists():
            shutil.copy(args.run_dir / name, args.folder)
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kept = {"agent", "decomposer", "iteration", "global_step", "wall_time"} & set(checkpoint)
    torch.save({name: checkpoint[name] for name in sorted(kept)}, args.folder / "checkpoint.pt")
