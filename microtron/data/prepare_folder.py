"""The dataset folder of `microtron prepare`: what is in it already, and moving a finished one in.

All is built in ``OUT/prepare.unfinished`` and moves up when complete; a folder never shows a part
of a dataset; ``OUT/prepare.json`` keeps the settings it was made with.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from microtron.data.checks import VERIFIED
from microtron.data.shards import (
    SIDECAR,
    SPLITS,
    DatasetInfo,
    ShardInfo,
    TokenizerInfo,
    check_shard,
    write_atomically,
)
from microtron.data.spool import spool_name
from microtron.data.tokenizers import load_tokenizer
from microtron.errors import UserError

SETTINGS, STATE, UNFINISHED = "prepare.json", "state.json", "prepare.unfinished"


def finished_dataset(out: Path, settings: dict, overwrite: bool) -> DatasetInfo | None:
    """The complete dataset of these settings, None where it is yet to be made."""
    present = (out / SIDECAR).exists() or any(_shards_of(out))
    if not present:
        return None
    there = read_json(out / SETTINGS)
    if there is None and not (out / UNFINISHED / STATE).exists() and not overwrite:
        raise UserError(
            f"{out} holds token shards that this command did not make; name another --out, or "
            "pass --overwrite to replace them"
        )
    if there != settings:
        if there is not None and not overwrite:
            raise differ(out, there, settings)
        return None
    try:
        info = DatasetInfo.load(out)
        for name in SPLITS:
            for entry in info.split(name):
                check_shard(out / entry.file, entry)
    except UserError as error:
        print(f"prepare: {out} is not complete ({error}); completing it", file=sys.stderr)
        return None
    return info if (out / SIDECAR).exists() else None


def differ(out: Path, there: dict, here: dict) -> UserError:
    """The refusal of a folder with other settings, naming those that differ."""
    keys = [key for key in here if there.get(key) != here[key]]
    told = "; ".join(
        key if key == "files of the source" else f"{key}: {there.get(key)} there, {here[key]} now"
        for key in keys
    )
    return UserError(
        f"{out} was prepared with other settings ({told}); pass --overwrite to replace it, or "
        "name another --out"
    )


def _shards_of(folder: Path) -> Iterator[Path]:
    for split in SPLITS:
        yield from folder.glob(f"{split}_[0-9][0-9][0-9][0-9][0-9][0-9].bin")


def read_json(path: Path) -> dict | None:
    """What the file holds; None without one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def intact(out: Path, state: dict) -> bool:
    """Whether the files of an unfinished dataset still hold what its state says."""
    work, item = out / UNFINISHED, np.dtype(state["dtype"]).itemsize
    try:
        for split, saved in state["splits"].items():
            for entry in saved["shards"]:
                moved = state["done"] and not (work / entry["file"]).exists()
                check_shard((out if moved else work) / entry["file"], ShardInfo(**entry))
            spool = work / spool_name(split, len(saved["shards"]))
            if not state["done"] and spool.stat().st_size < saved["tokens"] * item:
                raise UserError(f"{spool} is shorter than it was")
    except (UserError, OSError) as error:
        print(f"prepare: starting anew ({error})", file=sys.stderr)
        return False
    return True


def write_json(path: Path, data: dict) -> None:
    """Replaces the file at once."""
    write_atomically(path, json.dumps(data, indent=1) + "\n")


def publish(out: Path, state: dict) -> DatasetInfo:
    """Moves finished shards up and writes dataset.json. Killed in between, call it again."""
    work = out / UNFINISHED
    splits = {
        split: [ShardInfo(**entry) for entry in state["splits"][split]["shards"]]
        for split in SPLITS
    }
    files = [entry.file for entries in splits.values() for entry in entries]
    for path in _shards_of(out):  # of an older dataset, while its dataset.json is still there
        if path.name not in files or (work / path.name).exists():
            path.unlink()
    (out / VERIFIED).unlink(missing_ok=True)
    load_tokenizer(state["tokenizer"]["name"], work / "tokenizer").save(out / "tokenizer")
    # from here until the last move, dataset.json names shards that are missing: a reader stops
    write_json(out / SETTINGS, state["settings"])
    tokenizer = TokenizerInfo(**state["tokenizer"])
    info = DatasetInfo(tokenizer, state["settings"]["source"], state["dtype"], splits)
    info.save(out)
    for file in files:
        if (work / file).exists():
            os.replace(work / file, out / file)
    for path in out.glob("*.json.*.partial"):  # of an earlier publish that was killed
        path.unlink()
    shutil.rmtree(work)
    return info
