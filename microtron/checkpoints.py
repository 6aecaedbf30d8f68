"""Which checkpoint to resume from, and what must agree before it is.

TorchTitan's CheckpointManager writes and reads the steps (DCP). This page adds what it leaves open:
a step folder counts only when its metadata is there and every shard is as long as the metadata
says, others are skipped with a line; a step is never written into an older attempt's folder (a kill
would leave old metadata beside new shards); and each step carries its architecture, compared before
anything is loaded, and its tokenizer, so that it can be read without the data it was trained on.
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
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from microtron import dcp
from microtron.data.tokenizers import TIKTOKEN_NAMES, Tokenizer, load_tokenizer
from microtron.dcp import problem as problem_with
from microtron.errors import UserError
from microtron.model.args import ModelArgs

log = logging.getLogger("microtron")

IDENTITY, TOKENIZER = "microtron.json", "tokenizer"
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


def find_step(path: str | Path) -> Path:
    """The step that a person means: the folder itself, or the newest whole one of a run.

    ``path``: a step, a ``checkpoint`` folder, or the dump folder of a run.

    Raises:
        UserError: there is none that is whole.
    """
    path = Path(path)
    if (path / ".metadata").exists() or re.fullmatch(r"step-\d+", path.name):
        problem = problem_with(path)
        if problem:
            raise UserError(f"checkpoint {path} cannot be loaded: {problem}; name another step")
        return path
    folder = path if steps_in(path) else path / "checkpoint"
    step = choose_step(folder) if folder.is_dir() else -1
    if step < 0:
        what = "does not exist" if not path.exists() else "holds no whole checkpoint"
        hf = (path / "config.json").is_file()
        raise UserError(
            f"{path} {what}{': it is a Hugging Face folder' if hf else ''}; name a "
            "checkpoint/step-N folder"
            f"{', or make one with `microtron convert from-hf`' if hf else ' or the run it is in'}"
        )
    return folder / f"step-{step}"


def write_identity(
    step_folder: Path, args: ModelArgs, tokenizer: Tokenizer | None, facts: dict[str, object]
) -> None:
    """Writes architecture, facts of the run and the tokenizer beside the shards, before these."""
    step_folder.mkdir(parents=True, exist_ok=True)
    identity = {"model_args": dataclasses.asdict(args), "tokenizer": None, **facts}
    if tokenizer is not None:
        identity["tokenizer"] = {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
        }
        tokenizer.save(step_folder / TOKENIZER)
    (step_folder / IDENTITY).write_text(json.dumps(identity, indent=1) + "\n")


def identity(step_folder: Path) -> dict[str, Any]:
    """What a step says of itself: model_args, step, tokens, tokenizer and facts of its run.

    Raises:
        UserError: another tool wrote it, or the file is damaged.
    """
    path = step_folder / IDENTITY
    try:
        found = json.loads(path.read_text())
        told = found.get("tokenizer")
        if not isinstance(found["model_args"], dict) or not isinstance(told, dict | str | None):
            raise TypeError("model_args or tokenizer is no table of fields")
        if isinstance(told, dict) and not {"name", "fingerprint"} <= told.keys():
            raise KeyError("tokenizer has no name and fingerprint")
        return found
    except FileNotFoundError:
        raise UserError(
            f"{step_folder} has no {IDENTITY}, which says what the weights mean: it is not a "
            "checkpoint of microtron; copy the whole folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}); "
            "move the step away or restore the file"
        ) from None


def architecture(step_folder: Path) -> ModelArgs:
    """The architecture of a step; how it is computed is left to the reader (backends ``auto``).

    Raises:
        UserError: as `identity`, or a field is not known here.
    """
    saved = identity(step_folder)["model_args"]
    auto = {"attn_backend": "auto", "experts_backend": "auto"}
    try:
        return ModelArgs().override({**saved, **auto})
    except UserError as error:
        raise UserError(f"{step_folder / IDENTITY}: {error}") from None


def load_step_tokenizer(step_folder: Path) -> Tokenizer | None:
    """The tokenizer that a step was trained with, from its own files; None where it names none.

    Raises:
        UserError: its files are missing, or give another tokenizer.
    """
    told = identity(step_folder).get("tokenizer")
    if isinstance(told, str):  # steps saved before they carried it
        return load_tokenizer(told) if told in ("byte", *TIKTOKEN_NAMES) else None
    if not told:
        return None
    tokenizer = load_tokenizer(told["name"], step_folder / TOKENIZER)
    if tokenizer.fingerprint != told["fingerprint"]:
        raise UserError(
            f"the tokenizer in {step_folder} is not the one it was trained with (fingerprint "
            f"{tokenizer.fingerprint}, {IDENTITY} says {told['fingerprint']}): copy the step again"
        )
    return tokenizer


def check_step(step_folder: Path, args: ModelArgs) -> None:
    """Refuses a whole step that a run must not load.

    Raises:
        UserError: it is of another architecture (the fields that differ, with both values), or
            would build foreign objects.
    """
    dcp.check_bytes(step_folder)
    if not (step_folder / IDENTITY).exists():
        return  # written by another tool; DCP compares the shapes
    told = differing(identity(step_folder)["model_args"], args)
    if told:
        raise UserError(
            f"{step_folder} holds another architecture ({told}): set these fields back, or choose "
            "another --job.dump_folder"
        )


def differing(saved: dict[str, Any], args: ModelArgs) -> str:
    """The fields of an architecture that differ, with both values; "" where none does.

    Fields that mean nothing in this architecture (a window where no layer has one) may differ.
    """
    now = dataclasses.asdict(args)
    left_out = NOT_ARCHITECTURE | _idle(args)

    def pattern(letters: object) -> object:
        return letters if not letters else (str(letters) * args.n_layers)[: args.n_layers]

    return "; ".join(
        f"{k} {saved[k]!r} there, {now[k]!r} here"
        for k in now
        if k in saved
        and k not in left_out
        and saved[k] != now[k]
        and not (k == "window_pattern" and pattern(saved[k]) == pattern(now[k]))
    )


def _idle(args: ModelArgs) -> set[str]:
    """Fields that nothing is computed from."""
    idle = {"hidden_dim"} if args.moe else {"top_k", "expert_dim"}
    if args.activation != "clamped_swiglu":
        idle |= {"swiglu_alpha", "swiglu_limit"}
    if all(args.mask_kind(layer) == "full" for layer in range(args.n_layers)):
        idle |= {"window"}
    extension = {"rope_original_len", "rope_scaling", "rope_beta_fast", "rope_beta_slow"}
    if args.positions != "rope":
        idle |= {"rope_theta", "rope_factor", *extension}
    elif args.rope_factor == 1:
        idle |= extension
    return idle


def check_initial(step_folder: Path, args: ModelArgs) -> None:
    """Refuses a checkpoint.initial_load_path that cannot be loaded.

    Raises:
        UserError: it is missing or broken, or of another architecture.
    """
    problem = problem_with(step_folder) if step_folder.is_dir() else "not there"
    if problem:
        remedy = "name a whole checkpoint/step-N folder"
        if (step_folder / "config.json").is_file():
            remedy = "for a Hugging Face folder, add --checkpoint.initial_load_in_hf"
        raise UserError(
            f"checkpoint.initial_load_path = {str(step_folder)!r} is {problem}: {remedy}"
        )
    check_step(step_folder, args)


def leave_out_checksums() -> None:
    """`torch.save` writes no CRC-32 from now on: `torch.load` does not look at it, and reckoning it
    is a good part of a save's work (benchmarks/checkpoint.py has both).
    """
    torch.serialization.set_crc32_options(False)


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
