"""All experts of a layer on a CPU, as one operator: ``down(swiglu(gate_up(x)))`` for sorted tokens.

What costs time on a CPU besides the products is passing large tensors through memory once for each
elementwise step. Here a thousand rows at most of one expert go through both products and everything
between while they are in the cache, and gate and up come out of two products side by side instead
of interleaved. `experts.py` has the slow obvious twin (``loop``).

The gradients (g, u before clamping; s = sigmoid(alpha g); primes are clamped values):
    act = g' s (u' + 1),  d act/d u = g' s,  d act/d g = (u' + 1) s (1 + alpha g' (1 - s)),
each zero where its clamp holds.
"""

from collections.abc import Iterator

import torch

_ROWS = 1024  # of width 128: half a MiB a buffer, a few fit in the cache


def cpu_experts(
    x: torch.Tensor, weights: list[torch.Tensor], counts: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor:
    """x [M, dim], the first counts[0] rows for expert 0 and so on; counts [E] -> [M, dim].

    Args:
        weights: gate_up [E, dim, 2 I] interleaved, its bias [E, 2 I], down [E, I, dim], its bias
            [E, dim]; the biases may be None.
    """
    gate_up, gate_up_bias, down, down_bias = weights
    if gate_up_bias is None:
        gate_up_bias = gate_up.new_zeros(gate_up.shape[0], gate_up.shape[2])
        down_bias = down.new_zeros(down.shape[0], down.shape[2])
    operator = torch.ops.microtron.experts
    return operator(x, gate_up, gate_up_bias, down, down_bias, counts, alpha, limit)[0]


def _chunks(counts: torch.Tensor) -> Iterator[tuple[int, list[slice]]]:
    """Expert -> its rows, at most _ROWS at a time."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        end = start + count
        yield expert, [slice(i, min(i + _ROWS, end)) for i in range(start, end, _ROWS)]
        start = end


def _split(interleaved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Even and odd columns."""
    return interleaved[..., ::2].contiguous(), interleaved[..., 1::2].contiguous()


@torch.library.custom_op("microtron::experts", mutates_args=(), device_types="cpu")
def _forward(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    counts: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and gate and up [M, I] before clamping."""
    out = torch.empty_like(x)
    gates, ups = (x.new_empty(x.shape[0], down.shape[1]) for _ in range(2))
    for expert, chunks in _chunks(counts):
        w_gate, w_up = _split(gate_up[expert])
        b_gate, b_up = _split(gate_up_bias[expert])
        for rows in chunks:
            torch.addmm(b_gate, x[rows], w_gate, out=gates[rows])
            torch.addmm(b_up, x[rows], w_up, out=ups[rows])
            gate = gates[rows].clamp(max=limit)
            act = torch.sigmoid(gate * alpha).mul_(gate)
            act.mul_(ups[rows].clamp(-limit, limit).add_(1))
            torch.addmm(down_bias[expert], act, down[expert], out=out[rows])
    return out, gates, ups


@_forward.register_fake
def _(x, gate_up, gate_up_bias, down, down_bias, counts, alpha, limit):  # noqa: ANN001, ANN202
    width = (x.shape[0], down.shape[1])
    return torch.empty_like(x), x.new_empty(width), x.new_empty(width)


@torch.library.custom_op("microtron::experts_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor,
    gates: torch.Tensor,
    ups: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gate_up, its bias, down, its bias."""
    dx, d_gate_up, d_down = torch.empty_like(x), torch.empty_like(gate_up), torch.zeros_like(down)
    d_gate_up_bias = x.new_empty(gate_up.shape[0], gate_up.shape[2])
    d_down_bias = x.new_zeros(down.shape[0], down.shape[2])
    for expert, chunks in _chunks(counts):
        w_gate, w_up = _split(gate_up[expert])
        dw_gate, dw_up = torch.zeros_like(w_gate), torch.zeros_like(w_up)
        db_gate, db_up = (x.new_zeros(down.shape[1]) for _ in range(2))
        for rows in chunks:
            act, d_gate, d_up = _activation_gradient(
                grad[rows] @ down[expert].t(), gates[rows], ups[rows], alpha, limit
            )
            d_down[expert].addmm_(act.t(), grad[rows])
            dw_gate.addmm_(x[rows].t(), d_gate)
            dw_up.addmm_(x[rows].t(), d_up)
            torch.mm(d_gate, w_gate.t(), out=dx[rows])
            dx[rows].addmm_(d_up, w_up.t())
            db_gate += d_gate.sum(0)
            db_up += d_up.sum(0)
            d_down_bias[expert] += grad[rows].sum(0)
        d_gate_up[expert] = torch.stack((dw_gate, dw_up), dim=-1).flatten(1)
        d_gate_up_bias[expert] = torch.stack((db_gate, db_up), dim=-1).flatten()
    return dx, d_gate_up, d_gate_up_bias, d_down, d_down_bias


def _activation_gradient(
    d_act: torch.Tensor, gates: torch.Tensor, ups: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """act again, and the gradients of gate and up; all [rows, I]."""
    gate, up1 = gates.clamp(max=limit), ups.clamp(-limit, limit).add_(1)
    sigmoid = torch.sigmoid(gate * alpha)
    swish = gate * sigmoid
    d_up = (d_act * swish).mul_(ups.abs().le_(limit))
    slope = torch.rsub(sigmoid, 1).mul_(gate).mul_(alpha).add_(1).mul_(sigmoid).mul_(up1)
    d_gate = slope.mul_(d_act).mul_(gates.clone().le_(limit))  # not a bool: slow to multiply
    return swish.mul_(up1), d_gate, d_up


@_backward.register_fake
def _(grad, x, gate_up, down, counts, gates, ups, alpha, limit):  # noqa: ANN001, ANN202
    return (
        torch.empty_like(x),
        torch.empty_like(gate_up),
        x.new_empty(gate_up.shape[0], gate_up.shape[2]),
        torch.empty_like(down),
        x.new_empty(down.shape[0], down.shape[2]),
    )


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    x, gate_up, _, down, _, counts, alpha, limit = inputs
    _, gates, ups = output
    ctx.save_for_backward(x, gate_up, down, counts, gates, ups)
    ctx.mark_non_differentiable(gates, ups)
    ctx.constants = (alpha, limit)


def _differentiate(ctx, grad, *unused):  # noqa: ANN001, ANN202
    operator = torch.ops.microtron.experts_backward
    dx, d_gate_up, d_gate_up_bias, d_down, d_down_bias = operator(
        grad.contiguous(), *ctx.saved_tensors, *ctx.constants
    )
    return dx, d_gate_up, d_gate_up_bias, d_down, d_down_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
