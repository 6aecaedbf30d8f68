"""Tokens on their way into shards, such that a killed writer can go on where it was.

A split's tokens are appended to a plain spool file; when it holds a shard's worth, ``ShardWriter``
turns it into a shard. ``saved()`` is a handful of numbers: with them and the files, ``Spool``
continues exactly, whatever was written after (it is cut off). Every shard of a split but the last
holds ``shard_tokens`` tokens; a document may run on into the next, as in llm.c. A document counts
in the shard where it begins, its bytes where they are.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from microtron.data.shards import ShardInfo, ShardWriter


def spool_name(split: str, shard: int) -> str:
    """The file that gathers a shard's tokens; what a killed run left in it is cut off later."""
    return f"{split}_{shard:06d}.spool"


class Spool:
    """One split in the folder of an unfinished dataset.

    ``token_bytes`` [vocab_size]: bytes an id stands for, to share out a document between shards.
    ``saved``: what ``saved()`` returned, the files being as they were then or longer; None starts
    anew.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        shard_tokens: int,
        token_bytes: np.ndarray,
        saved: dict | None = None,
    ) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype, self.token_bytes = np.dtype(dtype), token_bytes
        saved = saved or {"shards": [], "tokens": 0, "bytes": 0, "documents": 0}
        self.shards = [ShardInfo(**entry) for entry in saved["shards"]]
        self.tokens, self.bytes, self.documents = (
            saved["tokens"],
            saved["bytes"],
            saved["documents"],
        )
        self._stale: list[Path] = []
        self._file = self._open(self.tokens)

    @property
    def _spool(self) -> Path:
        return self.folder / spool_name(self.split, len(self.shards))

    def _open(self, tokens: int) -> BinaryIO:
        file = open(self._spool, "ab")  # noqa: SIM115
        file.truncate(tokens * self.dtype.itemsize)
        return file

    def add(self, ids: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Appends documents: ``ids`` of all, ``tokens`` and ``sizes`` (bytes) of each."""
        begun = np.ones(len(tokens), dtype=np.int64)  # 0 for the rest of one cut in two
        while ids.size > self.shard_tokens - self.tokens:
            room = self.shard_tokens - self.tokens
            ends = np.cumsum(tokens)
            whole = int(np.searchsorted(ends, room, side="right"))
            start = int(ends[whole - 1]) if whole else 0
            head = 0
            if room > start:  # document `whole` is cut; its ids tell how many bytes stay here
                head = int(self.token_bytes[ids[start:room]].sum(dtype=np.int64))
                head = min(head, int(sizes[whole]))
            self._append(
                ids[:room],
                int(sizes[:whole].sum()) + head,
                int(begun[:whole].sum()) + (int(begun[whole]) if room > start else 0),
            )
            self._close_shard()
            tokens, sizes = tokens[whole:].copy(), sizes[whole:].copy()
            begun, ids = begun[whole:].copy(), ids[room:]
            if room > start:
                tokens[0] -= room - start
                sizes[0] -= head
                begun[0] = 0
        self._append(ids, int(sizes.sum()), int(begun.sum()))

    def _append(self, ids: np.ndarray, size: int, documents: int) -> None:
        self._file.write(np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")))
        self.tokens += ids.size
        self.bytes += size
        self.documents += documents

    def _close_shard(self) -> None:
        self._file.close()
        spool, name = self._spool, self._spool.with_suffix(".bin").name
        little = self.dtype.newbyteorder("<")
        with ShardWriter(self.folder / name, self.dtype.name) as shard:
            shard.write(np.memmap(spool, dtype=little, mode="r", shape=(self.tokens,)))
        self._stale.append(spool)
        self.shards.append(ShardInfo(name, self.tokens, self.bytes, self.documents, shard.sha256))
        self.tokens = self.bytes = self.documents = 0
        self._file = self._open(0)

    def finish(self) -> None:
        """Makes the last shard of what is left."""
        if self.tokens:
            self._close_shard()

    def saved(self) -> dict:
        """What to keep, after bringing the spool to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {
            "shards": [asdict(entry) for entry in self.shards],
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }

    def forget(self) -> None:
        """Removes the spools of finished shards; call it when ``saved()`` is safely stored."""
        for path in self._stale:
            path.unlink()
        self._stale = []

    def close(self) -> None:
        """Closes the file; what is not saved is cut off by the next start."""
        self._file.close()
