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

from microtron.model import head

_ROWS = 256  # of a few I numbers each
_LOG2E = 1.4426950408889634


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


def interleave(sides: torch.Tensor, out: torch.Tensor) -> None:
    """The reverse, into ``out``."""
    out.unflatten(-1, (-1, 2)).copy_(sides.unflatten(-1, (2, -1)).transpose(-1, -2))


def activation(sides: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gate and up before clamping, side by side: [N, 2 I] -> act [N, I]."""
    return _activation(sides, alpha, limit)[0]


def _activation(sides: torch.Tensor, alpha: float, limit: float) -> tuple[torch.Tensor, ...]:
    """act, silu(alpha g') / alpha, alpha g', u': all [N, I]."""
    gate, up = sides.chunk(2, -1)
    scaled, up = gate.clamp(max=limit).mul_(alpha), up.clamp(-limit, limit)
    swish = F.silu(scaled).mul_(1 / alpha)
    return torch.addcmul(swish, swish, up), swish, scaled, up


def activation_gradient(
    grad: torch.Tensor, sides: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """act again [N, I], and the gradients of gate and up side by side [N, 2 I] if act's is grad."""
    act, swish, scaled, up = _activation(sides, alpha, limit)
    out = torch.empty_like(sides)
    d_gate, d_up = out.chunk(2, -1)
    torch.mul(grad, swish, out=d_up)
    torch.ops.aten.silu_backward(torch.addcmul(grad, grad, up), scaled, grad_input=d_gate)
    # An expert may have no rows, of which there is no maximum.
    if sides.numel() and max(abs(x.item()) for x in torch.aminmax(sides)) >= limit:
        gate, up = sides.chunk(2, -1)
        d_gate.mul_(gate.clone().lt_(limit))  # numbers: booleans multiply slowly
        d_up.mul_(up.abs().lt_(limit))
    return act, out


class _SwiGLU(torch.autograd.Function):
    """A few rows at a time, which stay in the cache from one step to the next."""

    @staticmethod
    def forward(ctx, gate_up, alpha, limit):  # noqa: ANN001, ANN205
        ctx.save_for_backward(gate_up)
        ctx.constants = (alpha, limit)
        parts = (activation(sides_of(part), alpha, limit) for part in gate_up.split(_ROWS))
        return torch.cat(list(parts))

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        parts = zip(grad.split(_ROWS), gate_up.split(_ROWS), out.split(_ROWS), strict=True)
        for given, part, into in parts:
            sides = sides_of(part)
            interleave(activation_gradient(given, sides, *ctx.constants)[1], into)
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
