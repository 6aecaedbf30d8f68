"""Where text comes from: one spec string names a source, a source is a sequence of documents.

    stdlib                  the source files of the running interpreter's standard library
    text:GLOB               UTF-8 files, one document a file
    jsonl:GLOB              one JSON object a line (also .gz), the text in ``--field``
    parquet:GLOB            a column of strings, named by ``--field``
    hf:NAME[:CONFIG]        streamed by `datasets`: a Hub name such as HuggingFaceFW/fineweb,
                            HuggingFaceFW/fineweb-edu, Skylion007/openwebtext, or a local
                            folder or data file; always its ``train`` split

A source is listed as ``Part``s first: small pieces in a fixed order that do not depend on who reads
them, so that worker processes can share the reading and the result is the same for any number of
them. A part that cannot be kept small (a gzip file, a stream) says so with ``bounded=False`` and is
read by one process. Files come sorted by path; lines and rows keep their order.

    for document in documents("jsonl:data/*.jsonl.gz"):
        print(document.source_id, len(document.text))
"""

import glob
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from microtron.errors import UserError

KINDS = ("stdlib", "text:GLOB", "jsonl:GLOB", "parquet:GLOB", "hf:NAME[:CONFIG]")
PART_BYTES = 4 << 20  # of a jsonl file: big enough to hide the cost of a task, small in memory
FILES_BYTES = 1 << 20  # small files are grouped up to this
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    """One text and where it was found (for messages and provenance, unique within a source)."""

    text: str
    source_id: str


@dataclass(frozen=True)
class Part:
    """A piece of a source. ``start``/``stop`` are bytes (jsonl), a row group or a shard (hf).

    ``size_bytes``: what it takes up on disk, 0 when unknown. ``bounded``: its documents fit into
    memory together.
    """

    kind: str
    names: tuple[str, ...]
    start: int = 0
    stop: int = 0
    size_bytes: int = 0
    bounded: bool = True


def documents(
    spec: str, *, field: str = "text", left_out: list[str] | None = None
) -> Iterator[Document]:
    """All documents of a source, in order; arguments and errors as ``list_parts``/``read_part``."""
    for part in list_parts(spec, field):
        yield from read_part(part, field, left_out)


def parse_spec(spec: str) -> tuple[str, str]:
    """(kind, what follows the colon). Raises: UserError for an unknown kind or nothing named."""
    kind, colon, name = spec.partition(":")
    if kind == "stdlib" and not colon:
        return kind, ""
    if kind not in _LISTERS or kind == "stdlib" or not name:
        raise UserError(f"source {spec!r} is not one of: {', '.join(KINDS)}")
    return kind, name


def list_parts(spec: str, field: str = "text") -> list[Part]:
    """The parts of a source, in the order of their documents.

    Raises: UserError for an unknown spec, a glob that matches nothing, a file that is no parquet
    file, a parquet file without a string column ``field``, a Hub that cannot be reached.
    """
    kind, name = parse_spec(spec)
    return _LISTERS[kind](name, field)


def read_part(
    part: Part, field: str = "text", left_out: list[str] | None = None
) -> Iterator[Document]:
    """The documents of one part, in order; an empty or null text is a document of no characters.

    A standard library file that does not decode is left out and named in ``left_out`` (without
    that list it is an error); a user's file that does not is always an error. Lone surrogates,
    which JSON can spell and UTF-8 cannot, become U+FFFD.

    Raises: UserError for an unreadable file, broken JSON (with file and line), a missing field.
    """
    try:
        yield from _READERS[part.kind](part, field, left_out)
    except (OSError, EOFError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"source {':'.join((part.kind, *part.names[:2]))} cannot be read: {what}; mend or "
            "leave out the file and run again"
        ) from error


def source_state(spec: str) -> str:
    """16 hex digits that change when the files of a source do (name, size, modification time).

    The standard library goes by interpreter version, names and sizes; a ``hf:`` source by its spec
    alone, since asking the Hub would take seconds. Raises: UserError as ``list_parts``.
    """
    kind, name = parse_spec(spec)
    if kind == "hf":
        rows: list[Any] = [spec]
    elif kind == "stdlib":
        sizes = ((os.path.relpath(p, _stdlib_root()), os.path.getsize(p)) for p in _stdlib_files())
        rows = [sys.version, *sizes]
    else:
        stats = ((path, os.stat(path)) for path in matching_files(kind, name))
        rows = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


# -- plain files ----------------------------------------------------------------------------------


def matching_files(kind: str, pattern: str) -> list[str]:
    """The files a glob names (``**`` and ``~`` too), sorted. Raises: UserError for none."""
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    files = sorted(path for path in found if os.path.isfile(path))
    if not files:
        raise UserError(
            f"source {kind}:{pattern} matches no file (looked from {os.getcwd()}); correct the "
            "path, and quote the pattern so that the shell leaves it alone"
        )
    return files


def _stdlib_root() -> str:
    return sysconfig.get_paths()["stdlib"]


def _stdlib_files() -> list[str]:
    root, files = _stdlib_root(), []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(
            f"source stdlib: no .py files under {root} (this Python was installed without its "
            "sources); name another --source"
        )
    return sorted(files)


def _group(kind: str, paths: Iterable[str]) -> list[Part]:
    """Parts of whole files, each of about FILES_BYTES or of one larger file."""
    parts, names, size = [], [], 0
    for path in paths:
        names.append(path)
        size += os.path.getsize(path)
        if size >= FILES_BYTES or len(names) >= 1024:
            parts.append(Part(kind, tuple(names), size_bytes=size))
            names, size = [], 0
    if names:
        parts.append(Part(kind, tuple(names), size_bytes=size))
    return parts


def _read_stdlib(part: Part, _: str, left_out: list[str] | None) -> Iterator[Document]:
    for path in part.names:
        try:
            with tokenize.open(path) as file:  # honours a coding cookie and a BOM
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            if left_out is None:
                raise UserError(f"{path} does not decode ({error}); leave it out") from error
            left_out.append(f"{path}: {error}")
            continue
        yield Document(text, path)


def _read_text(part: Part, _: str, __: list[str] | None) -> Iterator[Document]:
    for path in part.names:
        try:
            yield Document(Path(path).read_bytes().decode("utf-8-sig"), path)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); convert it "
                "(iconv -t UTF-8) or narrow the pattern"
            ) from error


# -- jsonl ----------------------------------------------------------------------------------------


def _list_jsonl(pattern: str, _: str) -> list[Part]:
    parts = []
    for path in matching_files("jsonl", pattern):
        size = os.path.getsize(path)
        if path.endswith(".gz"):  # cannot be entered in the middle
            parts.append(Part("jsonl", (path,), 0, size, size, bounded=False))
            continue
        starts = range(0, size, PART_BYTES)
        stops = [min(start + PART_BYTES, size) for start in starts]
        parts += [Part("jsonl", (path,), a, b, b - a) for a, b in zip(starts, stops, strict=True)]
    return parts


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin within the part."""
    path = part.names[0]
    if path.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            offset = 0
            for line in file:
                yield offset, line
                offset += len(line)
        return
    with open(path, "rb") as file:
        if part.start:  # the line that runs into this part belongs to the one before
            file.seek(part.start - 1)
            file.readline()
        offset = file.tell()
        while offset < part.stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _read_jsonl(part: Part, field: str, _: list[str] | None) -> Iterator[Document]:
    path = part.names[0]
    for offset, line in _lines(part):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # broken JSON and broken UTF-8
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(
                f"{_place(path, offset)} is not JSON ({reason}); mend or remove that line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{_place(path, offset)} is no JSON object; a line must be one")
        text = text_of(row, field, lambda offset=offset: _place(path, offset))
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Document(text, f"{path}@{offset}")


def _place(path: str, offset: int) -> str:
    """``path, line n`` of a byte offset: counted only when a message needs it."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rb") as file:
        line, left = 1, offset
        while left and (chunk := file.read(min(left, 1 << 20))):
            line, left = line + chunk.count(b"\n"), left - len(chunk)
    return f"{path}, line {line}"


def text_of(row: dict[str, Any], field: str, place: Callable[[], str]) -> str:
    """The text of a row, "" for null. Raises: UserError naming ``place()`` without such a field."""
    if field not in row:
        raise UserError(
            f"{place()} has no field {field!r} (it has: {', '.join(map(str, row))}); name the "
            "field of the text with --field"
        )
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{place()}: field {field!r} is {type(text).__name__}, not text; name another --field"
        )
    return text


def _columns() -> ModuleType:
    """The readers that need optional packages, imported when a spec names them."""
    from microtron.data import sources_columns

    return sources_columns


_LISTERS = {
    "stdlib": lambda *_: _group("stdlib", _stdlib_files()),
    "text": lambda pattern, _: _group("text", matching_files("text", pattern)),
    "jsonl": _list_jsonl,
    "parquet": lambda *args: _columns().list_parquet(*args),
    "hf": lambda *args: _columns().list_hf(*args),
}
_READERS = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": lambda *args: _columns().read_parquet(*args),
    "hf": lambda *args: _columns().read_hf(*args),
}
