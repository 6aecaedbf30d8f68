"""Shards on disk: the bytes of llm.c's layout, and that no damage goes unnoticed."""

import hashlib
import json
import os
import shutil
import struct

import numpy as np
import pytest

from microtron.data import shards
from microtron.data.checks import VERIFIED, check_datasets, verify_split
from microtron.data.shards import (
    DatasetInfo,
    ShardInfo,
    ShardWriter,
    TokenizerInfo,
    check_shard,
    dtype_for,
    open_shard,
    read_header,
)
from microtron.errors import UserError

TOKENIZER = TokenizerInfo("byte", "0123456789abcdef", 257, 256)


def write_shard(path, ids, dtype="uint16"):
    with ShardWriter(path, dtype) as shard:
        shard.write(np.asarray(ids))
    return ShardInfo(path.name, shard.tokens, 0, 1, shard.sha256)


def write_dataset(folder, train, val=(), dtype="uint16", tokenizer=TOKENIZER):
    folder.mkdir(exist_ok=True)
    splits = {"train": list(train), "val": list(val)}
    entries = {
        name: [
            write_shard(folder / f"{name}_{i:06d}.bin", ids, dtype) for i, ids in enumerate(lists)
        ]
        for name, lists in splits.items()
    }
    DatasetInfo(tokenizer, "test", dtype, entries).save(folder)
    return folder


def foreign_bytes(ids, magic=20240520, version=1, code="H", count=None):
    """A shard as llm.c writes it, from its description alone."""
    count = len(ids) if count is None else count
    header = struct.pack("<3i", magic, version, count) + bytes(253 * 4)
    return header + struct.pack(f"<{len(ids)}{code}", *ids)


@pytest.mark.parametrize(
    ("dtype", "magic", "version", "code", "top"),
    [("uint16", 20240520, 1, "H", 65535), ("uint32", 20240801, 7, "I", 2**32 - 1)],
)
def test_layout_is_llm_c_s(tmp_path, dtype, magic, version, code, top):
    ids = [0, 1, 50256, top]
    path = tmp_path / "x.bin"
    with ShardWriter(path, dtype) as shard:
        shard.write(np.array(ids[:3], dtype=np.int64))
        shard.write(np.array([], dtype=np.int64))
        shard.write(np.array(ids[3:], dtype=np.uint32))
    raw = path.read_bytes()
    assert raw == foreign_bytes(ids, magic, version, code)
    assert shard.tokens == 4 and shard.sha256 == hashlib.sha256(raw).hexdigest()
    assert read_header(path) == (np.dtype(dtype), 4)
    tokens = open_shard(path)
    assert tokens.tolist() == ids and not tokens.flags.writeable
    assert check_shard(path, ShardInfo("x.bin", 4, sha256=shard.sha256)) is None
    assert check_shard(path, deep=True) == (shard.sha256, top)


def test_empty_shard(tmp_path):
    entry = write_shard(tmp_path / "x.bin", np.array([], dtype=np.int64))
    assert entry.tokens == 0 and open_shard(tmp_path / "x.bin").shape == (0,)
    assert check_shard(tmp_path / "x.bin", entry, deep=True)[1] == -1


def test_dtype_for():
    assert [dtype_for(n) for n in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_largest_id_is_found_beyond_the_first_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 64)
    ids = np.arange(1000) % 7
    ids[777] = 1234
    entry = write_shard(tmp_path / "x.bin", ids)
    assert check_shard(tmp_path / "x.bin", entry, deep=True) == (entry.sha256, 1234)


@pytest.mark.parametrize(
    "ids", [np.array([65536]), np.array([-1]), np.array([1.0]), np.array([[1, 2]])]
)
def test_writer_refuses_what_it_cannot_hold(tmp_path, ids):
    with pytest.raises(ValueError), ShardWriter(tmp_path / "x.bin", "uint16") as shard:
        shard.write(ids)
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_other_dtypes_and_overlong_shards(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="int32"):
        ShardWriter(tmp_path / "x.bin", "int32")
    monkeypatch.setattr(shards, "MAX_SHARD_TOKENS", 10)
    with ShardWriter(tmp_path / "x.bin", "uint16") as shard:
        shard.write(np.arange(10))
        with pytest.raises(ValueError, match="at most 10"):
            shard.write(np.arange(1))
    assert open_shard(tmp_path / "x.bin").shape == (10,)


def test_a_killed_writer_leaves_nothing_that_passes(tmp_path):
    path = tmp_path / "train_000000.bin"
    child = os.fork()
    if child == 0:
        writer = ShardWriter(path, "uint16")
        writer.write(np.arange(5000))
        writer._file.flush()
        os._exit(0)  # as SIGKILL does: no close, no exit handlers
    os.waitpid(child, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["train_000000.bin.partial"]
    with pytest.raises(UserError, match="unfinished"):
        DatasetInfo.load(tmp_path)
    shutil.move(tmp_path / "train_000000.bin.partial", path)
    with pytest.raises(UserError, match="never finished"):
        check_shard(path)


def test_any_flipped_byte_is_found(tmp_path):
    path = tmp_path / "x.bin"
    entry = write_shard(path, np.arange(150) * 3)
    raw = path.read_bytes()
    check_shard(path, entry, deep=True)
    for i in range(len(raw)):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ (1 << i % 8)]) + raw[i + 1 :])
        with pytest.raises(UserError) as caught:
            check_shard(path, entry, deep=True)
        assert "x.bin" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_any_other_length_is_found_without_reading(tmp_path, dtype):
    path = tmp_path / "x.bin"
    entry = write_shard(path, np.arange(100), dtype)
    raw = path.read_bytes()
    for length in [*range(len(raw)), len(raw) + 1, len(raw) + 2, len(raw) + 4]:
        path.write_bytes((raw + bytes(8))[:length])
        for given in (entry, None):
            with pytest.raises(UserError, match="truncated|longer"):
                check_shard(path, given)
        with pytest.raises(UserError, match="truncated|longer"):
            open_shard(path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (foreign_bytes([1, 2], magic=20240519), "bad magic 20240519"),
        (foreign_bytes([1, 2], version=7), "version 7"),
        (foreign_bytes([1, 2], magic=0), "never finished"),
        (foreign_bytes([1, 2], count=-2), "counts -2"),
        (foreign_bytes([1, 2], count=3), "truncated"),
        (b"", "truncated"),
    ],
)
def test_bad_headers(tmp_path, raw, words):
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(UserError, match=words):
        check_shard(tmp_path / "x.bin")


def test_missing_shard_and_other_count_than_the_sidecar_s(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        check_shard(tmp_path / "x.bin")
    write_shard(tmp_path / "x.bin", [1, 2, 3])
    with pytest.raises(UserError, match="holds 3 tokens, dataset.json says 4"):
        check_shard(tmp_path / "x.bin", ShardInfo("x.bin", 4))


def test_sidecar_round_trip(tmp_path):
    write_dataset(tmp_path, [[1, 2, 3], [4, 5]], [[6]])
    info = DatasetInfo.load(tmp_path)
    data = json.loads((tmp_path / "dataset.json").read_text())
    assert data["format"] == 1 and data["dtype"] == "uint16" and data["source"] == "test"
    assert data["tokenizer"] == {
        "name": "byte",
        "fingerprint": "0123456789abcdef",
        "vocab_size": 257,
        "eot_id": 256,
    }
    assert set(data["splits"]["train"][0]) == {"file", "tokens", "bytes", "documents", "sha256"}
    assert info.tokenizer == TOKENIZER and info.folder == tmp_path
    assert [e.tokens for e in info.split("train")] == [3, 2] and len(info.split("val")) == 1
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".bin", ".bin", ".json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "tokenizer": {"name": "x"}, "source": "", "dtype": "uint16", "splits": {}}',
        '{"format": 1, "tokenizer": null, "source": "", "dtype": "uint16", '
        '"splits": {"train": [1]}}',
    ],
)
def test_unreadable_sidecar_is_one_line(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="microtron prepare"):
        DatasetInfo.load(tmp_path)


def test_missing_folder_and_missing_split(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        DatasetInfo.load(tmp_path / "no")
    with pytest.raises(UserError, match="neither dataset.json nor shards"):
        DatasetInfo.load(tmp_path)
    info = DatasetInfo.load(write_dataset(tmp_path / "d", [[1, 2]]))
    with pytest.raises(UserError, match=r"no shards of split 'val' \(it has: train\)"):
        info.split("val")


def test_other_format_is_named(tmp_path):
    path = write_dataset(tmp_path, [[1, 2]]) / "dataset.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        DatasetInfo.load(tmp_path)


def test_foreign_shards_come_in_the_order_of_their_names(tmp_path):
    names = [f"x_train_{i:06d}.bin" for i in range(40)]
    for name in sorted(names, key=lambda n: n[::-1]):
        (tmp_path / name).write_bytes(foreign_bytes([1]))
    assert [e.file for e in DatasetInfo.load(tmp_path).split("train")] == names


def test_foreign_folder(tmp_path):
    (tmp_path / "fineweb_train_000002.bin").write_bytes(foreign_bytes([3, 4, 5]))
    (tmp_path / "fineweb_train_000001.bin").write_bytes(foreign_bytes([1, 2]))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(foreign_bytes([9, 50256]))
    info = DatasetInfo.load(tmp_path)
    assert info.tokenizer is None and info.dtype == "uint16"
    assert [(e.file, e.tokens) for e in info.split("train")] == [
        ("fineweb_train_000001.bin", 2),
        ("fineweb_train_000002.bin", 3),
    ]
    assert verify_split(info, "train") == 5 and verify_split(info, "val") == 50256
    (tmp_path / "fineweb_val_000001.bin").write_bytes(foreign_bytes([9], 20240801, 7, "I"))
    with pytest.raises(UserError, match="mixes shards of uint16 and uint32"):
        DatasetInfo.load(tmp_path)


def test_fingerprint_follows_contents_and_order(tmp_path):
    def fingerprint(name, train, val=()):
        return DatasetInfo.load(write_dataset(tmp_path / name, train, val)).fingerprint("train")

    first = fingerprint("a", [[1, 2], [3, 4]])
    assert fingerprint("b", [[1, 2], [3, 4]], [[5]]) == first  # another name, another split
    assert (
        len(
            {
                first,
                fingerprint("c", [[3, 4], [1, 2]]),
                fingerprint("d", [[1, 2, 3, 4]]),
                fingerprint("e", [[1, 2], [3, 5]]),
            }
        )
        == 4
    )


def flip(path, keep_mtime):
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_mtime else 10**9)))


def test_files_are_read_once(tmp_path):
    folder = write_dataset(tmp_path, [[1, 2, 300]], [[7]])
    info = DatasetInfo.load(folder)
    assert verify_split(info, "train") == 300 and verify_split(info, "val") == 7
    assert set(json.loads((folder / VERIFIED).read_text())) == {
        "train_000000.bin",
        "val_000000.bin",
    }
    flip(folder / "train_000000.bin", keep_mtime=True)  # only a second reading could see this
    assert verify_split(info, "train") == 300
    flip(folder / "train_000000.bin", keep_mtime=True)
    flip(folder / "train_000000.bin", keep_mtime=False)
    with pytest.raises(UserError, match="corrupt"):
        verify_split(info, "train")


def test_cache_of_another_dataset_json_does_not_count(tmp_path):
    folder = write_dataset(tmp_path, [[1, 2, 3]])
    verify_split(DatasetInfo.load(folder), "train")
    text = (folder / "dataset.json").read_text()
    sha256 = DatasetInfo.load(folder).split("train")[0].sha256
    (folder / "dataset.json").write_text(text.replace(sha256, "0" * 64))
    with pytest.raises(UserError, match="corrupt"):
        verify_split(DatasetInfo.load(folder), "train")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"train_000000.bin": 3}', '{"train_000000.bin": {"size": 1030}}']
)
def test_damaged_cache_is_ignored(tmp_path, text):
    info = DatasetInfo.load(write_dataset(tmp_path, [[1, 2, 3]]))
    (tmp_path / VERIFIED).write_text(text)
    assert verify_split(info, "train") == 3
    assert json.loads((tmp_path / VERIFIED).read_text())["train_000000.bin"]["max_id"] == 3


def test_folder_that_cannot_take_the_cache(tmp_path):
    info = DatasetInfo.load(write_dataset(tmp_path, [[1, 2, 3]]))
    (tmp_path / VERIFIED).mkdir()  # root may write anywhere, but not replace this
    before = sorted(p.name for p in tmp_path.iterdir())
    assert verify_split(info, "train") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    flip(tmp_path / "train_000000.bin", keep_mtime=True)
    with pytest.raises(UserError, match="corrupt"):
        verify_split(info, "train")


def test_check_datasets_names_the_damaged_file(tmp_path):
    folder = write_dataset(tmp_path, [[1, 2], [3, 4], [5, 6]])
    check_datasets([folder], "train", 257)
    flip(folder / "train_000001.bin", keep_mtime=False)
    with pytest.raises(UserError, match=r"train_000001\.bin is corrupt"):
        check_datasets([folder], "train", 257)
    check_datasets([folder], "train", 257, verify=False)  # by design: sizes only
