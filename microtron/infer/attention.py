"""Attention with a cache: takes the place of a block's ``attention`` where tokens are generated.

Queries, keys and values come out of one product (the three weights become views of one tensor, so
nothing is stored twice). How the new tokens meet the cache depends on the step:

* ``FirstStep``: the cache is empty: the model's own fast cores, then what will be needed is kept
  (``WholeStep``: nothing is).
* ``ChunkStep``: several tokens a row after others: one masked attention over cache and tokens.
* ``TokenStep``: one token a row: two small batched products over the cache, the query heads of a kv
  head together, so that no key is repeated. The sink's score stands on the cache's zero slot, where
  it takes weight and brings no value.

Shapes: q [B, n, H, D], k and v [B, n, K, D]; tokens beyond a row's own count are padding on its
right, which a causal model cannot see; they are never kept where a later token would look.
"""

import torch
from torch import nn

from microtron.infer.kv_cache import Cache, LayerCache
from microtron.infer.linear import Product
from microtron.model.attention import Attention
from microtron.model.attention_core import BACKENDS, resolve_backend
from microtron.model.masks import build_masks
from microtron.model.rope import rotate


class CachedAttention(nn.Module):
    """x [B, n, dim] -> [B, n, dim], as `Attention`, with a step in place of the mask."""

    def __init__(self, attention: Attention, layer: int, window: int | None) -> None:
        super().__init__()
        self.layer, self.window = layer, window
        self.head_dim, self.scale = attention.head_dim, attention.inner_attention.scale
        self.qkv = Product([attention.wq, attention.wk, attention.wv])
        self.wo, self.sinks = Product([attention.wo]), attention.sinks
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.heads = attention.wq.out_features // self.head_dim
        self.kv_heads = attention.wk.out_features // self.head_dim

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        step: "WholeStep | ChunkStep | TokenStep",
    ) -> torch.Tensor:
        """x [B, n, dim], rope: cos and sin [B or 1, n, 1, D] or None."""
        batch, width, _ = x.shape
        qkv = self.qkv(x).view(batch, width, -1, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        out = step.attend(q, k, v, self)
        return self.wo(out.reshape(batch, width, -1))


class TokenStep:
    """One new token a row, for which the cache has room.

    Args:
        lengths: tokens that each row has. As a list, work is cut to the longest row; as a tensor
            [B], shapes do not depend on it and every slot is looked at, masked (for compilation).
    """

    def __init__(self, layers: list[LayerCache], lengths: list[int] | torch.Tensor) -> None:
        self.layers = layers
        static = isinstance(lengths, torch.Tensor)
        self.most = None if static else max(lengths) + 1
        self.even = None if static or min(lengths) < max(lengths) else lengths[0]
        if self.even is None:
            device = layers[0].kv.device
            self.positions = lengths if static else torch.tensor(lengths, device=device)
            self.rows = torch.arange(len(lengths), device=device)
        self.hidden: dict[tuple[int, int], torch.Tensor] = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: CachedAttention
    ) -> torch.Tensor:
        """Writes k and v, then looks at all that the row has in this layer."""
        layer = self.layers[own.layer]
        self._write(layer, k, v)
        used = layer.slots if self.most is None else min(self.most, layer.slots)
        sinks, groups = own.sinks, own.heads // own.kv_heads
        first = 1 if sinks is None else 0
        queries = q.reshape(-1, groups, own.head_dim)  # [B K, G, D]
        keys = layer.keys[:, first : 1 + used].transpose(1, 2)
        if self.even is None:
            bias = self._bias(own.kv_heads, first, used, q.dtype)
            scores = torch.baddbmm(bias, queries, keys, alpha=own.scale)
        else:
            scores = torch.bmm(queries * own.scale, keys)
        if sinks is not None:
            scores.view(-1, own.kv_heads, groups, 1 + used)[..., 0] = sinks.view(-1, groups)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return torch.bmm(weights, layer.values[:, first : 1 + used])

    def _write(self, layer: LayerCache, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.even is not None:
            slot = 1 + (self.even if layer.window is None else self.even % layer.window)
            layer.keys.select(1, slot).copy_(k.reshape(-1, k.shape[3]))
            layer.values.select(1, slot).copy_(v.reshape(-1, v.shape[3]))
            return
        slots = self.positions if layer.window is None else self.positions % layer.window
        layer.kv[0][self.rows, :, slots + 1] = k[:, 0]
        layer.kv[1][self.rows, :, slots + 1] = v[:, 0]

    def _bias(self, kv_heads: int, first: int, used: int, dtype: torch.dtype) -> torch.Tensor:
        """-inf on slots that a row has not filled, [B K, 1, slots]; the same for all layers of a
        kind. A ring that went round has no such slot.
        """
        if (first, used) not in self.hidden:
            slots = torch.arange(first - 1, used, device=self.positions.device)
            bias = torch.zeros(len(self.rows), 1, len(slots), dtype=dtype, device=slots.device)
            bias.masked_fill_((slots > self.positions[:, None])[:, None], float("-inf"))
            self.hidden[first, used] = bias.repeat_interleave(kv_heads, dim=0)
        return self.hidden[first, used]


class WholeStep:
    """All tokens of each row, of which nothing is kept.

    Args:
        width: n, the longest row's tokens.
        backend: `attn_backend` of the model.
    """

    def __init__(self, device: torch.device, width: int, backend: str, window: int) -> None:
        backend = resolve_backend(backend, device.type)
        backend = "sdpa" if backend == "flex" else backend  # compiled anew for many a length
        self.core = BACKENDS[backend]
        self.masks = build_masks(backend, width, window, device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: CachedAttention
    ) -> torch.Tensor:
        """The model's own attention over the tokens alone."""
        mask = self.masks["full" if own.window is None else "window"]
        return self.core(q, k, v, own.sinks, mask, own.scale)


class FirstStep(WholeStep):
    """The first tokens of each row, into an empty cache.

    Args:
        counts: tokens of each row.
    """

    def __init__(
        self, cache: Cache, width: int, counts: list[int], backend: str, window: int
    ) -> None:
        self.layers = cache.layers
        device = cache.layers[0].kv.device
        super().__init__(device, width, backend, window)
        self.starts, self.counts = (
            torch.zeros(len(counts), dtype=torch.long, device=device),
            torch.tensor(counts, device=device),
        )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: CachedAttention
    ) -> torch.Tensor:
        """Over the tokens alone; keys and values are kept."""
        layer = self.layers[own.layer]
        if own.window is None:
            width = k.shape[1]
            layer.kv[0, :, :, 1 : 1 + width] = k.transpose(1, 2)
            layer.kv[1, :, :, 1 : 1 + width] = v.transpose(1, 2)
        else:
            keep_newest(layer, k, v, self.starts, self.counts)
        return super().attend(q, k, v, own)


class ChunkStep:
    """Several new tokens a row: ``counts[b]`` of them in row b, at positions from its length on."""

    def __init__(
        self, cache: Cache, width: int, counts: list[int], backend: str, window: int
    ) -> None:
        self.layers = cache.layers
        device = cache.layers[0].kv.device
        self.core = BACKENDS["eager" if backend == "eager" else "sdpa"]
        self.starts = torch.tensor(cache.lengths, device=device)
        self.counts = torch.tensor(counts, device=device)
        queries = self.starts[:, None] + torch.arange(width, device=device)  # [B, n]
        self.rows, self.slots = torch.arange(len(counts), device=device)[:, None], 1 + queries
        self.most = max(cache.lengths) + width
        self.masks: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            if layer.window is None and "full" not in self.masks:
                keys = torch.arange(self.most, device=device)
                self.masks["full"] = (keys <= queries[..., None])[:, None]
            elif layer.window is not None and "window" not in self.masks:
                kept = positions_in(layer, self.starts)
                keys = torch.cat((kept, queries), dim=1)[:, None]  # [B, 1, slots + n]
                seen = (keys <= queries[..., None]) & (keys > queries[..., None] - window)
                seen[:, :, : kept.shape[1]] &= (kept >= 0)[:, None]
                self.masks["window"] = seen[:, None]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own: CachedAttention
    ) -> torch.Tensor:
        """Cache and new tokens under one mask."""
        layer = self.layers[own.layer]
        if own.window is None:
            layer.kv[0][self.rows, :, self.slots] = k
            layer.kv[1][self.rows, :, self.slots] = v
            keys, values = layer.kv[:, :, :, 1 : 1 + self.most].transpose(2, 3)
            return self.core(q, keys, values, own.sinks, self.masks["full"], own.scale)
        ring = layer.kv[:, :, :, 1:].transpose(2, 3)  # [2, B, slots, K, D]
        keys, values = torch.cat((ring[0], k), dim=1), torch.cat((ring[1], v), dim=1)
        out = self.core(q, keys, values, own.sinks, self.masks["window"], own.scale)
        keep_newest(layer, k, v, self.starts, self.counts)
        return out


def positions_in(layer: LayerCache, lengths: torch.Tensor) -> torch.Tensor:
    """The position that lies in each slot of a ring whose rows have ``lengths`` [B] tokens: [B,
    slots]; negative: nothing yet.
    """
    newest = lengths[:, None] - 1
    slots = torch.arange(layer.slots, device=lengths.device)
    return newest - (newest - slots) % layer.window


def keep_newest(
    layer: LayerCache, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor
) -> None:
    """Writes a row's ``counts`` new tokens, at positions from ``starts`` on, into its ring.

    Each slot asks which position it will hold, so that nothing is written twice and no padding at
    all.
    """
    index = positions_in(layer, starts + counts) - starts[:, None]  # of the new tokens: [B, slots]
    new = (index >= 0)[:, None, :, None]
    index = index.clamp(0, k.shape[1] - 1)[:, None, :, None]
    for kept, x in zip(layer.kv, (k, v), strict=True):
        x = x.transpose(1, 2)  # [B, K, n, D]
        fresh = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
        kept[:, :, 1:] = torch.where(new, fresh, kept[:, :, 1:])
