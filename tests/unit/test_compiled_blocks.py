"""A compiled block is one graph, whatever is in it, and a new batch compiles nothing anew.

Tracing alone is enough to know that (backend "eager"); what comes out is tested in test_moe.py and
tests/distributed/test_compiled.py.
"""

import functools

import pytest
import torch
from helpers import build_random, tiny_args, tokens_of
from torch._dynamo.utils import counters

from microtron.model import masks
from microtron.model.masks import document_numbers, predicate

SEQ_LEN = 24


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled, nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    masks._compiled_block_mask.cache_clear()
    yield
    torch._dynamo.reset()
    masks._compiled_block_mask.cache_clear()


def documents_of(length):
    """[2, S]: documents of that many tokens."""
    return document_numbers(torch.arange(SEQ_LEN).expand(2, SEQ_LEN) % length)


def graphs():
    """Compiled so far; none of them broken."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "overrides, documents",
    [
        ({"load_balance": "aux_loss", "router_z_loss_coef": 0.1}, True),
        ({"load_balance": "bias", "qk_norm": True}, False),
        ({"num_experts": 0}, True),
        ({"num_experts": 0}, False),
    ],
    ids=["aux_loss, documents", "bias", "dense, documents", "dense"],
)
def test_a_block_is_one_graph(overrides, documents):
    args = tiny_args(attn_backend="sdpa", experts_backend="grouped_mm", **overrides)
    model = build_random(args)
    for block in model.layers.values():
        block.compile(backend="eager", fullgraph=True)
    counted = []
    for seed in range(3):
        given = documents_of(5 + seed) if documents else None
        tokens = tokens_of(args, seq_len=SEQ_LEN, seed=seed)
        model(tokens, labels=tokens, documents=given).backward()
        counted.append(graphs())
    assert 1 <= counted[0] <= 2 and counted[0] == counted[2]  # with a window and without


@pytest.mark.slow
def test_flex_in_a_block_is_in_its_graph():
    """Forward alone: on a CPU flex has no backward. Masks of other documents are the same graph."""
    args = tiny_args(attn_backend="flex", num_experts=0)
    model = build_random(args).eval()
    for block in model.layers.values():
        block.compile(backend="eager", fullgraph=True)
    counted = []
    for seed in range(2):
        with torch.no_grad():
            model(tokens_of(args, seq_len=SEQ_LEN, seed=seed), documents=documents_of(5 + seed))
        counted.append(graphs())
    assert counted[0] == counted[1] == 2


@pytest.mark.slow
def test_masks_of_other_documents_compile_nothing(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    create, counted, kept = masks._compiled_block_mask(), [], []
    for length in (5, 6, 7):
        may_look = predicate(3, documents_of(length))
        mask = create(may_look, 2, None, SEQ_LEN, SEQ_LEN, device=torch.device("cpu"))
        kept.append(mask.mask_mod(*torch.tensor([0, 0, 6, 4])).item())
        counted.append(graphs())
    assert counted[0] == counted[2] >= 1
    assert kept == [False, False, True]  # each has its own documents
