"""Grouped-query attention: projections, optional qk-norm, RoPE (none with learned positions), and
the core that `attn_backend` names.
"""

import torch
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.attention_core import BACKENDS, resolve_backend
from microtron.model.cpu_product import Linear
from microtron.model.norms import RMSNorm
from microtron.model.precision import compute_dtype
from microtron.model.rope import rotate_both


class InnerAttention(nn.Module):
    """The part between the projections: it sees whole sequences, whatever part of the heads.

    A module of its own so that parallel plans can exchange sequence for heads around it.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.backend = args.attn_backend
        self.scale = args.head_dim**-0.5
        self.rotate = rotate_both  # [kernels] may put another body here

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: object,
    ) -> torch.Tensor:
        """q [B, S, H, D], k and v [B, S, K, D], sinks [H] or None -> [B, S, H, D]."""
        core = BACKENDS[resolve_backend(self.backend, q.device.type)]
        if rope is not None:
            q, k = self.rotate(q, k, *rope)
        return core(q, k, v, sinks, mask, self.scale)


class Attention(nn.Module):
    """x [B, S, dim] -> [B, S, dim]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        bias = args.attention_bias
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, bias=bias)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=bias)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=bias)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, bias=bias)
        self.q_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.k_norm = RMSNorm(args.head_dim, args.norm_eps) if args.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(args.n_heads)) if args.sinks else None
        self.inner_attention = InnerAttention(args)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, mask: object
    ) -> torch.Tensor:
        """x [B, S, dim], rope: cos and sin [B or 1, S, 1, D] or None, mask: what the core takes."""
        batch, seq_len, _ = x.shape
        x = x.to(compute_dtype(x))
        q, k, v = (
            w(x).view(batch, seq_len, -1, self.head_dim) for w in (self.wq, self.wk, self.wv)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = self.inner_attention(q, k, v, self.sinks, rope, mask)
        return self.wo(out.reshape(batch, seq_len, -1))
