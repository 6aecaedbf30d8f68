"""A linear layer for tokens sorted by expert: ``y[rows of e] = x[rows of e] @ weight[e] +
bias[e]``.

torch's grouped GEMM takes the ends of the groups from device memory, so the host never waits for
the counts. CPUs have an operator of their own (`cpu_experts.py`).
"""

import torch
import torch.nn.functional as F


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    """x [M, in], weight [E, in, out], bias [E, out] or None, counts [E] -> [M, out]."""
    ends = counts.cumsum(0).to(torch.int32)
    out = F.grouped_mm(x, weight, offs=ends)
    if bias is not None:
        rows = torch.arange(x.shape[0], device=x.device)
        out = out + F.embedding(torch.searchsorted(ends, rows, right=True), bias)
    return out
