"""Rows to their experts and back: one gather in, one weighted sum out, in both directions.

The gradient of a gather is a scatter, on a GPU by atomic additions: slow where rows meet, and in
another order each time. But ``slots`` says where each token's k rows lie, so the way back can be a
gather too: every row is read once, sums run in fp32, and the same input gives the same bits.
Kept for backward: the indices, and what the experts gave (the routing weights' gradient needs it).

Uncompiled, a weighted sum of rows is one embedding_bag: no [N, k, dim] tensor, and in CUDA's kernel
a thread for each number of the output, neither atomics nor waiting
(ATen/native/cuda/EmbeddingBag.cu). The compiler fuses the plain expression into its neighbours.
"""

import torch
import torch.nn.functional as F


def by_expert(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """experts [N, k] -> slots n * k + j in the order of their experts [N k], and where each slot
    went [N, k].
    """
    order = experts.reshape(-1).argsort(stable=True)
    index = torch.arange(order.numel(), device=order.device)
    return order, torch.empty_like(order).scatter(0, order, index).view_as(experts)


def take(tokens: torch.Tensor, order: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``tokens[order // k]``, [N, dim] -> [N k, dim], by the two results of `by_expert`.

    With k = 1 a permutation, whose inverse is ``take(rows, slots[:, 0], order[:, None])``.
    """
    return _Take.apply(tokens, order, slots)


def combine(
    outputs: torch.Tensor, order: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``sum_j weights[n, j] * outputs[slots[n, j]]``: outputs [N k, dim], weights [N, k] fp32 ->
    [N, dim] in the dtype of the outputs.
    """
    return _Combine.apply(outputs, order, slots, weights)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, order, slots):  # noqa: ANN001, ANN205
        ctx.save_for_backward(slots)
        return tokens.index_select(0, order // slots.shape[1])

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (slots,) = ctx.saved_tensors
        return _sum_of_rows(grad, slots, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, order, slots, weights):  # noqa: ANN001, ANN205
        ctx.save_for_backward(outputs, order, slots, weights)
        return _sum_of_rows(outputs, slots, weights)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        outputs, order, slots, weights = ctx.saved_tensors
        grads = grad.index_select(0, order // slots.shape[1])  # [N k, dim]
        if grads.device.type == "cpu" and not torch.compiler.is_compiling():
            d_weights = _dot_in_one_pass(grad, outputs, slots)
        else:
            dots = (grads * outputs).sum(-1, dtype=weights.dtype)
            d_weights = dots.index_select(0, slots.reshape(-1)).view_as(slots)
        scale = weights.reshape(-1).index_select(0, order).to(grads.dtype)
        return grads.mul_(scale.unsqueeze(-1)), None, None, d_weights.to(weights.dtype)


def _sum_of_rows(
    rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """rows [M, dim], slots and weights [N, k] -> [N, dim]."""
    if weights is None and slots.shape[1] == 1:
        return rows.index_select(0, slots.reshape(-1))
    weights = None if weights is None else weights.to(rows.dtype)
    if not torch.compiler.is_compiling():
        rows = rows.contiguous()
        return F.embedding_bag(slots, rows, mode="sum", per_sample_weights=weights)
    chosen = rows.index_select(0, slots.reshape(-1)).view(*slots.shape, -1)  # [N, k, dim]
    return (chosen if weights is None else chosen * weights.unsqueeze(-1)).sum(dim=1)


def _dot_in_one_pass(
    grad: torch.Tensor, outputs: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """``grad[n] . outputs[slots[n, j]]`` [N, k], by what embedding_bag's own gradient uses.

    Nothing of size [N k, dim] is made. On CUDA that kernel has no bf16 (torch 2.11).
    """
    tokens, k = slots.shape
    bag = torch.arange(slots.numel(), device=slots.device) // k
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.contiguous(), outputs.contiguous(), slots.reshape(-1), bag[::k] * k, bag, 0
    )
    return dots.view(tokens, k)
