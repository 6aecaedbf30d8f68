"""Token shards on disk: llm.c's ``.bin`` layout and the ``dataset.json`` beside it.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] number of tokens) and
then the tokens as uint16 or uint32, so that a reader maps the file and slices it: no index, no
parsing. The layout is llm.c's (github.com/karpathy/llm.c, ``dev/data/data_common.py``); shards that
other tools wrote in it load without a sidecar. What the layout cannot say (tokenizer, bytes of
text, checksums) stands in ``dataset.json``, written last.

A shard gets its name and its magic number only once all of it is on disk, so a killed writer leaves
nothing that passes for a shard.

    with ShardWriter(folder / "train_000000.bin", "uint16") as shard:
        shard.write(ids)
    DatasetInfo(tokenizer, "source", "uint16", {"train": [ShardInfo(...)]}).save(folder)
    tokens = open_shard(folder / "train_000000.bin")
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from microtron.errors import UserError

MAGIC = {"uint16": 20240520, "uint32": 20240801}
VERSION = {"uint16": 1, "uint32": 7}
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32
SIDECAR = "dataset.json"
FORMAT = 1
SPLITS = ("train", "val")
_CHUNK_BYTES = 4 << 20
_REMEDY = "copy it again or run `microtron prepare` again"


def dtype_for(vocab_size: int) -> str:
    """The narrowest shard dtype that holds the ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def _little(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text``: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # left only by a failure


class ShardWriter:
    """Writes one shard; a context manager.

    ``tokens`` counts what has been written; ``sha256`` (hex, whole file) is there after close.
    Leaving the block by an exception removes the unfinished file.

    Raises: ValueError for a dtype other than uint16 and uint32, for ids that are not 1-D integers
    or do not fit the dtype, and beyond 2**31 - 1 tokens (the header is int32).
    """

    def __init__(self, path: str | Path, dtype: str) -> None:
        if dtype not in MAGIC:
            raise ValueError(f"shard dtype {dtype!r} is not one of {', '.join(MAGIC)}")
        self.path = Path(path)
        self.dtype = dtype
        self.tokens = 0
        self.sha256: str | None = None
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = open(self._partial, "wb")  # noqa: SIM115
        self._file.write(bytes(HEADER_BYTES))  # magic 0 until close

    def write(self, ids: np.ndarray) -> None:
        """Appends ``ids`` [n], any integer dtype."""
        ids = np.asarray(ids)
        if ids.size == 0:
            return
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"a shard takes 1-D integer ids, not {ids.dtype} of {ids.shape}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > np.iinfo(self.dtype).max:
            raise ValueError(f"token ids {low}..{high} do not fit a {self.dtype} shard")
        if self.tokens + ids.size > MAX_SHARD_TOKENS:
            raise ValueError(f"a shard holds at most {MAX_SHARD_TOKENS} tokens; start the next one")
        self._file.write(np.ascontiguousarray(ids, dtype=_little(self.dtype)))
        self.tokens += ids.size

    def close(self) -> None:
        """Completes the header, flushes to disk, gives the file its name, takes its checksum."""
        if self._file.closed:
            return
        header = np.zeros(3, dtype="<i4")
        header[:] = MAGIC[self.dtype], VERSION[self.dtype], self.tokens
        self._file.flush()
        os.fsync(self._file.fileno())  # the tokens first: a valid header never precedes them
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.sha256, _ = _scan(self._partial, _little(self.dtype))
        os.replace(self._partial, self.path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            self._partial.unlink(missing_ok=True)


def read_header(path: str | Path) -> tuple[np.dtype, int]:
    """(dtype of the tokens, number of tokens) as the header of ``path`` says.

    Raises: UserError for a missing file, one shorter than a header, an unknown magic or version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error.strerror}); {_REMEDY}") from error
    if len(raw) < HEADER_BYTES:
        raise UserError(f"shard {path} is truncated: {len(raw)} bytes are no header; {_REMEDY}")
    magic, version, tokens = (int(x) for x in np.frombuffer(raw, dtype="<i4", count=3))
    if magic == 0:
        raise UserError(f"shard {path} was never finished (magic 0: writer stopped); {_REMEDY}")
    dtype = {number: name for name, number in MAGIC.items()}.get(magic)
    if dtype is None:
        raise UserError(
            f"{path} is no llm.c token shard: bad magic {magic}, expected "
            f"{' or '.join(map(str, MAGIC.values()))}; {_REMEDY}"
        )
    if version != VERSION[dtype]:
        raise UserError(
            f"shard {path} has version {version}, its magic goes with {VERSION[dtype]}; {_REMEDY}"
        )
    if tokens < 0:
        raise UserError(f"shard {path} is corrupt: its header counts {tokens} tokens; {_REMEDY}")
    return _little(dtype), tokens


def open_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map [tokens]; nothing is read yet.

    Raises: UserError as ``check_shard`` without ``deep``.
    """
    dtype, tokens = _check_size(Path(path))
    if tokens == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=dtype)
    # np.memmap's slices carry a subclass whose bookkeeping costs more than a short copy
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(tokens,))
    return mapped.view(np.ndarray)


def _check_size(path: Path) -> tuple[np.dtype, int]:
    dtype, tokens = read_header(path)
    size, expected = path.stat().st_size, HEADER_BYTES + tokens * dtype.itemsize
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise UserError(f"shard {path} is {what}: {size} bytes, not {expected}; {_REMEDY}")
    return dtype, tokens


def _scan(path: Path, dtype: np.dtype) -> tuple[str, int]:
    """(sha256 of the file, largest token id or -1), in one pass."""
    digest, highest = hashlib.sha256(), -1
    with open(path, "rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while chunk := file.read(_CHUNK_BYTES):  # a multiple of every item size
            digest.update(chunk)
            highest = max(highest, int(np.frombuffer(chunk, dtype=dtype).max()))
    return digest.hexdigest(), highest


@dataclass(frozen=True)
class ShardInfo:
    """One shard of a split. ``bytes``: UTF-8 bytes of text in it, eot tokens counting 0.

    In a foreign folder only ``file`` and ``tokens`` are known; the others are None.
    """

    file: str
    tokens: int
    bytes: int | None = None
    documents: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer a dataset was made with; ``fingerprint`` identifies its mapping."""

    name: str
    fingerprint: str
    vocab_size: int
    eot_id: int


def check_shard(
    path: str | Path, entry: ShardInfo | None = None, deep: bool = False
) -> tuple[str, int] | None:
    """Checks one shard against its own header and, where there is one, its sidecar entry.

    ``deep`` reads the file and returns (sha256, largest token id or -1 when empty); otherwise the
    cost is a stat and 1 KiB, and the answer None.

    Raises: UserError for a missing, unfinished, truncated, overlong or foreign file, another token
    count than the entry's and, with ``deep``, another checksum than the entry's.
    """
    path = Path(path)
    dtype, tokens = _check_size(path)
    if entry is not None and entry.tokens != tokens:
        raise UserError(
            f"shard {path} holds {tokens} tokens, {SIDECAR} says {entry.tokens}; {_REMEDY}"
        )
    if not deep:
        return None
    sha256, highest = _scan(path, dtype)
    if entry is not None and entry.sha256 is not None and sha256 != entry.sha256:
        raise UserError(
            f"shard {path} is corrupt: sha256 {sha256[:16]}.., {SIDECAR} says "
            f"{entry.sha256[:16]}..; {_REMEDY}"
        )
    return sha256, highest


@dataclass
class DatasetInfo:
    """What ``dataset.json`` holds. ``tokenizer`` is None for a foreign folder."""

    tokenizer: TokenizerInfo | None
    source: str
    dtype: str
    splits: dict[str, list[ShardInfo]]
    folder: Path | None = field(default=None, compare=False)

    @classmethod
    def load(cls, folder: str | Path) -> "DatasetInfo":
        """Reads the sidecar of ``folder`` or, without one, lists its llm.c shards by name.

        Raises: UserError for a missing folder, no shards, an unreadable sidecar.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(
                f"dataset folder {folder} does not exist; make it with `microtron prepare "
                f"--out {folder}` or correct the path"
            )
        if not (folder / SIDECAR).exists():
            return cls._foreign(folder)
        try:
            data = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise UserError(
                    f"{folder / SIDECAR} has format {data['format']}, this version reads {FORMAT}; "
                    "run `microtron prepare` again"
                )
            tokenizer = TokenizerInfo(**data["tokenizer"]) if data["tokenizer"] else None
            splits = {k: [ShardInfo(**e) for e in v] for k, v in data["splits"].items()}
            return cls(tokenizer, data["source"], data["dtype"], splits, folder)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / SIDECAR} cannot be read ({type(error).__name__}: {error}); "
                "run `microtron prepare` again"
            ) from error

    @classmethod
    def _foreign(cls, folder: Path) -> "DatasetInfo":
        if any(folder.glob("*.bin.partial")):
            raise UserError(
                f"dataset folder {folder} is unfinished (a .bin.partial file and no {SIDECAR}); "
                "empty it and run `microtron prepare` again"
            )
        splits, dtypes = {}, set()
        for name in SPLITS:
            for path in sorted(folder.glob(f"*{name}*.bin")):
                dtype, tokens = read_header(path)
                dtypes.add(dtype.name)
                splits.setdefault(name, []).append(ShardInfo(path.name, tokens))
        if not splits:
            raise UserError(
                f"dataset folder {folder} has neither {SIDECAR} nor shards named *train*.bin or "
                "*val*.bin; run `microtron prepare` (again, if it was interrupted)"
            )
        if len(dtypes) > 1:
            raise UserError(
                f"dataset folder {folder} mixes shards of {' and '.join(sorted(dtypes))}; "
                "keep each tokenizer's shards in a folder of their own"
            )
        return cls(None, "foreign", dtypes.pop(), splits, folder)

    def save(self, folder: str | Path) -> None:
        """Writes ``dataset.json`` atomically; call it last, when every shard is closed."""
        data = {
            "format": FORMAT,
            "tokenizer": asdict(self.tokenizer) if self.tokenizer else None,
            "source": self.source,
            "dtype": self.dtype,
            "splits": {k: [asdict(e) for e in v] for k, v in self.splits.items()},
        }
        self.folder = Path(folder)
        write_atomically(self.folder / SIDECAR, json.dumps(data, indent=1) + "\n")

    def split(self, name: str) -> list[ShardInfo]:
        """The shards of a split, in order. Raises: UserError when there are none."""
        if not self.splits.get(name):
            known = ", ".join(k for k, v in self.splits.items() if v) or "none"
            raise UserError(
                f"dataset folder {self.folder} has no shards of split {name!r} (it has: {known}); "
                "name one of those or prepare the dataset with this split"
            )
        return self.splits[name]

    def fingerprint(self, name: str) -> str:
        """16 hex digits for a split's shards: their contents where checksums are known, else names.

        Moving or renaming a folder does not change it; other shards, or another order of them, do.
        """
        rows = [[e.tokens, e.sha256 or e.file] for e in self.split(name)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
