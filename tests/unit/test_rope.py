"""RoPE and its extensions against transformers, published numbers and the definition."""

import math

import pytest
import torch
from helpers import tiny_args
from transformers import GptOssConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from microtron.model.rope import RotaryEmbedding, attention_factor, inverse_frequencies, rotate

GPT_OSS = {
    "head_dim": 64,
    "rope_theta": 150000.0,
    "rope_factor": 32.0,
    "rope_original_len": 4096,
    "rope_beta_fast": 32.0,
    "rope_beta_slow": 1.0,
}


def theirs(args):
    config = GptOssConfig(
        head_dim=args.head_dim,
        hidden_size=args.dim,
        num_attention_heads=args.n_heads,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": args.rope_theta,
            "factor": args.rope_factor,
            "beta_fast": args.rope_beta_fast,
            "beta_slow": args.rope_beta_slow,
            "truncate": False,
            "original_max_position_embeddings": args.rope_original_len,
        },
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))


def table(args, positions):
    rope = RotaryEmbedding(args)
    rope.init_weights()
    return rope(positions)


@pytest.mark.parametrize(
    "changes",
    [
        GPT_OSS,
        GPT_OSS | {"rope_factor": 4.0},
        GPT_OSS | {"rope_original_len": 512, "head_dim": 128},
        GPT_OSS | {"rope_theta": 10000.0, "rope_beta_fast": 16.0, "rope_beta_slow": 2.0},
        # Few pairs and a short context: the ramp's lower bound is cut at 0.
        {"rope_theta": 20.0, "rope_factor": 8.0, "rope_original_len": 32},
        # A long one for this base: the upper bound is cut at head_dim - 1.
        {
            "rope_theta": 20.0,
            "rope_factor": 8.0,
            "rope_original_len": 4096,
            "rope_beta_fast": 600.0,
        },
    ],
)
def test_yarn_against_transformers(changes):
    args = tiny_args(**changes)
    frequencies, factor = theirs(args)
    torch.testing.assert_close(inverse_frequencies(args), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(args) == pytest.approx(factor, rel=1e-12)


LLAMA3 = {  # Llama 3.1 8B's config.json
    "rope_scaling": "llama3",
    "head_dim": 128,
    "rope_theta": 500000.0,
    "rope_factor": 8.0,
    "rope_original_len": 8192,
    "rope_beta_fast": 4.0,
    "rope_beta_slow": 1.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_factor": 32.0, "head_dim": 64},  # Llama 3.2 1B
        {"rope_original_len": 6, "rope_theta": 20.0, "head_dim": 16},  # none is kept
        {"rope_beta_fast": 2.5, "rope_beta_slow": 0.3},
    ],
)
def test_llama3_against_transformers(changes):
    args = tiny_args(**(LLAMA3 | changes))
    config = LlamaConfig(
        head_dim=args.head_dim,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": args.rope_theta,
            "factor": args.rope_factor,
            "low_freq_factor": args.rope_beta_slow,
            "high_freq_factor": args.rope_beta_fast,
            "original_max_position_embeddings": args.rope_original_len,
        },
        max_position_embeddings=131072,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(args), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(args) == factor == 1.0


def test_gpt_oss_numbers():
    """0.1 ln(32) + 1; the ramp runs from pair 8.1 to pair 17.4 of 32 (bounds not rounded)."""
    args = tiny_args(**GPT_OSS)
    assert attention_factor(args) == pytest.approx(1.3466, abs=5e-5)
    plain = 150000.0 ** -(torch.arange(32) / 32)
    ratio = (inverse_frequencies(args) / plain).tolist()
    low, high = (
        32 * math.log(4096 / (turns * 2 * math.pi)) / math.log(150000) for turns in (32, 1)
    )
    assert (low, high) == pytest.approx((8.0928, 17.3980), abs=1e-4)
    assert ratio[:9] == pytest.approx([1.0] * 9)
    assert ratio[18:] == pytest.approx([1 / 32] * 14)
    for pair in range(9, 18):
        share = (pair - low) / (high - low)
        assert ratio[pair] == pytest.approx(1 - share + share / 32, rel=1e-5)


def test_without_yarn_it_is_plain_rope():
    args = tiny_args(rope_theta=10000.0, rope_original_len=8)
    expected = torch.tensor([10000.0 ** (-2 * i / 16) for i in range(8)])
    torch.testing.assert_close(inverse_frequencies(args), expected)
    assert attention_factor(args) == 1.0


def test_the_factor_is_on_cos_and_sin_at_every_length():
    cos, sin = table(tiny_args(**GPT_OSS), torch.arange(5).unsqueeze(0))
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, 1.34657359**2))
    assert cos.shape == sin.shape == (1, 5, 1, 64) and cos.dtype == torch.float32


def test_rotation_is_half_split():
    """Pair i is (x[i], x[i + D/2]), turned as a complex number is."""
    args = tiny_args(rope_theta=50.0)
    positions = torch.tensor([[0, 1, 7], [3, 0, 2]])
    x = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    out = rotate(x, *table(args, positions))
    frequencies = inverse_frequencies(args)
    for b in range(2):
        for t in range(3):
            for pair in range(8):
                angle = float(positions[b, t]) * float(frequencies[pair])
                turn = complex(math.cos(angle), math.sin(angle))
                for h in range(4):
                    z = complex(x[b, t, h, pair], x[b, t, h, pair + 8]) * turn
                    got = complex(out[b, t, h, pair], out[b, t, h, pair + 8])
                    assert abs(got - z) < 1e-5


def test_scores_depend_on_distance_alone():
    args = tiny_args(**(GPT_OSS | {"head_dim": 16}))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = []
    for start in (0, 5, 1000):
        at = [table(args, torch.tensor([[p]])) for p in (start + 3, start)]
        scores.append((rotate(q, *at[0]) * rotate(k, *at[1])).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-3, atol=1e-4)


def test_bf16_is_rotated_in_fp32():
    x = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = table(tiny_args(), torch.arange(4).unsqueeze(0))
    out = rotate(x, *tables)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), *tables).bfloat16())
