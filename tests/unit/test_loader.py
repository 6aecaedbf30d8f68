"""Loaders: one global order on any number of ranks, exact resumption, honest validation."""

import os
from itertools import islice

import numpy as np
import pytest
import torch
from test_shards import write_dataset

import microtron.data.loader as loader_module
from microtron.data import order
from microtron.data.loader import IGNORE, MockLoader, TokenLoader
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
    defaults = dict(
        seq_len=8,
        batch_size=1,
        rank=0,
        world_size=1,
        seed=1,
        vocab_size=10**6,
        tokenizer_fingerprint=None,
        prefetch=0,
    )
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
    return [
        s[i : i + seq_len + 1].tolist() for s in shards for i in range(0, len(s) - seq_len, seq_len)
    ]


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
        rows, state = global_rows([data], steps, batch_size, world_size, state, prefetch=prefetch)
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
    for inputs, _ in islice(
        iter(make(folder, batch_size=4, seq_len=16, document_positions=True)), 40
    ):
        for tokens, positions in zip(
            inputs["input"].tolist(), inputs["positions"].tolist(), strict=True
        ):
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
    folders = [
        write_dataset(tmp_path / n, unique_shards([801], f), dtype="uint32")
        for n, f in (("a", 0), ("b", 10_000))
    ]
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
        assert sorted(row[0] for row in rows) == [*range(0, 48, 8), *range(100_000, 100_048, 8)]


def test_without_weights_datasets_are_joined(tmp_path):
    parts = [unique_shards([100, 33]), unique_shards([77], first=10_000)]
    folders = [write_dataset(tmp_path / str(i), p) for i, p in enumerate(parts)]
    expected = windows(sum(parts, []), 8)
    rows = take(make(folders), len(expected))
    assert sorted(rows) == sorted(expected) and rows != expected
    crossings = sum(
        (a[0] < 10_000) != (b[0] < 10_000) for a, b in zip(rows, rows[1:], strict=False)
    )
    assert crossings > 4  # shuffled as one


# one pass


def targets_of(folder, world_size, batch_size, **options):
    """(input token, target) of all ranks' rows, and the number of batches of each rank."""
    pairs, counts = [], []
    for rank in range(world_size):
        loader = make(
            folder,
            split="val",
            rank=rank,
            world_size=world_size,
            infinite=False,
            batch_size=batch_size,
            **({"shuffle": False} | options),
        )
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
    folders = [
        write_dataset(tmp_path / n, [[1, 2]], unique_shards([30], f))
        for n, f in (("a", 0), ("b", 1000))
    ]
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


# random tokens


def mock(**options):
    defaults = dict(
        seq_len=8, batch_size=1, rank=0, world_size=1, seed=1, vocab_size=100, prefetch=0
    )
    return MockLoader(**(defaults | options))


def test_mock_tokens_are_a_function_of_seed_and_sample():
    expected = take(mock(), 24)
    assert take(mock(), 24) == expected != take(mock(seed=2), 24)
    assert take(mock(batch_size=4, prefetch=2), 6) == expected
    ranks = [take(mock(batch_size=2, rank=r, world_size=3), 4) for r in range(3)]
    assert [
        row for s in range(4) for r in range(3) for row in ranks[r][2 * s : 2 * s + 2]
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
