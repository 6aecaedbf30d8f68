"""The cache: what lies where, how it grows, and that windows keep no more than their window."""

import pytest
import torch
from helpers import tiny_args

from microtron.infer.attention import keep_newest, positions_in
from microtron.infer.kv_cache import Cache, LayerCache

WINDOW, HEADS, WIDTH = 5, 2, 4


def ring(slots=WINDOW, rows=1):
    return LayerCache(torch.zeros(2, rows, HEADS, 1 + slots, WIDTH), WINDOW)


def marked(positions):
    """Keys and values [1, n, K, D] whose numbers are their positions, the values negated."""
    k = torch.tensor(positions, dtype=torch.float).view(1, -1, 1, 1).expand(1, -1, HEADS, WIDTH)
    return k, -k


@pytest.mark.parametrize("parts", [[3], [5], [12], [3, 4], [4, 1, 1, 9], [5, 5, 5], [1] * 13])
def test_a_ring_holds_the_newest_positions(parts):
    layer, start = ring(), 0
    for n in parts:
        k, v = marked([*range(1 + start, 1 + start + n), 99, 99])  # two columns of padding
        keep_newest(layer, k, v, torch.tensor([start]), torch.tensor([n]))
        start += n
    for position in range(max(0, start - WINDOW), start):
        slot = 1 + position % WINDOW
        assert (layer.kv[0, 0, :, slot] == 1 + position).all()
        assert (layer.kv[1, 0, :, slot] == -1 - position).all()
    assert not (layer.kv.abs() == 99).any() and not layer.kv[:, :, :, 0].any()
    held = positions_in(layer, torch.tensor([start]))[0]
    assert sorted(held[held >= 0].tolist()) == list(range(max(0, start - WINDOW), start))


def test_rows_keep_their_own():
    layer = ring(rows=3)
    k, v = (x.expand(3, -1, -1, -1) for x in marked([1, 2, 3]))
    keep_newest(layer, k, v, torch.tensor([0, 7, 4]), torch.tensor([3, 0, 2]))
    kept = layer.kv[0, :, 0, 1:, 0].tolist()
    assert kept == [[1, 2, 3, 0, 0], [0] * 5, [2, 0, 0, 0, 1]]


def test_size_and_growth():
    args = tiny_args(n_layers=3, window_pattern="SLS", window=6)
    cache = Cache.empty(args, 2, 4, torch.device("cpu"), torch.float32)
    assert [c.slots for c in cache.layers] == [4, 4, 4] and cache.capacity == 4
    for i, layer in enumerate(cache.layers):
        layer.kv[:] = i + torch.arange(5.0).view(-1, 1)  # slot s holds i + s
    cache.grow(5)
    assert [c.slots for c in cache.layers] == [6, 8, 6] and cache.capacity == 8
    cache.grow(500)
    assert [c.slots for c in cache.layers] == [6, 500, 6]
    for i, layer in enumerate(cache.layers):
        assert (layer.kv[0, 0, 0, :5, 0] == i + torch.arange(5)).all()
        assert not layer.kv[:, :, :, 5:].any()
        assert layer.keys.data_ptr() == layer.kv[0].data_ptr()
    one = 2 * 2 * args.n_kv_heads * args.head_dim * 4  # bytes of a slot in both rows
    assert cache.nbytes == one * (7 + 501 + 7)


def test_select_copies():
    cache = Cache.empty(tiny_args(), 3, 4, torch.device("cpu"), torch.float32)
    for layer in cache.layers:
        layer.kv[:] = torch.arange(3.0).view(1, 3, 1, 1, 1)
    cache.lengths = [1, 2, 3]
    for index in ([2, 0, 2], torch.tensor([2, 0, 2])):
        taken = cache.select(index)
        assert taken.lengths == [3, 1, 3]
        assert taken.layers[1].kv[0, :, 0, 0, 0].tolist() == [2, 0, 2]
        taken.layers[1].kv.zero_()
        taken.lengths[0] = 9
    assert cache.layers[1].kv[0, :, 0, 0, 0].tolist() == [0, 1, 2] and cache.lengths == [1, 2, 3]


def test_windows_only_have_no_capacity():
    cache = Cache.empty(tiny_args(window_pattern="S"), 1, 9, torch.device("cpu"), torch.float32)
    assert cache.capacity is None and cache.layers[0].slots == 5
