"""OpenAI's own model (package gpt-oss, torch/model.py), a second judge on tiny random weights.

It holds bf16 weights and computes in bf16, one sequence at a time. `setup.sh dev` installs the
package without its requirements (they pin another Python); where it is not to be had, these skip.
"""

import pytest
import torch
from helpers import build_random, rel, tiny_args

reference = pytest.importorskip("gpt_oss.torch.model", reason="the gpt-oss package is not here")

SEQ_LEN = 96
# Its YaRN wants a real head and a real context; windows end long before the text does.
SHAPE = {
    "dim": 72,
    "n_layers": 4,
    "head_dim": 64,
    "window": 24,
    "expert_dim": 40,
    "num_experts": 6,
    "top_k": 3,
    "vocab_size": 96,
    "swiglu_limit": 1.0,  # so that it is reached
    "rope_theta": 150000.0,
    "rope_factor": 32.0,
    "rope_original_len": 4096,
}
NAMES = {  # theirs -> ours, within layer n; qkv is three of ours
    "attn.norm.scale": "attention_norm.weight",
    "attn.sinks": "attention.sinks",
    "attn.out.weight": "attention.wo.weight",
    "attn.out.bias": "attention.wo.bias",
    "mlp.norm.scale": "ffn_norm.weight",
    "mlp.gate.weight": "moe.router.gate.weight",
    "mlp.gate.bias": "moe.router.gate.bias",
    "mlp.mlp1_weight": "moe.experts.gate_up",
    "mlp.mlp1_bias": "moe.experts.gate_up_bias",
    "mlp.mlp2_weight": "moe.experts.down",
    "mlp.mlp2_bias": "moe.experts.down_bias",
}
OUTER = {
    "embedding.weight": "tok_embeddings.weight",
    "norm.scale": "norm.weight",
    "unembedding.weight": "output.weight",
}


def theirs_of(model):
    """Their model with our weights, rounded to bf16 on both sides."""
    args = model.model_args
    config = reference.ModelConfig(
        num_hidden_layers=args.n_layers,
        num_experts=args.num_experts,
        experts_per_token=args.top_k,
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.expert_dim,
        swiglu_limit=args.swiglu_limit,
        head_dim=args.head_dim,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        sliding_window=args.window,
        initial_context_length=args.rope_original_len,
        rope_theta=args.rope_theta,
        rope_scaling_factor=args.rope_factor,
        rope_ntk_alpha=args.rope_beta_slow,
        rope_ntk_beta=args.rope_beta_fast,
    )
    theirs = reference.Transformer(config, device=torch.device("cpu"))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(weight.bfloat16())
        for name, parameter in theirs.named_parameters():
            parameter.copy_(_ours(weights, name))
    assert not weights, f"they have no {sorted(weights)}"
    return theirs


def _ours(weights, name):
    """One of their parameters, made of ours, which are taken out."""
    if name in OUTER:
        return weights.pop(OUTER[name])
    _, layer, rest = name.split(".", 2)
    if rest.startswith("attn.qkv."):
        kind = rest.rpartition(".")[2]
        return torch.cat([weights.pop(f"layers.{layer}.attention.w{w}.{kind}") for w in "qkv"])
    weight = weights.pop(f"layers.{layer}.{NAMES[rest]}")
    return weight.transpose(1, 2) if weight.dim() == 3 else weight  # theirs are [E, out, in]


def logits_of(**overrides):
    """(ours in fp32, theirs in bf16, theirs in fp32): [S, V] of the same bf16 weights."""
    model = build_random(tiny_args(**(SHAPE | overrides)))
    theirs = theirs_of(model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.model_args.vocab_size, (SEQ_LEN,), generator=generator)
    with torch.no_grad():
        return model(tokens[None])[0], theirs(tokens).float(), theirs.float()(tokens)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "blocked"])
@pytest.mark.parametrize(
    "rope", [{}, {"rope_factor": 1.0}, {"n_kv_heads": 4}], ids=["yarn", "rope", "mha"]
)
def test_logits_agree(backend, rope):
    """In fp32 to rounding; their own bf16 run is as far from ours as from their fp32 run."""
    ours, rounded, exact = logits_of(attn_backend=backend, **rope)
    assert rel(ours, exact) < 2e-6
    assert rel(ours, rounded) < 1.2 * rel(exact, rounded) < 0.1
