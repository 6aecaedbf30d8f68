"""Linear layers for a row or two: weights lie as [in, out], which suits one row of input.

``F.linear`` keeps [out, in]. With a single row on a CPU its kernels read that at a third of the
speed at which memory gives it; as a sum of weighted rows (`experts.py`) or as ``x @ w`` the same
numbers stream. The layers handed in keep their shape and become transposed views, so that nothing
is stored twice.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Product:
    """``F.linear`` of one or several linear layers of the same input, side by side.

    Args:
        streamed: lay weights out as [in, out] for few rows (fp32 on a CPU).
        bag: sum rows, for outputs narrow enough for registers; else ``x @ w``.
    """

    def __init__(self, linears: list[nn.Linear], *, bag: bool = True) -> None:
        first = linears[0]
        self.streamed = first.weight.device.type == "cpu" and first.weight.dtype == torch.float32
        self.bag, self.weight, self.bias = bag, first.weight.detach(), None
        with torch.no_grad():
            if self.streamed or len(linears) > 1:
                self.weight = torch.cat([w.weight for w in linears])  # [out, in]
            if self.streamed:
                self.weight = self.weight.t().contiguous().t()
            if first.bias is not None:
                self.bias = torch.cat([w.bias for w in linears])
        sizes = [w.out_features for w in linears]
        for linear, weight in zip(linears, self.weight.split(sizes), strict=True):
            linear.weight.data = weight
        if self.bias is not None:
            for linear, bias in zip(linears, self.bias.split(sizes), strict=True):
                linear.bias.data = bias
        self.rows, self.start = torch.arange(first.in_features), torch.zeros(1, dtype=torch.long)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if not (self.streamed and self.bag) or x.numel() != x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        table, flat = self.weight.t(), x.reshape(-1)
        out = torch.embedding_bag(table, self.rows, self.start, False, 0, False, flat)[0]
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], -1)
