"""What happens between the command line and the Trainer: folder, threads, corpus, signals."""

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

log = logging.getLogger("microtron")


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
        raise UserError(f"job.dump_folder = {str(path)!r} cannot be written ({error.strerror}): choose "
                        "another with --job.dump_folder") from None


def write_config(path: Path, config: dict[str, Any]) -> None:
    """The resolved run as a TOML that can be run again; None (no such key in TOML) is left out."""

    def given(table: dict[str, Any]) -> dict[str, Any]:
        return {k: given(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}

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
    if any(folder.glob("*.bin")) and (folder / "dataset.json").exists() or not data.source:
        return  # the loader tells what is wrong with a folder that nobody can prepare
    if rank == 0:
        log.info(f"preparing {folder} from {data.source} (tokenizer {data.tokenizer})")
        command = [
            sys.executable, "-m", "microtron.cli", "prepare", "--source", data.source,
            "--tokenizer", data.tokenizer, "--out", str(folder), "--field", data.text_field,
            "--val-fraction", str(data.val_fraction),
        ]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            told = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
            raise UserError(f"data.dirs: {folder} could not be prepared: {told}")
        return
    end = time.monotonic() + patience_s
    while not (folder / "dataset.json").exists():
        if time.monotonic() > end:
            raise UserError(f"data.dirs: {folder} did not appear on this node: prepare it there, or use a "
                            "folder that all nodes share")
        time.sleep(1.0)


def on_signals(request_stop: Callable[[int], None]) -> None:
    """SIGTERM and Ctrl-C ask for a stop after the current step; a second one stops at once."""
    seen = []

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        name = signal.Signals(number).name
        log.info(f"{name}: finishing this step, then saving (again: stop at once, saving nothing)")
        request_stop(number)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
