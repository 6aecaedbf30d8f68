"""``microtron prepare``: documents -> token shards and their ``dataset.json``.

    microtron prepare --source stdlib --tokenizer byte --out data/stdlib
    microtron prepare --source hf:HuggingFaceFW/fineweb-edu --tokenizer gpt2 --out data/edu

All is built in ``OUT/prepare.unfinished`` and moves up when complete: a folder never shows a part
of a dataset. A small state file there, rewritten every few seconds, lets the same command go on
after a kill, with the same bytes as if nothing had happened; the number of workers changes nothing
either. ``OUT/prepare.json`` keeps the settings, so that a second run knows it has nothing to do.

`split.py` says which documents are validation data, `workers.py` how the work is shared, `spool.py`
how tokens become shards, `prepare_folder.py` what the folder holds when.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from microtron.data.prepare_folder import (
    STATE,
    UNFINISHED,
    differ,
    finished_dataset,
    intact,
    publish,
    read_json,
    write_json,
)
from microtron.data.prepare_report import Progress, report
from microtron.data.shards import MAX_SHARD_TOKENS, SPLITS, DatasetInfo, TokenizerInfo
from microtron.data.sources import Part, list_parts, read_part, source_state
from microtron.data.split import SplitRule, choose_split
from microtron.data.spool import Spool
from microtron.data.tokenizers import CharTokenizer, Tokenizer, load_tokenizer, tokenizer_state
from microtron.data.workers import BATCH_CHARS, Alphabet, Tokenize, Tokenized, list_tasks, run_tasks
from microtron.errors import UserError

VERSION = 1  # of what the same settings produce
CHECKPOINT_S = 10.0
POOL_BYTES = 16 << 20  # less text than this is done before worker processes have started


def prepare(
    *,
    source: str,
    tokenizer: str,
    out: Path,
    field: str = "text",
    val_fraction: float = 0.02,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    max_documents: int | None = None,
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> DatasetInfo:
    """Tokenizes documents into shards that the loader reads.

    Args:
        source: stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB or hf:NAME[:CONFIG] (quote a GLOB).
        tokenizer: byte, char, gpt2, o200k_harmony, or the path of a tokenizer.json.
        out: The dataset folder to make.
        field: Field or column of the text (jsonl, parquet, hf).
        val_fraction: Share of the documents that become validation; both sides get at least one,
            and a single document is cut, its last part being validation.
        shard_tokens: Tokens in a shard file.
        workers: Processes; default: one a CPU core. The result does not depend on it.
        max_documents: Stop after so many documents.
        max_bytes: Stop after the document with which the text reaches so many bytes.
        overwrite: Replace a dataset made with other settings.

    Raises: UserError for settings, sources and tokenizers that cannot be used, for a folder that
        holds something else, for a disk that cannot be written.
    """
    out = Path(out).expanduser()
    _check_numbers(val_fraction, shard_tokens, workers, max_documents, max_bytes)
    settings = {
        "version": VERSION,
        "source": source,
        "files of the source": source_state(source),
        "field": field,
        "tokenizer": tokenizer_state(tokenizer),
        "val-fraction": val_fraction,
        "shard-tokens": shard_tokens,
        "max-documents": max_documents,
        "max-bytes": max_bytes,
    }
    try:
        finished = finished_dataset(out, settings, overwrite)
        if finished is not None:
            print(f"already prepared: {out}")
            return finished
        started = time.monotonic()
        job = _Job(out, settings, workers or _cores(), overwrite)
        with contextlib.closing(job):
            job.run(source, tokenizer, field)
            info = publish(out, job.state)
        report(out, job.state, info, time.monotonic() - started)
        return info
    except OSError as error:
        raise UserError(
            f"cannot write the dataset {out}: {error.strerror or error}; free space or name "
            "another --out (the same command goes on where it stopped)"
        ) from error


def _check_numbers(
    val_fraction: float,
    shard_tokens: int,
    workers: int | None,
    max_documents: int | None,
    max_bytes: int | None,
) -> None:
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} is not between 0 and 1; try 0.02")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise UserError(
            f"--shard-tokens {shard_tokens} is not between 1 and {MAX_SHARD_TOKENS} (the header "
            "of a shard counts in int32); try 100000000"
        )
    limits = {"workers": workers, "max-documents": max_documents, "max-bytes": max_bytes}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is less than 1; leave it out for the default")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what this process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Job:
    """One dataset on its way; ``state`` is what the state file holds."""

    def __init__(self, out: Path, settings: dict, workers: int, overwrite: bool) -> None:
        self.out, self.folder = out, out / UNFINISHED
        self.settings, self.workers = settings, workers
        self._held: BinaryIO | None = None
        self.state = read_json(self.folder / STATE)
        if self.state is not None and self.state["settings"] != settings:
            if not overwrite:
                raise differ(out, self.state["settings"], settings)
            self.state = None
        if self.state is not None and not intact(out, self.state):
            self.state = None

    def run(self, source: str, tokenizer_spec: str, field: str) -> None:
        """Tokenizes what is yet to be tokenized; all shards are in ``folder`` then."""
        if self.state is not None and self.state["done"]:
            self._lock()
            return
        parts = list_parts(source, field)
        size = sum(p.size_bytes if p.bounded else 4 * p.size_bytes for p in parts)  # gzip: times 4
        if all(p.size_bytes for p in parts) and size < POOL_BYTES:
            self.workers = 1
        layout = hashlib.sha256(repr((parts, BATCH_CHARS)).encode()).hexdigest()[:16]
        if self.state is not None and self.state["layout"] != layout:
            print("prepare: starting anew (the source is cut into other parts)", file=sys.stderr)
            self.state = None
        if self.state is None:  # nothing is written before source and tokenizer have proved good
            texts = self._texts(parts, field)
            rule = choose_split(texts, self.settings["val-fraction"], source)
            made = self._make_tokenizer(tokenizer_spec, parts, field)
            self._lock()
            self._start(rule, made, layout)
        else:
            self._lock()
            print(
                f"prepare: going on in {self.out} after {self.state['documents']:,} documents",
                file=sys.stderr,
            )
        self._tokenize(parts, field)

    def _lock(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = open(self.folder / "lock", "wb")  # noqa: SIM115
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another `microtron prepare` is writing to {self.out}; wait for it, or name "
                "another --out"
            ) from error
        except OSError:  # a file system without locks
            return

    def close(self) -> None:
        """Lets go of the folder."""
        if self._held is not None:
            self._held.close()

    def _texts(self, parts: list[Part], field: str) -> Iterator[str]:
        """The texts that --max-documents and --max-bytes let through."""
        documents = size = 0
        for part in parts:
            for document in read_part(part, field, []):
                if not document.text:
                    continue
                if self._full(documents, size):
                    return
                documents, size = documents + 1, size + len(document.text.encode())
                yield document.text

    def _full(self, documents: int, size: int) -> bool:
        most_documents = self.settings["max-documents"]
        most_bytes = self.settings["max-bytes"]
        return (most_documents is not None and documents >= most_documents) or (
            most_bytes is not None and size >= most_bytes
        )

    def _make_tokenizer(self, spec: str, parts: list[Part], field: str) -> Tokenizer:
        if spec != "char":
            return load_tokenizer(spec)
        alphabet, documents, size = set(), 0, 0
        for found, failed in run_tasks(Alphabet(field), list_tasks(parts, field), self.workers):
            for text_bytes, chars in found:
                if not self._full(documents, size):
                    alphabet.update(chars)
                    documents, size = documents + 1, size + text_bytes
            if self._full(documents, size):
                break
            if failed:
                raise UserError(failed)
        return CharTokenizer("".join(alphabet))

    def _start(self, rule: SplitRule, tokenizer: Tokenizer, layout: str) -> None:
        for path in self.folder.iterdir():  # leftovers of other settings, or of a failed start
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        tokenizer.save(self.folder / "tokenizer")
        named = TokenizerInfo(
            tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eot_id
        )
        self.state = {
            "settings": self.settings,
            "layout": layout,
            "rule": asdict(rule),
            "tokenizer": asdict(named),
            "dtype": tokenizer.dtype.name,
            "position": [0, 0],
            "documents": 0,
            "bytes": 0,
            "empty": 0,
            "left_out": [],
            "progress_bytes": 0,
            "splits": {},
            "done": False,
        }

    def _tokenize(self, parts: list[Part], field: str) -> None:
        state = self.state
        folder = self.folder / "tokenizer"
        rule = SplitRule(**state["rule"])
        work = Tokenize(state["tokenizer"]["name"], folder, field, rule)
        token_bytes = load_tokenizer(work.tokenizer_name, folder).token_bytes()
        spools = {
            split: Spool(
                self.folder,
                split,
                state["dtype"],
                self.settings["shard-tokens"],
                token_bytes,
                state["splits"].get(split),
            )
            for split in SPLITS
        }
        self._save(spools)
        total = sum(p.size_bytes for p in parts) if all(p.bounded for p in parts) else None
        results = run_tasks(work, list_tasks(parts, field, tuple(state["position"])), self.workers)
        saved_at = time.monotonic()
        try:
            with Progress(total, state["progress_bytes"]) as progress:
                for result in results:
                    full = self._add(result, spools, rule.pieces_per_document)
                    progress.update(result.progress_bytes)
                    if full:
                        break
                    if time.monotonic() - saved_at >= CHECKPOINT_S:
                        self._save(spools)
                        saved_at = time.monotonic()
            for spool in spools.values():
                spool.finish()
            state["done"] = True
            self._save(spools)
        finally:
            results.close()
            for spool in spools.values():
                spool.close()

    def _add(self, result: Tokenized, spools: dict[str, Spool], pieces: int) -> bool:
        """Adds what the limits let through; True when they are reached."""
        state = self.state
        kept = 0
        sizes = result.sizes.reshape(-1, pieces).sum(axis=1)
        while kept < len(sizes) and not self._full(state["documents"], state["bytes"]):
            state["documents"] += 1
            state["bytes"] += int(sizes[kept])
            kept += 1
        kept *= pieces
        ids = result.ids[: int(result.tokens[:kept].sum())]
        tokens, sizes, val = result.tokens[:kept], result.sizes[:kept], result.val[:kept]
        for split, chosen in (("train", ~val), ("val", val)):
            spools[split].add(ids[np.repeat(chosen, tokens)], tokens[chosen], sizes[chosen])
        state["empty"] += result.empty
        state["left_out"] += result.left_out
        state["progress_bytes"] += result.progress_bytes
        full = self._full(state["documents"], state["bytes"])
        if result.failed and not full:
            raise UserError(result.failed)
        state["position"] = [result.index[0], result.index[1] + 1]
        return full

    def _save(self, spools: dict[str, Spool]) -> None:
        self.state["splits"] = {split: spool.saved() for split, spool in spools.items()}
        write_json(self.folder / STATE, self.state)
        for spool in spools.values():
            spool.forget()
