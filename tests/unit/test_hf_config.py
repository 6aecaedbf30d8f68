"""config.json there and back, the published ones, what transformers makes of ours, and refusals."""

import dataclasses

import pytest
import torch
from exports import family
from helpers import build_random, rel, tokens_of

from microtron.errors import UserError
from microtron.flavors import flavor
from microtron.hf.config import from_config, to_config

# openai/gpt-oss-20b, config.json as published.
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
# openai-community/gpt2-large, config.json as published.
GPT2_LARGE = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 1280,
    "n_head": 20,
    "n_layer": 36,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
# meta-llama/Llama-3.2-1B, config.json as published.
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
TINY_LLAMA = {  # Llama 2's generation: no head_dim, no biases named, no rope_scaling
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def architecture(args, *without):
    """The fields that decide what is computed."""
    from microtron.checkpoints import NOT_ARCHITECTURE

    fields = dataclasses.asdict(args)
    return {k: v for k, v in fields.items() if k not in NOT_ARCHITECTURE | set(without)}


def test_published_gpt_oss():
    args = from_config(GPT_OSS_20B)
    assert architecture(args, "hidden_dim") == architecture(flavor("gpt_oss_20b"), "hidden_dim")
    short = {k: GPT_OSS_20B[k] for k in ("model_type", "num_hidden_layers", "num_local_experts")}
    assert from_config(short) == args  # what is left out, transformers fills so


def test_published_gpt2():
    idle = ("rope_theta",)
    args = from_config(GPT2_LARGE)
    assert architecture(args, *idle) == architecture(flavor("gpt2_774m"), *idle)


def test_published_llama():
    args = from_config(LLAMA_1B)
    assert (args.rope_scaling, args.rope_factor, args.rope_original_len) == ("llama3", 32.0, 8192)
    assert (args.rope_beta_slow, args.rope_beta_fast, args.rope_theta) == (1.0, 4.0, 500000.0)
    assert args.tie_embeddings and args.head_dim == 64 and args.hidden_dim == 8192
    args = from_config(TINY_LLAMA)
    assert (args.head_dim, args.rope_theta, args.rope_factor) == (64, 10000.0, 1.0)
    assert not (args.attention_bias or args.mlp_bias or args.sinks or args.tie_embeddings)


YARN = {"rope_factor": 4.0, "rope_original_len": 64, "rope_beta_fast": 8.0, "rope_beta_slow": 0.5}
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_len": 48,
    "rope_beta_fast": 5.0,
    "rope_beta_slow": 1.5,
}
CHANGES = {
    "gpt_oss": [
        {"window_pattern": "SSL", "n_layers": 5, "window": 7},
        {"window_pattern": "LS"},
        {"window_pattern": "L"},
        {"attention_bias": False, "tie_embeddings": True, "norm_eps": 1e-6},
        {"rope_theta": 7000.0, "top_k": 3, "num_experts": 6},
        YARN,
        LLAMA3,
    ],
    "gpt2": [
        {"tie_embeddings": False},
        {"max_positions": 19, "norm_eps": 1e-6, "n_layers": 3},
        {"dim": 96, "head_dim": 24},
    ],
    "llama": [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_embeddings": True, "n_kv_heads": 4, "head_dim": 32, "rope_theta": 7000.0},
        {"hidden_dim": 40, "vocab_size": 72, "n_heads": 2, "n_kv_heads": 1},
        YARN,
        LLAMA3,
    ],
}
CASES = [(name, change) for name, changes in CHANGES.items() for change in ({}, *changes)]
# Fields of ModelArgs that a config carries, each of them changed above or in TINY.
CARRIED = {k for _, change in CASES for k in change} | {"expert_dim"}


@pytest.mark.parametrize("name, change", CASES, ids=str)
def test_there_and_back(name, change):
    from microtron.checkpoints import differing

    args = family(name, **change)
    config = to_config(args, max_positions=64, eos_token_id=3)
    back = from_config(config)
    assert not differing(dataclasses.asdict(back), args)
    assert not differing(dataclasses.asdict(args), back)
    for field in change:
        assert getattr(back, field) == getattr(args, field), field


@pytest.mark.parametrize("name, change", CASES, ids=str)
def test_transformers_computes_the_same(name, change):
    from exports import theirs
    from transformers import AutoConfig, AutoModelForCausalLM

    args = family(name, **change)
    ours = build_random(args).eval()
    config = AutoConfig.for_model(**to_config(args, max_positions=64))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unknown = model.load_state_dict(theirs(ours, args), strict=False)
    assert not unknown and missing in ([], ["lm_head.weight"])
    model.tie_weights()
    tokens = tokens_of(args, seq_len=18)
    with torch.no_grad():
        assert rel(ours(tokens), model(tokens).logits) < 1e-5


def test_both_spellings_of_rope_say_the_same():
    for name, change in (("gpt_oss", YARN), ("gpt_oss", {}), ("llama", LLAMA3), ("llama", {})):
        config = to_config(family(name, **change), max_positions=64)
        inner = dict(config["rope_parameters"])
        assert inner.pop("rope_theta") == config["rope_theta"]
        assert inner == (config["rope_scaling"] or {"rope_type": "default"})
    # Readers of gpt-oss look for YaRN's fields, and check the lengths against its factor.
    yarn = to_config(family("gpt_oss", **YARN), max_positions=64)
    assert yarn["max_position_embeddings"] == 4 * 64
    assert to_config(family("gpt_oss"), max_positions=64)["rope_scaling"]["factor"] == 1.0
    twice = to_config(family("gpt_oss", **YARN), max_positions=64)
    twice["rope_parameters"]["factor"] = 8.0
    with pytest.raises(UserError, match="rope_scaling = .* is not computed"):
        from_config(twice)


def rope(**fields):
    return {"rope_scaling": GPT_OSS_20B["rope_scaling"] | fields}


@pytest.mark.parametrize(
    "base, change, told",
    [
        (GPT_OSS_20B, {"model_type": "mixtral"}, "model_type = 'mixtral'"),
        (GPT_OSS_20B, {"model_type": ["gpt_oss"]}, "model_type = ['gpt_oss']"),
        (GPT_OSS_20B, {"hidden_size": "2880"}, "hidden_size = '2880' is no int"),
        (GPT_OSS_20B, {"num_hidden_layers": True}, "num_hidden_layers = True is no int"),
        (GPT_OSS_20B, {"num_attention_heads": 0}, "num_attention_heads"),
        (GPT_OSS_20B, {"num_attention_heads": 63}, "n_kv_heads"),
        (GPT_OSS_20B, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (GPT_OSS_20B, {"layer_types": ["full_attention"] * 3}, "layer_types"),
        (GPT_OSS_20B, {"layer_types": ["chunked_attention"] * 24}, "layer_types"),
        (GPT_OSS_20B, {"layer_types": [[]] * 24}, "layer_types"),
        (GPT_OSS_20B, {"layer_types": [], "num_hidden_layers": 0}, "layer_types"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (GPT_OSS_20B, {"rope_scaling": None}, "rope_scaling = None"),
        (GPT_OSS_20B, rope(rope_type="linear"), "rope_scaling.rope_type = 'linear'"),
        (GPT_OSS_20B, rope(truncate=True), "rope_scaling.truncate = True"),
        (GPT_OSS_20B, rope(attention_factor=1.0), "rope_scaling.attention_factor = 1.0"),
        (GPT_OSS_20B, rope(mscale=1.0, mscale_all_dim=1.0), "rope_scaling.mscale"),
        (GPT_OSS_20B, rope(factor=None), "rope_scaling.factor = None"),
        (GPT_OSS_20B, rope(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (GPT2_LARGE, {"activation_function": "relu"}, "activation_function = 'relu'"),
        (GPT2_LARGE, {"activation_function": "gelu"}, "activation_function = 'gelu'"),
        (GPT2_LARGE, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        (GPT2_LARGE, {"scale_attn_weights": False}, "scale_attn_weights = False"),
        (GPT2_LARGE, {"add_cross_attention": True}, "add_cross_attention = True"),
        (GPT2_LARGE, {"n_head": 19}, "n_head = 19"),
        (GPT2_LARGE, {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        (LLAMA_1B, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (LLAMA_1B, {"head_dim": 60}, "head_dim = 60"),
        (LLAMA_1B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    ],
    ids=str,
)
def test_what_is_not_computed_here_is_named(base, change, told):
    from_config(base)
    with pytest.raises(UserError) as refused:
        from_config(base | change)
    message = str(refused.value)
    assert message.startswith("config.json: ") and told in message and "\n" not in message, message


def test_an_export_without_a_counterpart_is_refused():
    with pytest.raises(UserError, match="logit_softcap = 15.0"):
        to_config(family("gpt_oss", logit_softcap=15.0), max_positions=64)
