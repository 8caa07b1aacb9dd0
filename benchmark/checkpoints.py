"""Keep a trained team: the networks of a finished run, without optimizers and buffer, for evaluate.py to play.

python benchmark/checkpoints.py RUN_DIR checkpoints/spread_3_stas
python evaluate.py checkpoints/spread_3_stas
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from run_folder import COUNTERS, fail, load_run  # noqa: E402


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]  # folder of a run
    folder: tyro.conf.Positional[Path]  # folder to make


if __name__ == "__main__":
    args = tyro.cli(Args)
    _, _, checkpoint = load_run(args.run_dir, "RUN_DIR")
    if checkpoint is None:
        fail(f"RUN_DIR {args.run_dir}: must have a checkpoint.pt")
    try:
        args.folder.mkdir(parents=True)
    except OSError as error:
        fail(f"FOLDER {args.folder}: must be a new folder ({error.strerror})")
    for name in ("config.json", "metrics.csv"):
        shutil.copy(args.run_dir / name, args.folder)
    kept = {"agent", "decomposer", *COUNTERS} & set(checkpoint)
    torch.save({name: checkpoint[name] for name in sorted(kept)}, args.folder / "checkpoint.pt")
