"""``microtron train-bpe``: trains a byte-level BPE tokenizer on the documents of a source.

    microtron train-bpe --source stdlib --vocab-size 8192 --out data/bpe
    microtron prepare --source stdlib --tokenizer data/bpe --out data/stdlib-bpe

One training, three readers with the same ids: ``tokenizer.json`` (`tokenizers`, and `transformers`
through ``tokenizer_config.json``) and ``ranks.tiktoken`` with ``encoding.json`` (tiktoken). That
holds because the training knows no special tokens, so an id is the rank of its merge, and because
the pattern that cuts text into words avoids what the two regular expression engines read
differently. ``<|endoftext|>`` gets the last id. Training is deterministic.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microtron.data.optional import import_package
from microtron.data.sources import documents
from microtron.data.tokenizers import EOT, write_file
from microtron.data.tokenizers_bpe import begins_with_eot, byte_alphabet, save_encoding, to_text
from microtron.errors import UserError

# OpenAI's o200k pattern (github.com/openai/tiktoken, openai_public.py): words with their leading
# blank and contraction, numbers by three digits, runs of punctuation, line ends. cl100k's
# `\p{N}{1,3}+` would be possessive in tiktoken and a repetition in Oniguruma.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_bpe(
    *,
    source: str,
    vocab_size: int,
    out: Path,
    field: str = "text",
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Trains a byte-level BPE tokenizer for tiktoken, tokenizers and transformers.

    Args:
        source: stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB or hf:NAME[:CONFIG] (quote a GLOB).
        vocab_size: Ids in all: 256 bytes, the merges, and <|endoftext|> as the last.
        out: The folder to write tokenizer.json and its companions to.
        field: Field or column of the text (jsonl, parquet, hf).
        max_bytes: Read documents until the text reaches so many bytes (some 100 MB will do).
        overwrite: Replace a tokenizer that is there already.

    Returns: ``out``. Raises: UserError for a vocabulary below 257, a source without text, a folder
        with a tokenizer in it, a disk that cannot be written.
    """
    out = Path(out).expanduser()
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size} is less than 256 bytes and {EOT}: at least 257")
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"--max-bytes {max_bytes} is less than 1; leave it out to read everything")
    if (out / "tokenizer.json").exists() and not overwrite:
        raise UserError(
            f"{out} holds a tokenizer already; pass --overwrite to replace it (data prepared with "
            "it keep their copy), or name another --out"
        )
    tokenizer = _train(_texts(source, field, max_bytes), source, vocab_size)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        print(
            f"train-bpe: the text yields {size:,} ids, not {vocab_size:,}: no pair of tokens is "
            "left to merge; read more text or ask for less",
            file=sys.stderr,
        )
    try:
        _save(tokenizer, out)
    except OSError as error:
        raise UserError(
            f"cannot write the tokenizer to {out}: {error.strerror or error}; free space or name "
            "another --out"
        ) from error
    print(f"trained {out}: {size:,} ids, {EOT} is {size - 1}")
    return out


def _texts(source: str, field: str, max_bytes: int | None) -> Iterator[str]:
    size, left_out = 0, []
    for document in documents(source, field=field, left_out=left_out):
        if max_bytes is not None and size >= max_bytes:
            break
        size += len(document.text.encode())
        yield document.text
    for line in left_out:
        print(f"train-bpe: left out {line}", file=sys.stderr)


def _train(texts: Iterator[str], source: str, vocab_size: int) -> Any:  # noqa: ANN401
    tokenizers = import_package("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    first = next((text for text in texts if text), None)
    if first is None:
        raise UserError(f"source {source} holds no text; name another --source or --field")
    # tiktoken takes a word that is a token as it is; ignore_merges makes this library do so too
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )

    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    tokenizer.add_special_tokens([EOT])
    return tokenizer


def _save(tokenizer: Any, out: Path) -> None:  # noqa: ANN401
    tiktoken = import_package("tiktoken")
    alphabet = byte_alphabet()
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    ranks = {bytes(alphabet[char] for char in token): i for token, i in vocab.items()}
    special = {EOT: len(ranks)}
    encoding = tiktoken.Encoding(
        "microtron-bpe",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens=special,
        explicit_n_vocab=len(ranks) + 1,
    )
    save_encoding(encoding, out)
    # no bos_token: TorchTitan 0.2.2 loses the eos id where the two are the same
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOT,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    write_file(out, "tokenizer_config.json", to_text(config))
    fields = begins_with_eot(json.loads(tokenizer.to_str()), EOT, special[EOT])
    write_file(out, "tokenizer.json", to_text(fields))
