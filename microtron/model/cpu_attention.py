"""Attention with sinks on a CPU, as one operator that computes only what a layer may see.

Queries are taken 32 at a time against the keys in their reach: half of the square for a full layer,
a band for a window layer. The query heads of a kv head share one product, the sink enters the
softmax's denominator directly, and backward makes the weights again from their logarithmic sums, so
no [S, S] tensor exists. `attention_core.py` has the slow obvious twin (``eager``).

Shapes: q [B, S, H, D], k and v [B, S, K, D]; inside, [B K, G rows, D] with G = H / K query heads.
"""

from collections.abc import Iterator

import torch

_ROWS = 32  # queries at a time: smaller blocks waste less of the diagonal, larger ones call less


def cpu_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of one document: q [B, S, H, D] -> [B, S, H, D].

    Args:
        sinks: [H], or None.
        window: keys a query sees, itself included.
    """
    if sinks is None:
        sinks = q.new_full((q.shape[2],), float("-inf"))
    dtype = torch.promote_types(q.dtype, torch.float32)  # weights are made in fp32 at least
    wide = (x.to(dtype) for x in (q, k, v, sinks))
    return torch.ops.microtron.attention(*wide, window, scale)[0].to(q.dtype)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, S, H, D] -> [B K, G, S, D], contiguous."""
    batch, seq_len, heads, width = x.shape
    split = x.reshape(batch, seq_len, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
    return split.reshape(batch * kv_heads, heads // kv_heads, seq_len, width)


def _ungrouped(x: torch.Tensor, batch: int) -> torch.Tensor:
    """The reverse: [B K, G, S, D] -> [B, S, H, D]."""
    _, groups, seq_len, width = x.shape
    split = x.view(batch, -1, groups, seq_len, width).permute(0, 3, 1, 2, 4)
    return split.reshape(batch, seq_len, -1, width).contiguous()


def _blocks(seq_len: int, window: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """(queries, keys in reach, what is out of sight among them [rows, keys])."""
    for start in range(0, seq_len, _ROWS):
        stop = min(start + _ROWS, seq_len)
        first = max(0, start - window + 1)
        distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)[None, :]
        yield slice(start, stop), slice(first, stop), (distance < 0) | (distance >= window)


def _scores(
    q: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [B K, G, rows, D], keys [B K, n, D] -> [B K, G, rows, n], -inf out of sight."""
    groups, rows = q.shape[1], q.shape[2]
    scores = torch.bmm(q.flatten(1, 2).mul(scale), keys.transpose(1, 2))
    bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    return scores.view(-1, groups, rows, keys.shape[1]).add_(bias)


@torch.library.custom_op("microtron::attention", mutates_args=(), device_types="cpu")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the logarithm of each softmax's denominator [B K, G, S]."""
    batch, seq_len, heads, _ = q.shape
    kv_heads = k.shape[2]
    qs, ks, vs = (_grouped(x, kv_heads) for x in (q, k, v))
    ks, vs = ks.squeeze(1), vs.squeeze(1)
    sink = sinks.view(kv_heads, -1).repeat(batch, 1).unsqueeze(-1)  # [B K, G, 1]
    out, lse = torch.empty_like(qs), qs.new_empty(qs.shape[:3])
    for rows, keys, hidden in _blocks(seq_len, window):
        scores = _scores(qs[:, :, rows], ks[:, keys], hidden, scale)
        top = torch.maximum(scores.amax(-1), sink)
        weights = scores.sub_(top.unsqueeze(-1)).exp_()
        total = weights.sum(-1).add_(torch.exp(sink - top))
        lse[:, :, rows] = total.log().add_(top)
        block = torch.bmm(weights.flatten(1, 2), vs[:, keys]).view(*total.shape, -1)
        out[:, :, rows] = block.div_(total.unsqueeze(-1))
    return _ungrouped(out, batch), lse


@_forward.register_fake
def _(q, k, v, sinks, window, scale):  # noqa: ANN001, ANN202
    kv_heads = k.shape[2]
    groups = q.shape[2] // kv_heads
    return q.new_empty(q.shape), q.new_empty(q.shape[0] * kv_heads, groups, q.shape[1])


@torch.library.custom_op("microtron::attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, sinks (as FlashAttention-2, arXiv:2307.08691, with a sink)."""
    batch, seq_len, heads, _ = q.shape
    kv_heads = k.shape[2]
    qs, ks, vs, gs = (_grouped(x, kv_heads) for x in (q, k, v, grad))
    ks, vs = ks.squeeze(1), vs.squeeze(1)
    delta = (gs * _grouped(out, kv_heads)).sum(-1)  # [B K, G, S]
    sink = sinks.view(kv_heads, -1).repeat(batch, 1).unsqueeze(-1)
    dsink = torch.exp(sink - lse).mul_(delta).neg_().view(batch, heads, seq_len).sum((0, 2))
    dq, dk, dv = torch.empty_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
    for rows, keys, hidden in _blocks(seq_len, window):
        weights = _scores(qs[:, :, rows], ks[:, keys], hidden, scale)
        weights = weights.sub_(lse[:, :, rows].unsqueeze(-1)).exp_()
        g = gs[:, :, rows].flatten(1, 2)
        dv[:, keys].baddbmm_(weights.flatten(1, 2).transpose(1, 2), g)
        dscores = torch.bmm(g, vs[:, keys].transpose(1, 2)).view_as(weights)
        dscores.sub_(delta[:, :, rows].unsqueeze(-1)).mul_(weights).mul_(scale)
        flat = dscores.flatten(1, 2)
        dq[:, :, rows] = torch.bmm(flat, ks[:, keys]).view_as(dq[:, :, rows])
        dk[:, keys].baddbmm_(flat.transpose(1, 2), qs[:, :, rows].flatten(1, 2))
    return (
        _ungrouped(dq, batch),
        _ungrouped(dk.unsqueeze(1), batch),
        _ungrouped(dv.unsqueeze(1), batch),
        dsink,
    )


@_backward.register_fake
def _(grad, q, k, v, sinks, out, lse, window, scale):  # noqa: ANN001, ANN202
    return tuple(x.new_empty(x.shape) for x in (q, k, v, sinks))


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    q, k, v, sinks, window, scale = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.constants = (window, scale)


def _differentiate(ctx, grad, unused):  # noqa: ANN001, ANN202
    operator = torch.ops.microtron.attention_backward
    return *operator(grad.contiguous(), *ctx.saved_tensors, *ctx.constants), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
