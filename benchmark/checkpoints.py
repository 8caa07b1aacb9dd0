"""Keep a trained team: the networks of a finished run, without optimizers and buffer, for evaluate.py to play.

python benchmark/checkpoints.py RUN_DIR checkpoints/spread_3_stas
python evaluate.py checkpoints/spread_3_stas
"""

import json
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
    _, config, checkpoint = load_run(args.run_dir, "RUN_DIR")
    if checkpoint is None:
        fail(f"RUN_DIR {args.run_dir}: must have a checkpoint.pt")
    try:
        args.folder.mkdir(parents=True)
    except OSError as error:
        fail(f"FOLDER {args.folder}: must be a new folder ({error.strerror})")
    shutil.copy(args.run_dir / "metrics.csv", args.folder)  # which evaluate.py draws
    config["flags"] |= {"run_dir": None, "resume": None}
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kept = {"agent", "decomposer", *COUNTERS} & set(checkpoint)
    torch.save({name: checkpoint[name] for name in sorted(kept)}, args.folder / "checkpoint.pt")
