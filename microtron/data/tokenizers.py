"""Tokenizers behind one small interface: text -> ids, ids -> text, and bytes per id.

    byte              ids 0..255 are the bytes of UTF-8; needs nothing
    char              one id a character of the corpus, as nanoGPT's; built by `microtron prepare`
    gpt2, o200k_harmony, cl100k_base, o200k_base      by tiktoken
    PATH              a tokenizer.json, or a folder with one, by the `tokenizers` library

Every tokenizer has one id, ``eot_id``, that text never encodes to: it stands before each document.
A literal ``<|endoftext|>`` inside a document stays text. ``token_bytes`` turns a loss per token
into bits per byte, and ``fingerprint`` says whether two tokenizers map text alike. ``save`` writes
what a dataset folder needs to be read on a machine without cache or network.

    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode_array("Hello world")
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np

from microtron.data.shards import DatasetInfo, dtype_for
from microtron.errors import UserError

TIKTOKEN_NAMES = ("gpt2", "o200k_harmony", "cl100k_base", "o200k_base")
EOT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every tokenizer does. ``name`` is the spec that loads it again; all ids < vocab_size."""

    name: str
    vocab_size: int
    eot_id: int

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The ids of ``text`` [tokens], uint16 or uint32; the eot id is not among them."""

    @property
    @abstractmethod
    def pieces(self) -> list[bytes]:
        """The bytes that each id stands for [vocab_size]; special and unused ids have none."""

    @property
    def prefix_ids(self) -> list[int]:
        """What stands before a text that begins a document: eot, unless the tokenizer's file says
        otherwise."""
        return [self.eot_id]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits of a sha256 over what defines the mapping."""

    def save(self, folder: str | Path) -> None:
        """Writes the files that ``load_tokenizer(name, folder)`` reads; none for ``byte``."""
        return None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        return self.encode_array(text).tolist()

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """The text of ``ids``; broken UTF-8 becomes U+FFFD, eot shows as ``<|endoftext|>``."""
        eot = EOT.encode()
        known = self.pieces
        parts = (
            eot if i == self.eot_id else known[i] if i < len(known) else b"\xef\xbf\xbd"
            for i in map(int, ids)
        )
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text per id [vocab_size], int32; special tokens 0."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int32)

    @property
    def dtype(self) -> np.dtype:
        """The shard dtype that holds its ids."""
        return np.dtype(dtype_for(self.vocab_size))


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; eot is 256."""

    name, vocab_size, eot_id = "byte", 257, 256
    fingerprint = hashlib.sha256(b"microtron byte 1").hexdigest()[:16]
    pieces = [bytes([i]) for i in range(256)] + [b""]

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)


class CharTokenizer(Tokenizer):
    """One id a character, sorted by code point (github.com/karpathy/nanoGPT, shakespeare_char)."""

    name = "char"

    def __init__(self, alphabet: str) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        self.eot_id = len(self.alphabet)
        self.vocab_size = self.eot_id + 1
        self._points = _code_points(self.alphabet)

    @cached_property
    def pieces(self) -> list[bytes]:
        return [char.encode() for char in self.alphabet] + [b""]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"microtron char 1" + self.alphabet.encode()).hexdigest()[:16]

    def encode_array(self, text: str) -> np.ndarray:
        """Raises: UserError for a character that the corpus did not have, naming it."""
        points = _code_points(text)
        ids = np.searchsorted(self._points, points)
        known = self._points[np.minimum(ids, self.eot_id - 1)] == points
        if not known.all():
            char = text[int(np.argmin(known))]
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not among the {self.eot_id} of this "
                "char tokenizer; leave it out, or prepare the data anew with a corpus that has it"
            )
        return ids.astype(self.dtype)

    def save(self, folder: str | Path) -> None:
        write_file(folder, "char.json", json.dumps({"alphabet": self.alphabet}).encode())


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def load_tokenizer(spec: str, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer that ``spec`` names; ``folder`` holds its files where they were saved.

    Raises: UserError for an unknown spec, missing files, tiktoken without cache and network.
    """
    from microtron.data import tokenizers_bpe as bpe

    folder = Path(folder) if folder is not None else None
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return _load_char(folder)
    if spec in TIKTOKEN_NAMES:
        saved = folder is not None and (folder / bpe.ENCODING_FILE).is_file()
        return bpe.TiktokenTokenizer(bpe.load_encoding(folder) if saved else bpe.get_encoding(spec))
    if folder is not None and (folder / "tokenizer.json").is_file():
        tokenizer = bpe.JsonTokenizer(folder / "tokenizer.json")
        tokenizer.name = spec
        return tokenizer
    return bpe.JsonTokenizer(_json_path(spec))


def _json_path(spec: str) -> Path:
    path = Path(os.path.expanduser(spec.removeprefix("json:")))
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"tokenizer {spec!r} is not one of byte, char, {', '.join(TIKTOKEN_NAMES)}, and "
            f"{path} does not exist; name a tokenizer.json or a folder with one"
        )
    return path


def tokenizer_state(spec: str) -> str:
    """What a spec stands for, without loading it: the spec, or for a file its checksum too."""
    if spec in ("byte", "char", *TIKTOKEN_NAMES):
        return spec
    path = _json_path(spec)
    config = path.parent / "tokenizer_config.json"
    raw = path.read_bytes() + (config.read_bytes() if config.is_file() else b"")
    return f"json:{path} {hashlib.sha256(raw).hexdigest()[:16]}"


def load_dataset_tokenizer(dataset: str | Path) -> Tokenizer | None:
    """The tokenizer a dataset folder was made with, from its own files; None for a foreign folder.

    Raises: UserError when those files do not give the tokenizer that dataset.json names.
    """
    info = DatasetInfo.load(dataset).tokenizer
    if info is None:
        return None
    tokenizer = load_tokenizer(info.name, Path(dataset) / "tokenizer")
    if tokenizer.fingerprint != info.fingerprint:
        raise UserError(
            f"tokenizer {info.name} of {dataset} has fingerprint {tokenizer.fingerprint}, "
            f"dataset.json says {info.fingerprint}; copy its tokenizer folder again or prepare anew"
        )
    return tokenizer


def _load_char(folder: Path | None) -> CharTokenizer:
    if folder is None:
        raise UserError(
            "tokenizer 'char' is made from a corpus: run `microtron prepare --tokenizer char` and "
            "name the dataset folder"
        )
    try:
        return CharTokenizer(json.loads((folder / "char.json").read_bytes())["alphabet"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"tokenizer file {folder / 'char.json'} cannot be read ({error}); prepare the data "
            "again with --tokenizer char"
        ) from error


def write_file(folder: str | Path, name: str, content: bytes) -> None:
    """Writes ``folder/name`` under a temporary name first, making the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    partial = Path(folder) / f"{name}.partial"
    try:
        partial.write_bytes(content)
        os.replace(partial, Path(folder) / name)
    finally:
        partial.unlink(missing_ok=True)
