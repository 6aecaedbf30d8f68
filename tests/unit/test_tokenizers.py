"""Tokenizers: exact round trips, bytes per id that add up, special tokens that stay text."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from microtron.data.shards import DatasetInfo, TokenizerInfo
from microtron.data.tokenizers import (
    EOT,
    ByteTokenizer,
    CharTokenizer,
    load_dataset_tokenizer,
    load_tokenizer,
    tokenizer_state,
)
from microtron.data.tokenizers_bpe import byte_alphabet, load_encoding
from microtron.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "tiktoken_cache"
TEXTS = ["", "Hello world", "Ünïcödé 四 \U0001f600\n\ttab", f"a {EOT} b </s>", "  \r\n  x  ", "\0"]


@pytest.fixture
def ranks(monkeypatch):
    """tiktoken's files: without them, or a network, nothing here can be compared with it."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or str(SHARED)
    if not Path(cache).is_dir():
        pytest.skip("needs tiktoken's ranks: set TIKTOKEN_CACHE_DIR to a folder with them")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)


def unicode_texts(count, seed=0):
    """Random strings over all planes, over ASCII, and over what tokenizers treat specially."""
    draw = random.Random(seed)
    special = "'sS'ſtTll'ReVE \n\r\t\u00a0\u2003\u0301éÉ1234５٣abcXYZǅʰ!?/.\u200b\u0130\u212a"
    anything = [*range(0xD800), *range(0xE000, 0x110000)]
    pools = [
        lambda: chr(draw.choice(anything)),
        lambda: chr(draw.randrange(0x20, 0x7F)),
        lambda: draw.choice(special),
    ]
    for i in range(count):
        text = "".join(pools[i % 3]() for _ in range(draw.randrange(60)))
        yield text + EOT + text[::-1] if i % 7 == 0 else text


def check_interface(tokenizer, texts):
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.eot_id] == 0
    assert 0 <= tokenizer.eot_id < tokenizer.vocab_size
    for text in texts:
        ids = tokenizer.encode_array(text)
        assert ids.dtype == ("uint16" if tokenizer.vocab_size <= 65536 else "uint32")
        assert ids.tolist() == tokenizer.encode(text)
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
    assert tokenizer.decode([tokenizer.eot_id]) == EOT
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"


def check_saved(tokenizer, folder):
    tokenizer.save(folder)
    again = load_tokenizer(tokenizer.name, folder)
    assert (again.name, again.vocab_size, again.eot_id, again.fingerprint) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.eot_id,
        tokenizer.fingerprint,
    )
    assert again.pieces == tokenizer.pieces
    return again


# -- byte and char --------------------------------------------------------------------------------


def test_byte():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    check_interface(tokenizer, [*TEXTS, *unicode_texts(50)])
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"


def test_char_is_nanogpts_sorted_alphabet(tmp_path):
    text = "hello \U0001f600 wörld\n"
    tokenizer = CharTokenizer(text + text)
    alphabet = sorted(set(text))
    assert tokenizer.encode(text) == [alphabet.index(char) for char in text]
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (len(alphabet), len(alphabet) + 1)
    check_interface(tokenizer, ["", text, "wörld"])
    check_saved(tokenizer, tmp_path)
    assert CharTokenizer(text + "!").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("char", ["\0", "i", "\U0010ffff"])
def test_char_names_a_character_it_does_not_know(char):
    with pytest.raises(UserError, match=f"U\\+{ord(char):04X}.*not among the 3"):
        CharTokenizer("ajz").encode("ajz" + char + "a")


def test_char_needs_its_file(tmp_path):
    with pytest.raises(UserError, match="made from a corpus"):
        load_tokenizer("char")
    with pytest.raises(UserError, match=r"char\.json cannot be read"):
        load_tokenizer("char", tmp_path)


# -- tiktoken -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hello", "vocab_size", "eot_id"),
    [("gpt2", [15496, 995], 50257, 50256), ("o200k_harmony", [13225, 2375], 201088, 199999)],
)
def test_tiktoken(ranks, tmp_path, name, hello, vocab_size, eot_id):
    import tiktoken

    tokenizer = load_tokenizer(name)
    assert tokenizer.encode("Hello world") == hello
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (vocab_size, eot_id)
    check_interface(tokenizer, [*TEXTS, *unicode_texts(100)])
    again = check_saved(tokenizer, tmp_path)
    upstream = tiktoken.get_encoding(name)
    for text in unicode_texts(300, seed=1):
        assert again.encode(text) == upstream.encode_ordinary(text)


def test_a_run_that_tiktokens_regex_gives_up_on_is_still_encoded(ranks):
    tokenizer = load_tokenizer("o200k_harmony")
    text = "before" + " " * 1_500_000 + "after"
    with pytest.raises(ValueError, match="stack"):
        tokenizer._encoding.encode_to_numpy(text, disallowed_special=())
    assert tokenizer.decode(tokenizer.encode_array(text)) == text


def test_no_cache_and_no_network_is_one_line(tmp_path, monkeypatch):
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):  # a closed port stands for no network
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="gpt2: .* TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


# -- tokenizer.json -------------------------------------------------------------------------------


def byte_level_json(folder, special=(EOT,), truncate=False):
    """A tokenizer.json of single bytes and one merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: byte for char, byte in byte_alphabet().items()} | {"ab": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken("<<ö>>", special=False, normalized=False)])
    if truncate:
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=50)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_json_by_file_folder_and_prefix(tmp_path):
    folder = byte_level_json(tmp_path / "t")
    for spec in (str(folder), str(folder / "tokenizer.json"), f"json:{folder}/tokenizer.json"):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.name == f"json:{folder}/tokenizer.json"
        assert tokenizer.encode("abc") == [256, 99]
        assert (tokenizer.eot_id, tokenizer.vocab_size) == (257, 259)
    check_interface(tokenizer, [*TEXTS, "x<<ö>>y", *unicode_texts(50)])
    assert tokenizer.encode("<<ö>>") == [258] and tokenizer.token_bytes()[258] == 6
    check_saved(tokenizer, tmp_path / "saved")


def test_json_truncation_and_padding_in_the_file_are_off(tmp_path):
    tokenizer = load_tokenizer(str(byte_level_json(tmp_path, truncate=True)))
    assert tokenizer.encode("xyzxyz") == list(b"xyzxyz")


@pytest.mark.parametrize(
    ("special", "config", "eot"),
    [
        (["</s>", EOT], None, EOT),
        (["<s>", "</s>"], {"eos_token": "<s>"}, "</s>"),
        (["<|end_of_text|>"], None, "<|end_of_text|>"),
        (["<stop>"], {"eos_token": "<stop>"}, "<stop>"),
        (["<stop>"], {"eos_token": {"content": "<stop>", "special": True}}, "<stop>"),
    ],
)
def test_json_finds_its_eot(tmp_path, special, config, eot):
    folder = byte_level_json(tmp_path, special)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eot_id == 257 + special.index(eot)
    assert not tokenizer.token_bytes()[257 : 257 + len(special)].any()
    assert check_saved(tokenizer, tmp_path / "saved").eot_id == tokenizer.eot_id


def test_json_refusals(tmp_path):
    folder = byte_level_json(tmp_path / "t", ["<stop>"])
    with pytest.raises(UserError, match="has none of .* and no eos_token"):
        load_tokenizer(str(folder))
    for content in ("{}", "nonsense"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json cannot be read") as caught:
            load_tokenizer(str(folder))
        assert "\n" not in str(caught.value)
    for spec in ("gpt3", str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(UserError, match="not one of byte, char, gpt2"):
            load_tokenizer(spec)


def test_json_ids_with_gaps(tmp_path):
    folder = byte_level_json(tmp_path)
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["vocab"]["ab"] = 700
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.vocab_size == 701 and tokenizer.encode("ab") == [700]
    assert tokenizer.token_bytes()[[699, 700]].tolist() == [0, 2]


def test_sentencepiece_like_vocabularies(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁": 257, "a": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = load_tokenizer(str(tmp_path))
    text = "a a é</s>"
    ids = made.encode_array(text)
    assert ids[:3].tolist() == [258, 257, 258] and made.eot_id not in ids
    assert made.decode(ids) == text
    assert made.token_bytes()[ids].sum() == len(text.encode())


def test_byte_alphabet_is_the_libraries():
    from tokenizers import pre_tokenizers

    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == ord(" ") and byte_alphabet()["Ċ"] == ord("\n")


# -- datasets -------------------------------------------------------------------------------------


def test_a_datasets_tokenizer_comes_from_its_own_files(tmp_path):
    char = CharTokenizer("abc")
    char.save(tmp_path / "tokenizer")
    info = TokenizerInfo("char", char.fingerprint, char.vocab_size, char.eot_id)
    DatasetInfo(info, "text:x", "uint16", {}).save(tmp_path)
    assert load_dataset_tokenizer(tmp_path).alphabet == "abc"
    CharTokenizer("abd").save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="char of .* has fingerprint"):
        load_dataset_tokenizer(tmp_path)
    DatasetInfo(None, "foreign", "uint16", {}).save(tmp_path)
    assert load_dataset_tokenizer(tmp_path) is None


def test_tokenizer_state_follows_the_file(tmp_path):
    folder = byte_level_json(tmp_path)
    state = tokenizer_state(str(folder))
    assert state == tokenizer_state(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    assert tokenizer_state(str(folder)) != state
    assert tokenizer_state("gpt2") == "gpt2"


def test_encoding_files_are_read_anew_each_time(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_encoding(tmp_path)
    fields = {"name": "x", "pat_str": ".", "special_tokens": {EOT: 256}}
    (tmp_path / "encoding.json").write_text(json.dumps(fields))
    for shift in (0, 1):
        import base64

        rows = [base64.b64encode(bytes([(i + shift) % 256])) + b" %d" % i for i in range(256)]
        (tmp_path / "ranks.tiktoken").write_bytes(b"\n".join(rows))
        assert load_encoding(tmp_path).encode_ordinary("b") == [98 - shift]


def test_fingerprints_differ():
    prints = {
        ByteTokenizer().fingerprint,
        CharTokenizer("ab").fingerprint,
        CharTokenizer("ac").fingerprint,
    }
    assert len(prints) == 3 and all(len(p) == 16 for p in prints)
