"""Rotary positions (arXiv:2104.09864), half-split as gpt-oss has them, with YaRN
(arXiv:2309.00071) or Llama 3.1's extension (arXiv:2407.21783).

YaRN as gpt-oss runs it: the ramp's bounds are not rounded (truncate=false), and cos and sin carry
the attention factor 0.1 ln(factor) + 1 at every length. Angles are computed from the positions of
the batch, so packed documents and context-parallel slices need nothing special.
"""

import math

import torch
from torch import nn

from microtron.model.args import ModelArgs


def inverse_frequencies(args: ModelArgs, device: torch.device | None = None) -> torch.Tensor:
    """Radians a position for each rotated pair: fp32 [head_dim / 2].

    Pairs that turn more than ``rope_beta_fast`` times over the original context keep their
    frequency, those below ``rope_beta_slow`` are divided by ``rope_factor``, a linear ramp joins
    them: over the pairs' numbers (YaRN) or over their rotations (Llama 3.1).
    """
    half = args.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=device) / half
    extrapolated = 1.0 / args.rope_theta**exponent
    if args.rope_factor == 1.0:
        return extrapolated
    if args.rope_scaling == "llama3":
        rotations = args.rope_original_len * extrapolated / (2 * math.pi)
        span = args.rope_beta_fast - args.rope_beta_slow
        ramp = ((args.rope_beta_fast - rotations) / span).clamp(0, 1)
    else:
        ramp = _yarn_ramp(args, device)
    return extrapolated / args.rope_factor * ramp + extrapolated * (1 - ramp)


def _yarn_ramp(args: ModelArgs, device: torch.device | None) -> torch.Tensor:
    """0 for pairs that keep their frequency to 1 for those divided: fp32 [head_dim / 2]."""
    half = args.head_dim // 2

    def pair_turning(rotations: float) -> float:
        wavelength = args.rope_original_len / (rotations * 2 * math.pi)
        return half * math.log(wavelength) / math.log(args.rope_theta)

    low = max(pair_turning(args.rope_beta_fast), 0.0)
    high = min(pair_turning(args.rope_beta_slow), args.head_dim - 1.0)
    pairs = torch.arange(half, dtype=torch.float32, device=device)
    return ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)


def attention_factor(args: ModelArgs) -> float:
    """The factor on cos and sin (YaRN eq. 22 with t = 1 / 0.1 ln(s) + 1); Llama 3.1 has none."""
    return 0.1 * math.log(args.rope_factor) + 1.0 if args.rope_scaling == "yarn" else 1.0


class RotaryEmbedding(nn.Module):
    """Positions to cos and sin tables."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.factor = attention_factor(args)
        self.register_buffer("inv_freq", torch.empty(args.head_dim // 2), persistent=False)

    def init_weights(self, device: torch.device | None = None) -> None:
        """Fills the frequencies (a meta model has none)."""
        device = device or self.inv_freq.device
        self.inv_freq = inverse_frequencies(self.args, device)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B or 1, S] -> cos, signed sin: fp32 [B or 1, S, 1, head_dim]; see `rotate`."""
        angles = positions[..., None, None].float() * self.inv_freq
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (x[i], x[i + D/2]) by their angles, in fp32.

    x [B, S, H, D]; cos and sin [B or 1, S, 1, D], the latter with the first half's sign turned, so
    that one roll does both halves; returns x's shape and dtype.
    """
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` for queries [B, S, H, D] and keys [B, S, K, D]."""
    return rotate(q, cos, sin), rotate(k, cos, sin)
