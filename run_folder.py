"""What the scripts and evaluate.py do with flags, run folders, progress and signals; none of it is the algorithm.

A run folder holds config.json (script, flags, package versions, git commit), metrics.csv, checkpoint.pt, TensorBoard
events and, from evaluate.py, summary.json and pictures. Whatever is wrong with a flag or a folder ends the program with
one line on stderr that says what is allowed: exit code 2, or 1 once training has begun.
"""

import contextlib
import csv
import errno
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import EnvFailure

HERE = Path(__file__).parent
COUNTERS = ("iteration", "global_step", "wall_time", "csv_position")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
RANGES = [  # the smallest and the largest value of every flag that is a number
    (0, 2**32 - 1, "seed"),
    (0, 100, "num_layers"),
    (0, 256, "num_threads num_obstacles env_workers"),
    (1, 10**12, "total_timesteps"),
    (1, 10**6, "max_cycles horizon num_minibatches buffer_size checkpoint_every eval_episodes"),
    (1, 10**5, "num_envs decomposer_batch_size"),
    (1, 10**4, "update_epochs decomposer_updates"),
    (1, 1024, "mc_samples emb_dim"),
    (1, 100, "num_heads num_agents num_agent_neighbors num_landmark_neighbors num_prey"),
    (0, 10**9, "learning_starts attention_window"),
    (1e-12, 1e38, "learning_rate decomposer_lr adv_eps"),
    (1e-12, 1e9, "clip_coef max_grad_norm target_kl reward_scale"),
    (0, 1e9, "ent_coef vf_coef"),
    (0, 1, "gamma gae_lambda own_share"),
]
METRICS = (  # the columns of metrics.csv that all scripts have
    "iteration global_step wall_time charts/episodic_return charts/episodic_length charts/agent_return_sum charts/SPS "
    "charts/learning_rate losses/value_loss losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl "
    "losses/clipfrac losses/explained_variance decomposer/loss decomposer/explained_variance decomposer/credit_std "
    "decomposer/reward_correlation time/rollout time/decomposer time/ppo"
).split()
SCRIPTS = sorted(path.name for path in HERE.glob("stas_*.py"))


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def fail_flag(error: ValueError | EnvFailure) -> NoReturn:
    """The same for an error "name value: must ..." about a flag, or of the environment; any other is raised."""
    if isinstance(error, EnvFailure):
        fail(str(error))
    name, _, rest = str(error).partition(" ")
    if ": must " not in rest:
        raise error
    fail(f"--{name.replace('_', '-')} {rest}")


def kept(run_dir: Path | None) -> str:
    """The end of an error message."""
    return "; the last checkpoint is kept" if run_dir and (run_dir / "checkpoint.pt").exists() else ""


def report_error(kind, error, traceback, run_dir: Path | None = None) -> None:
    """As sys.excepthook: one line where the machine or the environment is to blame; else the traceback."""
    if kind is RuntimeError and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save hides it behind its own
    one_line = isinstance(error, EnvFailure | MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
    if one_line or isinstance(error, OSError) and error.errno in FULL_DISK:
        print(f"error: {(str(error) or kind.__name__).splitlines()[0]}{kept(run_dir)}", file=sys.stderr)
    elif kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, traceback)


def write_file(path: Path, write) -> None:
    """write(temporary path), then rename: `path` is always whole, and nothing else stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_run(run_dir: Path, flag: str, scripts: list[str] = SCRIPTS) -> tuple:
    """Flags, config.json and checkpoint (None before the first) of a run; errors name `flag`."""
    try:
        config = json.loads((run_dir / "config.json").read_text())
        if config["script"] not in scripts:
            raise ValueError("of another script")
        Args = importlib.import_module(config["script"].removesuffix(".py")).Args
        words = [f"--{name}={value}" for name, value in config["flags"].items()]  # parsed anew, to check the types
        with contextlib.redirect_stderr(io.StringIO()):
            args = tyro.cli(tyro.conf.FlagConversionOff[Args], args=words)
        if set(config["flags"]) != set(asdict(args)):
            raise ValueError("flags are missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SystemExit):
        fail(f"{flag} {run_dir}: must be the folder of a run of {' or '.join(scripts)} with its config.json")
    path = run_dir / "checkpoint.pt"
    return args, config, load_checkpoint(path, flag) if path.exists() else None


def load_checkpoint(path: Path, flag: str) -> dict:
    """A checkpoint whose checksums are right, loaded so that it cannot run code; errors name `flag`."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("wrong checksum")
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds on a damaged file
        fail(f"{flag} {path}: must be a checkpoint that is whole ({type(error).__name__})")


def parse_flags(Args: type, file: str, processes: int = 1) -> tuple:
    """Flags of the script `file` from the command line, config.json, and the checkpoint to resume from, if any."""
    release_signals()  # from here on until training begins, Ctrl-C ends at once and quietly
    script = os.path.basename(file)
    if script not in SCRIPTS:  # a copy of one
        fail(f"{script}: must be named stas_*.py and lie beside run_folder.py, where evaluate.py looks for it")
    args, config, checkpoint = tyro.cli(Args), {"script": script, "processes": processes}, None
    if args.resume is not None:  # the saved flags win, but for three
        saved, config, checkpoint = load_run(Path(args.resume), "--resume", [script])
        if (began := config.get("processes", 1)) != processes:
            fail(f"--resume {args.resume}: must be continued by {began} process{'es' * (began != 1)}, as it began")
        given = asdict(tyro.cli(type(saved), default=saved)).items()  # parsed again: what differs from saved was typed
        asked = {name: value for name, value in given if value != getattr(saved, name) and name != "resume"}
        anew = {name: asked.pop(name) for name in ("total_timesteps", "eval_episodes", "cuda") if name in asked}
        if asked:
            print(f"ignored, a resumed run keeps its own: {', '.join('--' + name.replace('_', '-') for name in asked)}")
        args = replace(saved, run_dir=args.resume, resume=args.resume, **anew)

    def check(name: str, ok: bool, allowed: str) -> None:
        if not ok:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {allowed}")

    for low, high, names in RANGES:
        for name in filter(partial(hasattr, args), names.split()):
            value = getattr(args, name)
            check(name, value is None or low <= value <= high, f"between {low:,} and {high:,}")
    check("emb_dim", args.emb_dim % args.num_heads == 0, f"a multiple of --num-heads {args.num_heads}")
    check("exp_name", re.fullmatch(r"\w[\w.-]{,99}", args.exp_name), "up to 100 letters, digits, '.', '_' and '-'")
    check("track", not args.track or importlib.util.find_spec("wandb"), "off without wandb (pip install wandb)")
    return args, config, checkpoint


def name_run(args, env_name: str) -> str:
    """{environment}__{exp_name}__{flags that differ from the defaults, 100 characters}__{seed}__{microseconds}"""
    named = "exp_name seed scenario env_id num_agents run_dir cuda num_threads track wandb_project_name wandb_entity"
    changed = [f.name for f in fields(args) if getattr(args, f.name) != f.default and f.name not in named.split()]
    changes = re.sub(r"[^\w.,=+-]", "", ",".join(f"{name}={getattr(args, name)}" for name in changed))[:100]
    env_name = env_name.replace("/", "_")
    return "__".join(filter(None, (env_name, args.exp_name, changes, str(args.seed), str(time.time_ns() // 1000))))


def open_run_dir(args, name: str, config: dict) -> Path:
    """The folder of the run to resume, whose config.json gets the flags given anew, or a new one."""
    run_dir = Path(args.run_dir or f"runs/{name}")
    try:
        run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
        used = not args.resume and any(path.suffix != ".tmp" for path in run_dir.iterdir())
    except OSError as error:
        fail(f"--run-dir {run_dir}: must be a folder that can be written ({error.strerror})")
    sys.excepthook = partial(report_error, run_dir=run_dir)
    if used:
        fail(f"--run-dir {run_dir}: must be new or empty; to continue the run in it, use --resume")
    if not args.resume:
        packages = ("torch", "numpy", "pettingzoo", "mpe2", "tyro", "tensorboard")
        versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
        # By a shell, for which a missing git is no exception.
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=HERE, capture_output=True, text=True)
        config |= {"versions": versions, "git_commit": git.stdout.strip() or None}
    text = json.dumps(config | {"flags": asdict(args)}, indent=2) + "\n"
    write_file(run_dir / "config.json", lambda path: path.write_text(text))
    return run_dir


def open_logs(args, run_dir: Path, columns: list[str], global_step: int, csv_position: int) -> tuple:
    """metrics.csv, cut back to what it held at the checkpoint, its csv writer, TensorBoard's writer, progress bar."""
    csv_file = open(run_dir / "metrics.csv", "a+", newline="")
    csv_file.seek(0)
    if next(csv.reader(csv_file), list(columns)) != list(columns):
        fail(f"--resume {run_dir}: must be a run of this version; its metrics.csv has other columns")
    csv_file.seek(0, os.SEEK_END)
    if global_step < args.total_timesteps:
        (run_dir / "summary.json").unlink(missing_ok=True)  # of a shorter run
    csv_file.truncate(min(csv_position, csv_file.tell()))
    csv_writer = csv.DictWriter(csv_file, columns)
    if os.path.getsize(csv_file.name) == 0:
        csv_writer.writeheader()
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
        wandb.init(**names, id=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if args.resume else None)
    table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{table}", global_step)
    shown = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")
    options = {"unit": " steps", "unit_scale": True, "dynamic_ncols": True, "file": shown}
    bar = tqdm(total=args.total_timesteps, initial=global_step, **options)
    bar.printed = time.time()
    return csv_file, csv_writer, writer, bar


def show_progress(bar: tqdm, global_step: int, text: str) -> None:
    """Move the bar to `global_step`; with output that is no terminal, print it every ten seconds and at the end."""
    bar.set_postfix_str(text, refresh=False)
    bar.update(min(global_step, bar.total) - bar.n)
    if not sys.stderr.isatty() and (bar.n == bar.total or time.time() - bar.printed > 10):
        print(bar, flush=True)
        bar.printed = time.time()


def save_checkpoint(run_dir: Path | None, parts: dict, counters: tuple) -> None:
    """Write checkpoint.pt: numbers and state dicts, to be loaded with weights_only=True. Its keys are COUNTERS, agent,
    agent_optimizer and, where the credit is learned, decomposer, decomposer_optimizer and buffer (a list of the buffers
    of several processes, all of which must call this; those without a run folder write nothing)."""
    state = {name: part.state_dict() for name, part in parts.items()} | dict(zip(COUNTERS, counters))
    if run_dir is None:
        return

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            torch.save(state, file)

    write_file(run_dir / "checkpoint.pt", write)


def check_finite(networks: dict, iteration: int, run_dir: Path | None) -> None:
    """End the program if a network (None: there is none) has weights that are not finite; `networks` names its loss."""
    for name, network in networks.items():
        if network is not None and not all(weights.isfinite().all() for weights in network.parameters()):
            fail(f"{name} is not finite in iteration {iteration}{kept(run_dir)}", code=1)


def stop(run_dir: Path | None, signals: list[int], processes: int = 1) -> NoReturn:
    """End the program at a signal, caught here or elsewhere, with a line from the process that has the run folder."""
    if run_dir is not None:
        start = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
        print(f"stopped; to continue: {start} {sys.argv[0]} --resume {shlex.quote(str(run_dir))}", file=sys.stderr)
    sys.exit(128 + (signals or [signal.SIGTERM])[0])


def restore(checkpoint: dict | None, parts: dict) -> tuple:
    """Move the states of all parts out of a checkpoint, if there is one; returns the values of COUNTERS."""
    if checkpoint is None:
        return 0, 0, 0.0, 0
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint.pop(name))  # the buffer is large: one copy of it is enough
        return tuple(checkpoint[name] + 0 for name in COUNTERS)  # + 0: numbers they must be
    except Exception as error:  # torch raises many kinds
        fail(f"--resume: must be a folder whose checkpoint.pt fits its config.json ({type(error).__name__})")


def choose_device(args) -> torch.device:
    """The device of the flags; also sets torch's threads and determinism."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("--cuda: no CUDA device found, running on the CPU")
    if args.num_threads > 0:
        torch.set_num_threads(args.num_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what determinism asks of CUDA
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # to save time: nothing here reads it
    return device


def catch_signals() -> list[int]:
    """A list that the first Ctrl-C or SIGTERM is added to, so that an iteration can end; the second ends at once."""
    caught: list[int] = []

    def catch(signum: int, frame) -> None:
        caught.append(signum)
        release_signals()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, catch)
    return caught


def release_signals() -> None:
    """Ctrl-C and SIGTERM end the program at once."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
