"""Attention with sinks: one signature, four bodies.

A sink is one logit a head in the softmax denominator that carries no value (gpt-oss; the idea is
arXiv:2309.17453). ``eager`` writes that down and is the truth; the others answer to it:

* ``sdpa`` keeps torch's fused kernels by making the sink an ordinary key: queries get one more
  feature holding sink/scale, and one extra key is one-hot on that feature with value zero. The mask
  stays boolean and the sink's gradient flows through the query. Put in front of the keys (with a
  dummy query in front of the queries), plain causal attention needs no mask at all.
* ``blocked`` is an operator of our own for CPUs (`cpu_attention.py`) that skips what is out of
sight.
* ``flex`` uses FlexAttention's logsumexp: ``out * sigmoid(lse - sink)`` is exact.

Shapes: q [B, S, H, D], k and v [B, S, K, D], sinks [H] or None; returns [B, S, H, D].
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from microtron.model.cpu_attention import cpu_attention

# Kernels want head widths in multiples of 8, so the sink's feature brings seven empty ones.
_PAD = 8


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The truth: scores, sink column, softmax in fp32, values. mask: bool [B or 1, 1, S, S]."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H or K, S, D]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """torch's fused kernels. mask: bool [B or 1, 1, S, S], or None for plain causal."""
    width = v.shape[-1]
    dummy_query = sinks is not None and mask is None
    if sinks is not None:
        q, k, v = _sink_as_key(q, k, v, sinks, scale, dummy_query)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    ).transpose(1, 2)
    return out[:, int(dummy_query) :, :, :width]


def _sink_as_key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    dummy_query: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q with the feature sink/scale, k and v with one more slot in front that answers to it."""
    batch, _, heads, width = q.shape
    rows = q.shape[1] + int(dummy_query)  # sympy, behind shapes that vary, adds no booleans
    feature = (sinks / scale).to(q.dtype).view(1, 1, heads, 1).expand(batch, rows, heads, 1)
    q = F.pad(q, (0, 0, 0, 0, int(dummy_query), 0))
    q = torch.cat((q, feature, q.new_zeros(1).expand(batch, rows, heads, _PAD - 1)), dim=-1)
    slot = F.pad(k.new_ones(1), (width, _PAD - 1)).expand(batch, 1, k.shape[2], width + _PAD)
    k = torch.cat((slot, F.pad(k, (0, _PAD))), dim=1)
    return q, k, F.pad(v, (0, _PAD, 0, 0, 1, 0))


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    mask: object,
    scale: float,
) -> torch.Tensor:
    """FlexAttention (CUDA). mask: BlockMask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    run = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out, aux = run(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        kept = torch.sigmoid(aux.lse - sinks.float().view(1, -1, 1))  # [B, H, S]
        out = out * kept.unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2)


def blocked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    mask: int | torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Our CPU operator. mask: the window (keys a query sees), or a dense mask for documents."""
    if isinstance(mask, torch.Tensor):
        return sdpa(q, k, v, sinks, mask, scale)
    if q.shape[1] <= 64 <= mask:  # a few blocks only: the fused kernel calls less
        return sdpa(q, k, v, sinks, None, scale)
    return cpu_attention(q, k, v, sinks, mask, scale)


BACKENDS: dict[str, Callable] = {"eager": eager, "sdpa": sdpa, "flex": flex, "blocked": blocked}


def resolve_backend(name: str, device_type: str) -> str:
    """``auto`` becomes flex on CUDA, blocked on CPU and sdpa elsewhere; other names stay."""
    best = {"cuda": "flex", "cpu": "blocked"}
    return name if name != "auto" else best.get(device_type, "sdpa")
