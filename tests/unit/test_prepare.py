"""prepare: shards equal a naive reading of the corpus, whatever the workers and the kills.

The kill tests run ``KILLER`` in a process of its own, which forks a prepare for every file
operation and kills it there.
"""

import fcntl
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from microtron.data import prepare as module
from microtron.data import prepare_report, sources, workers
from microtron.data.prepare import prepare
from microtron.data.shards import DatasetInfo, check_shard, open_shard
from microtron.data.split import choose_split
from microtron.data.tokenizers import EOT, CharTokenizer, load_dataset_tokenizer, load_tokenizer
from microtron.data.train_bpe import train_bpe
from microtron.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WORK = "prepare.unfinished"
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}  # this code, in any folder


def corpus(count=60, seed=0):
    draw = random.Random(seed)
    words = ["alpha", "beta", "γάμμα", "四", "\U0001f600", "def f(x):\n", EOT, " ", "tail."]
    return ["".join(draw.choice(words) for _ in range(draw.randrange(1, 80))) + str(i)
            for i in range(count)]


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
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refusal(**options):
    with pytest.raises(UserError) as caught:
        prepare(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def quick_disk(monkeypatch):
    """Without fsync, which costs milliseconds a call and guards against power failure alone."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


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
    info = prepare(source=spec, tokenizer=str(bpe) if name == "json" else name,
                   out=tmp_path / "out", val_fraction=0.3, shard_tokens=shard_tokens)
    loaded = DatasetInfo.load(tmp_path / "out")
    assert loaded == info and loaded.source == spec
    texts.remove("")
    tokenizer = load_dataset_tokenizer(tmp_path / "out")
    if name == "char":
        assert tokenizer.alphabet == "".join(sorted(set("".join(texts))))
    assert (loaded.tokenizer.name, loaded.tokenizer.vocab_size, loaded.tokenizer.eot_id) == (
        tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id)
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
        prepare(source=spec, tokenizer=tokenizer, out=tmp_path / str(count), workers=count,
                shard_tokens=2000, max_documents=50)
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
    prepare(source=spec, tokenizer="char", out=tmp_path / "out", val_fraction=0.1,
            max_documents=2, shard_tokens=500)
    tokenizer = load_dataset_tokenizer(tmp_path / "out")
    at, taken = int(1001 * 0.9), min(copies, 2)
    for split, piece in (("train", text[:at]), ("val", text[at:])):
        assert tokens_of(tmp_path / "out", split) == [
            tokenizer.eot_id, *tokenizer.encode(piece)] * taken
    (tmp_path / "one.txt").write_text("x")
    assert "one character" in refusal(
        source=f"text:{tmp_path}/one.txt", tokenizer="byte", out=tmp_path / "no")
    (tmp_path / "one.txt").write_text("xy")
    for fraction in (0.02, 0.9):
        prepare(source=f"text:{tmp_path}/one.txt", tokenizer="byte", out=tmp_path / "two",
                val_fraction=fraction, overwrite=True)
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
        info = prepare(source=f"text:{text}", tokenizer=tokenizer, out=tmp_path / tokenizer,
                       val_fraction=0.1)
        (first,), (second,) = info.split("train"), info.split("val")
        assert (first.tokens, second.tokens) == (train + 1, val + 1)
        assert first.bytes + second.bytes == text.stat().st_size
    assert info.tokenizer.vocab_size == 65 + 1
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    tokenizer = load_dataset_tokenizer(tmp_path / "gpt2")  # from the dataset's own files
    raw = text.read_text()
    assert tokenizer.decode(tokens_of(tmp_path / "gpt2", "val")[1:]) == raw[int(len(raw) * 0.9):]


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("limits", [
    {"max_documents": 2}, {"max_documents": 17}, {"max_bytes": 1}, {"max_bytes": 3000},
    {"max_documents": 20, "max_bytes": 2000}, {"max_documents": 10**9},
])
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


@pytest.mark.parametrize(("change", "told"), [
    ({"tokenizer": "char"}, "tokenizer: byte there, char now"),
    ({"val_fraction": 0.4}, "val-fraction: 0.3 there, 0.4 now"),
    ({"shard_tokens": 999}, "shard-tokens: 1000 there, 999 now"),
    ({"max_documents": 30}, "max-documents: None there, 30 now"),
    ({"max_bytes": 3000}, "max-bytes: None there, 3000 now"),
    ({"field": "text2"}, "field: text there, text2 now"),
    ({"source": "stdlib"}, "source: jsonl:"),
])
def test_other_settings_are_refused_by_name_unless_overwritten(tmp_path, change, told):
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    options = {"source": spec, "tokenizer": "byte", "out": tmp_path / "out",
               "val_fraction": 0.3, "shard_tokens": 1000}
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
        e.bytes for split in DatasetInfo.load(tmp_path / "out").splits.values() for e in split)


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


# -- killed ---------------------------------------------------------------------------------------

KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
from microtron.data import prepare as module, prepare_report, sources, workers

module.CHECKPOINT_S = 0
sources.PART_BYTES = workers.BATCH_CHARS = 700
options, step = json.loads(sys.argv[1]), int(sys.argv[2])

def run(kill_at):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "fsync"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = lambda fd: sys.audit("fsync")  # a killed process loses nothing that was written
    sys.addaudithook(hook)
    module.prepare(**options, out=Path(f"{kill_at}" if kill_at else "whole"), workers=1)
    os._exit(0)

assert run(0) == 0
for moment in range(1, 10_000, step):
    if os.path.isdir("old"):
        shutil.copytree("old", f"{moment}")
    if run(moment) == 0:
        print(*range(1, moment, step))
        break
"""


def run_killer(folder, options, step=1):
    """The moments (1st, 2nd, .. file operation) at which folders of that name were left behind."""
    done = subprocess.run([sys.executable, "-c", KILLER, json.dumps(options), str(step)],
                          cwd=folder, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    return [int(moment) for moment in done.stdout.split()]


def loads_as(folder, complete):
    """The dataset that a reader who checks sizes alone takes the folder for: one of ``complete``,
    or none."""
    try:
        info = DatasetInfo.load(folder)
        for split in ("train", "val"):
            for entry in info.split(split):
                check_shard(folder / entry.file, entry)
    except UserError:
        return None
    (name,) = [name for name, files in complete.items()
               if all(files_of(folder)[f] == files[f] for f in files if f.endswith(".bin"))]
    assert (folder / "dataset.json").read_bytes() == complete[name]["dataset.json"]
    return name


@pytest.mark.parametrize(("name", "step"), [("a.jsonl", 1), ("a.jsonl.gz", 5)])
def test_killed_at_any_file_operation_it_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, capsys, quick_disk, name, step
):
    monkeypatch.setattr(sources, "PART_BYTES", 700)
    monkeypatch.setattr(workers, "BATCH_CHARS", 700)
    spec = write_corpus(tmp_path / name, corpus(9))
    options = {"source": spec, "tokenizer": "char", "shard_tokens": 600, "val_fraction": 0.2}
    moments = run_killer(tmp_path, options, step)
    complete = {"whole": files_of(tmp_path / "whole")}
    assert len(moments) * step > 60
    assert len([f for f in complete["whole"] if f.startswith("train")]) > 2
    resumed, told = 0, set()
    read = module.list_tasks

    def note_start(parts, field, start=(0, 0)):
        told.add(start)
        return read(parts, field, start)

    monkeypatch.setattr(module, "list_tasks", note_start)
    for moment in moments:
        out = tmp_path / str(moment)
        if not out.exists():  # killed before anything was written
            continue
        unfinished = loads_as(out, complete) is None
        for path in (out / WORK).glob("*.bin"):  # a shard that passes its check has its content
            check_shard(path)
            assert path.read_bytes() == complete["whole"][path.name]
        prepare(**options, out=out, workers=1)
        shown = {f: c for f, c in files_of(out).items() if not f.startswith(WORK)}
        assert shown == complete["whole"]
        resumed += unfinished
    assert "starting anew" not in capsys.readouterr().err
    assert resumed * step > 50 and len(told) > 2  # it went on from where it was, not from the start


def test_an_overwrite_killed_at_any_file_operation_leaves_the_old_the_new_or_none(
    tmp_path, quick_disk
):
    """Old and new hold as many tokens: only their contents tell them apart."""
    texts = [f"{text} {i}".encode("ascii", "ignore").decode() for i, text in enumerate(corpus(6))]
    spec = write_corpus(tmp_path / "a.jsonl", texts)
    options = {"source": spec, "tokenizer": "byte", "shard_tokens": 700, "val_fraction": 0.2}
    prepare(**options, out=tmp_path / "old")
    complete = {"old": files_of(tmp_path / "old")}
    options |= {"tokenizer": "char", "overwrite": True}
    moments = run_killer(tmp_path, options)
    complete["whole"] = files_of(tmp_path / "whole")
    old, new = DatasetInfo.load(tmp_path / "old"), DatasetInfo.load(tmp_path / "whole")
    assert [e.tokens for e in old.split("train")] == [e.tokens for e in new.split("train")]
    assert old.fingerprint("train") != new.fingerprint("train")
    states = []
    for moment in moments:
        out = tmp_path / str(moment)
        states.append(loads_as(out, complete))
        prepare(**options, out=out, workers=1)
        assert loads_as(out, complete) == "whole"
    assert set(states) == {"old", None, "whole"}
    assert states == sorted(states, key=["old", None, "whole"].index)


def test_kill_9_with_workers_leaves_no_process_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 20_000)
    spec = write_corpus(tmp_path / "a.jsonl", corpus(3000))
    options = {"source": spec, "tokenizer": "char", "shard_tokens": 50_000, "val_fraction": 0.1}
    code = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from microtron.data import prepare as module, sources\n"
        "module.Progress.update = lambda self, size: time.sleep(0.1)\n"
        "module.CHECKPOINT_S, module.POOL_BYTES, sources.PART_BYTES = 0, 0, 20_000\n"
        "module.prepare(**json.loads(sys.argv[1]), out=Path(sys.argv[2]), workers=2)\n"
    )
    prepare(**options, out=tmp_path / "whole")
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(options), str(out)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    deadline = time.monotonic() + 60
    while not (state := out / WORK / "state.json").exists() or not json.loads(
            state.read_text())["documents"]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children
    assert not psutil.wait_procs(children, timeout=20)[1], "workers outlive a killed prepare"
    assert loads_as(out, {"whole": files_of(tmp_path / "whole")}) is None
    prepare(**options, out=out)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_unfinished_work_of_other_settings_is_refused_by_name(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", [*corpus(), 3])
    options = {"source": spec, "tokenizer": "byte", "out": tmp_path / "out", "val_fraction": 0.3}
    assert "line 61" in refusal(**options)
    assert "tokenizer: byte there, char now" in refusal(**options | {"tokenizer": "char"})
    assert "line 61" in refusal(**options)


@pytest.mark.parametrize("damage", ["spool", "shard", "parts"])
def test_unfinished_work_that_was_damaged_starts_anew(
    tmp_path, monkeypatch, quick_disk, damage, capsys
):
    monkeypatch.setattr(sources, "PART_BYTES", 700)
    monkeypatch.setattr(module, "CHECKPOINT_S", 0)
    (good := corpus()).append("the end")
    options = {"tokenizer": "byte", "out": tmp_path / "out", "shard_tokens": 900,
               "source": write_corpus(tmp_path / "a.jsonl", good)}
    with monkeypatch.context() as patch:
        patch.setattr(module.Spool, "finish", lambda self: (_ for _ in ()).throw(OSError("pulled")))
        assert "pulled" in refusal(**options)
    work = tmp_path / "out" / WORK
    if damage == "parts":  # as another version might cut them: the position would mean another
        monkeypatch.setattr(sources, "PART_BYTES", 800)
    else:
        path = sorted(work.glob("train_*.spool" if damage == "spool" else "train_*.bin"))[-1]
        path.write_bytes(path.read_bytes()[:-4])
    prepare(**options)
    assert "starting anew" in capsys.readouterr().err
    prepare(**options | {"out": tmp_path / "whole"})
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    (tmp_path / "out" / WORK).mkdir(parents=True)
    with open(tmp_path / "out" / WORK / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another `microtron prepare` is writing" in refusal(
            source=spec, tokenizer="byte", out=tmp_path / "out")
    prepare(source=spec, tokenizer="byte", out=tmp_path / "out")


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_nothing_half_valid(tmp_path):
    spec = write_corpus(tmp_path / "a.jsonl", corpus(400))
    options = {"source": spec, "tokenizer": "byte", "shard_tokens": 20_000}
    code = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from microtron.data.prepare import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (35_000, 35_000))\n"
        "prepare(**json.loads(sys.argv[1]), out=Path('out'), workers=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(options)], cwd=tmp_path,
                          capture_output=True, text=True, env=ENV)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "UserError: cannot write the dataset out: File too large; free space" in last
    assert [p.name for p in (tmp_path / "out").iterdir()] == [WORK]
    assert not list((tmp_path / "out" / WORK).glob("*.bin*"))
    prepare(**options, out=tmp_path / "out")
    prepare(**options, out=tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    good = write_corpus(tmp_path / "a.jsonl", corpus())
    options = {"source": good, "tokenizer": "byte", "out": tmp_path / "out"}
    empty = write_corpus(tmp_path / "empty.jsonl", ["", ""])
    for change, told in (
        ({"source": "nonsense"}, "is not one of: stdlib"),
        ({"source": f"text:{tmp_path}/*.nothing"}, "matches no file"),
        ({"source": empty}, "holds no text"),
        ({"field": "body"}, "has no field 'body'"),
        ({"tokenizer": "gpt3"}, "not one of byte, char"),
        ({"val_fraction": 0.0}, "--val-fraction 0.0 is not between 0 and 1"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
        ({"shard_tokens": 2**31}, "--shard-tokens 2147483648"),
        ({"workers": 0}, "--workers 0"),
        ({"max_documents": 0}, "--max-documents 0"),
        ({"max_bytes": -1}, "--max-bytes -1"),
    ):
        assert told in refusal(**options | change)
        assert not (tmp_path / "out").exists(), told
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "cannot write the dataset" in refusal(**options | {"out": out})


def test_an_error_in_a_worker_arrives_as_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POOL_BYTES", 0)
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    spec = write_corpus(tmp_path / "a.jsonl", [*corpus(), 3])
    assert "a.jsonl, line 61: field 'text' is int" in refusal(
        source=spec, tokenizer="byte", out=tmp_path / "out", workers=2)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match="one of 2 worker processes died"):
        list(workers.run_tasks(os._exit, [3, 3], 2))


def test_an_unknown_character_cannot_come_from_the_corpus_itself(tmp_path):
    """A char tokenizer of another corpus is not mistaken for this one's."""
    CharTokenizer("xyz").save(tmp_path / "out" / "tokenizer")
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    prepare(source=spec, tokenizer="char", out=tmp_path / "out")
    assert load_dataset_tokenizer(tmp_path / "out").alphabet != "xyz"


# -- the command ----------------------------------------------------------------------------------


def run_cli(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "microtron.cli", "prepare", *arguments], cwd=cwd,
                          capture_output=True, text=True, env=ENV)


def test_the_command_line(tmp_path):
    write_corpus(tmp_path / "a.jsonl", corpus())
    options = ["--source", "jsonl:*.jsonl", "--tokenizer", "byte", "--out", "out"]
    done = run_cli(*options, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "60 documents in" in done.stdout and "tokens" in done.stdout
    done = run_cli(*options, "--val-fraction", "0.5", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: out was prepared with other settings")
    assert done.stderr.count("\n") == 1
    done = run_cli("--help", cwd=tmp_path)
    assert "--shard-tokens" in done.stdout and "Tokens in a shard file" in done.stdout


def test_importing_is_light():
    code = (
        "import sys, microtron.data.prepare, microtron.data.train_bpe\n"
        "heavy = {'torch', 'datasets', 'pyarrow', 'tiktoken', 'tokenizers', 'transformers'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    tmp_path, monkeypatch, capsys, terminal
):
    monkeypatch.setattr(prepare_report, "LINE_S", 0)
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    prepare(source=spec, tokenizer="byte", out=tmp_path / "out")
    printed = capsys.readouterr().err
    assert ("\r" in printed and "100%" in printed) == terminal
    assert ("MB/s" in printed.splitlines()[-1] and "\r" not in printed) == (not terminal)


def test_special_tokens_in_documents_stay_text(tmp_path, bpe):
    assert any(EOT in text for text in corpus())
    tokenizer = load_tokenizer(str(bpe))
    spec = write_corpus(tmp_path / "a.jsonl", corpus())
    prepare(source=spec, tokenizer=str(bpe), out=tmp_path / "out")
    tokens = tokens_of(tmp_path / "out", "train") + tokens_of(tmp_path / "out", "val")
    assert tokens.count(tokenizer.eot_id) == 60
