"""Whole runs in processes of their own, about a second each.

A fork server imports torch and TorchTitan once, in a process that does nothing else; every rank of
every run is forked from it. A run is `microtron.train.main(argv)` with its streams in files, so
that a test sees what a person would: exit code, console, errors, files.
"""

import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PRELOAD = [
    "microtron.train",
    "microtron.spec",
    "microtron.parse",
    "microtron.parallel.apply",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "tomli_w",
]
SMALL = [  # a model and a step that take milliseconds
    "--model.args.dim=16",
    "--model.args.n_layers=2",
    "--model.args.n_heads=2",
    "--model.args.n_kv_heads=1",
    "--model.args.head_dim=8",
    "--model.args.expert_dim=16",
    "--model.args.window=8",
    "--training.seq_len=16",
    "--training.local_batch_size=4",
    "--metrics.log_freq=1",
    "--lr_scheduler.warmup_steps=2",
    "--optimizer.lr=1e-2",
]
_context = None


def _server():
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
    return _context


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def become(rank, world_size, port):
    """What a launcher sets for a rank, and one thread."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)


def _rank(argv, rank, world_size, port, folder, prepare):
    become(rank, world_size, port)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    from torchtitan.tools import utils

    from microtron import train

    utils.get_peak_flops = lambda name: 1e11  # measuring it takes 0.15 s a rank
    os.fsync = lambda descriptor: None  # milliseconds a call; it guards against power failure alone
    if prepare is not None:
        prepare()
    sys.exit(train.main(argv))


class Run:
    """A run under way."""

    def __init__(self, argv, folder, world_size=1, prepare: Callable[[], None] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dump = folder, folder / "dump"
        argv = [*argv, f"--job.dump_folder={self.dump}"]
        port = free_port()
        self.ranks = [
            _server().Process(target=_rank, args=(argv, r, world_size, port, folder, prepare))
            for r in range(world_size)
        ]
        for rank in self.ranks:
            rank.start()

    def signal(self, number):
        """Sends a signal to every rank."""
        for rank in self.ranks:
            os.kill(rank.pid, number)

    def wait_for(self, text, timeout_s=60):
        """Until the console shows ``text``."""
        end = time.monotonic() + timeout_s
        while text not in self.out:
            assert time.monotonic() < end and self.ranks[0].is_alive(), self.told
            time.sleep(0.005)
        return self

    def wait(self, timeout_s=90):
        """Until it ends; returns itself."""
        for rank in self.ranks:
            rank.join(timeout_s)
            if rank.is_alive():
                self.signal(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout_s} s: {self.told}")
        return self

    @property
    def code(self):
        """Exit code of rank 0."""
        return self.ranks[0].exitcode

    def _read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    @property
    def out(self):
        """Console of rank 0."""
        return self._read("rank0.out")

    @property
    def err(self):
        """Errors of rank 0."""
        return self._read("rank0.err")

    @property
    def told(self):
        """Both, for a failing assertion."""
        return f"exit code {self.code}\n{self.out}\n{self.err}"

    def lines(self, key="loss"):
        """Metrics lines that hold ``key``."""
        text = (self.dump / "metrics.jsonl").read_text()
        return [e for e in map(json.loads, text.splitlines()) if key in e]

    def losses(self):
        """step -> loss."""
        return {e["step"]: e["loss"] for e in self.lines()}

    def step(self, number) -> Path:
        """Folder of a checkpoint."""
        return self.dump / "checkpoint" / f"step-{number}"


def run(argv, folder, **options):
    """Runs to the end and asserts success."""
    done = Run(argv, folder, **options).wait()
    assert done.code == 0, done.told
    return done


def assert_one_line(err, *told):
    """One line that starts with ``error: `` and holds all of ``told``."""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in told:
        assert part in err, (part, err)


def contents(step_folder: Path) -> dict:
    """Every tensor and number of a checkpoint, by flat name."""
    return _contents(step_folder, (step_folder / ".metadata").stat().st_mtime_ns)


@functools.cache  # a run that many are compared with is read once
def _contents(step_folder: Path, written_ns: int) -> dict:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = step_folder.parent / f"{step_folder.name}.pt"
    dcp_to_torch_save(step_folder, path)
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        else:
            flat[prefix] = value

    walk("", torch.load(path, weights_only=False))
    path.unlink()
    return flat


def assert_same_contents(a: Path, b: Path, ignore=("time_s",)):
    """Bit-equal: weights, optimizer state, schedule, data position."""
    first, second = contents(a), contents(b)
    assert first.keys() == second.keys()
    tensors = 0
    for name, value in first.items():
        if name.rsplit("/", 1)[-1] in ignore:
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
            tensors += value.numel() > 1
        else:
            assert value == second[name], name
    assert tensors > 20
