"""All experts of a layer on a CPU, as one operator: ``down(swiglu(gate_up(x)))`` for sorted tokens.

What costs time on a CPU besides the products is passing large tensors through memory once for each
elementwise step. Here about a thousand rows of one expert go through both products and everything
between while they are in the cache, and gate and up come out of one product side by side instead
of interleaved. `experts.py` has the slow obvious twin (``loop``).

With y = act @ down + bias the gradient of a routing weight, grad . y, is act . (grad @ down^T) +
grad . bias: neither y nor the rows that were taken are kept.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from microtron.model.cpu_pointwise import activation, activation_gradient, interleave, sides_of
from microtron.model.cpu_product import product

_ROWS = 1024  # of width 128: half a MiB a buffer, a few fit in the cache
_STEP = 64  # rows are rounded up to these: each new shape costs a kernel (`cpu_product.py`)


def cpu_experts(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    counts: torch.Tensor,
    alpha: float,
    limit: float,
    index: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """M rows, the first counts[0] for expert 0 and so on: row r is x[index[r]], and what its
    expert makes of it, times scale[r], is added to row index[r] of the result.

    Args:
        x: [N, dim].
        weights: gate_up [E, dim, 2 I] interleaved, its bias [E, 2 I], down [E, I, dim], its bias
            [E, dim]; the biases may be None.
        counts: int64 [E], summing to M.
        index: int64 [M]; None: row r is x[r].
        scale: [M] fp32, or fp64 like x; None: ones.

    Returns:
        [N, dim] in the dtype of x.
    """
    gate_up, gate_up_bias, down, down_bias = weights
    if gate_up_bias is None:
        gate_up_bias = gate_up.new_zeros(gate_up.shape[0], gate_up.shape[2])
        down_bias = down.new_zeros(down.shape[0], down.shape[2])
    if index is None:
        index = torch.arange(x.shape[0])
        scale = torch.ones(x.shape[0], dtype=_wide(x))
    weights = (gate_up, gate_up_bias, down, down_bias)
    return torch.ops.microtron.experts(x, index, scale, *weights, counts, alpha, limit)[0]


def _wide(x: torch.Tensor) -> torch.dtype:
    """Sums run in fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _by_expert(counts: torch.Tensor) -> Iterator[tuple[int, list[slice], int]]:
    """(expert, its rows in parts, their size rounded up), so that few rows are left over."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        parts = max(1, round(count / _ROWS))
        size = max(1, -(-count // (parts * _STEP))) * _STEP
        end = start + count
        yield expert, [slice(i, min(i + size, end)) for i in range(start, end, size)], size
        start = end


def _padded(x: torch.Tensor, rows: slice, size: int) -> torch.Tensor:
    """``size`` rows of x from ``rows.start``: what follows the rows is anybody's."""
    part = x[rows.start : rows.start + size]
    pad = (0, 0) * (x.dim() - 1) + (0, size - len(part))
    return part if len(part) == size else F.pad(part, pad)


@torch.library.custom_op("microtron::experts", mutates_args=(), device_types="cpu")
def _forward(
    x: torch.Tensor,
    index: torch.Tensor,
    scale: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    counts: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and gate and up before clamping, side by side [M, 2 I]."""
    out = torch.zeros_like(x, dtype=_wide(x))
    hidden = x.new_empty(index.shape[0], gate_up.shape[2])
    for expert, parts, size in _by_expert(counts):
        weight, bias = sides_of(gate_up[expert]), sides_of(gate_up_bias[expert])
        for rows in parts:
            count = rows.stop - rows.start
            taken = x.index_select(0, _padded(index, rows, size))
            sides = product(taken, weight, bias)
            hidden[rows] = sides[:count]
            act = activation(sides, alpha, limit)
            made = product(act, down[expert], down_bias[expert])[:count].to(out.dtype)
            out.index_add_(0, index[rows], made.mul_(scale[rows].unsqueeze(-1)))
    return out.to(x.dtype), hidden


@_forward.register_fake
def _(x, index, scale, gate_up, gate_up_bias, down, *constants):  # noqa: ANN001, ANN002, ANN202
    return torch.empty_like(x), x.new_empty(index.shape[0], gate_up.shape[2])


@torch.library.custom_op("microtron::experts_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    scale: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    counts: torch.Tensor,
    hidden: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, scale, gate_up, its bias, down, its bias."""
    dx, d_scale = torch.zeros_like(x, dtype=_wide(x)), torch.empty_like(scale)
    d_gate_up, d_down = torch.empty_like(gate_up), torch.zeros_like(down)
    d_gate_up_bias = x.new_empty(gate_up.shape[0], gate_up.shape[2])
    d_down_bias = torch.zeros_like(down_bias)
    for expert, parts, size in _by_expert(counts):
        weight = sides_of(gate_up[expert])
        d_weight, d_bias = torch.zeros_like(weight), x.new_zeros(weight.shape[1])
        for rows in parts:
            count = rows.stop - rows.start
            taken = _padded(index, rows, size)
            g = grad.index_select(0, taken)
            g[count:] = 0  # and so are all rows past count below
            times = _padded(scale, rows, size).to(x.dtype).unsqueeze(-1)
            d_act = product(g, down[expert].t())
            act, d_sides = activation_gradient(d_act, _padded(hidden, rows, size), alpha, limit)
            along = d_act.mul_(act).sum(-1, dtype=scale.dtype) + g @ down_bias[expert]
            d_scale[rows] = along[:count]
            d_sides.mul_(times)
            g.mul_(times)
            d_down[expert] += product(act.t(), g)
            d_down_bias[expert] += g.sum(0)
            d_weight += product(x.index_select(0, taken).t(), d_sides)
            d_bias += d_sides.sum(0)
            d_taken = product(d_sides, weight.t())[:count]
            dx.index_add_(0, index[rows], d_taken.to(dx.dtype))
        interleave(*d_weight.chunk(2, -1), d_gate_up[expert])
        interleave(*d_bias.chunk(2, -1), d_gate_up_bias[expert])
    return dx.to(x.dtype), d_scale, d_gate_up, d_gate_up_bias, d_down, d_down_bias


@_backward.register_fake
def _(grad, x, index, scale, gate_up, down, down_bias, *others):  # noqa: ANN001, ANN002, ANN202
    return (
        torch.empty_like(x),
        torch.empty_like(scale),
        torch.empty_like(gate_up),
        x.new_empty(gate_up.shape[0], gate_up.shape[2]),
        torch.empty_like(down),
        torch.empty_like(down_bias),
    )


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    x, index, scale, gate_up, _, down, down_bias, counts, alpha, limit = inputs
    ctx.save_for_backward(x, index, scale, gate_up, down, down_bias, counts, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.constants = (alpha, limit)


def _differentiate(ctx, grad, unused):  # noqa: ANN001, ANN202
    operator = torch.ops.microtron.experts_backward
    dx, d_scale, *d_weights = operator(grad.contiguous(), *ctx.saved_tensors, *ctx.constants)
    return dx, None, d_scale, *d_weights, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
