"""A linear layer for tokens sorted by expert: ``y[rows of e] = x[rows of e] @ weight[e] +
bias[e]``.

CUDA has a grouped GEMM in torch that takes the group ends from device memory. On CPU the same
product is a loop of GEMMs into slices of one output, wrapped as an operator: no per-expert autograd
nodes, no concatenation, and torch.compile sees one opaque call instead of a graph break.
"""

import torch
import torch.nn.functional as F


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    """x [M, in], weight [E, in, out], bias [E, out] or None, counts [E] -> [M, out]."""
    if x.device.type == "cpu":
        return torch.ops.microtron.grouped_linear(x, weight, bias, counts)
    ends = counts.cumsum(0).to(torch.int32)
    out = F.grouped_mm(x, weight, offs=ends)
    if bias is not None:
        rows = torch.arange(x.shape[0], device=x.device)
        out = out + F.embedding(torch.searchsorted(ends, rows, right=True), bias)
    return out


@torch.library.custom_op("microtron::grouped_linear", mutates_args=(), device_types="cpu")
def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        if bias is None:
            torch.mm(x[rows], weight[expert], out=out[rows])
        else:
            torch.addmm(bias[expert], x[rows], weight[expert], out=out[rows])
        start += count
    return out


@_forward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, counts: torch.Tensor):  # noqa: ANN202
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("microtron::grouped_linear_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    dbias = weight.new_empty(weight.shape[0], weight.shape[2])
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        torch.mm(grad[rows], weight[expert].t(), out=dx[rows])
        torch.mm(x[rows].t(), grad[rows], out=dweight[expert])
        torch.sum(grad[rows], dim=0, out=dbias[expert])
        start += count
    return dx, dweight, dbias


@_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor):  # noqa: ANN202
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0], weight.shape[2]),
    )


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    x, weight, bias, counts = inputs
    ctx.save_for_backward(x, weight, counts)
    ctx.has_bias = bias is not None


def _differentiate(ctx, grad):  # noqa: ANN001, ANN202
    dx, dweight, dbias = torch.ops.microtron.grouped_linear_backward(
        grad.contiguous(), *ctx.saved_tensors
    )
    return dx, dweight, dbias if ctx.has_bias else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
