"""Masks against their definition, one entry at a time."""

import pytest
import torch
from reference.sink_attention import may_see

from microtron.model.masks import block_mask, build_masks, dense_mask, document_numbers, predicate

CPU = torch.device("cpu")
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 0, 1, 2, 3, 4]])


def by_definition(seq_len, window, documents):
    """[B or 1, 1, S, S] from the reference's rule."""
    rows = [None] if documents is None else documents.tolist()
    return torch.tensor(
        [
            [[[may_see(q, k, window, row) for k in range(seq_len)] for q in range(seq_len)]]
            for row in rows
        ]
    )


def from_block_mask(mask, window, documents, seq_len):
    """The dense form of what a BlockMask holds: kept blocks, each cut by its predicate."""
    size_q, size_k = mask.BLOCK_SIZE
    blocks = mask.to_dense().bool()  # [B, 1, blocks of queries, blocks of keys]
    kept = blocks.repeat_interleave(size_q, 2).repeat_interleave(size_k, 3)
    index = torch.arange(seq_len)
    batch = torch.arange(kept.shape[0])[:, None, None, None]
    inside = mask.mask_mod(batch, torch.tensor(0), index[:, None], index[None, :])
    return kept[..., :seq_len, :seq_len] & inside


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "documents"])
def test_dense_mask(window, packed):
    documents = document_numbers(POSITIONS) if packed else None
    assert torch.equal(dense_mask(8, window, documents, CPU), by_definition(8, window, documents))


@pytest.mark.parametrize("window", [1, 3, 128])
def test_a_window_of_w_is_w_keys_with_the_token_itself(window):
    mask = dense_mask(200, window, None, CPU)[0, 0]
    assert mask.diagonal().all()
    assert mask.sum(-1).tolist() == [min(t + 1, window) for t in range(200)]


def test_document_numbers():
    assert document_numbers(POSITIONS).tolist() == [
        [1, 1, 1, 2, 2, 2, 2, 2],
        [1, 1, 2, 3, 3, 3, 3, 3],
    ]


@pytest.mark.parametrize("window", [None, 130, 40], ids=["full", "w130", "w40"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "documents"])
def test_block_mask_says_the_same(window, packed):
    seq_len = 300
    documents = None
    if packed:
        starts = torch.zeros(2, seq_len, dtype=torch.long)
        starts[0, [0, 50, 260]] = 1
        starts[1, [0, 128, 129]] = 1
        documents = starts.cumsum(1)
    blocks = block_mask(seq_len, window, documents, CPU)
    assert torch.equal(
        from_block_mask(blocks, window, documents, seq_len),
        dense_mask(seq_len, window, documents, CPU),
    )


def test_block_mask_skips_what_no_query_sees():
    """The point of flex: a window of 40 leaves at most two blocks of keys for each of queries."""
    blocks = block_mask(1024, 40, None, CPU).to_dense()[0, 0]
    assert blocks.sum(-1).max() == 2


def test_build_masks_kinds():
    masks = build_masks("eager", 8, 3, CPU)
    assert torch.equal(masks["window"], by_definition(8, 3, None))
    assert torch.equal(masks["full"], by_definition(8, None, None))
    packed = build_masks("sdpa", 8, 3, CPU, document_numbers(POSITIONS))
    assert torch.equal(packed["full"], by_definition(8, None, document_numbers(POSITIONS)))
    assert torch.equal(packed["window"], by_definition(8, 3, document_numbers(POSITIONS)))


@pytest.mark.parametrize("window", [8, 9])
def test_a_window_that_reaches_everywhere_needs_no_mask(window):
    assert build_masks("sdpa", 8, window, CPU) == {"full": None, "window": None}
    assert build_masks("sdpa", 8, 7, CPU)["window"] is not None


def test_predicate_is_elementwise():
    """FlexAttention calls it with scalars under vmap."""
    may_look = predicate(3, document_numbers(POSITIONS))
    zero = torch.tensor(0)
    assert may_look(zero, zero, torch.tensor(5), torch.tensor(3))
    assert not may_look(zero, zero, torch.tensor(5), torch.tensor(2))
    assert not may_look(zero, zero, torch.tensor(3), torch.tensor(2))
