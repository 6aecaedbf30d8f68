"""The clamped SwiGLU of gpt-oss, and the dense feed-forward: with it, with Llama's SwiGLU
(arXiv:2002.05202), or with GPT-2's GELU (arXiv:1606.08415).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.cpu_product import Linear


def swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``gate * sigmoid(alpha * gate) * (up + 1)``; gate and up interleaved on the last dimension.

    gate_up: [..., 2 I] as gate0, up0, gate1, up1, ... -> [..., I]. Gate is clamped above at
    ``limit``, up on both sides (gpt-oss ``torch/model.py``, ``swiglu``).
    """
    gate, up = deinterleave(gate_up)
    # hardtanh is clamp with a vectorised gradient.
    gate, up = F.hardtanh(gate, -math.inf, limit), F.hardtanh(up, -limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def deinterleave(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Even and odd columns as contiguous tensors: plain slices make all that follows strided."""
    return _Deinterleave.apply(x)


class _Deinterleave(torch.autograd.Function):
    """Its gradient is written once, into one tensor."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001, ANN205
        return x[..., ::2].contiguous(), x[..., 1::2].contiguous()

    @staticmethod
    def backward(ctx, even, odd):  # noqa: ANN001, ANN205
        grad = even.new_empty(*even.shape[:-1], 2 * even.shape[-1])
        grad[..., ::2], grad[..., 1::2] = even, odd
        return grad


def plain_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; gate and up interleaved as above: [..., 2 I] -> [..., I]."""
    gate, up = deinterleave(gate_up)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """Gated, the dense twin of one expert: x [..., dim] -> [..., dim]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        clamped = args.activation == "clamped_swiglu"
        self.swiglu = swiglu if clamped else plain_swiglu  # [kernels] may put another body here
        self.constants = (args.swiglu_alpha, args.swiglu_limit) if clamped else ()
        self.gate_up = Linear(args.dim, 2 * args.hidden_dim, bias=args.mlp_bias)
        self.down = Linear(args.hidden_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim] -> [..., dim]."""
        return self.down(self.swiglu(self.gate_up(x), *self.constants))


class GeluFeedForward(nn.Module):
    """Two products with GELU (by tanh) between: x [..., dim] -> [..., dim]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.up = Linear(args.dim, args.hidden_dim, bias=args.mlp_bias)
        self.down = Linear(args.hidden_dim, args.dim, bias=args.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim] -> [..., dim]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def build_feed_forward(args: ModelArgs) -> FeedForward | GeluFeedForward:
    """The dense feed-forward that ``args.activation`` names."""
    return GeluFeedForward(args) if args.activation == "gelu" else FeedForward(args)
