"""Counts against the modules, against published figures, and against a FLOP counter."""

import pytest
import torch
from helpers import build, tiny_args, tokens_of
from torch.utils.flop_counter import FlopCounterMode

from microtron.errors import UserError
from microtron.flavors import FLAVORS, flavor
from microtron.model import accounting, cpu_product
from microtron.model.model import Transformer


@pytest.mark.parametrize("name", FLAVORS)
def test_counts_agree_with_the_module_tree(name):
    args = flavor(name)
    with torch.device("meta"):
        accounting.check(Transformer(args), args)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_experts": 0},
        {"tie_embeddings": True},
        {"sinks": False},
        {"qk_norm": True},
        {"attention_bias": False},
        {"mlp_bias": False},
        {"n_kv_heads": 1},
        {"n_kv_heads": 4},
        {"norm": "layer", "qk_norm": True},
        {"positions": "learned", "max_positions": 7},
        {"num_experts": 0, "activation": "swiglu"},
        {"num_experts": 0, "activation": "gelu"},
        {"num_experts": 0, "activation": "gelu", "mlp_bias": False},
    ],
)
def test_counts_of_every_choice(overrides):
    args = tiny_args(**overrides)
    accounting.check(build(args), args)


def test_a_wrong_count_is_noticed():
    model = build(tiny_args())
    with pytest.raises(AssertionError, match="accounting says"):
        accounting.check(model, tiny_args(n_layers=3))


def test_published_sizes():
    """arXiv:2508.10925, table 1: 20.91B total and 3.61B active; 116.83B and 5.13B."""
    small, large = (accounting.count_parameters(flavor(f"gpt_oss_{n}")) for n in ("20b", "120b"))
    assert (round(small.total / 1e9, 2), round(small.active / 1e9, 2)) == (20.91, 3.61)
    assert (round(large.total / 1e9, 2), round(large.active / 1e9, 2)) == (116.83, 5.13)
    gpt2 = [accounting.count_parameters(f()).total for n, f in FLAVORS.items() if "gpt2" in n]
    assert gpt2 == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]  # of transformers' models


def test_the_656m_flavor_and_its_dense_twin():
    sparse, dense = flavor("gpt_oss_656m"), flavor("gpt_oss_656m_dense")
    counted = accounting.count_parameters(sparse)
    assert counted.non_embedding == pytest.approx(656e6, rel=0.01)
    assert (
        sparse.n_layers,
        sparse.dim,
        sparse.expert_dim,
        sparse.num_experts,
        sparse.top_k,
        sparse.head_dim,
        sparse.vocab_size,
    ) == (12, 1440, 1440, 8, 4, 64, 50304)
    assert sparse.n_heads % 8 == 0 and sparse.n_kv_heads % 8 == 0
    flops = [sum(accounting.flops_per_token(a, 2048).values()) for a in (sparse, dense)]
    assert flops[1] == pytest.approx(flops[0], rel=1e-3)  # the router is the difference


@pytest.mark.parametrize(
    "overrides", [{}, {"num_experts": 0}, {"num_experts": 0, "activation": "gelu"}], ids=str
)
def test_flops_against_a_counter(monkeypatch, overrides):
    """torch counts the products of a real step (not oneDNN's, which it does not know); eager
    attention computes the whole square, so the scores of a full layer are (S + 1) / 2S of what it
    does, and a window of S is a full layer.
    """
    monkeypatch.setattr(cpu_product, "has_onednn", lambda: False)
    args = tiny_args(window=16, loss_chunk_tokens=1000, **overrides)
    seq_len = 16
    model, tokens = build(args), tokens_of(args, batch=3, seq_len=seq_len)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    parts = accounting.flops_per_token(args, seq_len)
    square = {**parts, "scores": parts["scores"] * 2 * seq_len / (seq_len + 1)}
    expected = sum(square.values()) * 3 * seq_len
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seq_len", [1, 3, 8, 20])
def test_mean_keys_against_counting(seq_len):
    args = tiny_args(window=8)
    for layer, window in ((0, 8), (1, seq_len)):
        seen = [min(i + 1, window) for i in range(seq_len)]
        assert accounting.mean_keys(args, layer, seq_len) == pytest.approx(sum(seen) / seq_len)


def test_each_look_up_is_a_fresh_copy():
    first = flavor("debug")
    first.dim = 7
    assert flavor("debug").dim != 7


def test_unknown_flavor():
    with pytest.raises(UserError, match="'gpt5' is unknown: choose one of debug, "):
        flavor("gpt5")
