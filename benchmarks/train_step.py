"""A training step against transformers' GptOssForCausalLM: same weights, same batch, same AdamW.

    python benchmarks/train_step.py --shape tiny \
        --out benchmarks/results/train_step_tiny_float32.json

Both sides run forward, backward, clipping and a fused AdamW step in one process, taking turns. The
peer gets its best: the implementations of its experts that are made for more than a few tokens, the
fastest counts. In bf16 both train twice: fp32 weights under autocast, and weights of bf16.
"""

import argparse
import copy
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

BF16 = torch.bfloat16
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
    """One training step, under autocast if ``dtype`` is not fp32, as a function that returns its
    loss.
    """
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


def peers(
    ours: Transformer, tokens: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], float]]:
    """Name -> a step of transformers' model with our weights."""
    found = {}
    for weights in dict.fromkeys((torch.float32, dtype)):
        for implementation in ("eager", "grouped_mm"):  # batched_mm copies weights for each token
            theirs = peer(ours, tokens.shape[1])
            theirs.set_experts_implementation(implementation)
            kind = implementation + ", bf16 weights" * (weights == BF16)
            found[f"transformers ({kind})"] = stepper(
                hold(theirs, weights),
                lambda m=theirs: F.cross_entropy(
                    m(input_ids=tokens).logits.float().flatten(0, 1), labels.flatten()
                ),
                torch.float32 if weights == BF16 else dtype,  # bf16 weights need no autocast
            )
    return found


def hold(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """``model`` with weights of ``dtype``; what is no parameter (RoPE's frequencies) stays fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def own(
    model: Transformer,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype,
    compiled: bool,
) -> dict[str, Callable[[], float]]:
    """Name -> a step of ours; ``model`` is the one with fp32 weights."""
    held = hold(copy.deepcopy(model), BF16) if dtype == BF16 else None

    def stepping(model: Transformer, under: torch.dtype) -> Callable[[], float]:
        for block in model.layers.values() if compiled else ():
            block.compile(fullgraph=True)
        return stepper(model, lambda: model(tokens, labels=labels) / labels.numel(), under)

    found = {"microtron": stepping(model, dtype)}
    if held is not None:
        found["microtron (bf16 weights)"] = stepping(held, torch.float32)
    return found


def compared(rows: dict[str, dict[str, float]]) -> dict[str, object]:
    """Our fastest and theirs, and the ratio of their medians; ``by_weights``: of those that hold
    the same weights.
    """

    def best(names: list[str]) -> dict[str, object]:
        ours, theirs = (
            max((n for n in names if n.startswith(who)), key=lambda n: rows[n]["median"])
            for who in ("microtron", "transformers")
        )
        ratio = rows[ours]["median"] / rows[theirs]["median"]
        return {"ours": ours, "peer": theirs, "ratio": ratio}

    bf16 = [name for name in rows if "bf16 weights" in name]
    kinds = {"fp32": [name for name in rows if name not in bf16]} | ({"bf16": bf16} if bf16 else {})
    return {**best(list(rows)), "by_weights": {k: best(names) for k, names in kinds.items()}}


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
    steps = own(ours, tokens, labels, dtype, asked.compile) | peers(ours, tokens, labels, dtype)
    first = {name: step() for name, step in steps.items()}
    spread = max(first.values()) - min(first.values())
    assert spread < (1e-4 if dtype == torch.float32 else 2e-2), first  # else it compares nothing
    seconds = interleave(steps, asked.repeats)
    rows = {n: summary([labels.numel() / s for s in values]) for n, values in seconds.items()}
    found = compared(rows)
    for name, row in rows.items():
        print(f"{name:40} {row['median']:8,.0f} tokens/s [{row['min']:,.0f} .. {row['max']:,.0f}]")
    told = f"{found['ours']} {found['ratio']:.2f}x {found['peer']}"
    print(f"{asked.shape} {asked.dtype}: {told}; first losses agree to {spread:.1e}")
    for weights, pair in found["by_weights"].items():
        print(f"both with {weights} weights: {pair['ratio']:.2f}x {pair['peer']}")
    if asked.out:
        result = {"shape": asked.shape, "fields": fields, "batch": batch, "seq_len": seq_len}
        result |= {"dtype": asked.dtype, "compile": asked.compile, "tokens_per_s": rows}
        write_json(asked.out, {**result, **found, **facts()})


if __name__ == "__main__":
    main()
