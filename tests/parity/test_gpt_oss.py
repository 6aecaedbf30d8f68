"""The same weights in transformers' GptOssForCausalLM: same logits, same loss, same gradients.

Sequences are longer than the window and than YaRN's original context.
"""

import re

import pytest
import torch
from helpers import (
    assert_same_grads,
    assert_same_loss,
    build_random,
    grads_of,
    tiny_args,
    tokens_of,
)
from transformers import GptOssConfig, GptOssForCausalLM

SEQ_LEN = 40
YARN = {"rope_theta": 20.0, "rope_factor": 8.0, "rope_original_len": 32, "rope_beta_fast": 4.0}

NAMES = {  # theirs -> ours; <layer> stands for the number
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.<layer>.input_layernorm.weight": "layers.<layer>.attention_norm.weight",
    "model.layers.<layer>.self_attn.q_proj.weight": "layers.<layer>.attention.wq.weight",
    "model.layers.<layer>.self_attn.q_proj.bias": "layers.<layer>.attention.wq.bias",
    "model.layers.<layer>.self_attn.k_proj.weight": "layers.<layer>.attention.wk.weight",
    "model.layers.<layer>.self_attn.k_proj.bias": "layers.<layer>.attention.wk.bias",
    "model.layers.<layer>.self_attn.v_proj.weight": "layers.<layer>.attention.wv.weight",
    "model.layers.<layer>.self_attn.v_proj.bias": "layers.<layer>.attention.wv.bias",
    "model.layers.<layer>.self_attn.o_proj.weight": "layers.<layer>.attention.wo.weight",
    "model.layers.<layer>.self_attn.o_proj.bias": "layers.<layer>.attention.wo.bias",
    "model.layers.<layer>.self_attn.sinks": "layers.<layer>.attention.sinks",
    "model.layers.<layer>.post_attention_layernorm.weight": "layers.<layer>.ffn_norm.weight",
    "model.layers.<layer>.mlp.router.weight": "layers.<layer>.moe.router.gate.weight",
    "model.layers.<layer>.mlp.router.bias": "layers.<layer>.moe.router.gate.bias",
    "model.layers.<layer>.mlp.experts.gate_up_proj": "layers.<layer>.moe.experts.gate_up",
    "model.layers.<layer>.mlp.experts.gate_up_proj_bias": "layers.<layer>.moe.experts.gate_up_bias",
    "model.layers.<layer>.mlp.experts.down_proj": "layers.<layer>.moe.experts.down",
    "model.layers.<layer>.mlp.experts.down_proj_bias": "layers.<layer>.moe.experts.down_bias",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def ours(name):
    """Our name of one of their parameters."""
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer is None:
        return NAMES[name]
    plain = name.replace(layer[0], "layers.<layer>.")
    return NAMES[plain].replace("<layer>", layer[1])


def their_config(args):
    """The same architecture in their words."""
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_factor > 1:
        rope = {
            "rope_type": "yarn",
            "rope_theta": args.rope_theta,
            "factor": args.rope_factor,
            "beta_fast": args.rope_beta_fast,
            "beta_slow": args.rope_beta_slow,
            "truncate": False,
            "original_max_position_embeddings": args.rope_original_len,
        }
    return GptOssConfig(
        num_hidden_layers=args.n_layers,
        num_local_experts=args.num_experts,
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.expert_dim,
        head_dim=args.head_dim,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        sliding_window=args.window,
        num_experts_per_tok=args.top_k,
        rope_parameters=rope,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=4096,
        swiglu_limit=args.swiglu_limit,
        use_cache=False,
    )


def twins(**overrides):
    """(ours, theirs) with the same random weights."""
    args = tiny_args(n_layers=3, swiglu_limit=1.5, **overrides)
    model = build_random(args)
    theirs = GptOssForCausalLM._from_config(
        their_config(args),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights.pop(ours(name)))
    assert not weights, "parameters of ours that transformers does not have"
    return model, theirs


def compare(**overrides):
    """Logits, loss and every gradient; no more than rounding may differ."""
    model, theirs = twins(**overrides)
    assert_same_loss(model, theirs, SEQ_LEN)
    assert_same_grads(
        grads_of(model), {ours(name): p.grad for name, p in theirs.named_parameters()}, 1e-3
    )


@pytest.mark.parametrize("yarn", [{}, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_heads_and_positions(n_kv_heads, yarn):
    compare(n_kv_heads=n_kv_heads, loss_chunk_tokens=7, **yarn)


@pytest.mark.parametrize("experts_backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("attn_backend", ["eager", "sdpa", "blocked"])
def test_backends(attn_backend, experts_backend):
    compare(attn_backend=attn_backend, experts_backend=experts_backend, **YARN)


def test_all_experts():
    compare(top_k=4)


def test_one_expert():
    """Its routing weight is 1 whatever the logits, so the router has no gradient: logits only."""
    model, theirs = twins(top_k=1)
    tokens = tokens_of(model.model_args, seq_len=SEQ_LEN)
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_logits_take_the_plain_gradient():
    """Without labels the gradient comes from ordinary autograd through the logits."""
    model, theirs = twins(**YARN)
    tokens = tokens_of(model.model_args, seq_len=SEQ_LEN)
    for either in (model, theirs):
        out = either(tokens)
        (out if either is model else out.logits).square().mean().backward()
    assert_same_grads(
        grads_of(model), {ours(name): p.grad for name, p in theirs.named_parameters()}, 1e-3
    )
