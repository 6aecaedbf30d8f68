"""train-bpe: the same ids from tokenizer.json, tiktoken and transformers."""

import json
import random

import pytest

from microtron.data.sources import documents
from microtron.data.tokenizers import EOT, load_tokenizer
from microtron.data.tokenizers_bpe import load_encoding
from microtron.data.train_bpe import PATTERN, train_bpe
from microtron.errors import UserError

CORPUS_BYTES = 400_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("bpe")
    return train_bpe(source="stdlib", vocab_size=1500, out=out, max_bytes=CORPUS_BYTES)


def texts():
    draw = random.Random(0)
    special = "'sS'ſtTll'ReVE \n\r\t\u00a0\u2003\u0301éÉ1234５٣abcXYZǅʰ!?/.\u200b\u0130\u212a"
    anything = [*range(0xD800), *range(0xE000, 0x110000)]
    for i in range(3000):
        pool = [anything, range(0x20, 0x7F), [ord(char) for char in special]][i % 3]
        text = "".join(chr(draw.choice(pool)) for _ in range(draw.randrange(60)))
        yield text + EOT + text[::-1] if i % 7 == 0 else text
    for _, document in zip(range(60), documents("stdlib"), strict=False):
        yield document.text[:5000]


def test_three_readers_give_the_same_ids(folder):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    by_tokenizers = Tokenizer.from_file(str(folder / "tokenizer.json"))
    by_tokenizers.encode_special_tokens = True
    by_tiktoken = load_encoding(folder)
    by_transformers = AutoTokenizer.from_pretrained(folder)
    merged = 0
    for text in texts():
        ids = by_tokenizers.encode(text, add_special_tokens=False).ids
        assert ids == by_tiktoken.encode_ordinary(text), repr(text)
        assert ids == by_transformers.encode(
            text, add_special_tokens=False, split_special_tokens=True
        ), repr(text)
        assert 1499 not in ids
        assert by_transformers.decode(ids, clean_up_tokenization_spaces=False) == text
        merged += sum(i >= 256 for i in ids)
    assert merged > 10_000
    assert by_transformers.eos_token_id == by_tiktoken.eot_token == 1499
    assert len(by_transformers) == by_tiktoken.n_vocab == 1500


def test_this_packages_reader_agrees_with_and_without_tiktokens_files(folder, tmp_path):
    fast = load_tokenizer(str(folder))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    slow = load_tokenizer(str(tmp_path))
    assert fast._twin is not None and slow._twin is None
    sizes = fast.token_bytes()
    for text in texts():
        ids = fast.encode(text)
        assert ids == slow.encode(text)
        assert fast.decode(ids) == text and sizes[ids].sum() == len(text.encode())
    fast.save(tmp_path / "copy")
    assert load_tokenizer(fast.name, tmp_path / "copy")._twin is not None


@pytest.mark.parametrize("change", ["pattern", "rank"])
def test_files_that_do_not_belong_together_are_not_mixed(folder, tmp_path, change):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if change == "pattern":
        fields = json.loads((tmp_path / "encoding.json").read_text())
        (tmp_path / "encoding.json").write_text(json.dumps(fields | {"pat_str": r"\w+|\W+"}))
    else:
        rows = (tmp_path / "ranks.tiktoken").read_bytes().splitlines()
        (one, a), (two, b) = rows[300].split(), rows[301].split()
        rows[300:302] = [two + b" " + a, one + b" " + b]
        (tmp_path / "ranks.tiktoken").write_bytes(b"\n".join(rows))
    mixed, good = load_tokenizer(str(tmp_path)), load_tokenizer(str(folder))
    text = next(documents("stdlib")).text
    assert mixed._twin is None and mixed.encode(text) == good.encode(text)


def test_training_is_deterministic(folder, tmp_path):
    train_bpe(source="stdlib", vocab_size=1500, out=tmp_path, max_bytes=CORPUS_BYTES)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["encoding.json", "ranks.tiktoken", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_only_eos_is_named(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == EOT
    assert not {"bos_token", "pad_token", "unk_token"} & config.keys()
    assert r"\p{N}{1,3}" in PATTERN and r"\p{N}{1,3}+" not in PATTERN


def test_a_text_too_small_for_the_vocabulary_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abab")
    train_bpe(source=f"text:{tmp_path}/a.txt", vocab_size=1000, out=tmp_path / "t")
    assert "yields" in capsys.readouterr().err
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert tokenizer.vocab_size == tokenizer.eot_id + 1 < 1000
    assert (
        tokenizer.encode("abab") != list(b"abab")
        and tokenizer.decode(tokenizer.encode("abab")) == "abab"
    )


def test_max_bytes_stops_reading(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("aaaa " * 50, "bbbb " * 50)] + ["broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    spec = f"jsonl:{tmp_path}/a.jsonl"
    train_bpe(source=spec, vocab_size=300, out=tmp_path / "t", max_bytes=10)
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert len(tokenizer.encode("aaaa")) < 4 and len(tokenizer.encode("bbbb")) == 4
    with pytest.raises(UserError, match="line 3 is not JSON"):
        train_bpe(source=spec, vocab_size=300, out=tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_refusals(folder, tmp_path):
    options = {"source": "stdlib", "vocab_size": 300, "max_bytes": 1000}
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(**options | {"vocab_size": 256}, out=tmp_path / "t")
    with pytest.raises(UserError, match="--max-bytes 0"):
        train_bpe(**options | {"max_bytes": 0}, out=tmp_path / "t")
    with pytest.raises(UserError, match="holds a tokenizer already.*--overwrite"):
        train_bpe(**options, out=folder)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        train_bpe(source=f"text:{tmp_path}/empty.txt", vocab_size=300, out=tmp_path / "t")
    with pytest.raises(UserError, match="cannot write the tokenizer"):
        train_bpe(**options, out=tmp_path / "empty.txt" / "t")
    assert not (tmp_path / "t").exists()
    train_bpe(**options, out=tmp_path / "t")
    train_bpe(**options | {"vocab_size": 280}, out=tmp_path / "t", overwrite=True)
    assert load_tokenizer(str(tmp_path / "t")).vocab_size == 280
