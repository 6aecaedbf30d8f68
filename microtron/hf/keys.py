"""The one table of names: every tensor of ours beside the tensor of transformers that holds it.

Three families have a counterpart there: gpt-oss, GPT-2 and Llama. A row of a table is one claim; it
says which tensors it turns into which, and how, in both directions. `match` proves that each key of
a checkpoint is claimed exactly once. Weights of experts are [E, in, out] on both sides and only
change their name; GPT-2's Conv1D keeps [in, out] where ours are [out, in]; Llama's gate and up are
rows of one matrix here, interleaved.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from microtron.errors import UserError
from microtron.model.args import ModelArgs
from microtron.model.model import Transformer

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Claim:
    """Tensors of ours and the tensors of transformers that hold the same numbers."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_hf: Callable[[Tensors], Tensors]
    """Values of ``ours`` -> values of ``theirs``; shapes alone (meta tensors) will do."""
    from_hf: Callable[[Tensors], Tensors]
    """The reverse."""


Way = tuple[Callable[[Tensors], Tensors], Callable[[Tensors], Tensors]]
SAME: Way = (lambda t: t, lambda t: t)
TURNED: Way = (lambda t: [t[0].t()], lambda t: [t[0].t()])
JOINED: Way = (lambda t: [torch.cat(t)], lambda t: list(t[0].chunk(3)))
JOINED_TURNED: Way = (lambda t: [torch.cat(t).t()], lambda t: list(t[0].t().chunk(3)))
TIED: Way = (lambda t: t[:1], lambda t: [t[0], t[0]])
INTERLEAVED: Way = (
    lambda t: [t[0][0::2], t[0][1::2]],
    lambda t: [torch.stack(t, dim=1).flatten(0, 1)],
)

# Rows: names of ours, names of theirs, the way from one to the other; {} is the layer.
Row = tuple[str, str, Way]
GPT_OSS: tuple[Row, ...] = (
    ("tok_embeddings.weight", "model.embed_tokens.weight", SAME),
    ("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", SAME),
    ("layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight", SAME),
    ("layers.{}.attention.wq.bias", "model.layers.{}.self_attn.q_proj.bias", SAME),
    ("layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight", SAME),
    ("layers.{}.attention.wk.bias", "model.layers.{}.self_attn.k_proj.bias", SAME),
    ("layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight", SAME),
    ("layers.{}.attention.wv.bias", "model.layers.{}.self_attn.v_proj.bias", SAME),
    ("layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight", SAME),
    ("layers.{}.attention.wo.bias", "model.layers.{}.self_attn.o_proj.bias", SAME),
    ("layers.{}.attention.sinks", "model.layers.{}.self_attn.sinks", SAME),
    ("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", SAME),
    ("layers.{}.moe.router.gate.weight", "model.layers.{}.mlp.router.weight", SAME),
    ("layers.{}.moe.router.gate.bias", "model.layers.{}.mlp.router.bias", SAME),
    ("layers.{}.moe.experts.gate_up", "model.layers.{}.mlp.experts.gate_up_proj", SAME),
    ("layers.{}.moe.experts.gate_up_bias", "model.layers.{}.mlp.experts.gate_up_proj_bias", SAME),
    ("layers.{}.moe.experts.down", "model.layers.{}.mlp.experts.down_proj", SAME),
    ("layers.{}.moe.experts.down_bias", "model.layers.{}.mlp.experts.down_proj_bias", SAME),
    ("norm.weight", "model.norm.weight", SAME),
    ("output.weight", "lm_head.weight", SAME),
)
_QKV = "layers.{0}.attention.wq.%s layers.{0}.attention.wk.%s layers.{0}.attention.wv.%s"
GPT2: tuple[Row, ...] = (
    ("tok_embeddings.weight", "transformer.wte.weight", SAME),
    ("pos_embeddings.weight", "transformer.wpe.weight", SAME),
    ("layers.{}.attention_norm.weight", "transformer.h.{}.ln_1.weight", SAME),
    ("layers.{}.attention_norm.bias", "transformer.h.{}.ln_1.bias", SAME),
    (_QKV % (("weight",) * 3), "transformer.h.{}.attn.c_attn.weight", JOINED_TURNED),
    (_QKV % (("bias",) * 3), "transformer.h.{}.attn.c_attn.bias", JOINED),
    ("layers.{}.attention.wo.weight", "transformer.h.{}.attn.c_proj.weight", TURNED),
    ("layers.{}.attention.wo.bias", "transformer.h.{}.attn.c_proj.bias", SAME),
    ("layers.{}.ffn_norm.weight", "transformer.h.{}.ln_2.weight", SAME),
    ("layers.{}.ffn_norm.bias", "transformer.h.{}.ln_2.bias", SAME),
    ("layers.{}.feed_forward.up.weight", "transformer.h.{}.mlp.c_fc.weight", TURNED),
    ("layers.{}.feed_forward.up.bias", "transformer.h.{}.mlp.c_fc.bias", SAME),
    ("layers.{}.feed_forward.down.weight", "transformer.h.{}.mlp.c_proj.weight", TURNED),
    ("layers.{}.feed_forward.down.bias", "transformer.h.{}.mlp.c_proj.bias", SAME),
    ("norm.weight", "transformer.ln_f.weight", SAME),
    ("norm.bias", "transformer.ln_f.bias", SAME),
    ("output.weight", "lm_head.weight", SAME),
)
_GATE_UP = "model.layers.{0}.mlp.gate_proj.%s model.layers.{0}.mlp.up_proj.%s"
LLAMA: tuple[Row, ...] = (
    *(row for row in GPT_OSS if ".moe." not in row[0] and "sinks" not in row[0]),
    ("layers.{}.feed_forward.gate_up.weight", _GATE_UP % (("weight",) * 2), INTERLEAVED),
    ("layers.{}.feed_forward.gate_up.bias", _GATE_UP % (("bias",) * 2), INTERLEAVED),
    ("layers.{}.feed_forward.down.weight", "model.layers.{}.mlp.down_proj.weight", SAME),
    ("layers.{}.feed_forward.down.bias", "model.layers.{}.mlp.down_proj.bias", SAME),
)
TABLES = {"gpt_oss": GPT_OSS, "gpt2": GPT2, "llama": LLAMA}

# What a family computes, whatever its config says: other values have no counterpart there.
_PLAIN = {"qk_norm": False, "logit_softcap": 0.0}
FIXED: dict[str, dict[str, object]] = {
    "gpt_oss": _PLAIN
    | {
        "norm": "rms",
        "positions": "rope",
        "activation": "clamped_swiglu",
        "sinks": True,
        "mlp_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    "gpt2": _PLAIN
    | {
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu",
        "sinks": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama": _PLAIN | {"norm": "rms", "positions": "rope", "activation": "swiglu", "sinks": False},
}
# Buffers of old checkpoints that hold no weights: causal masks, RoPE's frequencies.
_NO_WEIGHTS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def family(args: ModelArgs) -> str:
    """The family whose table fits best, asked of the feed-forward; see `architecture`."""
    if args.num_experts:
        return "gpt_oss"
    return {"gelu": "gpt2", "swiglu": "llama"}.get(args.activation, "gpt_oss")


def architecture(args: ModelArgs) -> str:
    """The family of transformers that computes the same: gpt_oss, gpt2 or llama.

    Raises:
        UserError: there is none; with every field that has no counterpart in the closest one.
    """
    found = family(args)
    wrong = [
        f"{name} = {getattr(args, name)!r} ({wanted!r} there)"
        for name, wanted in FIXED[found].items()
        if getattr(args, name) != wanted
    ]
    kinds = {args.mask_kind(layer) for layer in range(args.n_layers)}
    if found == "gpt_oss" and not args.num_experts:
        wrong.append("num_experts = 0 (1 or more there)")
    if found != "gpt_oss" and "window" in kinds:
        wrong.append(f"window_pattern = {args.window_pattern!r} ('L' there)")
    if found == "gpt2" and args.n_kv_heads != args.n_heads:
        wrong.append(f"n_kv_heads = {args.n_kv_heads} (n_heads = {args.n_heads} there)")
    if found == "gpt2" and args.n_heads * args.head_dim != args.dim:
        wrong.append(f"head_dim = {args.head_dim} (dim / n_heads there)")
    if found == "llama" and args.dim % args.n_heads:
        wrong.append(f"n_heads = {args.n_heads} (a divisor of dim = {args.dim} there)")
    if wrong:
        raise UserError(
            f"no model of transformers computes this architecture; from the closest, {found}, it "
            f"differs in {'; '.join(wrong)}: only a model trained without these can be exported"
        )
    return found


def shapes(args: ModelArgs) -> dict[str, torch.Size]:
    """Our names, as a checkpoint has them (both of tied weights), and their shapes."""
    with torch.device("meta"):
        return {name: t.shape for name, t in Transformer(args).state_dict().items()}


def claims(args: ModelArgs) -> list[Claim]:
    """The claims of an architecture: first what has no counterpart, then the table, layer by layer.

    The experts' selection bias is such a thing: its claim lets zeros pass alone, so whoever exports
    should ask it first.
    """
    there = shapes(args)
    found = [claim for name in there if (claim := _ours_alone(name, args)) is not None]
    tied = args.tie_embeddings
    for ours, theirs, way in TABLES[family(args)]:
        if tied and ours == "output.weight":
            continue
        for layer in range(args.n_layers) if "{" in ours else (0,):
            names = tuple(ours.format(layer).split())
            if tied and ours == "tok_embeddings.weight":
                names, way = (*names, "output.weight"), TIED
            if all(name in there for name in names):
                found.append(Claim(names, tuple(theirs.format(layer).split()), *way))
    return found


def _ours_alone(name: str, args: ModelArgs) -> Claim | None:
    experts = args.num_experts
    if name.endswith(".load_fractions"):  # steers the balance of experts while training
        return Claim((name,), (), lambda t: [], lambda t: [torch.full((experts,), 1 / experts)])
    if not name.endswith(".expert_bias"):
        return None

    def only_zeros(values: Tensors) -> Tensors:
        if not values[0].is_meta and values[0].any():
            raise UserError(
                f"{name} is not zero: transformers has no selection bias and would route tokens "
                "to other experts; train with model.args.load_balance = aux_loss to export"
            )
        return []

    return Claim((name,), (), only_zeros, lambda t: [torch.zeros(experts)])


def match(
    claims: list[Claim], *, ours: Iterable[str] | None = None, theirs: Iterable[str] | None = None
) -> None:
    """Proves that every key of one side, or of both, is claimed exactly once.

    Raises:
        UserError: listing the keys that are missing, and those that nobody claims.
    """
    for side, names in (("ours", ours), ("theirs", theirs)):
        if names is None:
            continue
        names = Counter(iter(names))  # of a dictionary, too, its keys
        claimed = Counter(key for claim in claims for key in getattr(claim, side))
        told = [
            f"{what} {', '.join(keys)}"
            for what, keys in (
                ("lacks", sorted(claimed.keys() - names)),
                ("has unknown", sorted(names.keys() - claimed)),
                ("has twice", sorted(k for k, n in names.items() if n > 1)),
                ("claims twice", sorted(k for k, n in claimed.items() if n > 1)),
            )
            if keys
        ]
        if told:
            raise UserError(
                f"the weights do not fit the architecture: the checkpoint {'; '.join(told)}"
            )


def canonical(names: Iterable[str], args: ModelArgs) -> dict[str, str]:
    """Name in the table -> name as stored, for what is found in the wild.

    GPT-2 is published with and without ``transformer.``; buffers that hold no weights are left out,
    and so is the head of a tied model (`Folder` compares it with the embedding).
    """
    names = [name for name in names if not _NO_WEIGHTS.search(name)]
    bare = family(args) == "gpt2" and not any(n.startswith("transformer.") for n in names)
    found = {}
    for name in names:
        known = f"transformer.{name}" if bare and name != "lm_head.weight" else name
        if not (args.tie_embeddings and known == "lm_head.weight"):
            found[known] = name
    return found
