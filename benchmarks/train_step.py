"""A training step against transformers' GptOssForCausalLM: same weights, same batch, same AdamW.

    python benchmarks/train_step.py --shape tiny \
        --out benchmarks/results/train_step_tiny_float32.json

Both sides run forward, backward, clipping and a fused AdamW step in one process, taking turns. The
peer gets its best: the implementations of its experts that are made for more than a few tokens, the
fastest counts.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import facts, interleave, summary, write_json  # noqa: E402
from transformers import GptOssConfig, GptOssForCausalLM  # noqa: E402

from microtron.kernels import apply_kernels  # noqa: E402
from microtron.model.args import ModelArgs  # noqa: E402
from microtron.model.model import Transformer  # noqa: E402

SHAPES = {  # ModelArgs fields, batch, sequence
    "tiny": (
        {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
        | {"num_experts": 4, "top_k": 2, "expert_dim": 128, "vocab_size": 512},
        8,
        256,
    ),
    "small": (
        {"dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32}
        | {"num_experts": 8, "top_k": 4, "expert_dim": 256, "vocab_size": 4096},
        4,
        512,
    ),
    "medium": (
        {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64}
        | {"num_experts": 16, "top_k": 4, "expert_dim": 512, "vocab_size": 8192},
        2,
        1024,
    ),
}
# ours -> transformers
LAYER = {
    "attention.sinks": "self_attn.sinks",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "moe.router.gate": "mlp.router",
    "moe.experts.gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down_bias": "mlp.experts.down_proj_bias",
    "moe.experts.down": "mlp.experts.down_proj",
}
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def their_name(name: str) -> str:
    """The transformers name of one of our parameters."""
    table, prefix = TOP, ""
    if name.startswith("layers."):
        _, number, name = name.split(".", 2)
        table, prefix = LAYER, f"model.layers.{number}."
    part = max((p for p in table if name.startswith(p)), key=len)
    return prefix + table[part] + name[len(part) :]


def peer(ours: Transformer, seq_len: int) -> GptOssForCausalLM:
    """transformers' model with our weights."""
    a = ours.model_args
    config = GptOssConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.dim,
        intermediate_size=a.expert_dim,
        num_hidden_layers=a.n_layers,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_kv_heads,
        head_dim=a.head_dim,
        num_local_experts=a.num_experts,
        num_experts_per_tok=a.top_k,
        sliding_window=a.window,
        max_position_embeddings=seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
        attn_implementation="eager",  # the only one with sinks on CPU
        use_cache=False,
    )
    model = GptOssForCausalLM(config)
    weights = {their_name(n): p.detach().clone() for n, p in ours.named_parameters()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


def stepper(
    model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], dtype: torch.dtype
) -> Callable[[], float]:
    """One training step as a function, which returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Compares, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = getattr(torch, asked.dtype)
    fields, batch, seq_len = SHAPES[asked.shape]
    ours = Transformer(ModelArgs(**fields, window=128, aux_loss_coef=0.0))
    ours.init_weights()
    apply_kernels(ours, {}, "cpu", asked.compile)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(fields["vocab_size"], (batch, seq_len + 1), generator=generator)
    tokens, labels = data[:, :-1], data[:, 1:]
    if asked.compile:
        for block in ours.layers.values():
            block.compile(fullgraph=True)
    steps = {
        "microtron": stepper(ours, lambda: ours(tokens, labels=labels) / labels.numel(), dtype)
    }
    for implementation in ("eager", "grouped_mm"):  # batched_mm copies weights for each token
        theirs = peer(ours, seq_len)
        theirs.set_experts_implementation(implementation)
        steps[f"transformers ({implementation})"] = stepper(
            theirs,
            lambda m=theirs: F.cross_entropy(
                m(input_ids=tokens).logits.float().flatten(0, 1), labels.flatten()
            ),
            dtype,
        )
    first = {name: step() for name, step in steps.items()}
    spread = max(first.values()) - min(first.values())
    assert spread < (1e-4 if dtype == torch.float32 else 2e-2), first  # else it compares nothing
    seconds = interleave(steps, asked.repeats)
    rows = {n: summary([labels.numel() / s for s in values]) for n, values in seconds.items()}
    best = max((n for n in rows if n != "microtron"), key=lambda n: rows[n]["median"])
    ratio = rows["microtron"]["median"] / rows[best]["median"]
    for name, row in rows.items():
        print(f"{name:28} {row['median']:8,.0f} tokens/s [{row['min']:,.0f} .. {row['max']:,.0f}]")
    print(f"{asked.shape} {asked.dtype}: {ratio:.2f}x {best}; first losses agree to {spread:.1e}")
    if asked.out:
        result = {"shape": asked.shape, "fields": fields, "batch": batch, "seq_len": seq_len}
        result |= {"dtype": asked.dtype, "compile": asked.compile, "tokens_per_s": rows}
        write_json(asked.out, {**result, "peer": best, "ratio": ratio, **facts()})


if __name__ == "__main__":
    main()
