"""Which checkpoint to resume from, and what must agree before it is.

TorchTitan's CheckpointManager writes and reads the steps (DCP). This page adds what it leaves open:
a step folder counts only when its metadata is there and every shard is as long as the metadata
says, others are skipped with a line; a step is never written into an older attempt's folder (a kill
would leave old metadata beside new shards); and each step carries its architecture, compared before
anything is loaded.
"""

import contextlib
import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from microtron.errors import UserError
from microtron.model.args import ModelArgs

log = logging.getLogger("microtron")

IDENTITY = "microtron.json"
# Fields that change how a step is computed or trained, not what the weights mean.
NOT_ARCHITECTURE = {
    "attn_backend",
    "experts_backend",
    "load_balance",
    "aux_loss_coef",
    "balance_stats",
    "router_z_loss_coef",
    "bias_update_rate",
    "z_loss",
    "loss_chunk_tokens",
    "embed_std",
    "init_scale",
}


def steps_in(folder: Path) -> dict[int, Path]:
    """step -> its folder, complete or not, in ascending order."""
    if not folder.is_dir():
        return {}
    found = {
        int(m[1]): p
        for p in folder.iterdir()
        if p.is_dir() and (m := re.fullmatch(r"step-(\d+)", p.name))
    }
    return dict(sorted(found.items()))


def problem_with(step_folder: Path) -> str | None:
    """Why a step folder cannot be loaded; None: it looks whole."""
    if not (step_folder / ".metadata").is_file():
        return "half-written (no .metadata)"
    try:
        metadata = FileSystemReader(step_folder).read_metadata()
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(
                ends.get(info.relative_path, 0), info.offset + info.length
            )
    except Exception as error:  # whatever unpickling damaged bytes raises
        return f"unreadable .metadata ({type(error).__name__})"
    for name, end in ends.items():
        shard = step_folder / name
        if not shard.is_file():
            return f"shard {name} is missing"
        if shard.stat().st_size < end:
            return f"shard {name} is truncated ({shard.stat().st_size:,} of {end:,} bytes)"
    return None


def choose_step(folder: Path, wanted: int = -1) -> int:
    """The step to resume from: the newest whole one, or ``wanted``; -1: there is none.

    Raises:
        UserError: ``wanted`` is missing or broken, or ``folder`` is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{folder} is a file, and checkpoints go there: move it away or choose "
            "another --checkpoint.folder"
        )
    steps = steps_in(folder)
    if wanted != -1:
        problem = problem_with(steps[wanted]) if wanted in steps else "not there"
        if problem:
            known = ", ".join(map(str, steps))
            remedy = f"name one of {known} or leave it out" if steps else "leave it out"
            raise UserError(
                f"checkpoint.load_step = {wanted} cannot be loaded: "
                f"{folder}/step-{wanted} is {problem}; {remedy}"
            )
        return wanted
    for step, path in reversed(steps.items()):
        problem = problem_with(path)
        if problem is None:
            return step
        log.warning(f"skipping checkpoint step-{step}: {problem}")
    return -1


def set_aside(folder: Path, after: int) -> None:
    """Moves steps beyond ``after`` to ``discarded/``: the run takes another course from there."""
    for step, path in steps_in(folder).items():
        if step > after:
            target = folder.parent / "discarded" / f"{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
            log.info(f"moved checkpoint step-{step}, newer than step {after}, to {target}")


def clear(step_folder: Path) -> None:
    """Removes an older attempt at a step, metadata first: a kill leaves nothing that loads."""
    (step_folder / ".metadata").unlink(missing_ok=True)
    shutil.rmtree(step_folder, ignore_errors=True)


def write_identity(
    step_folder: Path, args: ModelArgs, job: object, facts: dict[str, object]
) -> None:
    """Writes the architecture and the run's facts beside the shards, before they are written."""
    run = {"flavor": job.model.flavor, "data": job.data.dirs, "seq_len": job.training.seq_len}
    step_folder.mkdir(parents=True, exist_ok=True)
    identity = {"model_args": dataclasses.asdict(args), **run, **facts}
    (step_folder / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n")


def check_identity(step_folder: Path, args: ModelArgs) -> None:
    """Refuses a checkpoint of another architecture.

    Raises:
        UserError: with the fields that differ and both values.
    """
    try:
        saved = dict(json.loads((step_folder / IDENTITY).read_text())["model_args"])
    except FileNotFoundError:
        return  # written by another tool; DCP compares the shapes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {step_folder / IDENTITY} ({type(error).__name__}: {error}); "
            "move the step away or restore the file"
        ) from None
    now = dataclasses.asdict(args)
    differing = [
        f"{k} {saved[k]!r} there, {now[k]!r} here"
        for k in now
        if k in saved and k not in NOT_ARCHITECTURE and saved[k] != now[k]
    ]
    if differing:
        raise UserError(
            f"{step_folder} holds another architecture ({'; '.join(differing)}): set these "
            "fields back, or choose another --job.dump_folder"
        )


def check_initial(step_folder: Path, args: ModelArgs) -> None:
    """Refuses a checkpoint.initial_load_path that cannot be loaded.

    Raises:
        UserError: it is missing or broken, or of another architecture.
    """
    problem = problem_with(step_folder) if step_folder.is_dir() else "not there"
    if problem:
        raise UserError(
            f"checkpoint.initial_load_path = {str(step_folder)!r} is {problem}: name a "
            "whole checkpoint/step-N folder"
        )
    check_identity(step_folder, args)


@contextlib.contextmanager
def saving(step_folder: Path) -> Iterator[None]:
    """While a step is written.

    Raises:
        UserError: it could not be (disk full, folder gone); with the newest step that is whole.
    """
    try:
        yield
    except (OSError, CheckpointException) as error:
        whole = [p for p in steps_in(step_folder.parent).values() if problem_with(p) is None]
        raise UserError(
            f"could not save {step_folder} ({_cause(error)}): free the disk, or move the run to "
            "another, and run the same command again; newest whole step: "
            f"{whole[-1] if whole else 'there is none'}"
        ) from error


@contextlib.contextmanager
def loading(step_folder: Path) -> Iterator[None]:
    """While a step is read.

    Raises:
        UserError: it looked whole and was not, or lacks what this run needs.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        cause = _cause(error)
        remedy = "move it away to go on from an older step"
        if "Missing key" in cause:
            remedy = (
                "a run with other options saved it (checkpoint.last_save_model_only, "
                "model.args.load_balance): set them back, or start in another "
                "--job.dump_folder with --checkpoint.initial_load_path"
            )
        raise UserError(f"cannot load the checkpoint {step_folder} ({cause}): {remedy}") from error


def _cause(error: BaseException) -> str:
    """The last line of what may be the tracebacks of all ranks."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]
