"""The vocabulary head, and its cross-entropy computed chunk by chunk.

Logits are the largest tensor of a small model: B x S x V in fp32. With labels the head returns the
summed loss instead, a few thousand tokens at a time, and takes the gradients while a chunk's logits
are at hand; they never exist all at once and are never computed twice.
``full_loss`` is the slow obvious twin.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.cpu_product import inner, product, product_into
from microtron.model.precision import compute_dtype

IGNORE = -100  # torch's and TorchTitan's label for "not a target"


def softcapped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(logits / cap)``, or the logits when cap is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def full_loss(
    h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float = 0.0, z: float = 0.0
) -> torch.Tensor:
    """The truth: all logits, plain autograd. h [N, dim], weight [V, dim], labels [N] -> summed
    loss.
    """
    logits = softcapped((h @ weight.t()).float(), cap)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    if z:
        loss = loss + z * logits.logsumexp(-1)[labels != IGNORE].square().sum()
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """full_loss, ``chunk`` tokens at a time; forward makes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx, h, weight, labels, chunk, cap, z, dtype, train, of_chunk):  # noqa: ANN001, ANN205
        # A graph that needs no gradient (validation) computes the loss alone.
        # (needs_input_grad is blind to no_grad.)
        need = train and any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=torch.float32, device=h.device)
        w = weight.to(dtype)
        dh = torch.empty_like(h) if need else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need else None
        for start in range(0, h.shape[0], chunk):
            part = slice(start, start + chunk)
            x = h[part].to(dtype)
            value, dlogits = of_chunk(product(x, w.t()), labels[part], cap, z, need)
            loss += value
            if need:
                dlogits = dlogits.to(dtype)
                product_into(dh[part], dlogits, w)
                dw += inner(dlogits, x)
        if need:
            ctx.save_for_backward(dh, dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        dh, dw = ctx.saved_tensors
        return dh * grad.to(dh.dtype), dw * grad.to(dw.dtype), *[None] * 7


def chunk_loss(
    raw: torch.Tensor, labels: torch.Tensor, cap: float, z: float, need: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss and gradient for one chunk of logits: raw [n, V], labels [n] -> (sum, [n, V] fp32)."""
    raw = raw.float()
    logits = softcapped(raw, cap)
    valid = (labels != IGNORE).float()
    target = labels.clamp(min=0).unsqueeze(-1)
    log_probs = torch.log_softmax(logits, -1)
    lse = logits[:, 0] - log_probs[:, 0]
    picked = log_probs.gather(-1, target).squeeze(-1)
    loss = ((z * lse.square() - picked) * valid).sum()
    if not need:
        return loss, None
    grad = log_probs.exp_()
    if z:
        grad *= (1 + 2 * z * lse).unsqueeze(-1)
    grad.scatter_add_(-1, target, torch.full_like(target, -1, dtype=grad.dtype))
    grad *= valid.unsqueeze(-1)
    if cap:
        grad *= 1 - (logits / cap).square()
    return loss, grad


class Head(nn.Linear):
    """h [B, S, dim] -> logits [B, S, V]; with labels [B, S] -> their summed loss, fp32 scalar."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args.dim, args.vocab_size, bias=False)
        self.softcap, self.z_loss, self.chunk = (
            args.logit_softcap,
            args.z_loss,
            args.loss_chunk_tokens,
        )
        self.chunk_loss = chunk_loss  # parallel/loss.py has one for a part of the vocabulary
        # [kernels] may put another body above, or one for the whole loss here.
        self.fused_loss: Callable[..., torch.Tensor] | None = None

    def forward(self, h: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The summed loss counts z-loss in training only, so validation is plain cross-entropy."""
        if labels is None:
            return softcapped(super().forward(h), self.softcap)
        z = self.z_loss if self.training else 0.0
        if self.fused_loss is not None:
            return self.fused_loss(h.flatten(0, 1), self.weight, labels.flatten(), self.softcap, z)
        return _ChunkedLoss.apply(
            h.flatten(0, 1),
            self.weight,
            labels.flatten(),
            self.chunk,
            self.softcap,
            z,
            compute_dtype(h),
            torch.is_grad_enabled(),
            self.chunk_loss,
        )
