"""Run a script in this process, as `python script.py flags` would."""

import csv
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

torch.set_num_threads(1)  # on tensors as small as here a second thread only costs
ROOT = Path(__file__).parent.parent
ALICEBOB, MPE, ML, PETTINGZOO = SCRIPTS = (
    "stas_ippo_alicebob.py",
    "stas_ippo_mpe.py",
    "stas_ml_ippo_mpe.py",
    "stas_ippo_pettingzoo.py",
)
TORCHRUN = "stas_ippo_pettingzoo_torchrun.py"  # the fifth; by itself it is a run of one process
# A whole run of three small iterations of 200 steps, about a second long.
COMMON = "--total-timesteps 600 --emb-dim 8 --num-heads 2 --num-layers 1 --decomposer-batch-size 8"
COMMON += " --decomposer-updates 2 --update-epochs 2 --num-minibatches 4 --buffer-size 12 --eval-episodes 2"
TINY = {ALICEBOB: f"{COMMON} --num-threads 1 --num-envs 5", MPE: f"{COMMON} --num-threads 1 --num-envs 8"}
TINY[PETTINGZOO] = TINY[MPE]
TINY[TORCHRUN] = TINY[PETTINGZOO]
TINY[ML] = TINY[MPE].replace("--num-layers 1", "--num-layers 2")

TIMES = ("wall_time", "time/", "charts/SPS")


def read_metrics(run_dir) -> list[dict]:
    """The rows of metrics.csv without their times."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in csv.DictReader(file)]


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    """Tests that use a script run for each of them."""
    return request.param


@pytest.fixture
def tiny(script) -> str:
    """Flags of a very short run."""
    return TINY[script]


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path, request):
    """run_script("--flag value ...") -> exit code, stdout, stderr. Works in tmp_path; leaves no global state."""

    def run(flags: str, script: str | None = None) -> tuple[int, str, str]:
        script = script or request.getfixturevalue("script")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        threads, handlers = torch.get_num_threads(), [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        locks: list[FileLock] = []
        monkeypatch.setattr("filelock.FileLock", lambda path: locks.append(FileLock(path)) or locks[-1])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code
            if isinstance(code, str):  # sys.exit("message")
                print(code, file=sys.stderr)
                code = 1
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
            for signum, handler in handlers:
                signal.signal(signum, handler)
            for lock in locks:  # as when a process ends
                lock.release()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """evaluate.py draws dots, to save time where nobody looks at the pictures."""
    dot = np.zeros((9, 9, 3), np.uint8)
    for draw in ("envs.alice_bob.draw", "envs.mpe_pettingzoo.draw"):
        monkeypatch.setattr(draw, lambda *state: dot)
    monkeypatch.setattr("envs.pettingzoo.UniformEnv.render", lambda env: dot)
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, path, **options: Image.fromarray(dot).save(path, format="png"))
