"""prepare: shards equal a naive reading of the corpus, whatever the workers.

Kills are in test_prepare_killed.py, refusals and the command in test_prepare_command.py.
"""

import gzip
import hashlib
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from microtron.data import prepare as module
from microtron.data import sources, workers
from microtron.data.prepare import prepare
from microtron.data.shards import DatasetInfo, check_shard, open_shard
from microtron.data.split import choose_split
from microtron.data.tokenizers import EOT, load_dataset_tokenizer, load_tokenizer
from microtron.data.train_bpe import train_bpe
from microtron.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WORK = "prepare.unfinished"
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}  # this code, in any folder


def corpus(count=60, seed=0):
    draw = random.Random(seed)
    words = ["alpha", "beta", "γάμμα", "四", "\U0001f600", "def f(x):\n", EOT, " ", "tail."]
    return [
        "".join(draw.choice(words) for _ in range(draw.randrange(1, 80))) + str(i)
        for i in range(count)
    ]


def write_corpus(path, texts):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return f"jsonl:{path}"


def side(text, fraction):
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") / 2**64 < fraction else "train"


def naive(texts, tokenizer, fraction):
    """split -> [ids of each document, eot first]."""
    splits = {"train": [], "val": []}
    for text in texts:
        splits[side(text, fraction)].append([tokenizer.eot_id, *tokenizer.encode(text)])
    return splits


def tokens_of(folder, split):
    info = DatasetInfo.load(folder)
    return np.concatenate([open_shard(Path(folder) / e.file) for e in info.split(split)]).tolist()


def files_of(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def refusal(**options):
    with pytest.raises(UserError) as caught:
        prepare(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    spec = write_corpus(folder / "a.jsonl", corpus())
    return train_bpe(source=spec, vocab_size=400, out=folder / "t")


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "char", "json"])
@pytest.mark.parametrize("shard_tokens", [37, 1000, 10**8])
def test_shards_hold_the_corpus(tmp_path, bpe, quick_disk, name, shard_tokens):
    texts = corpus()
    texts.insert(7, "")
    spec = write_corpus(tmp_path / "a.jsonl", texts)
    info = prepare(
        source=spec,
        tokenizer=str(bpe) if name == "json" else name,
        out=tmp_path / "out",
        val_fraction=0.3,
        shard_tokens=shard_tokens,
    )
    loaded = DatasetInfo.load(tmp_path / "out")
    assert loaded == info and loaded.source == spec
    texts.remove("")
    tokenizer = load_dataset_tokenizer(tmp_path / "out")
    if name == "char":
        assert tokenizer.alphabet == "".join(sorted(set("".join(texts))))
    assert (loaded.tokenizer.name, loaded.tokenizer.vocab_size, loaded.tokenizer.eot_id) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.eot_id,
    )
    sizes, total = tokenizer.token_bytes(), 0
    for split, documents in naive(texts, tokenizer, 0.3).items():
        entries = loaded.split(split)
        assert tokens_of(tmp_path / "out", split) == sum(documents, [])
        assert all(e.tokens == shard_tokens for e in entries[:-1])
        assert sum(e.documents for e in entries) == len(documents)
        for entry in entries:
            tokens = open_shard(tmp_path / "out" / entry.file)
            check_shard(tmp_path / "out" / entry.file, entry, deep=True)
            assert entry.documents == (tokens == tokenizer.eot_id).sum()
            assert entry.bytes == sizes[tokens].sum()
            total += entry.bytes
    assert total == sum(len(text.encode()) for text in texts)
    assert not (tmp_path / "out" / WORK).exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch, name, tokenizer):
    monkeypatch.setattr(module, "POOL_BYTES", 0)
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    monkeypatch.setattr(workers, "BATCH_CHARS", 1500)
    spec = write_corpus(tmp_path / name, corpus())
    for count in (1, 3):
        prepare(
            source=spec,
            tokenizer=tokenizer,
            out=tmp_path / str(count),
            workers=count,
            shard_tokens=2000,
            max_documents=50,
        )
    one, three = files_of(tmp_path / "1"), files_of(tmp_path / "3")
    assert one == three and len([f for f in one if f.startswith("train")]) > 2


def test_stdlib_is_prepared_and_what_was_left_out_is_told(tmp_path, monkeypatch, capsys):
    library = tmp_path / "library"
    library.mkdir()
    for i in range(4):
        (library / f"m{i}.py").write_text(f"x = {i}\n" * 9)
    (library / "bad.py").write_bytes(b"\xff\xfe")
    (library / "empty.py").write_text("")
    monkeypatch.setattr(sources, "_stdlib_root", lambda: str(library))
    prepare(source="stdlib", tokenizer="byte", out=tmp_path / "out", val_fraction=0.25)
    printed = capsys.readouterr()
    assert f"left out {library}/bad.py" in printed.err
    assert "left out 1 files that do not decode" in printed.err
    assert "left out 1 empty documents" in printed.err
    assert "4 documents" in printed.out and "bytes/token" in printed.out


# -- the validation split -------------------------------------------------------------------------


def test_duplicates_fall_on_the_same_side(tmp_path):
    texts = corpus(40)
    spec = write_corpus(tmp_path / "a.jsonl", texts + texts[::-1])
    prepare(source=spec, tokenizer="byte", out=tmp_path / "out", val_fraction=0.4)
    seen = {}
    for split in ("train", "val"):
        raw = tokens_of(tmp_path / "out", split)
        cuts = [i for i, token in enumerate(raw) if token == 256] + [len(raw)]
        seen[split] = {bytes(raw[a + 1 : b]) for a, b in zip(cuts, cuts[1:], strict=False)}
    assert not seen["train"] & seen["val"]
    assert len(seen["train"]) + len(seen["val"]) == 40 and min(map(len, seen.values())) > 5


def test_few_documents_leave_no_side_empty():
    """A hash that puts all on one side: the document nearest in size to the wanted share moves."""
    texts = ["a" * 1000, "b" * 100, "c" * 3000, "d" * 20]
    for fraction, wanted in ((1e-9, "d" * 20), (1 - 1e-9, "d" * 20)):
        rule = choose_split(texts, fraction, "x")
        alone = [text for text in texts if rule.is_val(text) == (fraction < 0.5)]
        assert alone == [wanted]
    rule = choose_split(texts, 0.0242 / 1e9, "x")
    assert choose_split(texts[::-1], 0.0242 / 1e9, "x") == rule
    many = [f"{i}" for i in range(10_000)]
    share = sum(map(choose_split(many, 0.05, "x").is_val, many)) / 10_000
    assert 0.04 < share < 0.06


def test_choosing_stops_reading_when_both_sides_have_a_document():
    read = []
    choose_split((read.append(i) or f"text {i}" for i in range(100_000)), 0.02, "x")
    assert len(read) < 1000


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_document_is_cut(tmp_path, copies):
    text = "".join(chr(0x100 + i % 700) for i in range(1001))
    spec = write_corpus(tmp_path / "a.jsonl", [text] * copies)
    prepare(
        source=spec,
        tokenizer="char",
        out=tmp_path / "out",
        val_fraction=0.1,
        max_documents=2,
        shard_tokens=500,
    )
    tokenizer = load_dataset_tokenizer(tmp_path / "out")
    at, taken = int(1001 * 0.9), min(copies, 2)
    for split, piece in (("train", text[:at]), ("val", text[at:])):
        assert (
            tokens_of(tmp_path / "out", split)
            == [tokenizer.eot_id, *tokenizer.encode(piece)] * taken
        )
    (tmp_path / "one.txt").write_text("x")
    assert "one character" in refusal(
        source=f"text:{tmp_path}/one.txt", tokenizer="byte", out=tmp_path / "no"
    )
    (tmp_path / "one.txt").write_text("xy")
    for fraction in (0.02, 0.9):
        prepare(
            source=f"text:{tmp_path}/one.txt",
            tokenizer="byte",
            out=tmp_path / "two",
            val_fraction=fraction,
            overwrite=True,
        )
        assert tokens_of(tmp_path / "two", "train") == [256, ord("x")]
        assert tokens_of(tmp_path / "two", "val") == [256, ord("y")]


def test_tiny_shakespeare_is_split_as_in_nanogpt(tmp_path, monkeypatch):
    """nanoGPT, data/shakespeare/readme.md: 301,966 and 36,059 tokens of gpt2; char: 1,003,854 and
    111,540, vocabulary 65."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or str(SHARED / "tiktoken_cache")
    text = SHARED / "tinyshakespeare.txt"
    if not Path(cache).is_dir() or not text.is_file():
        pytest.skip("needs tiktoken's ranks and tinyshakespeare.txt: set TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    for tokenizer, train, val in (("gpt2", 301_966, 36_059), ("char", 1_003_854, 111_540)):
        info = prepare(
            source=f"text:{text}", tokenizer=tokenizer, out=tmp_path / tokenizer, val_fraction=0.1
        )
        (first,), (second,) = info.split("train"), info.split("val")
        assert (first.tokens, second.tokens) == (train + 1, val + 1)
        assert first.bytes + second.bytes == text.stat().st_size
    assert info.tokenizer.vocab_size == 65 + 1
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    tokenizer = load_dataset_tokenizer(tmp_path / "gpt2")  # from the dataset's own files
    raw = text.read_text()
    assert tokenizer.decode(tokens_of(tmp_path / "gpt2", "val")[1:]) == raw[int(len(raw) * 0.9) :]


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_documents": 2},
        {"max_documents": 17},
        {"max_bytes": 1},
        {"max_bytes": 3000},
        {"max_documents": 20, "max_bytes": 2000},
        {"max_documents": 10**9},
    ],
)
def test_limits_take_the_first_documents(tmp_path, monkeypatch, name, limits):
    monkeypatch.setattr(sources, "PART_BYTES", 700)
    monkeypatch.setattr(workers, "BATCH_CHARS", 700)
    texts, wanted, size = corpus(), [], 0
    for text in texts:
        if len(wanted) >= limits.get("max_documents", 99) or size >= limits.get("max_bytes", 1e9):
            break
        wanted.append(text)
        size += len(text.encode())
    spec = write_corpus(tmp_path / name, ["", *texts])
    if len(wanted) < 60:  # what comes after the limit is not even looked at
        write_corpus(tmp_path / name, ["", *texts, 3])
    info = prepare(source=spec, tokenizer="char", out=tmp_path / "out", val_fraction=0.3, **limits)
    found = sum(e.bytes for split in info.splits.values() for e in split)
    assert found == size and 0 < len(wanted) <= 60
    alphabet = load_dataset_tokenizer(tmp_path / "out").alphabet
    assert alphabet == "".join(sorted(set("".join(wanted))))


# -- running again --------------------------------------------------------------------------------


def test_a_second_run_returns_at_once(tmp_path, capsys):
    options = {"source": "stdlib", "tokenizer": "byte", "out": tmp_path / "out"}
    first = prepare(**options)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    began = time.monotonic()
    assert prepare(**options) == first
    assert time.monotonic() - began < 0.5
    assert "already prepared" in capsys.readouterr().out
    assert prepare(**options, workers=1, overwrite=True) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer": "char"}, "tokenizer: byte there, char now"),
        ({"val_fraction": 0.4}, "val-fraction: 0.3 there, 0.4 now"),
        ({"shard_tokens": 999}, "shard-tokens: 1000 there, 999 now"),
        ({"max_documents": 30}, "max-documents: None there, 30 now"),
        ({"max_bytes": 3000}, "max-bytes: None there, 3000 now"),
        ({"field": "text2"}, "field: text there, text2 now"),
        ({"source": "stdlib"}, "source: jsonl:"),
    ],
)
def test_other_settings_are_refused_by_name_unless_overwritten(tmp_path, change, told):
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    options = {
        "source": spec,
        "tokenizer": "byte",
        "out": tmp_path / "out",
        "val_fraction": 0.3,
        "shard_tokens": 1000,
    }
    prepare(**options)
    before = files_of(tmp_path / "out")
    message = refusal(**options | change)
    assert told in message and "--overwrite" in message and "another --out" in message
    assert files_of(tmp_path / "out") == before
    if change.keys() & {"field", "source"}:
        return
    prepare(**options | change, overwrite=True)
    prepare(**options | change | {"out": tmp_path / "fresh"})
    assert files_of(tmp_path / "out").keys() >= files_of(tmp_path / "fresh").keys()
    for name, content in files_of(tmp_path / "fresh").items():
        assert files_of(tmp_path / "out")[name] == content


def test_a_changed_corpus_is_noticed(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    options = {"source": spec, "tokenizer": "byte", "out": tmp_path / "out"}
    prepare(**options)
    write_corpus(tmp_path / "a.jsonl", corpus(61))
    assert "other settings (files of the source)" in refusal(**options)
    prepare(**options, overwrite=True)
    assert sum(len(t.encode()) for t in corpus(61)) == sum(
        e.bytes for split in DatasetInfo.load(tmp_path / "out").splits.values() for e in split
    )


def test_foreign_shards_are_not_touched(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    options = {"source": spec, "tokenizer": "byte", "out": tmp_path / "out"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_000007.bin").write_bytes(b"mine")
    (tmp_path / "out" / "notes.txt").write_bytes(b"mine too")
    assert "did not make" in refusal(**options)
    assert set(files_of(tmp_path / "out")) == {"train_000007.bin", "notes.txt"}
    prepare(**options, overwrite=True)
    assert "train_000007.bin" not in files_of(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "sidecar"])
def test_a_damaged_dataset_is_made_again(tmp_path, damage, capsys):
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    options = {"source": spec, "tokenizer": "byte", "out": tmp_path / "out", "shard_tokens": 1000}
    prepare(**options)
    before = files_of(tmp_path / "out")
    path = tmp_path / "out" / "train_000001.bin"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        (tmp_path / "out" / "dataset.json").unlink()
    prepare(**options)
    assert "already prepared" not in capsys.readouterr().out.splitlines()[-1]
    assert files_of(tmp_path / "out") == before


def test_special_tokens_in_documents_stay_text(tmp_path, bpe):
    assert any(EOT in text for text in corpus())
    tokenizer = load_tokenizer(str(bpe))
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    prepare(source=spec, tokenizer=str(bpe), out=tmp_path / "out")
    tokens = tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "val")
    assert tokens.count(tokenizer.eot_id) == 60
