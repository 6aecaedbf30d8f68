"""What a loader refuses, and what it takes from other tools."""

import numpy as np
import pytest
from test_loader import make, take, unique_shards
from test_shards import TOKENIZER, foreign_bytes, write_dataset

from microtron.data.shards import TokenizerInfo
from microtron.errors import UserError


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data", unique_shards(), unique_shards(), dtype="uint32")


def test_foreign_shards_load(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 1000).tolist()
    (tmp_path / "fineweb_train_000001.bin").write_bytes(foreign_bytes(ids))
    loader = make(tmp_path, shuffle=False, vocab_size=50257, tokenizer_fingerprint="00ff")
    assert take(loader, 124) == [ids[i : i + 9] for i in range(0, 992, 8)]
    with pytest.raises(UserError, match="give eot_id"):
        make(tmp_path, document_positions=True)
    inputs, _ = next(iter(make(tmp_path, document_positions=True, eot_id=50256)))
    assert inputs["positions"].tolist() == [list(range(8))]


def damage_truncate(folder):
    path = folder / "train_000002.bin"
    path.write_bytes(path.read_bytes()[:-1])


def damage_magic(folder):
    path = folder / "train_000002.bin"
    path.write_bytes(b"\1\0\0\0" + path.read_bytes()[4:])


def damage_token(folder):
    path = folder / "train_000002.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")


def damage_missing(folder):
    (folder / "train_000002.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, "truncated"),
        (damage_magic, "bad magic 1"),
        (damage_token, "corrupt"),
        (damage_missing, "cannot be read"),
    ],
)
def test_damaged_shards_are_refused_at_construction(data, damage, words):
    make(data, verify=False)
    damage(data)
    with pytest.raises(UserError, match=rf"train_000002\.bin.*{words}") as caught:
        make(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(split="test"), "no shards of split 'test'"),
        (dict(vocab_size=201), "token id 201.*vocab_size 201.*202 or more"),
        (dict(tokenizer_fingerprint="feed"), "'byte'.*0123456789abcdef.*feed"),
        (dict(seq_len=101), "too few tokens"),
        (dict(batch_size=9, world_size=3), "global batch of 27"),
        (dict(weights=[1, 1]), "2 dataset weights do not go with 1 dataset"),
        (dict(weights=[0]), "weights"),
        (dict(weights=[-1]), "weights"),
        (dict(seq_len=0), "seq_len 0"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(world_size=0), "world_size 0"),
        (dict(rank=1), "rank 1"),
        (dict(rank=-1), "rank -1"),
        (dict(max_tokens=5), "max_tokens 5"),
        (dict(max_tokens=0, infinite=False), "max_tokens 0"),
        (dict(document_positions=True, eot_id=3), "eot_id 3 contradicts"),
        (dict(document_positions=True, vocab_size=250, verify=False), "eot_id 256 is beyond"),
        (dict(folders=[]), "no dataset folder"),
        (dict(folders=["/no/such/folder"]), "does not exist"),
    ],
)
def test_refusals_are_one_line(data, options, words):
    options = dict(options)
    folders, weights = options.pop("folders", [data]), options.pop("weights", None)
    with pytest.raises(UserError, match=words) as caught:
        make(folders, weights, **options)
    assert "\n" not in str(caught.value)


def test_limits_that_still_pass(data):
    make(data, seq_len=100)
    make(data, batch_size=23)
    make(data, vocab_size=202, tokenizer_fingerprint=TOKENIZER.fingerprint)
    with pytest.raises(UserError, match="23 windows .* batch of 24"):
        make(data, batch_size=24)


def test_datasets_of_different_tokenizers_do_not_mix(data, tmp_path):
    other = write_dataset(
        tmp_path / "o", [np.arange(99)], tokenizer=TokenizerInfo("gpt2", "beef", 50257, 50256)
    )
    with pytest.raises(UserError, match="'byte' 0123456789abcdef, 'gpt2' beef"):
        make([data, other])
