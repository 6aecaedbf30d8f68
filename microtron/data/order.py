"""Which tokens sample number i of a run is: pure functions of (seed, epoch, global sample index).

A sample is a window of seq_len + 1 tokens; windows start every seq_len tokens of a shard (the last
token of one is the first input of the next) and never cross shards. Nothing here has state, so the
one number "samples taken so far" is the whole state of a loader, on any number of processes.

The shuffle is a keyed permutation instead of a shuffled table: a Feistel network over the bits of
the index (Luby and Rackoff, "How to construct pseudorandom permutations", 1988), walked along its
cycle until it lands below the size (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002). It is a bijection by construction, takes no memory at 10^12 samples, and its result does not
depend on the version of any library's random numbers. Round function: splitmix64's finaliser
(Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).

A mixture is a table of 4096 slots, each a dataset, in which every dataset has its share of slots;
sample i uses slot i mod 4096, and counting slots gives the index within the dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from microtron.errors import UserError

SLOTS = 4096
ROUNDS = 24  # 4 would do for large halves; sizes of a few bits need more to be uniform (tested)
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, elementwise on uint64: a bijection that avalanches."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key64(*parts: int | np.ndarray) -> np.ndarray:
    """A uint64 key of the integers ``parts``, in order; arrays broadcast to one key per element."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        if isinstance(part, int):
            part = np.uint64(part & _MASK)
        key = mix64(key + np.uint64(_GOLDEN) + mix64(np.atleast_1d(part).astype(np.uint64)))
    return key


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where the permutation of 0 .. size - 1 chosen by ``key`` sends each of ``index``.

    ``index``: int64 [n], each in [0, size). ``key``: uint64 [1] or [n], as from ``key64``; elements
    with different keys are elements of different permutations. Returns int64 [n].
    """
    bits = (size - 1).bit_length()
    key = np.broadcast_to(key, index.shape)
    out = _feistel(index.astype(np.uint64), bits, key)
    todo = np.flatnonzero(out >= np.uint64(size))
    while todo.size:  # 2**bits < 2 * size: at least half of what is left lands, on average
        out[todo] = _feistel(out[todo], bits, key[todo])
        todo = todo[out[todo] >= np.uint64(size)]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    """A permutation of 0 .. 2**bits - 1: each half in turn is xored with a hash of the other."""
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    right, left = x & low_mask, x >> low
    for i in range(ROUNDS):
        key = key + np.uint64(_GOLDEN)
        if i % 2:
            right = right ^ (mix64(left + key) & low_mask)
        else:
            left = left ^ (mix64(right + key) & high_mask)
    return (left << low) | right


def epoch_order(index: np.ndarray, size: int, seed: int, stream: int = 0) -> np.ndarray:
    """The window that running sample ``index`` (int64 [n], over all epochs) of a dataset takes.

    Epoch index // size visits each of the ``size`` windows once, in an order of its own that
    depends on (seed, stream, epoch); ``stream`` tells the datasets of a mixture apart.
    """
    return permute(index % size, size, key64(seed, stream, index // size))


def window_starts(shard_tokens: Sequence[int], seq_len: int, partial: bool = False) -> np.ndarray:
    """Number of windows before each shard, and in all: int64 [shards + 1].

    ``partial`` counts a last window of fewer than seq_len targets too; otherwise those tokens are
    left out.
    """
    targets = np.maximum(np.asarray(shard_tokens, dtype=np.int64) - 1, 0)
    windows = -(-targets // seq_len) if partial else targets // seq_len
    return np.concatenate(([0], np.cumsum(windows, dtype=np.int64)))


def locate(window: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(shard, offset of the first token in it) of each window number; int64 [n] each."""
    shard = np.searchsorted(starts, window, side="right") - 1
    return shard, (window - starts[shard]) * seq_len


@dataclass(frozen=True)
class SlotTable:
    """``dataset`` [SLOTS]; ``before`` [SLOTS] earlier slots of the same dataset; ``counts`` [K]."""

    dataset: np.ndarray
    before: np.ndarray
    counts: np.ndarray


def slot_table(weights: Sequence[float], seed: int, slots: int = SLOTS) -> SlotTable:
    """Slots in proportion to ``weights`` (any positive scale), by largest remainder, shuffled.

    Raises: UserError for negative or non-finite weights, all of them zero, or one too small to get
    a slot (a weight of exactly 0 switches a dataset off).
    """
    share = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(share).all() or (share < 0).any() or share.sum() <= 0:
        raise UserError(
            f"dataset weights {list(weights)} are refused: each must be 0 or more and one above 0; "
            "correct the weights"
        )
    exact = share / share.sum() * slots
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")  # largest remainder first
    counts[order[: slots - counts.sum()]] += 1
    if ((counts == 0) & (share > 0)).any():
        small = float(share[(counts == 0) & (share > 0)].min())
        raise UserError(
            f"dataset weight {small:g} is under 1/{slots} of the sum of {list(weights)} and would "
            "never be drawn; raise it or remove the dataset"
        )
    spread = permute(np.arange(slots), slots, key64(seed, 0x510))
    dataset = np.repeat(np.arange(len(share)), counts)[spread]
    before = np.empty(slots, dtype=np.int64)
    for i, count in enumerate(counts):
        before[dataset == i] = np.arange(count)
    return SlotTable(dataset, before, counts)


def draw(index: np.ndarray, table: SlotTable) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, running index within that dataset) of each global sample index; int64 [n] each."""
    cycle, slot = np.divmod(index, len(table.dataset))
    dataset = table.dataset[slot]
    return dataset, cycle * table.counts[dataset] + table.before[slot]
