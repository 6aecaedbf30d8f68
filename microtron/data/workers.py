"""The work that `microtron prepare` shares among processes: read a piece of text, tokenize it.

A source's parts become tasks, numbered (part, batch) in the order of the documents; results come
back in that order however many processes there are, so the output does not depend on their number
and a position in the sequence is enough to go on from. A bounded part is read by the worker itself;
a stream is read here and travels in batches.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TypeVar

import numpy as np

from microtron.data.sources import Document, Part, read_part
from microtron.data.split import SplitRule
from microtron.data.tokenizers import Tokenizer, load_tokenizer
from microtron.errors import UserError

BATCH_CHARS = 1 << 20  # of a stream, to a task
_R = TypeVar("_R")


@dataclass(frozen=True)
class Task:
    """A bounded part, or a batch of documents that have been read from a stream."""

    index: tuple[int, int]
    part: Part
    documents: list[Document] | None = None


def list_tasks(parts: list[Part], field: str, start: tuple[int, int] = (0, 0)) -> Iterator[Task]:
    """The tasks of ``parts``, in order, from position ``start`` (part, batch) on."""
    for i in range(start[0], len(parts)):
        part = parts[i]
        if part.bounded:
            if (i, 0) >= start:
                yield Task((i, 0), part)
            continue
        for j, batch in enumerate(_batches(read_part(part, field))):
            if (i, j) >= start:
                yield Task((i, j), part, batch)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS or len(batch) >= 4096:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@dataclass
class Tokenized:
    """A task's documents (or pieces of them): ``ids`` one after the other, each led by eot."""

    index: tuple[int, int]
    ids: np.ndarray  # [tokens]
    tokens: np.ndarray  # [pieces], eot included
    sizes: np.ndarray  # [pieces], UTF-8 bytes
    val: np.ndarray  # [pieces], bool
    empty: int  # documents of no characters, which hold nothing to learn
    left_out: list[str]
    failed: str | None  # the error after these documents; it counts only if more are wanted
    progress_bytes: int


@dataclass(frozen=True)
class Tokenize:
    """Task -> Tokenized. Travels to the workers once; each loads the tokenizer itself."""

    tokenizer_name: str
    tokenizer_folder: Path
    field: str
    rule: SplitRule

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded once a process."""
        return load_tokenizer(self.tokenizer_name, self.tokenizer_folder)

    def __call__(self, task: Task) -> Tokenized:
        left_out: list[str] = []
        eot = np.array([self.tokenizer.eot_id], dtype=self.tokenizer.dtype)
        ids, tokens, sizes, val = [eot[:0]], [], [], []
        empty, failed = 0, None
        try:
            for text in _texts(task, self.field, left_out):
                pieces = self.rule.pieces(text) if text else []
                encoded = [self.tokenizer.encode_array(piece) for piece, _ in pieces]
                empty += not text
                for (piece, is_val), piece_ids in zip(pieces, encoded, strict=True):
                    ids += [eot, piece_ids]
                    tokens.append(1 + piece_ids.size)
                    sizes.append(len(piece.encode()))
                    val.append(is_val)
        except UserError as error:
            failed = str(error)
        progress = task.part.size_bytes if task.documents is None else sum(sizes)
        return Tokenized(
            task.index,
            np.concatenate(ids),
            np.array(tokens, dtype=np.int64),
            np.array(sizes, dtype=np.int64),
            np.array(val, dtype=bool),
            empty,
            left_out,
            failed,
            progress,
        )


@dataclass(frozen=True)
class Alphabet:
    """Task -> ([(UTF-8 bytes, the distinct characters) of a document], the error after them).

    The first pass of ``char``.
    """

    field: str

    def __call__(self, task: Task) -> tuple[list[tuple[int, str]], str | None]:
        found: list[tuple[int, str]] = []
        try:
            for text in filter(None, _texts(task, self.field, [])):
                found.append((len(text.encode()), "".join(sorted(set(text)))))
        except UserError as error:
            return found, str(error)
        return found, None


def _texts(task: Task, field: str, left_out: list[str]) -> Iterator[str]:
    documents = task.documents
    if documents is None:
        documents = read_part(task.part, field, left_out)
    for document in documents:
        yield document.text


def run_tasks(work: Callable[[Task], _R], tasks: Iterable[Task], workers: int) -> Iterator[_R]:
    """``map(work, tasks)``, in order, by ``workers`` processes (1: by this one).

    At most a few tasks a worker are under way, so memory stays bounded. Raises: UserError when a
    worker dies; what ``work`` raises.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (work,))
    waiting: deque = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_do, task))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} worker processes died (often for want of memory); run again with "
            "fewer --workers: what is finished is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: Callable | None = None


def _start_worker(work: Callable) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()  # else a killed prepare would leave its workers waiting for ever
    os._exit(1)


def _do(task: Task) -> object:
    return _work(task)
