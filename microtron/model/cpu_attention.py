"""Attention with sinks on a CPU, as one operator that computes only what a layer may see.

A few queries at a time meet the keys in their reach: half of the square for a full layer, a band
for a window layer. The query heads of a kv head share one product, the sink enters the
softmax's denominator directly, and backward makes the weights again from their logarithmic sums, so
no [S, S] tensor exists. `attention_core.py` has the slow obvious twin (``eager``).

Shapes: q [B, S, H, D], k and v [B, S, K, D]; inside, [B K, rows G, D] with G = H / K query heads.
"""

import math
from collections.abc import Iterator

import torch

# Queries at a time: smaller blocks waste less of the diagonal, larger ones call less.
_ROWS = {torch.float32: 32, torch.bfloat16: 64}
_LOG2E = 1.4426950408889634  # weights are powers of two: torch's exp2 takes a quarter of exp's time


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
    sinks = sinks.to(torch.promote_types(q.dtype, torch.float32))
    return torch.ops.microtron.attention(q, k, v, sinks, window, scale)[0]


def _grouped(x: torch.Tensor, kv_heads: int, factor: float = 1.0) -> torch.Tensor:
    """[B, S, H, D] -> [B K, S G, D] times ``factor``: query heads of a kv head side by side."""
    by_head = _by_head(x, kv_heads)
    out = torch.empty_like(by_head, memory_format=torch.contiguous_format)
    torch.mul(by_head, factor, out=out) if factor != 1 else out.copy_(by_head)
    return out.view(x.shape[0] * kv_heads, -1, x.shape[3])


def _by_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """A view: [B, S, H, ..] -> [B, K, S, G, ..]."""
    return x.unflatten(2, (kv_heads, -1)).transpose(1, 2)


def _sink_rows(sinks: torch.Tensor, batch: int, kv_heads: int, rows: int) -> torch.Tensor:
    """In base 2, as it meets the scores of ``rows`` queries: [H] -> [B K, rows G]."""
    return sinks.mul(_LOG2E).view(kv_heads, -1).repeat(batch, rows)


def _blocks(
    seq_len: int, groups: int, window: int, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, slice, int]]:
    """(queries, their rows in [S G], keys, offset): query r sees keys beyond column r + offset.

    The keys in reach begin at a multiple of 16, since odd numbers of columns cost a product dearly.
    """
    rows_each = _ROWS.get(dtype, 32)
    for start in range(0, seq_len, rows_each):
        stop = min(start + rows_each, seq_len)
        first = max(0, start - window + 1) // 16 * 16
        rows = slice(start * groups, stop * groups)
        yield slice(start, stop), rows, slice(first, stop), start - window - first


def _scores(q: torch.Tensor, keys: torch.Tensor, rows: int, offset: int) -> torch.Tensor:
    """q [B K, rows G, D], keys [B K, n, D] -> [B K, rows G, n] fp32, -inf out of sight."""
    scores = torch.bmm(q, keys.transpose(1, 2))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    by_query = scores.unflatten(1, (rows, -1))
    gone = max(0, rows + offset)  # columns that the last query does not see any more
    never = scores.new_full((rows, max(rows, gone)), -math.inf)
    by_query[..., -rows:] += never[:, :rows].triu(1).unsqueeze(1)
    if gone:
        by_query[..., :gone] += never[:, :gone].tril(offset).unsqueeze(1)
    return scores


@torch.library.custom_op("microtron::attention", mutates_args=(), device_types="cpu")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the logarithm (base 2) of each softmax's denominator [B K, S G]."""
    batch, seq_len, heads, _ = q.shape
    kv_heads = k.shape[2]
    qs = _grouped(q, kv_heads, scale * _LOG2E)
    ks, vs = _grouped(k, kv_heads), _grouped(v, kv_heads)
    out, lse = torch.empty(q.shape, dtype=q.dtype), sinks.new_empty(qs.shape[:2])
    by_head = _by_head(out, kv_heads)
    for queries, part, keys, offset in _blocks(seq_len, heads // kv_heads, window, q.dtype):
        rows = queries.stop - queries.start
        sink = _sink_rows(sinks, batch, kv_heads, rows)
        scores = _scores(qs[:, part], ks[:, keys], rows, offset)
        top = torch.maximum(scores.amax(-1), sink)
        weights = scores.sub_(top.unsqueeze(-1)).exp2_()
        total = weights.sum(-1).add_(torch.exp2(sink - top))
        lse[:, part] = total.log2().add_(top)
        mixed = torch.bmm(weights.to(v.dtype), vs[:, keys])
        block = by_head[:, :, queries]
        torch.div(mixed.view(block.shape), total.view(*block.shape[:-1], 1), out=block)
    return out, lse


@_forward.register_fake
def _(q, k, v, sinks, window, scale):  # noqa: ANN001, ANN202
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    return q.new_empty(q.shape), sinks.new_empty(q.shape[0] * k.shape[2], rows)


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
    qs = _grouped(q, kv_heads, scale * _LOG2E)
    ks, vs, gs = (_grouped(x, kv_heads) for x in (k, v, grad))
    delta = _by_head((grad * out).sum(-1, dtype=lse.dtype), kv_heads).reshape(lse.shape)
    sink = _sink_rows(sinks, batch, kv_heads, seq_len)
    dsink = torch.exp2(sink - lse).mul_(delta).neg_()
    dsink = dsink.view(batch, kv_heads, seq_len, -1).sum((0, 2)).flatten()
    dq, dk, dv = torch.empty(q.shape, dtype=q.dtype), torch.zeros_like(ks), torch.zeros_like(vs)
    by_head = _by_head(dq, kv_heads)
    for queries, part, keys, offset in _blocks(seq_len, heads // kv_heads, window, q.dtype):
        rows = queries.stop - queries.start
        scores = _scores(qs[:, part], ks[:, keys], rows, offset)
        weights = scores.sub_(lse[:, part].unsqueeze(-1)).exp2_()
        g = gs[:, part]
        dv[:, keys] += torch.bmm(weights.to(g.dtype).transpose(1, 2), g)
        dscores = torch.bmm(g, vs[:, keys].transpose(1, 2)).to(weights.dtype)
        dscores = dscores.sub_(delta[:, part].unsqueeze(-1)).mul_(weights).to(g.dtype)
        block = by_head[:, :, queries]
        torch.mul(torch.bmm(dscores, ks[:, keys]).view(block.shape), scale, out=block)
        dk[:, keys] += torch.bmm(dscores.transpose(1, 2), qs[:, part])
    dk.mul_(1 / _LOG2E)  # qs has the scale already
    dk, dv = (x.view(batch, kv_heads, seq_len, -1).transpose(1, 2).contiguous() for x in (dk, dv))
    return dq, dk, dv, dsink


@_backward.register_fake
def _(grad, q, k, v, sinks, out, lse, window, scale):  # noqa: ANN001, ANN202
    return tuple(x.new_empty(x.shape) for x in (q, k, v, sinks))


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    q, k, v, sinks, window, scale = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.constants = (window, scale)


def _differentiate(ctx, grad, unused):  # noqa: ANN001, ANN202
    operator = torch.ops.microtron.attention_backward
    return *operator(grad.contiguous(), *ctx.saved_tensors, *ctx.constants), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
