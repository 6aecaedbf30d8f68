"""config.json of transformers <-> ModelArgs.

transformers fills what a config leaves out with defaults of its own, some of them silently wrong
for another model (YaRN of 32, 36 layers, a window of 128): an export writes every field, in the
spelling of transformers 5 (rope_parameters) and of 4.57 (rope_theta, rope_scaling). An import takes
the same defaults, and refuses by name whatever would be computed otherwise here.
"""

from collections.abc import Callable
from typing import Any

from microtron.errors import UserError
from microtron.hf.keys import architecture
from microtron.hf.rope import Fields, read_rope, write_rope
from microtron.model.args import ModelArgs

CLASSES = {"gpt_oss": "GptOssForCausalLM", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
LAYER_TYPES = {"window": "sliding_attention", "full": "full_attention"}


def to_config(
    args: ModelArgs,
    *,
    max_positions: int,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """config.json of an architecture.

    Args:
        max_positions: longest sequence, in tokens; learned positions and YaRN know their own.
        dtype: of the weights, without ``torch.``.

    Raises:
        UserError: no model of transformers computes the same; with the fields.
    """
    kind = architecture(args)
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": args.vocab_size,
        **_WRITERS[kind](args, max_positions),
        "tie_word_embeddings": args.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def from_config(config: dict[str, Any]) -> ModelArgs:
    """The architecture that a config.json describes.

    Raises:
        UserError: another kind of model, or a field whose value is not computed here; named.
    """
    if not isinstance(config, dict):
        raise UserError(f"config.json holds a {type(config).__name__}, not the fields of a model")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise UserError(
            f"config.json: model_type = {kind!r} is not known here; there are {', '.join(CLASSES)}"
        )
    fields = Fields(config)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and (kind, method) != ("gpt_oss", "mxfp4"):
        raise fields.refused("quantization_config", "weights in mxfp4 (gpt_oss) or none")
    try:
        return ModelArgs(
            **_READERS[kind](fields),
            tie_embeddings=fields.get("tie_word_embeddings", kind == "gpt2", bool),
        )
    except UserError as error:
        told = str(error)
        raise UserError(
            told if told.startswith("config.json") else f"config.json: {told}"
        ) from None


def _write_gpt_oss(args: ModelArgs, max_positions: int) -> dict[str, Any]:
    return {
        "hidden_size": args.dim,
        "intermediate_size": args.expert_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "num_local_experts": args.num_experts,
        "num_experts_per_tok": args.top_k,
        "experts_per_token": args.top_k,  # openai's own spelling
        "sliding_window": args.window,
        "layer_types": [LAYER_TYPES[args.mask_kind(i)] for i in range(args.n_layers)],
        "hidden_act": "silu",
        "swiglu_alpha": args.swiglu_alpha,
        "swiglu_limit": args.swiglu_limit,
        "attention_bias": args.attention_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": args.norm_eps,
        "router_aux_loss_coef": args.aux_loss_coef if args.load_balance == "aux_loss" else 0.0,
        "output_router_logits": False,
        # Readers of gpt-oss (vLLM) look for YaRN's fields: a factor of 1 is plain RoPE.
        **write_rope(args, max_positions, plain="yarn"),
    }


def _write_gpt2(args: ModelArgs, max_positions: int) -> dict[str, Any]:
    return {
        "n_positions": args.max_positions,
        "n_ctx": args.max_positions,
        "n_embd": args.dim,
        "n_layer": args.n_layers,
        "n_head": args.n_heads,
        "n_inner": args.hidden_dim,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": args.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    }


def _write_llama(args: ModelArgs, max_positions: int) -> dict[str, Any]:
    return {
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "attention_bias": args.attention_bias,
        "mlp_bias": args.mlp_bias,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "rms_norm_eps": args.norm_eps,
        **write_rope(args, max_positions, plain="default"),
    }


_GPT_OSS_DEFAULTS = {
    "num_hidden_layers": 36,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_LLAMA_DEFAULTS = {
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "head_dim": None,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}


def _read_attention(fields: Fields, defaults: dict[str, Any]) -> dict[str, Any]:
    """What gpt-oss and Llama call alike."""
    heads = fields.get("num_attention_heads", defaults["num_attention_heads"], int)
    dim = fields.get("hidden_size", defaults["hidden_size"], int)
    if heads < 1:
        raise fields.refused("num_attention_heads", "1 or more")
    fields.only("hidden_act", "silu", "silu")
    fields.only("partial_rotary_factor", 1.0, 1.0, None)
    return {
        "dim": dim,
        "vocab_size": fields.get("vocab_size", defaults["vocab_size"], int),
        "n_layers": fields.get("num_hidden_layers", defaults["num_hidden_layers"], int),
        "n_heads": heads,
        "n_kv_heads": fields.get(
            "num_key_value_heads", defaults["num_key_value_heads"] or heads, int
        ),
        "head_dim": fields.get("head_dim", defaults["head_dim"] or dim // heads, int),
        "norm_eps": fields.get("rms_norm_eps", defaults["rms_norm_eps"], float),
        "attention_bias": fields.get("attention_bias", defaults["attention_bias"], bool),
    }


def _read_gpt_oss(fields: Fields) -> dict[str, Any]:
    attention = _read_attention(fields, _GPT_OSS_DEFAULTS)
    told = fields.config
    if "rope_scaling" in told and not (told["rope_scaling"] or told.get("rope_parameters")):
        # 4.57 rotates plainly then, 5 by the family's YaRN.
        raise fields.refused("rope_scaling", "rope_parameters with a rope_type")
    return {
        **attention,
        **read_rope(fields, 150000.0, 131072, _GPT_OSS_ROPE),
        "window": fields.get("sliding_window", 128, int),
        "window_pattern": _pattern(fields, attention["n_layers"]),
        "sinks": True,
        "num_experts": fields.get("num_local_experts", 128, int),
        "top_k": fields.get("num_experts_per_tok", 4, int),
        "expert_dim": fields.get("intermediate_size", 2880, int),
        "swiglu_alpha": fields.get("swiglu_alpha", 1.702, float),
        "swiglu_limit": fields.get("swiglu_limit", 7.0, float),
    }


def _read_llama(fields: Fields) -> dict[str, Any]:
    return {
        **_read_attention(fields, _LLAMA_DEFAULTS),
        **read_rope(fields, 10000.0, 2048, {"rope_type": "default"}),
        "activation": "swiglu",
        "sinks": False,
        "window_pattern": "L",
        "num_experts": 0,
        "hidden_dim": fields.get("intermediate_size", 11008, int),
        "mlp_bias": fields.get("mlp_bias", False, bool),
    }


def _read_gpt2(fields: Fields) -> dict[str, Any]:
    fields.only("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    fields.only("scale_attn_weights", True, True)
    fields.only("scale_attn_by_inverse_layer_idx", False, False)
    fields.only("add_cross_attention", False, False)
    dim, heads = fields.get("n_embd", 768, int), fields.get("n_head", 12, int)
    if heads < 1 or dim % heads:
        raise fields.refused("n_head", f"a divisor of n_embd = {dim}")
    return {
        "dim": dim,
        "vocab_size": fields.get("vocab_size", 50257, int),
        "n_layers": fields.get("n_layer", 12, int),
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": dim // heads,
        "norm": "layer",
        "norm_eps": fields.get("layer_norm_epsilon", 1e-5, float),
        "positions": "learned",
        "max_positions": fields.get("n_positions", 1024, int),
        "activation": "gelu",
        "hidden_dim": fields.get("n_inner", 4 * dim, int),
        "num_experts": 0,
        "sinks": False,
        "window_pattern": "L",
    }


_WRITERS: dict[str, Callable[[ModelArgs, int], dict[str, Any]]] = {
    "gpt_oss": _write_gpt_oss,
    "gpt2": _write_gpt2,
    "llama": _write_llama,
}
_READERS: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "gpt_oss": _read_gpt_oss,
    "gpt2": _read_gpt2,
    "llama": _read_llama,
}


def _pattern(fields: Fields, layers: int) -> str:
    """The shortest window_pattern that repeats to layer_types."""
    types = fields.config.get("layer_types")
    if types is None:  # the family's default
        return "SL"
    letters = {"sliding_attention": "S", "full_attention": "L"}
    fits = isinstance(types, list) and len(types) == layers > 0
    if not fits or any(kind not in tuple(letters) for kind in types):
        raise fields.refused("layer_types", f"{layers} of {', '.join(letters)}")
    whole = "".join(letters[kind] for kind in types)
    lengths = range(1, layers + 1)
    return next(whole[:n] for n in lengths if (whole[:n] * layers)[:layers] == whole)
