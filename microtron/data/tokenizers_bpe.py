"""Byte-pair tokenizers: tiktoken's encodings and the tokenizer.json of the `tokenizers` library.

`tokenizers.py` has the interface and ``load_tokenizer``; this is imported when a spec names one of
these. Both libraries read and write the same vocabularies (see `train_bpe.py`); tiktoken's files
are a list of ranks and, here, a small JSON with the pattern that cuts text into words.
"""

import base64
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from microtron.data.optional import import_package
from microtron.data.tokenizers import EOT, Tokenizer, write_file
from microtron.errors import UserError

EOT_CANDIDATES = (EOT, "</s>", "<|end_of_text|>")
RANKS_FILE, ENCODING_FILE = "ranks.tiktoken", "encoding.json"
_LONG_CHARS = 100_000  # tiktoken's regular expressions give up on runs of some hundred thousand


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by ranks; wraps a ``tiktoken.Encoding``."""

    def __init__(self, encoding: Any) -> None:  # noqa: ANN401
        self.name = encoding.name
        self._encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eot_id = encoding.eot_token

    def encode_array(self, text: str) -> np.ndarray:
        return _encode(self._encoding, text).astype(self.dtype, copy=False)

    @property
    def pattern(self) -> str:
        """The regular expression that cuts text into words, as tiktoken spells it."""
        return self._encoding._pat_str

    @property
    def special_tokens(self) -> dict[str, int]:
        """Name -> id of the tokens that no text encodes to, eot among them."""
        return dict(self._encoding._special_tokens)

    @cached_property
    def pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        for piece, rank in self._encoding._mergeable_ranks.items():
            pieces[rank] = piece
        return pieces

    @cached_property
    def fingerprint(self) -> str:
        # not the pattern: tiktoken spells gpt2's differently from version to version
        named = f"tiktoken {self.name} {self.vocab_size} {self.eot_id}\n".encode()
        ranks = _ranks_text(self._encoding._mergeable_ranks)
        return hashlib.sha256(named + ranks).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        save_encoding(self._encoding, folder)


def _encode(encoding: Any, text: str) -> np.ndarray:  # noqa: ANN401
    """Special tokens stay text. A text with a run of blanks too long for tiktoken's regular
    expression is cut into pieces of 100,000 characters: exact to decode, other ids at the cuts."""
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        cut = [text[i : i + _LONG_CHARS] for i in range(0, len(text), _LONG_CHARS)]
        return np.concatenate([encoding.encode_to_numpy(t, disallowed_special=()) for t in cut])


def _definition(encoding: Any) -> bytes:  # noqa: ANN401
    fields = {
        "name": encoding.name,
        "pat_str": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
    }
    return json.dumps(fields, sort_keys=True, indent=1).encode()


def _ranks_text(ranks: dict[bytes, int]) -> bytes:
    rows = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in rows)


def save_encoding(encoding: Any, folder: str | Path) -> None:  # noqa: ANN401
    """Writes a ``tiktoken.Encoding``: ranks in tiktoken's own format, and name, pattern, specials
    as JSON beside them (the ranks alone do not say how text is cut)."""
    write_file(folder, RANKS_FILE, _ranks_text(encoding._mergeable_ranks))
    write_file(folder, ENCODING_FILE, _definition(encoding))


def load_encoding(folder: str | Path) -> Any:  # noqa: ANN401
    """The ``tiktoken.Encoding`` that ``save_encoding`` wrote.

    Parsed here: ``tiktoken.load.load_tiktoken_bpe`` caches by path and would return stale ranks.
    Raises: UserError for missing or broken files.
    """
    tiktoken = import_package("tiktoken")
    folder = Path(folder)
    try:
        fields = json.loads((folder / ENCODING_FILE).read_bytes())
        rows = (line.split() for line in (folder / RANKS_FILE).read_bytes().splitlines())
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in rows}
        return tiktoken.Encoding(mergeable_ranks=ranks, **fields)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"tokenizer files in {folder} cannot be read ({error}); prepare the data again"
        ) from error


class JsonTokenizer(Tokenizer):
    """A tokenizer.json run by the `tokenizers` library, its special tokens being plain text.

    Runs on tiktoken instead where `microtron train-bpe` left its files beside (``_twin``).
    ``token_bytes`` is exact for byte-level BPE. For sentencepiece-like vocabularies a "▁" counts as
    the one blank it stands for, so the blank put before a text's first word counts too.

    What the file puts before a text (its post-processor) is ``prefix_ids``. It says how a text is
    presented, not how it is mapped, so the fingerprint leaves it out. ``save`` writes, into a file
    that puts nothing there, that eot comes first: in the dataset it is saved with it does.

    Attributes:
        fields: tokenizer.json as a dictionary.
        config: tokenizer_config.json, empty where there is none.
        eot: the content of the token ``eot_id``.
        chat_template: chat_template.jinja beside the file, or None.
    """

    def __init__(self, path: Path) -> None:
        tokenizers = import_package("tokenizers")
        try:
            raw = path.read_bytes()
            self.fields: dict[str, Any] = json.loads(raw)
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
            self.config: dict[str, Any] = json.loads(_beside(path, "tokenizer_config.json") or "{}")
            eos = self.config.get("eos_token")
        except Exception as error:  # the library raises a bare Exception
            raise UserError(
                f"tokenizer {path} cannot be read ({error}); name a tokenizer.json of the "
                "`tokenizers` library, or a folder with one"
            ) from error
        self._folder = path.parent
        self.chat_template = _beside(path, "chat_template.jinja")
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = f"json:{path}"
        self._vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1  # ids may have gaps
        self.eot = self._find_eot(path, eos)
        self.eot_id = self._vocab[self.eot]

    def _find_eot(self, path: Path, eos: str | dict | None) -> str:
        eos = eos.get("content") if isinstance(eos, dict) else eos
        for token in (*EOT_CANDIDATES, eos):
            if token in self._vocab:
                return token
        raise UserError(
            f"tokenizer {path} has none of {', '.join(EOT_CANDIDATES)} and no eos_token in a "
            'tokenizer_config.json beside it; write one there, e.g. {"eos_token": "<eos>"}'
        )

    def encode_array(self, text: str) -> np.ndarray:
        if self._twin is not None:
            return _encode(self._twin, text).astype(self.dtype)
        # the batch call leaves out the character offsets, which nobody reads here
        try:
            (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # a word-level file without an unknown token
            raise UserError(
                f"tokenizer {self.name} has no token for a part of the text ({error}); leave that "
                "part out, or choose a byte-level tokenizer"
            ) from error
        return np.array(encoded.ids, dtype=self.dtype)

    @cached_property
    def prefix_ids(self) -> list[int]:
        return added_by(self.fields.get("post_processor"))[0]

    @property
    def chats(self) -> bool:
        """Whether a chat template comes with it: text that is made of special tokens."""
        return self.chat_template is not None or bool(self.config.get("chat_template"))

    @cached_property
    def _twin(self) -> Any:  # noqa: ANN401
        """The same tokenizer for tiktoken, five times as fast, where `microtron train-bpe` left
        one; None where there is none or its ranks or pattern are not those of this file."""
        if not (self._folder / ENCODING_FILE).is_file():
            return None
        encoding = load_encoding(self._folder)
        ranks, pieces = encoding._mergeable_ranks, self.pieces
        cuts = (self.fields.get("pre_tokenizer") or {}).get("pretokenizers", [])
        same = (
            [cut["type"] for cut in cuts] == ["Split", "ByteLevel"]
            and cuts[0]["pattern"] == {"Regex": encoding._pat_str}
            and self.fields["normalizer"] is None
            and pieces[: len(ranks)] == sorted(ranks, key=ranks.get)
            and not any(pieces[len(ranks) :])
        )
        return encoding if same else None

    def decode(self, ids: list[int] | np.ndarray) -> str:
        if self._byte_level:
            return super().decode(ids)
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(self.fields.get("decoder"))

    @cached_property
    def pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        alphabet = byte_alphabet()
        marked = "▁" in json.dumps(self.fields.get("decoder"), ensure_ascii=False)
        for token, i in self._vocab.items():
            if self._byte_level and all(char in alphabet for char in token):
                pieces[i] = bytes(alphabet[char] for char in token)
            elif byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
                pieces[i] = bytes.fromhex(byte[1])
            else:
                pieces[i] = (token.replace("▁", " ") if marked else token).encode()
        for added in self.fields.get("added_tokens", []):
            pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
        pieces[self.eot_id] = b""
        return pieces

    @cached_property
    def fingerprint(self) -> str:
        fields = {**self.fields, "post_processor": None}
        canonical = json.dumps([fields, self.eot_id], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        fields = begins_with_eot(self.fields, self.eot, self.eot_id)
        write_file(folder, "tokenizer.json", to_text(fields))
        if self.config:
            write_file(folder, "tokenizer_config.json", to_text(self.config))
        if self.chat_template is not None:
            write_file(folder, "chat_template.jinja", self.chat_template)
        if self._twin is not None:
            save_encoding(self._twin, folder)


def _beside(path: Path, name: str) -> bytes | None:
    companion = path.parent / name
    return companion.read_bytes() if companion.is_file() else None


def to_text(fields: dict[str, Any]) -> bytes:
    """The bytes of a tokenizer.json or a tokenizer_config.json."""
    return (json.dumps(fields, ensure_ascii=False, indent=1) + "\n").encode()


def added_by(processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json's post-processor puts before and after a single text."""
    kind = processor["type"] if processor else "ByteLevel"
    if kind == "Sequence":
        both = [added_by(inner) for inner in processor["processors"]]
        before = [i for ids, _ in reversed(both) for i in ids]
        return before, [i for _, ids in both for i in ids]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    sides: tuple[list[int], list[int]] = ([], [])
    after = 0
    for part in processor["single"] if kind == "TemplateProcessing" else []:
        if "Sequence" in part:
            after = 1
        else:
            sides[after].extend(processor["special_tokens"][part["SpecialToken"]["id"]]["ids"])
    return sides


def begins_with_eot(fields: dict[str, Any], eot: str, eot_id: int) -> dict[str, Any]:
    """A tokenizer.json that puts eot before each text when special tokens are asked for; as it was
    where it puts something of its own there."""
    given = fields.get("post_processor")
    if any(added_by(given)):
        return fields
    first = {"SpecialToken": {"id": eot, "type_id": 0}}
    a, b = ({"Sequence": {"id": text, "type_id": i}} for i, text in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, {"SpecialToken": {"id": eot, "type_id": 1}}, b],
        "special_tokens": {eot: {"id": eot, "ids": [eot_id], "tokens": [eot]}},
    }
    return {**fields, "post_processor": template}


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte -> that byte.

    GPT-2's table (github.com/openai/gpt-2, encoder.py, ``bytes_to_unicode``): printable bytes stand
    for themselves, the others are counted up from U+0100.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def get_encoding(name: str) -> Any:  # noqa: ANN401
    """tiktoken's own encoding of that name. Raises: UserError without cache and network."""
    tiktoken = import_package("tiktoken")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network; a broken download
        raise UserError(
            f"tokenizer {name}: tiktoken has no cached copy and cannot download it "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder with its files, or run "
            "once where there is a network"
        ) from error
