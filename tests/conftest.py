"""Run a script in this process, as `python script.py flags` would."""

import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = "stas_ippo_alicebob.py"
# A whole run of three small iterations, about a second long.
TINY = "--num-envs 8 --total-timesteps 900 --emb-dim 8 --num-heads 2 --num-layers 1 --decomposer-batch-size 8"
TINY += (
    " --decomposer-updates 2 --update-epochs 2 --buffer-size 20 --learning-starts 0 --eval-episodes 2 --num-threads 1"
)


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """run_script("--flag value ...") -> exit code, stdout, stderr. Works in tmp_path; leaves no global state."""

    def run(flags: str, script: str = SCRIPT) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        threads, handlers = torch.get_num_threads(), [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
            for signum, handler in handlers:
                signal.signal(signum, handler)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing, to save time where nobody looks at the pictures."""
    monkeypatch.setattr("envs.alice_bob.draw", lambda *state: np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)
