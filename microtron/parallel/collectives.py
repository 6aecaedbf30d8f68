"""The three exchanges that parallel plans are made of, each with its gradient.

They run on functional collectives, so a compiled block keeps them in its graph (and may overlap
them with products: asynchronous tensor parallel). The gradient of a gather is a reduce-scatter and
the reverse; that of an all-to-all is the all-to-all back.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional


def _gathered(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    # torch 2.13 renamed this and the next; 2.11 has the older names only.
    operation = getattr(functional, "all_gather_single", functional.all_gather_tensor)
    return functional.wait_tensor(operation(x.contiguous(), dim, group))


def _scattered(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    operation = getattr(functional, "reduce_scatter_single", functional.reduce_scatter_tensor)
    return functional.wait_tensor(operation(x.contiguous(), "sum", dim, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):  # noqa: ANN001, ANN205
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return _scattered(grad, ctx.dim, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):  # noqa: ANN001, ANN205
        ctx.dim, ctx.group = dim, group
        return _scattered(x, dim, group)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return _gathered(grad, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, received, sent, group):  # noqa: ANN001, ANN205
        ctx.received, ctx.sent, ctx.group = received, sent, group
        out = functional.all_to_all_single(x.contiguous(), received, sent, group)
        return functional.wait_tensor(out)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        back = functional.all_to_all_single(grad.contiguous(), ctx.sent, ctx.received, ctx.group)
        return functional.wait_tensor(back), None, None, None


def all_gather(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The parts of all ranks side by side along ``dim``; gradients are summed over the ranks."""
    return _Gather.apply(x, dim, group)


def reduce_scatter(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks, of which each keeps its part along ``dim``."""
    return _Scatter.apply(x, dim, group)


def all_to_all(
    x: torch.Tensor,
    group: dist.ProcessGroup,
    received: list[int] | None = None,
    sent: list[int] | None = None,
) -> torch.Tensor:
    """Rows of ``x`` to each rank of the group, in rank order.

    Args:
        received, sent: rows from and to each rank; None: equal parts.
    """
    return _AllToAll.apply(x, received, sent, group)
