"""Norm, rotation, SwiGLU and the loss of a chunk for a CPU: few passes over memory, backward by
hand.

Eager torch makes a tensor for every step of an expression, and autograd one more for every step
back. Here each function has one node with its gradient written out, in place where it may be.
The plain expressions of `norms.py`, `rope.py`, `mlp.py` and `head.py` are their slow obvious twins.

The clamped SwiGLU (g, u before clamping; s = sigmoid(alpha g'); primes are clamped values):
    act = g' s (u' + 1),  d act/d u = g' s,  d act/d g = (u' + 1) s (1 + alpha g' (1 - s)),
each zero from its bound on, as hardtanh's are. With t = alpha g' they are silu(t) and silu'(t),
one pass each.
"""

import torch
import torch.nn.functional as F

from microtron.model import head, mlp

PART = 2**17  # numbers: a few tensors of as many stay in the cache
_LOG2E = 1.4426950408889634
_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / rms(x). With t = g x r: dw = sum t, dx = r (g w - x r mean(t w))."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: ANN001, ANN205
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [N, 1]
        scale = scale.square_().div_(x.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        through = grad * unit
        mean = through @ weight.neg().div_(x.shape[1])  # [N]
        dx = torch.mul(grad, weight).addcmul_(unit, mean.unsqueeze(-1)).mul_(scale)
        return dx, through.sum(0), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See norms.rms_norm."""
    flat = x.reshape(-1, x.shape[-1]).float()
    return _RMSNorm.apply(flat, weight.float(), eps).view_as(x).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Orthogonal but for its length: the gradient turns back by the same angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # noqa: ANN001, ANN205
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """x [B, S, H, D] by the angles, or back (sign -1)."""
    half = x.shape[-1] // 2
    wide = x.float()
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:], value=sign)
    return out.to(x.dtype)


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See rope.rotate_both."""
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


def sides_of(interleaved: torch.Tensor) -> torch.Tensor:
    """Even columns (gate), then odd ones (up): [..., 2 I] -> the same."""
    return torch.cat((interleaved[..., ::2], interleaved[..., 1::2]), -1)


def interleave(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """The reverse, into ``out``."""
    out[..., ::2], out[..., 1::2] = gate, up


def activation(sides: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gate and up before clamping, side by side: [N, 2 I] -> act [N, I]."""
    swish, _, up = _factors(*sides.chunk(2, -1), alpha, limit)
    return torch.addcmul(swish, swish, up)


def activation_gradient(
    grad: torch.Tensor, sides: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """act again [N, I], and the gradients of gate and up side by side [N, 2 I] if act's is grad."""
    gate, up = sides.chunk(2, -1)
    factors, out = _factors(gate, up, alpha, limit), torch.empty_like(sides)
    d_gate, d_up = out.chunk(2, -1)
    _gradients(grad, factors, d_gate, d_up)
    if _beyond(limit, sides):
        _zero_beyond(limit, gate, up, d_gate, d_up)
    return torch.addcmul(factors[0], factors[0], factors[2]), out


def _factors(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> _Three:
    """silu(alpha g') / alpha, alpha g', u' of clamped gate and up: [N, I] each."""
    scaled, up = gate.clamp(max=limit).mul_(alpha), up.clamp(-limit, limit)
    return F.silu(scaled).mul_(1 / alpha), scaled, up


def _gradients(
    grad: torch.Tensor, factors: _Three, d_gate: torch.Tensor, d_up: torch.Tensor
) -> None:
    """Into ``d_gate`` and ``d_up``, as if nothing had been clamped."""
    swish, scaled, up = factors
    torch.mul(grad, swish, out=d_up)
    torch.ops.aten.silu_backward(torch.addcmul(grad, grad, up), scaled, grad_input=d_gate)


def _beyond(limit: float, *tensors: torch.Tensor) -> bool:
    """Whether anything was clamped: seldom, and to look costs less than to multiply."""
    some = (t for t in tensors if t.numel())  # an expert may have no rows, so no maximum
    return any(abs(x.item()) >= limit for t in some for x in torch.aminmax(t))


def _zero_beyond(
    limit: float, gate: torch.Tensor, up: torch.Tensor, d_gate: torch.Tensor, d_up: torch.Tensor
) -> None:
    d_gate.mul_(gate.clone().lt_(limit))  # numbers: booleans multiply slowly
    d_up.mul_(up.abs().lt_(limit))


class _SwiGLU(torch.autograd.Function):
    """A few rows at a time, which stay in the cache from one step to the next."""

    @staticmethod
    def forward(ctx, gate_up, alpha, limit):  # noqa: ANN001, ANN205
        gate, up = mlp.deinterleave(gate_up)
        ctx.save_for_backward(gate, up)
        ctx.constants, ctx.rows = (alpha, limit), max(1, PART // max(1, gate.shape[1]))
        out = torch.empty_like(gate)
        parts = (x.split(ctx.rows) for x in (gate, up, out))
        for g, u, into in zip(*parts, strict=True):
            swish, _, u = _factors(g, u, alpha, limit)
            torch.addcmul(swish, swish, u, out=into)
        return out

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        gate, up = ctx.saved_tensors
        limit = ctx.constants[1]
        out = gate.new_empty(gate.shape[0], 2 * gate.shape[1])
        clamped = _beyond(limit, gate, up)
        parts = (x.split(ctx.rows) for x in (grad, gate, up, out))
        for given, g, u, into in zip(*parts, strict=True):
            d_gate, d_up = torch.empty_like(g), torch.empty_like(u)
            _gradients(given, _factors(g, u, *ctx.constants), d_gate, d_up)
            if clamped:
                _zero_beyond(limit, g, u, d_gate, d_up)
            interleave(d_gate, d_up, into)
        return out, None, None


def swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """See mlp.swiglu."""
    out = _SwiGLU.apply(gate_up.reshape(-1, gate_up.shape[-1]), alpha, limit)
    return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def chunk_loss(
    raw: torch.Tensor, labels: torch.Tensor, cap: float, z: float, need: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See head.chunk_loss; ``raw`` is used up. Powers of two cost a quarter of exp's time."""
    if cap or z:
        return head.chunk_loss(raw, labels, cap, z, need)
    logits = raw.float()
    valid = (labels != head.IGNORE).float()
    target = labels.clamp(min=0).unsqueeze(-1)
    top = logits.amax(-1, keepdim=True)
    picked = logits.gather(-1, target) - top
    powers = logits.sub_(top).mul_(_LOG2E).exp2_()
    total = powers.sum(-1, keepdim=True)
    loss = ((total.log() - picked).squeeze(-1) * valid).sum()
    if not need:
        return loss, None
    grad = powers.mul_(valid.unsqueeze(-1) / total)
    grad.scatter_add_(-1, target, -valid.unsqueeze(-1))
    return loss, grad
