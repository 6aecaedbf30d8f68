"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450), both in fp32 whatever the compute
dtype.
"""

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.args import ModelArgs


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension; returns the dtype of ``x``."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim] -> [..., dim]."""
        weight = self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """``(x - mean(x)) / std(x) * weight + bias`` likewise."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim] -> [..., dim]."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x.dtype)


def build_norm(args: ModelArgs) -> RMSNorm | LayerNorm:
    """The residual stream's norm that ``args.norm`` names. (Heads have RMSNorm always: qk_norm.)"""
    kind = LayerNorm if args.norm == "layer" else RMSNorm
    return kind(args.dim, args.norm_eps)
