"""The same weights in transformers' GPT2LMHeadModel and LlamaForCausalLM: same logits, same loss,
same gradients.

Weights are carried over here by hand, whatever `microtron/hf` makes of the names.
"""

import pytest
import torch
from helpers import (
    GPT2,
    LLAMA,
    assert_same_grads,
    assert_same_loss,
    build_random,
    grads_of,
    tiny_args,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SEQ_LEN = 40
# Original context 32: the pairs of a head of 16 turn 5.1, 2.9, 1.6, .. times; of each kind some.
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_len": 32,
    "rope_beta_fast": 4.0,
    "rope_beta_slow": 1.0,
}


def their_gpt2(args):
    """An untouched GPT2LMHeadModel of this shape."""
    config = GPT2Config(
        n_layer=args.n_layers,
        n_embd=args.dim,
        n_head=args.n_heads,
        n_inner=args.hidden_dim,
        n_positions=args.max_positions,
        vocab_size=args.vocab_size,
        layer_norm_epsilon=args.norm_eps,
        tie_word_embeddings=args.tie_embeddings,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager", dtype=torch.float32)


def their_llama(args):
    """An untouched LlamaForCausalLM of this shape."""
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_factor > 1:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_factor,
            "low_freq_factor": args.rope_beta_slow,
            "high_freq_factor": args.rope_beta_fast,
            "original_max_position_embeddings": args.rope_original_len,
        }
    config = LlamaConfig(
        num_hidden_layers=args.n_layers,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        attention_bias=args.attention_bias,
        mlp_bias=args.mlp_bias,
        tie_word_embeddings=args.tie_embeddings,
        rope_parameters=rope,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)


def as_gpt2(ours, n_layers):
    """Our tensors, by our names, under theirs: Conv1D is [in, out], and q, k and v are one."""
    theirs = {
        "transformer.wte.weight": ours["tok_embeddings.weight"],
        "transformer.wpe.weight": ours["pos_embeddings.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
    }
    if "output.weight" in ours:
        theirs["lm_head.weight"] = ours["output.weight"]
    for layer in range(n_layers):
        at, of = f"transformer.h.{layer}.", f"layers.{layer}."
        for name, norm in (("ln_1", "attention_norm"), ("ln_2", "ffn_norm")):
            theirs[f"{at}{name}.weight"] = ours[f"{of}{norm}.weight"]
            theirs[f"{at}{name}.bias"] = ours[f"{of}{norm}.bias"]
        for kind in ("weight", "bias"):
            qkv = [ours[f"{of}attention.w{x}.{kind}"] for x in "qkv"]
            theirs[f"{at}attn.c_attn.{kind}"] = torch.cat(qkv).t()
            theirs[f"{at}attn.c_proj.{kind}"] = ours[f"{of}attention.wo.{kind}"].t()
            theirs[f"{at}mlp.c_fc.{kind}"] = ours[f"{of}feed_forward.up.{kind}"].t()
            theirs[f"{at}mlp.c_proj.{kind}"] = ours[f"{of}feed_forward.down.{kind}"].t()
    return theirs


def as_llama(ours, n_layers):
    """Our tensors, by our names, under theirs: gate and up are rows 0, 2, .. and 1, 3, .."""
    theirs = {
        "model.embed_tokens.weight": ours["tok_embeddings.weight"],
        "model.norm.weight": ours["norm.weight"],
    }
    if "output.weight" in ours:
        theirs["lm_head.weight"] = ours["output.weight"]
    for layer in range(n_layers):
        at, of = f"model.layers.{layer}.", f"layers.{layer}."
        theirs[f"{at}input_layernorm.weight"] = ours[f"{of}attention_norm.weight"]
        theirs[f"{at}post_attention_layernorm.weight"] = ours[f"{of}ffn_norm.weight"]
        for kind in ("weight", "bias"):
            if f"{of}attention.wq.{kind}" in ours:
                for x in "qkvo":
                    theirs[f"{at}self_attn.{x}_proj.{kind}"] = ours[f"{of}attention.w{x}.{kind}"]
            if f"{of}feed_forward.down.{kind}" in ours:
                gate_up = ours[f"{of}feed_forward.gate_up.{kind}"]
                theirs[f"{at}mlp.gate_proj.{kind}"] = gate_up[::2]
                theirs[f"{at}mlp.up_proj.{kind}"] = gate_up[1::2]
                theirs[f"{at}mlp.down_proj.{kind}"] = ours[f"{of}feed_forward.down.{kind}"]
    return theirs


FAMILIES = {
    "gpt2": (GPT2, their_gpt2, as_gpt2),
    "llama": (LLAMA | {"rope_theta": 100.0}, their_llama, as_llama),
}


def twins(family, **overrides):
    """(ours, theirs) with the same random weights."""
    shape, build_theirs, rename = FAMILIES[family]
    args = tiny_args(**(shape | {"n_layers": 3} | overrides))
    model, theirs = build_random(args), build_theirs(args)
    weights = rename({n: p.detach() for n, p in model.named_parameters()}, args.n_layers)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights, "parameters of ours that transformers does not have"
    return model, theirs


def compare(family, **overrides):
    """Logits, loss and every gradient; no more than rounding may differ."""
    model, theirs = twins(family, **overrides)
    args = model.model_args
    assert_same_loss(model, theirs, SEQ_LEN)
    ours = FAMILIES[family][2](grads_of(model), args.n_layers)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    if family == "gpt2":
        drop_keys(ours, args), drop_keys(wanted, args)
    assert_same_grads(ours, wanted, 1e-3)


def drop_keys(grads, args):
    """The keys' part of c_attn's bias, which without rotation or sink moves no softmax."""
    start, end = args.n_heads * args.head_dim, (args.n_heads + args.n_kv_heads) * args.head_dim
    for name in [n for n in grads if n.endswith("c_attn.bias")]:
        whole = grads[name]
        grads[name] = torch.cat((whole[:start], whole[end:]))
        assert whole[start:end].norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("attn_backend", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_backends(family, attn_backend):
    compare(family, attn_backend=attn_backend, loss_chunk_tokens=7)


def test_gpt2_with_a_head_of_its_own():
    compare("gpt2", tie_embeddings=False)


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "plain"])
@pytest.mark.parametrize("rope", [{}, LLAMA3], ids=["rope", "llama3"])
@pytest.mark.parametrize("n_kv_heads", [4, 1], ids=["mha", "mqa"])
def test_llama(n_kv_heads, rope, bias):
    compare("llama", n_kv_heads=n_kv_heads, attention_bias=bias, mlp_bias=bias, **rope)


def test_llama_with_a_tied_head():
    compare("llama", tie_embeddings=True, **LLAMA3)
