"""What every benchmark shares: the facts of the machine, interleaved timing, and the JSON file."""

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from microtron.train import Trainer

# A run that is measured: random tokens, and nothing beside its steps.
BARE = ["--data.mock", "--data.source=", "--checkpoint.no-enable", "--validation.no-enable"]
BARE += ["--sample.freq=0", "--eval.hellaswag=", "--metrics.no-enable-tensorboard"]
BARE += ["--metrics.no-enable-wandb"]


def facts() -> dict[str, object]:
    """Device, threads, cores and versions, for the JSON."""
    from microtron.accelerator import DEVICE_TYPE, cpu_name

    import torch

    from microtron import __version__

    device = torch.cuda.get_device_name() if DEVICE_TYPE == "cuda" else cpu_name()
    versions = {"microtron": __version__, "python": platform.python_version()}
    for name in ("torch", "torchtitan", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": commit(),
    }


def commit() -> str:
    """Of the code that is measured; "-changed" where it differs from that; "" without git."""

    def git(*words: str) -> subprocess.CompletedProcess:
        where = Path(__file__).resolve().parents[1]
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True)

    number = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "microtron", "train_configs", "benchmarks/*.py")
    return number + "-changed" * bool(number and changed.returncode)


def interleave(
    candidates: dict[str, Callable[[], None]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, candidates taking turns so that a slow minute hits them all.

    Each round has another order: nobody always pays for what one other leaves behind.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    chance = random.Random(0)
    for _ in range(repeats):
        for name in chance.sample(list(candidates), len(candidates)):
            began = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def only_rank() -> None:
    """This process is the one rank of a run (what torchrun would tell it)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@contextlib.contextmanager
def our_trainer(argv: list[str]) -> Iterator["Trainer"]:
    """The Trainer of the run that ``argv`` describes, on one device and `BARE`; not yet stepped.

    Raises:
        UserError: an option is wrong.
    """
    import microtron.accelerator  # noqa: F401  (before torchtitan)

    import torch.distributed as dist

    from microtron.parallel.layout import check_layout
    from microtron.parse import parse
    from microtron.spec import register
    from microtron.train import Trainer

    only_rank()
    with tempfile.TemporaryDirectory() as folder:
        job = parse([*argv[:1], *BARE, *argv[1:], f"--job.dump_folder={folder}"])
        check_layout(job, 1)
        register()
        try:
            trainer = Trainer(job)
            yield trainer
            trainer.close()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def one_rank_wrapped() -> contextlib.AbstractContextManager:
    """TorchTitan's meshes with an fsdp mesh of one rank that counts as there: models are wrapped by
    FSDP2 though there is nothing to share.
    """
    from microtron.accelerator import DEVICE_TYPE

    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed import ParallelDims

    plain = ParallelDims.get_mesh

    def get_mesh(self: ParallelDims, dims: str | list[str]) -> object:
        if dims in ("fsdp", ["fsdp"]):
            return init_device_mesh(DEVICE_TYPE, (1,), mesh_dim_names=("fsdp",))
        return plain(self, dims)

    return mock.patch.multiple(
        ParallelDims, fsdp_enabled=property(lambda self: True), get_mesh=get_mesh
    )


def synchronise() -> None:
    """Waits for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stepping(trainer: "Trainer") -> Callable[[], None]:
    """One optimizer step of ``trainer`` on its data; may return before the device is done."""
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.train_step(batches)

    return step


def seconds_of(step: Callable[[], None]) -> float:
    """Until the device has done it."""
    began = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - began


def reset_peak() -> int | None:
    """Peak memory counts from here; bytes held now. The device's, or on a CPU this process's
    resident ones (Linux; elsewhere None).
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def peak_bytes() -> int | None:
    """The most held since `reset_peak`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")


def _resident(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return int(status.read_text().partition(f"{name}:")[2].split()[0]) * 1024


def told_by(done: subprocess.CompletedProcess) -> dict[str, object]:
    """The JSON of a process's last line; ``failed``, with one line, where there is none."""
    lines = done.stdout.strip().splitlines()
    with contextlib.suppress(ValueError, IndexError):
        if done.returncode == 0 and isinstance(told := json.loads(lines[-1]), dict):
            return told
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {"failed": f"exit code {done.returncode}: {last}"[:200]}


def write_json(path: Path, results: dict[str, object]) -> None:
    """Writes one benchmark's results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")
