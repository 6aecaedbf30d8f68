"""Loaders: one global order on any number of ranks, exact resumption, honest validation."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from test_shards import TOKENIZER, foreign_bytes, write_dataset

import microtron.data.loader as loader_module
from microtron.data import order
from microtron.data.loader import IGNORE, MockLoader, TokenLoader
from microtron.data.shards import TokenizerInfo
from microtron.errors import UserError

SIZES = [57, 5, 101, 1, 0, 38]  # tokens of the shards; with unique ids each token tells its place


def unique_shards(sizes=SIZES, first=0):
    bounds = first + np.cumsum([0, *sizes])
    return [np.arange(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data", unique_shards(), unique_shards(), dtype="uint32")


def make(folders, weights=None, split="train", **options):
    folders = folders if isinstance(folders, list) else [folders]
    defaults = dict(seq_len=8, batch_size=1, rank=0, world_size=1, seed=1, vocab_size=10**6,
                    tokenizer_fingerprint=None, prefetch=0)
    return TokenLoader(folders, weights, split, **(defaults | options))


def take(loader, n):
    """The rows of the next n batches: [n * B, S + 1], input and last label."""
    rows = []
    for inputs, labels in islice(iter(loader), n):
        assert inputs["input"].dtype == labels.dtype == torch.int64
        assert inputs["input"].shape == labels.shape == (loader.batch_size, loader.seq_len)
        assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])
        rows += torch.cat((inputs["input"], labels[:, -1:]), dim=1).tolist()
    return rows


def global_rows(folders, steps, batch_size, world_size, start=None, **options):
    """What all ranks take in ``steps`` steps, in global order, and their common state."""
    per_rank, states = [], []
    for rank in range(world_size):
        loader = make(folders, batch_size=batch_size, rank=rank, world_size=world_size, **options)
        if start is not None:
            loader.load_state_dict(start)
        rows = take(loader, steps)
        per_rank.append([rows[i * batch_size : (i + 1) * batch_size] for i in range(steps)])
        states.append(loader.state_dict())
        loader.close()
    assert all(state == states[0] for state in states)
    return [row for step in range(steps) for rank in per_rank for row in rank[step]], states[0]


def windows(shards, seq_len):
    return [s[i : i + seq_len + 1].tolist() for s in shards
            for i in range(0, len(s) - seq_len, seq_len)]


def test_each_epoch_takes_every_window_once_in_a_new_order(data):
    expected = windows(unique_shards(), 8)
    n = len(expected)
    rows = take(make(data), 3 * n)
    epochs = [rows[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and expected not in epochs
    assert take(make(data), n) == epochs[0]
    assert take(make(data, seed=2), n) != epochs[0]
    assert take(make(data, shuffle=False), 2 * n) == 2 * expected


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 4), (3, 1), (2, 3), (4, 2), (23, 1)])
def test_ranks_and_batches_cut_the_same_order(data, batch_size, world_size, prefetch):
    step = batch_size * world_size
    rows, state = global_rows([data], 5, batch_size, world_size, prefetch=prefetch)
    assert rows == take(make(data), 5 * step)
    assert state["position_samples"] == 5 * step and state["seq_len"] == 8
    assert {type(v) for v in state.values()} == {int, str}


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_on_other_ranks_continues_without_gap_or_repeat(data, prefetch):
    expected, state, found = take(make(data), 6 + 20 + 6 + 7), None, []
    for steps, batch_size, world_size in ((3, 2, 1), (5, 1, 4), (1, 3, 2), (7, 1, 1)):
        rows, state = global_rows(
            [data], steps, batch_size, world_size, state, prefetch=prefetch)
        found += rows
    assert found == expected


def test_plans_do_not_show(data, monkeypatch):
    expected = take(make(data, batch_size=2), 40)
    for samples in (1, 6, 17):
        monkeypatch.setattr(loader_module, "_PLAN_SAMPLES", samples)
        assert take(make(data, batch_size=2), 40) == expected


def test_state_is_what_was_consumed_not_what_was_loaded(data):
    loader = make(data, prefetch=4)
    batches = iter(loader)
    assert loader.state_dict()["position_samples"] == 0
    for i in range(1, 6):
        next(batches)
        assert loader.state_dict()["position_samples"] == i
    loader.close()
    assert loader.state_dict()["position_samples"] == 5
    assert take(loader, 3) == take(make(data), 8)[5:]  # the same loader goes on, too
    loader.close()


def test_batches_share_no_memory(data):
    loader = make(data, batch_size=4, prefetch=3, document_positions=True)
    kept = list(islice(iter(loader), 12))
    loader.close()
    again = list(islice(iter(make(data, batch_size=4, document_positions=True)), 12))
    tensors = []
    for (inputs, labels), (inputs2, labels2) in zip(kept, again, strict=True):
        assert torch.equal(inputs["input"], inputs2["input"]) and torch.equal(labels, labels2)
        tensors += [*inputs.values(), labels]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 3 * 12
    assert all(t.is_contiguous() for t in tensors)


def test_many_shards_with_few_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "_OPEN_SHARDS", 3)
    shards = unique_shards([20] * 60)
    loader = make(write_dataset(tmp_path / "many", shards), seq_len=4)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    rows = take(loader, 60 * 4)
    assert sorted(rows) == sorted(windows(shards, 4))
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 4


# document positions


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_positions_restart_at_each_document(tmp_path, share):
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(3000) < share, 256, rng.integers(0, 256, 3000))
    folder = write_dataset(tmp_path / "d", [ids])
    for inputs, _ in islice(iter(make(folder, batch_size=4, seq_len=16, document_positions=True)),
                            40):
        for tokens, positions in zip(inputs["input"].tolist(), inputs["positions"].tolist(),
                                     strict=True):
            at = -1
            for token, position in zip(tokens, positions, strict=True):
                at = 0 if token == 256 else at + 1
                assert position == at
    assert inputs["positions"].dtype == torch.int64
    assert "positions" not in next(iter(make(folder)))[0]


# mixtures


def test_mixture_shares_and_each_dataset_s_own_epochs(tmp_path):
    sizes = [[400, 90], [61], [300]]
    parts = [unique_shards(s, first=10_000 * i) for i, s in enumerate(sizes)]
    folders = [write_dataset(tmp_path / str(i), p) for i, p in enumerate(parts)]
    rows, state = global_rows(folders, 256, 4, 4, weights=[0.5, 0.125, 0.375])
    assert state["position_samples"] == order.SLOTS == len(rows)
    for i, (part, share) in enumerate(zip(parts, (0.5, 0.125, 0.375), strict=True)):
        own = [row for row in rows if row[0] // 10_000 == i]
        assert len(own) == share * len(rows)
        expected = sorted(windows(part, 8))
        n = len(expected)
        epochs = [own[j : j + n] for j in range(0, len(own) - n + 1, n)]
        assert len(epochs) > 5 and all(sorted(epoch) == expected for epoch in epochs)
        assert epochs[0] != epochs[1]
    resumed, _ = global_rows(folders, 30, 1, 3, state, weights=[0.5, 0.125, 0.375])
    straight = take(make(folders, [0.5, 0.125, 0.375], batch_size=2), order.SLOTS // 2 + 45)
    assert rows + resumed == straight


def test_datasets_of_one_size_are_shuffled_differently(tmp_path):
    folders = [write_dataset(tmp_path / n, unique_shards([801], f), dtype="uint32")
               for n, f in (("a", 0), ("b", 10_000))]
    rows = take(make(folders, [1, 1]), 200)
    first = [row[0] for row in rows if row[0] < 10_000]
    second = [row[0] - 10_000 for row in rows if row[0] >= 10_000]
    same = sum(a == b for a, b in zip(first, second, strict=False))
    assert min(len(first), len(second)) > 50 and same < 10


def test_each_dataset_of_a_mixture_needs_a_window(data, tmp_path):
    small = write_dataset(tmp_path / "small", [[1, 2, 3]])
    make([data, small])
    with pytest.raises(UserError, match=r"23 \+ 0 windows"):
        make([data, small], [1, 1])


def test_narrow_and_wide_shards_mix(tmp_path):
    wide = write_dataset(tmp_path / "wide", [np.arange(100_000, 100_050)], dtype="uint32")
    narrow = write_dataset(tmp_path / "narrow", [np.arange(50)], dtype="uint16")
    for folders in ([wide, narrow], [narrow, wide]):
        rows = take(make(folders), 12)
        assert sorted(row[0] for row in rows) == [
            *range(0, 48, 8), *range(100_000, 100_048, 8)]


def test_without_weights_datasets_are_joined(tmp_path):
    parts = [unique_shards([100, 33]), unique_shards([77], first=10_000)]
    folders = [write_dataset(tmp_path / str(i), p) for i, p in enumerate(parts)]
    expected = windows(sum(parts, []), 8)
    rows = take(make(folders), len(expected))
    assert sorted(rows) == sorted(expected) and rows != expected
    crossings = sum((a[0] < 10_000) != (b[0] < 10_000) for a, b in zip(rows, rows[1:],
                                                                       strict=False))
    assert crossings > 4  # shuffled as one


# one pass


def targets_of(folder, world_size, batch_size, **options):
    """(input token, target) of all ranks' rows, and the number of batches of each rank."""
    pairs, counts = [], []
    for rank in range(world_size):
        loader = make(folder, split="val", rank=rank, world_size=world_size, infinite=False,
                      batch_size=batch_size, **({"shuffle": False} | options))
        batches = list(loader)
        counts.append(len(batches))
        for inputs, labels in batches:
            kept = labels != IGNORE
            pairs += zip(inputs["input"][kept].tolist(), labels[kept].tolist(), strict=True)
            blank = torch.cat((kept[:, :1], kept), dim=1)[:, :-1]  # a target or behind one
            assert (inputs["input"][~(kept | blank)] == 0).all()
    return pairs, counts


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 4), (3, 2), (4, 1), (7, 5)])
def test_each_token_is_a_target_exactly_once(data, world_size, batch_size, prefetch, shuffle):
    pairs, counts = targets_of(data, world_size, batch_size, prefetch=prefetch, shuffle=shuffle)
    expected = [(t - 1, t) for s in unique_shards() for t in s[1:].tolist()]
    assert sorted(pairs) == expected
    assert len(set(counts)) == 1


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 9, 56, 57, 60, 61, 10_000])
def test_max_tokens_takes_the_first_targets(data, max_tokens):
    expected = [(t - 1, t) for s in unique_shards() for t in s[1:].tolist()][:max_tokens]
    for world_size, batch_size in ((1, 1), (2, 3)):
        pairs, counts = targets_of(data, world_size, batch_size, max_tokens=max_tokens)
        assert sorted(pairs) == expected and len(set(counts)) == 1


def test_a_pass_ends_and_starts_over(data):
    loader = make(data, split="val", infinite=False, shuffle=False, prefetch=2)
    batches = iter(loader)
    first = [next(batches)[1].tolist() for _ in range(4)]
    again = [labels.tolist() for _, labels in loader]  # left unfinished: still from the start
    assert again[:4] == first
    assert [labels.tolist() for _, labels in loader] == again
    loader.load_state_dict(loader.state_dict() | {"position_samples": 3})
    assert [labels.tolist() for _, labels in loader] == again[3:]
    assert [labels.tolist() for _, labels in loader] == again


def test_one_pass_joins_datasets_and_refuses_weights(tmp_path):
    folders = [write_dataset(tmp_path / n, [[1, 2]], unique_shards([30], f))
               for n, f in (("a", 0), ("b", 1000))]
    pairs, _ = targets_of(folders, 2, 2)
    assert sorted(t for _, t in pairs) == [*range(1, 30), *range(1001, 1030)]
    with pytest.raises(UserError, match="one pass"):
        make(folders, [1, 1], infinite=False)


# state


def test_state_of_another_seq_len(data):
    loader = make(data, seq_len=8)
    take(loader, 6)
    state = loader.state_dict()
    other = make(data, seq_len=16)
    other.load_state_dict(state)
    assert other.state_dict() == state | {"position_samples": 3, "seq_len": 16}
    with pytest.raises(UserError, match="seq_len 32 cannot take over .* seq_len 8 after 48 tokens"):
        make(data, seq_len=32).load_state_dict(state)


def test_state_of_other_data(data, tmp_path):
    state = make(data).state_dict()
    moved = write_dataset(tmp_path / "moved", unique_shards(), dtype="uint32")
    make(moved).load_state_dict(state)  # the same shards elsewhere, without a val split
    other = write_dataset(tmp_path / "other", unique_shards([300]))
    for folders in ([other], [data, other], [other, data]):
        with pytest.raises(UserError, match="other data .*exclude_from_loading=dataloader") as e:
            make(folders).load_state_dict(state)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="lacks fingerprint, seq_len"):
        make(data).load_state_dict({"position_samples": 3})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_state_travels_in_a_distributed_checkpoint(data, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.stateful import Stateful

    loader, other = make(data), make(data)
    assert isinstance(loader, Stateful)
    take(loader, 11)
    dcp.save({"dataloader": loader}, checkpoint_id=tmp_path / "step-11", no_dist=True)
    dcp.load({"dataloader": other}, checkpoint_id=tmp_path / "step-11", no_dist=True)
    assert other.state_dict() == loader.state_dict() and take(other, 4) == take(loader, 4)


# thread


def threads():
    return [t for t in threading.enumerate() if t.name == "microtron-loader"]


def test_thread_starts_late_and_ends(data):
    loader = make(data, prefetch=2)
    batches = iter(loader)
    assert threads() == []
    next(batches)
    assert len(threads()) == 1 and threads()[0].daemon
    loader.close()
    loader.close()
    assert threads() == []
    with pytest.raises(RuntimeError, match="call iter"):
        next(batches)
    batches = iter(loader)
    next(batches)
    del batches
    gc.collect()
    assert threads() == []
    list(make(data, split="val", infinite=False, prefetch=2))
    assert threads() == []


def test_no_more_than_prefetch_batches_wait(data):
    loader, loaded = make(data, prefetch=3), []
    load = loader._load
    loader._load = lambda position: loaded.append(position) or load(position)
    batches = iter(loader)
    for taken in (1, 2, 5):
        while loader.state_dict()["position_samples"] < taken:
            next(batches)
        deadline = time.monotonic() + 5
        while len(loaded) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # room for one too many
        assert loaded == list(range(taken + 3))
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_only_the_newest_iterator_is_valid(data, prefetch):
    loader = make(data, prefetch=prefetch)
    old, new = iter(loader), iter(loader)
    next(new)
    with pytest.raises(RuntimeError, match="call iter"):
        next(old)
    next(new)
    loader.load_state_dict(loader.state_dict() | {"position_samples": 20})
    with pytest.raises(RuntimeError, match="call iter"):
        next(new)
    assert take(loader, 2) == take(make(data), 22)[20:]
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_in_the_thread_come_out_of_next(data, prefetch):
    loader, opened = make(data, prefetch=prefetch), []
    open_shard = loader._open

    def failing(shard):
        opened.append(shard)
        if len(opened) > 6:
            raise OSError("stale file handle")
        return open_shard(shard)

    loader._open = failing
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    with pytest.raises(OSError, match="stale file handle"):
        next(batches)
    assert loader.state_dict()["position_samples"] == 6 and threads() == []
    loader._open = open_shard
    assert take(loader, 2) == take(make(data), 8)[6:]
    loader.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_goes_on_by_itself(data):
    loader = make(data, prefetch=2)
    batches = iter(loader)
    expected = [row[:-1] for row in take(make(data), 10)]
    assert [next(batches)[0]["input"][0].tolist() for _ in range(4)] == expected[:4]
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for a thread it does not have must not stay
        code = 1
        try:
            rows = [next(batches)[0]["input"][0].tolist() for _ in range(6)]
            loader.close()
            code = 0 if rows == expected[4:] else 2
        finally:
            os._exit(code)
    assert [next(batches)[0]["input"][0].tolist() for _ in range(6)] == expected[4:]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loader.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_can_close_whatever_the_thread_was_doing(data):
    loader = make(data, prefetch=2)
    batches = iter(loader)
    next(batches)
    with loader._source._slots._cond:  # as if the thread held it: nobody frees it in the fork
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            loader.close()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    next(batches)
    loader.close()


def test_a_process_ends_with_its_thread_running(data):
    code = (
        "from microtron.data.loader import TokenLoader\n"
        f"loader = TokenLoader([{str(data)!r}], None, 'train', seq_len=8, batch_size=1, rank=0,"
        "world_size=1, seed=0, vocab_size=10**6, tokenizer_fingerprint=None)\n"
        "batches = iter(loader); next(batches); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# refusals


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


@pytest.mark.parametrize(("damage", "words"), [
    (damage_truncate, "truncated"), (damage_magic, "bad magic 1"), (damage_token, "corrupt"),
    (damage_missing, "cannot be read")])
def test_damaged_shards_are_refused_at_construction(data, damage, words):
    make(data, verify=False)
    damage(data)
    with pytest.raises(UserError, match=rf"train_000002\.bin.*{words}") as caught:
        make(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "words"), [
    (dict(split="test"), "no shards of split 'test'"),
    (dict(vocab_size=201), "token id 201.*vocab_size 201.*202 or more"),
    (dict(tokenizer_fingerprint="feed"), "'byte'.*0123456789abcdef.*feed"),
    (dict(seq_len=101), "too few tokens"),
    (dict(batch_size=9, world_size=3), "global batch of 27"),
    (dict(weights=[1, 1]), "2 dataset weights do not go with 1 dataset"),
    (dict(weights=[0]), "weights"), (dict(weights=[-1]), "weights"),
    (dict(seq_len=0), "seq_len 0"), (dict(batch_size=0), "batch_size 0"),
    (dict(world_size=0), "world_size 0"), (dict(rank=1), "rank 1"), (dict(rank=-1), "rank -1"),
    (dict(max_tokens=5), "max_tokens 5"), (dict(max_tokens=0, infinite=False), "max_tokens 0"),
    (dict(document_positions=True, eot_id=3), "eot_id 3 contradicts"),
    (dict(document_positions=True, vocab_size=250, verify=False), "eot_id 256 is beyond"),
    (dict(folders=[]), "no dataset folder"),
    (dict(folders=["/no/such/folder"]), "does not exist"),
])
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
    other = write_dataset(tmp_path / "o", [np.arange(99)],
                          tokenizer=TokenizerInfo("gpt2", "beef", 50257, 50256))
    with pytest.raises(UserError, match="'byte' 0123456789abcdef, 'gpt2' beef"):
        make([data, other])


# random tokens


def mock(**options):
    defaults = dict(seq_len=8, batch_size=1, rank=0, world_size=1, seed=1, vocab_size=100,
                    prefetch=0)
    return MockLoader(**(defaults | options))


def test_mock_tokens_are_a_function_of_seed_and_sample():
    expected = take(mock(), 24)
    assert take(mock(), 24) == expected != take(mock(seed=2), 24)
    assert take(mock(batch_size=4, prefetch=2), 6) == expected
    ranks = [take(mock(batch_size=2, rank=r, world_size=3), 4) for r in range(3)]
    assert [row for s in range(4) for r in range(3) for row in ranks[r][2 * s : 2 * s + 2]
            ] == expected
    loader = mock(batch_size=3)
    loader.load_state_dict(mock().state_dict() | {"position_samples": 6})
    assert take(loader, 6) == expected[6:]
    assert len({tuple(row) for row in expected}) == 24


def test_mock_tokens_are_uniform_and_its_state_is_its_own(data):
    tokens = np.array(take(mock(seq_len=999, batch_size=10), 10))
    counts = np.bincount(tokens.ravel(), minlength=100)
    assert len(counts) == 100 and ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * 198**0.5
    with pytest.raises(UserError, match="other data"):
        make(data).load_state_dict(mock().state_dict())
    with pytest.raises(UserError, match="other data"):
        mock(vocab_size=101).load_state_dict(mock().state_dict())


def test_mock_positions_and_single_pass():
    for rank in range(2):
        batches = list(mock(samples=7, batch_size=2, rank=rank, world_size=2, eot_id=5))
        assert len(batches) == 2
        kept = [(labels != IGNORE).all(dim=1).tolist() for _, labels in batches]
        assert kept == [[True, True], [True, rank == 0]]
        for inputs, _ in batches:
            assert (inputs["positions"][inputs["input"] == 5] == 0).all()
    with pytest.raises(UserError, match="eot_id 100 is beyond"):
        mock(eot_id=100)
