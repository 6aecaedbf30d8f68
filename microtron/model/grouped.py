"""A linear layer for tokens sorted by expert: ``y[rows of e] = x[rows of e] @ weight[e] +
bias[e]``.

torch's grouped GEMM takes the ends of the groups from device memory, so the host never waits for
the counts: in bf16 on compute capability 9.0 and 10.0, that is; in other cases it copies them to
the host and loops (ATen/native/cuda/GroupedBlas.cpp, `_grouped_mm_cuda`). Groups may be of any
size, 0 too: rows that are whole multiples of 16 bytes apart put every group where TMA can read it
(`check_valid_strides_and_return_transposed` in GroupedMMUtils.h), so no group is padded. Rows
beyond the last end would stay uninitialised; the counts of a routing sum to its rows. CPUs have an
operator of their own (`cpu_experts.py`).
"""

import torch
import torch.nn.functional as F


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    """x [M, in], weight [E, in, out], bias [E, out] or None, counts [E] -> [M, out]."""
    ends = counts.cumsum(0).to(torch.int32)
    out = F.grouped_mm(x, weight, offs=ends)
    return out if bias is None else _AddBias.apply(out, bias, ends)


class _AddBias(torch.autograd.Function):
    """``out + bias[expert of the row]``, whose gradient is a product with ones and zeros.

    M rows that meet in E: the gradient of an embedding sorts them again, or, compiled, adds them
    one by one by atomics. A product reads them once and always sums in the same order.
    """

    @staticmethod
    def forward(ctx, out, bias, ends):  # noqa: ANN001, ANN205
        ctx.save_for_backward(ends)
        return out + F.embedding(_expert_of_rows(ends, out), bias)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (ends,) = ctx.saved_tensors
        experts = torch.arange(ends.shape[0], device=ends.device)
        mine = experts.unsqueeze(1) == _expert_of_rows(ends, grad)  # [E, M]
        return grad, mine.to(grad.dtype) @ grad, None


def _expert_of_rows(ends: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """int64 [M]: which group each row lies in."""
    rows = torch.arange(like.shape[0], device=ends.device)
    return torch.searchsorted(ends, rows, right=True)
