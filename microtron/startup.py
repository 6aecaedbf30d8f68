"""What happens between the command line and the Trainer: folder, threads, corpus, signals."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from microtron.errors import UserError
from microtron.model import accounting
from microtron.model.args import ModelArgs

log = logging.getLogger("microtron")
# What a disk answers when it is full, or not ours to write to.
_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
}

# What torch and numpy say when memory is short, or when nothing could hold such a size.
_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Unable to allocate",
    "calculation overflowed",
    "Overflow when unpacking",
)


def open_folder(path: Path) -> None:
    """Makes the run's folder and proves that it can be written.

    Raises:
        UserError: it cannot.
    """
    probe = path / f".writable-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("ok")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"job.dump_folder = {str(path)!r} cannot be written ({error.strerror}): choose "
            "another with --job.dump_folder"
        ) from None


def describe(args: ModelArgs, job: Any, step_tokens: int) -> str:
    """What is about to be trained."""
    counted = accounting.count_parameters(args)
    shape = f"{counted.total / 1e6:.2f}M parameters"
    if args.moe:
        shape += (
            f", {counted.active / 1e6:.2f}M active a token ({args.num_experts} experts, "
            f"top {args.top_k})"
        )
    flops = sum(accounting.flops_per_token(args, job.training.seq_len).values())
    return (
        f"{shape}; {step_tokens:,} tokens a step (sequences of {job.training.seq_len}), "
        f"{job.training.steps:,} steps; {flops / 1e6:.1f} MFLOP a token"
        f"{'; random tokens (data.mock), from which nothing is learned' * job.data.mock}"
    )


def write_config(path: Path, config: dict[str, Any]) -> None:
    """The resolved run as a TOML that can be run again; None (no such key in TOML) is left out."""

    def given(table: dict[str, Any]) -> dict[str, Any]:
        return {
            k: given(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None
        }

    config = {**config, "job": {**config["job"], "config_file": None}}
    path.write_text(tomli_w.dumps(given(config)))


def prepare_data(data: Any, rank: int, patience_s: float = 24 * 3600) -> None:
    """Prepares data.dirs[0] from data.source where it is not there yet; other ranks wait for it.

    A process of its own does the work: its workers fork, which this one, full of threads, must not.

    Raises:
        UserError: the folder is missing and there is no source, or prepare refused.
    """
    if data.mock:
        return
    folder = Path(data.dirs[0])
    whole = (folder / "dataset.json").exists() and not (folder / "prepare.unfinished").exists()
    if not data.source or whole and any(folder.glob("*.bin")):
        return  # the loader tells what is wrong with a folder that nobody can prepare
    if rank == 0:
        log.info(f"preparing {folder} from {data.source} (tokenizer {data.tokenizer})")
        command = [
            sys.executable,
            "-m",
            "microtron.cli",
            "prepare",
            "--source",
            data.source,
            "--tokenizer",
            data.tokenizer,
            "--out",
            str(folder),
            "--field",
            data.text_field,
            "--val-fraction",
            str(data.val_fraction),
        ]
        told = "no message"
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
            for line in worker.stderr:  # its progress is shown, its error becomes ours
                if line.startswith("error: "):
                    told = line.removeprefix("error: ").strip()
                else:
                    print(line, end="", file=sys.stderr, flush=True)
        if worker.returncode:
            raise UserError(f"data.dirs: {folder} could not be prepared: {told}")
        return
    end = time.monotonic() + patience_s
    while not (folder / "dataset.json").exists():
        if time.monotonic() > end:
            raise UserError(
                f"data.dirs: {folder} did not appear on this node: prepare it there, or use a "
                "folder that all nodes share"
            )
        time.sleep(1.0)


def on_signals(request_stop: Callable[[int], None]) -> None:
    """SIGTERM and Ctrl-C ask for a stop after the current step; a second one stops at once.

    A second one within a second is the same request: a platform that signals every process of a
    job, and a launcher that hands its own on, both reach a rank.
    """
    seen = []

    def handle(number: int, frame: object) -> None:
        if seen and time.monotonic() - seen[0] < 1:
            return
        seen.append(time.monotonic())
        if len(seen) > 1:
            os._exit(128 + number)
        name = signal.Signals(number).name
        log.info(f"{name}: finishing this step, then saving (again: stop at once, saving nothing)")
        request_stop(number)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def one_line(error: Exception) -> str | None:
    """What to tell a person about an error; None: it is a bug and keeps its traceback.

    A person's mistakes, and what the machine refuses (disk, memory); the log file keeps the
    traceback.
    """
    if isinstance(error, UserError):
        told = str(error)
    elif isinstance(error, OSError) and error.errno in _DISK:
        told = (
            f"cannot use {error.filename or 'the disk'} ({error.strerror}): mend it or name "
            "another --job.dump_folder; the same command goes on from the newest whole step"
        )
    elif any(word in str(error) for word in _MEMORY):
        told = (
            f"out of memory ({str(error).splitlines()[0]}): lower training.local_batch_size "
            "or seq_len, set activation_checkpoint.mode = full, or choose a smaller model"
        )
    else:
        return None
    logging.getLogger("traceback").info("the run ends here", exc_info=error)  # in the file only
    return told
