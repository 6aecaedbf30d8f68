"""Tokenizer files that transformers' ``AutoTokenizer`` loads, for every tokenizer of `data/`.

    write_tokenizer(load_tokenizer("gpt2"), "exports/mine")

tokenizer.json is written out here rather than converted by transformers: ids are then ours by
construction, and a test compares them. Three choices decide whether they stay so:

* A literal ``<|endoftext|>`` inside a text is text, as it was in training
  (``split_special_tokens``). A file with a chat template is left alone, as templates are made of
  special tokens.
* Special tokens, when asked for, put eot before the text: every training document begins so.
* The pattern that cuts text into words is respelled where the library's regular expressions read
  it differently from tiktoken's.
"""

from pathlib import Path
from typing import Any

from microtron.data.tokenizers import EOT, ByteTokenizer, CharTokenizer, Tokenizer, write_file
from microtron.data.tokenizers_bpe import (
    JsonTokenizer,
    TiktokenTokenizer,
    begins_with_eot,
    byte_alphabet,
    to_text,
)
from microtron.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# transformers' own names for "whatever tokenizer.json says", version 5 and before
_FAST = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def write_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, *, max_length: int | None = None
) -> None:
    """Writes tokenizer.json and tokenizer_config.json (and the chat template, if there is one).

    Args:
        tokenizer: Any of this package; a tokenizer.json is passed on as it is.
        folder: Where to; made if it is not there.
        max_length: Tokens that the model was made for (``model_max_length``).

    Raises: UserError for a kind of tokenizer that has no such form.
    """
    if isinstance(tokenizer, JsonTokenizer):
        fields, config = tokenizer.fields, tokenizer.config
        if tokenizer.chat_template is not None:
            write_file(folder, "chat_template.jinja", tokenizer.chat_template)
    else:
        fields, config = begins_with_eot(_fields(tokenizer), EOT, tokenizer.eot_id), {}
    config = _config(tokenizer, config, max_length)
    write_file(folder, "tokenizer.json", to_text(fields))
    write_file(folder, "tokenizer_config.json", to_text(config))


def splits_special(tokenizer: Tokenizer) -> bool:
    """Whether the name of a special token inside a text is text to `AutoTokenizer`, too."""
    if not isinstance(tokenizer, JsonTokenizer):
        return True
    said = tokenizer.config.get("split_special_tokens")
    return not tokenizer.chats if said is None else bool(said)


def _config(tokenizer: Tokenizer, given: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """tokenizer_config.json: what the file says, and ours where it says nothing."""
    eot = EOT
    if isinstance(tokenizer, JsonTokenizer):
        eot = tokenizer.eot
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eot,
        "pad_token": eot,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": splits_special(tokenizer),
    }
    if tokenizer.prefix_ids == [tokenizer.eot_id]:
        config["bos_token"] = eot
    if max_length is not None:
        config["model_max_length"] = max_length
    # auto_map names code that does not travel: transformers would ask to download and run it
    config |= {k: v for k, v in given.items() if v is not None and k != "auto_map"}
    config["tokenizer_class"] = _FAST.get(config["tokenizer_class"], config["tokenizer_class"])
    return config


def _fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json as a dictionary, without a post-processor."""
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_fields(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        return _char_fields(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _rank_fields(tokenizer)
    raise UserError(
        f"tokenizer {tokenizer.name} ({type(tokenizer).__name__}) cannot be written as a "
        "tokenizer.json; use byte, char, tiktoken's or a tokenizer.json"
    )


def _byte_fields(tokenizer: ByteTokenizer) -> dict[str, Any]:
    model = _bpe_model(dict(byte_alphabet()), [])
    cut = {"pre_tokenizer": _byte_level(), "decoder": _byte_level()}
    return _assemble(model, {EOT: tokenizer.eot_id}, **cut)


def _char_fields(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Every character a word. One that the alphabet lacks is an error, as it is in ours: there is
    no "unknown" among the ids that the library could fall back on."""
    vocab = {char: i for i, char in enumerate(tokenizer.alphabet)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    cut = {"pre_tokenizer": _split(r"[\s\S]"), "decoder": {"type": "Fuse"}}
    return _assemble(model, {EOT: tokenizer.eot_id}, **cut)


def _rank_fields(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    letter = {byte: char for char, byte in byte_alphabet().items()}
    named = {i: name for name, i in reversed(tokenizer.special_tokens.items())}  # one has two names
    vocab, special = {}, {}
    for i, piece in enumerate(tokenizer.pieces):
        if piece:
            vocab["".join(letter[byte] for byte in piece)] = i
        else:  # the library counts added tokens on, without gaps
            special[named.get(i, f"<|unused_{i}|>")] = i
    cuts = [_split(_respelled(tokenizer.pattern)), _byte_level()]
    pre_tokenizer = {"type": "Sequence", "pretokenizers": cuts}
    model = _bpe_model(vocab, merges_of(vocab))
    return _assemble(model, special, pre_tokenizer=pre_tokenizer, decoder=_byte_level())


def merges_of(vocab: dict[str, int]) -> list[str]:
    """Every way to make a token of two others, ``"a b"``, in the order of the tokens made.

    tiktoken joins any two neighbours whose bytes together are a token, the least first; a merge
    list that leaves no pair out is the same rule.
    """
    merges = []
    for token in sorted(vocab, key=vocab.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(vocab[a], vocab[b], f"{a} {b}") for a, b in pairs if a in vocab and b in vocab]
        merges += [pair for _, _, pair in sorted(pairs)]
    return merges


def _respelled(pattern: str) -> str:
    """tiktoken's pattern for Oniguruma: there ``{1,3}+`` repeats instead of being possessive (the
    alternative has nothing to give back, so greedy is the same), and ``$`` ends every line."""
    return pattern.replace("}+", "}").replace("$", r"\z")


def _bpe_model(vocab: dict[str, int], merges: list[str]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a word that is a token is taken whole, as tiktoken does
        "vocab": vocab,
        "merges": merges,
    }


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    return {**split, "behavior": "Isolated", "invert": False}


def _byte_level() -> dict[str, Any]:
    off = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "ByteLevel", **off}


def _assemble(
    model: dict[str, Any],
    special: dict[str, int],
    *,
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any],
) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = sorted((i, content) for content, i in special.items())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": c, **plain, "special": True} for i, c in added],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
