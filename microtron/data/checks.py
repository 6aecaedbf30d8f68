"""Refuses datasets that cannot be trained on, before step 1, each in one line.

A run that dies at step 40,000 on a truncated shard, or learns from another tokenizer's ids, costs
more than reading the files once. Checksum and largest token id of each file are remembered beside
it in ``dataset.verified.json``, by size and modification time, so only the first start pays.
"""

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from microtron.data.shards import DatasetInfo, ShardInfo, check_shard, write_atomically
from microtron.errors import UserError

VERIFIED = "dataset.verified.json"


def check_datasets(
    folders: Sequence[str | Path],
    split: str,
    vocab_size: int,
    tokenizer_fingerprint: str | None = None,
    verify: bool = True,
) -> list[DatasetInfo]:
    """Opens dataset folders and checks their ``split``; the infos, in order.

    ``verify`` reads every shard once (checksum, largest id); without it only headers, sizes and
    sidecars are looked at, enough where another process of the run verifies the same files.

    Raises: UserError for a missing or unfinished folder, a split without shards, a damaged shard, a
    tokenizer other than ``tokenizer_fingerprint`` or than the other folders', and token ids that
    ``vocab_size`` does not cover.
    """
    if not folders:
        raise UserError("no dataset folder was given; name at least one")
    infos = []
    for folder in folders:
        info = DatasetInfo.load(folder)
        for entry in info.split(split):
            check_shard(info.folder / entry.file, entry)
        _check_tokenizer(info, tokenizer_fingerprint)
        infos.append(info)
    _check_same_tokenizer(infos)
    if verify:
        for info in infos:
            _check_vocabulary(info, verify_split(info, split), vocab_size)
    return infos


def _check_tokenizer(info: DatasetInfo, expected: str | None) -> None:
    found = info.tokenizer
    if expected is not None and found is not None and found.fingerprint != expected:
        raise UserError(
            f"dataset {info.folder} was made with tokenizer {found.name!r} (fingerprint "
            f"{found.fingerprint}), this run's tokenizer has fingerprint {expected}; choose that "
            "tokenizer or run `microtron prepare` with this one"
        )


def _check_same_tokenizer(infos: list[DatasetInfo]) -> None:
    known = [info for info in infos if info.tokenizer is not None]
    for info in known[1:]:
        if info.tokenizer.fingerprint != known[0].tokenizer.fingerprint:
            raise UserError(
                f"datasets {known[0].folder} and {info.folder} were made with different tokenizers "
                f"({known[0].tokenizer.name!r} {known[0].tokenizer.fingerprint}, "
                f"{info.tokenizer.name!r} {info.tokenizer.fingerprint}); prepare them with one"
            )


def _check_vocabulary(info: DatasetInfo, max_id: int, vocab_size: int) -> None:
    if max_id >= vocab_size:
        raise UserError(
            f"dataset {info.folder} holds token id {max_id}, vocab_size {vocab_size} covers 0 to "
            f"{vocab_size - 1}; raise vocab_size to {max_id + 1} or more, or prepare the data with "
            "the model's tokenizer"
        )


def find_eot(infos: Sequence[DatasetInfo], eot_id: int | None) -> int:
    """The id that starts a document: the datasets' own, else ``eot_id``.

    Raises: UserError when nobody knows it or ``eot_id`` contradicts a dataset.
    """
    for info in infos:
        own = info.tokenizer.eot_id if info.tokenizer is not None else eot_id
        if own is None:
            raise UserError(
                f"document positions need the end-of-text id, and dataset {info.folder} has no "
                "dataset.json that names it; give eot_id or switch document positions off"
            )
        if eot_id is not None and own != eot_id:
            raise UserError(
                f"eot_id {eot_id} contradicts dataset {info.folder}, whose tokenizer has {own}; "
                "leave eot_id out"
            )
        eot_id = own
    return eot_id


def verify_split(info: DatasetInfo, name: str) -> int:
    """Deep check of every shard of a split; the largest token id in it (-1 when it has no tokens).

    A file that passed before and has the same size and modification time is not read again; where
    ``dataset.verified.json`` cannot be written, every start reads.

    Raises: UserError as ``check_shard``.
    """
    cache = _read_cache(info.folder)

    def check(entry: ShardInfo) -> tuple[dict, bool]:
        path = info.folder / entry.file
        check_shard(path, entry)
        stat, seen = path.stat(), cache.get(entry.file, {})
        record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if seen.items() >= record.items() and entry.sha256 in (None, seen.get("sha256")):
            return seen, False
        record["sha256"], record["max_id"] = check_shard(path, entry, deep=True)
        return record, True

    entries = info.split(name)
    with ThreadPoolExecutor(min(4, len(entries))) as pool:  # hashlib and read release the GIL
        found = list(pool.map(check, entries))
    fresh = {e.file: record for e, (record, new) in zip(entries, found, strict=True) if new}
    if fresh:
        with contextlib.suppress(OSError):
            merged = _read_cache(info.folder) | fresh  # another split may have been added since
            write_atomically(info.folder / VERIFIED, json.dumps(merged, indent=1) + "\n")
    return max(record["max_id"] for record, _ in found)


def _read_cache(folder: Path) -> dict[str, dict]:
    try:
        cache = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
        return {
            file: record
            for file, record in cache.items()
            if isinstance(record.get("max_id"), int) and isinstance(record.get("sha256"), str)
        }
    except (OSError, ValueError, AttributeError):
        return {}
