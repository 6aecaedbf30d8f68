"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450), both in fp32 whatever the compute
dtype.
"""

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.args import ModelArgs


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight``: x [..., dim], weight [dim] -> x's shape and dtype."""
    weight = weight.float()
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """``(x - mean(x)) / std(x) * weight + bias``: x [..., dim] -> x's shape and dtype."""
    weight, bias = weight.float(), bias.float()
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.norm = rms_norm  # [kernels] may put another body here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim] -> [..., dim]."""
        return self.norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """`layer_norm` likewise."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.norm = layer_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim] -> [..., dim]."""
        return self.norm(x, self.weight, self.bias, self.eps)


def build_norm(args: ModelArgs) -> RMSNorm | LayerNorm:
    """The residual stream's norm that ``args.norm`` names. (Heads have RMSNorm always: qk_norm.)"""
    kind = LayerNorm if args.norm == "layer" else RMSNorm
    return kind(args.dim, args.norm_eps)
