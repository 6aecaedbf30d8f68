"""The order of samples: permutations that are bijective and uniform, windows, mixtures."""

import math
from collections import Counter

import numpy as np
import pytest

from microtron.data.order import (
    ROUNDS,
    SLOTS,
    draw,
    epoch_order,
    key64,
    locate,
    permute,
    slot_table,
    window_starts,
)
from microtron.errors import UserError

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def feistel(x, bits, key, backwards=False):
    """The slow twin, on Python integers; a round is its own inverse."""
    low, high = bits // 2, bits - bits // 2
    right, left = x % 2**low, x >> low
    for i in reversed(range(ROUNDS)) if backwards else range(ROUNDS):
        k = (key + (i + 1) * GOLDEN) & MASK
        if i % 2:
            right ^= mix((left + k) & MASK) % 2**low
        else:
            left ^= mix((right + k) & MASK) % 2**high
    return (left << low) + right


def walk(x, size, key, backwards=False):
    bits = (size - 1).bit_length()
    x = feistel(x, bits, key, backwards)
    while x >= size:
        x = feistel(x, bits, key, backwards)
    return x


def test_splitmix64_is_the_published_one():
    # first outputs for seed 1234567 (Vigna's splitmix64.c)
    state, found = 1234567, []
    for _ in range(3):
        state = (state + GOLDEN) & MASK
        found.append(mix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    from microtron.data.order import mix64

    states = (1234567 + np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)).astype(np.uint64)
    assert mix64(states).tolist() == found


SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 64, 97, 100, 1023, 1024, 1025, 4096, 65537]


@pytest.mark.parametrize("size", SIZES)
def test_every_index_is_hit_once(size):
    for key in range(3):
        found = permute(np.arange(size), size, key64(key))
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 97, 128, 1000, 10**12, 10**12 + 39, 2**40, 2**61 + 1])
def test_matches_the_slow_twin_and_can_be_inverted(size):
    rng = np.random.default_rng(size)
    index = np.unique(np.concatenate((rng.integers(0, size, 100), [0, size - 1])))
    key = key64(5, size)
    found = permute(index, size, key).tolist()
    assert found == [walk(int(x), size, int(key[0])) for x in index]
    assert [walk(y, size, int(key[0]), backwards=True) for y in found] == index.tolist()


def test_large_sizes_spread_evenly():
    size, n = 10**12, 200_000
    found = permute(np.arange(n) + 5 * 10**11, size, key64(1))  # neighbours, so not random input
    assert len(np.unique(found)) == n and found.min() >= 0 and found.max() < size
    bins = np.bincount(found * 100 // size, minlength=100)
    chi2 = ((bins - n / 100) ** 2 / (n / 100)).sum()
    assert 99 - 5 * math.sqrt(2 * 99) < chi2 < 99 + 5 * math.sqrt(2 * 99)
    steps = np.sign(np.diff(found))
    assert abs(steps.mean()) < 0.01  # rises and falls alike


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_small_size_are_equally_likely(size):
    trials, kinds = 60_000, math.factorial(size)
    keys = key64(11, np.arange(trials))
    found = np.stack([permute(np.full(trials, i), size, keys) for i in range(size)], axis=1)
    counts = np.array(list(Counter(map(bytes, found.astype(np.uint8))).values()))
    assert len(counts) == kinds
    chi2 = ((counts - trials / kinds) ** 2 / (trials / kinds)).sum()
    assert chi2 < kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize("size", [6, 9, 33, 100])
def test_pairs_are_uniform(size):
    trials, kinds = 60_000, size * (size - 1)
    keys = key64(12, np.arange(trials))
    first, last = (permute(np.full(trials, i), size, keys) for i in (0, size - 1))
    counts = np.bincount(first * size + last, minlength=size * size)
    counts = counts.reshape(size, size)[~np.eye(size, dtype=bool)]
    chi2 = ((counts - trials / kinds) ** 2 / (trials / kinds)).sum()
    assert chi2 < kinds - 1 + 5 * math.sqrt(2 * (kinds - 1))


def test_keys_differ_in_every_part_and_in_order():
    keys = [int(key64(*p)[0]) for p in ((0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (2**63,))]
    assert len(set(keys)) == len(keys)
    assert key64(3, np.arange(5), 7).tolist() == [int(key64(3, i, 7)[0]) for i in range(5)]


def test_epochs_have_orders_of_their_own():
    size = 500
    found = epoch_order(np.arange(4 * size), size, seed=1).reshape(4, size)
    assert all(np.array_equal(np.sort(epoch), np.arange(size)) for epoch in found)
    others = [
        epoch_order(np.arange(size), size, seed=2),
        epoch_order(np.arange(size), size, 1, 1),
        np.arange(size),
    ]
    orders = [*found, *others]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.05
    assert np.array_equal(epoch_order(np.arange(size), size, seed=1), found[0])
    # any index by itself gives the same answer as in a block
    assert epoch_order(np.array([1234]), size, seed=1)[0] == found.ravel()[1234]


def slow_windows(shard_tokens, seq_len, partial):
    found = []
    for shard, tokens in enumerate(shard_tokens):
        offset = 0
        while tokens - offset > (1 if partial else seq_len):
            found.append((shard, offset))
            offset += seq_len
    return found


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("seq_len", [1, 2, 4, 7])
def test_windows_match_the_slow_twin(seq_len, partial):
    for shard_tokens in ([9], [0, 1, 2, 3], [8, 9, 1, 10, 0, 15, 29], [1, 1], [5, 0, 0]):
        expected = slow_windows(shard_tokens, seq_len, partial)
        starts = window_starts(shard_tokens, seq_len, partial)
        assert starts[-1] == len(expected)
        shard, offset = locate(np.arange(starts[-1]), starts, seq_len)
        assert list(zip(shard.tolist(), offset.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    "weights", [[1, 1], [0.7, 0.2, 0.1], [3, 1, 1, 1, 1], [1], [0, 1], [1e6, 1e3]]
)
def test_mixture_shares_and_no_gaps(weights):
    table = slot_table(weights, seed=3)
    exact = np.array(weights) / sum(weights) * SLOTS
    assert table.counts.sum() == SLOTS and (abs(table.counts - exact) < 1).all()
    dataset, running = draw(np.arange(2 * SLOTS + 100), table)
    for i in range(len(weights)):
        own = running[dataset == i]
        assert np.array_equal(own, np.arange(len(own)))  # 0, 1, 2, ...: each index once, in order
        for block in dataset[: 2 * SLOTS].reshape(2, SLOTS):
            assert (block == i).sum() == table.counts[i]
    alone = draw(np.array([SLOTS + 17]), table)
    assert (alone[0][0], alone[1][0]) == (dataset[SLOTS + 17], running[SLOTS + 17])


def test_mixture_is_mixed_and_seeded():
    table = slot_table([0.5, 0.3, 0.2], seed=1)
    for start in range(0, SLOTS, 256):  # no stretch is far from its share
        shares = np.bincount(table.dataset[start : start + 256], minlength=3) / 256
        assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.15
    assert not np.array_equal(table.dataset, slot_table([0.5, 0.3, 0.2], seed=2).dataset)
    assert np.array_equal(table.dataset, slot_table([5, 3, 2], seed=1).dataset)


def test_largest_remainder():
    assert slot_table([1, 1, 1], seed=0, slots=8).counts.tolist() == [3, 3, 2]
    assert slot_table([0.5, 0.26, 0.24], seed=0, slots=10).counts.tolist() == [5, 3, 2]


@pytest.mark.parametrize(
    "weights", [[0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1], [1e-9, 1], []]
)
def test_refused_weights(weights):
    with pytest.raises(UserError, match="weight"):
        slot_table(weights, seed=0)
