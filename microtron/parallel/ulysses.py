"""Context parallel by DeepSpeed-Ulysses (arXiv:2309.14509): outside attention each rank holds a
part of the sequence, inside it a part of the heads.

One all-to-all turns one into the other and one turns back, so attention itself sees whole sequences
and windows, sinks and document masks need nothing special. Kv heads are repeated where there are
fewer than ranks; their gradients add up by themselves.
"""

import torch
import torch.distributed as dist
from torch import nn

from microtron.model.model import Transformer
from microtron.parallel.collectives import all_to_all
from microtron.parallel.local import own_positions


def heads_for_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [B, S/n, n h, D] -> [B, S, h, D]: each rank gives sequence and gets heads."""
    n = group.size()
    batch, part, heads, width = x.shape
    sent = x.view(batch, part, n, heads // n, width).permute(2, 0, 1, 3, 4)
    got = all_to_all(sent.contiguous(), group)  # [n, B, S/n, h, D]
    return got.permute(1, 0, 2, 3, 4).reshape(batch, n * part, heads // n, width)


def sequence_for_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The reverse: x [B, S, h, D] -> [B, S/n, n h, D]."""
    n = group.size()
    batch, length, heads, width = x.shape
    sent = x.view(batch, n, length // n, heads, width).permute(1, 0, 2, 3, 4)
    got = all_to_all(sent.contiguous(), group)  # [n, B, S/n, h, D]
    return got.permute(1, 2, 0, 3, 4).reshape(batch, length // n, n * heads, width)


def _exchange_in(group: dist.ProcessGroup):  # noqa: ANN202
    def hook(module: nn.Module, args: tuple) -> tuple:
        """q, k and v travel together, the heads of each destination side by side."""
        q, k, v, sinks, *rest = args
        n = group.size()
        if k.shape[2] < n:
            k, v = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (k, v))
        split = [x.unflatten(2, (n, -1)) for x in (q, k, v)]  # [B, S/n, n, h, D] each
        together = heads_for_sequence(torch.cat(split, dim=3).flatten(2, 3), group)
        q, k, v = together.split([x.shape[3] for x in split], dim=2)
        if sinks is not None:
            sinks = sinks.view(n, -1)[group.rank()]
        return q, k, v, sinks, *rest

    return hook


def _exchange_out(group: dist.ProcessGroup):  # noqa: ANN202
    def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        return sequence_for_heads(out, group)

    return hook


def apply_ulysses(model: Transformer, group: dist.ProcessGroup) -> None:
    """Wraps every layer's inner attention, and the learned positions."""
    if model.pos_embeddings is not None:  # after apply_tp: tp cuts the parts of cp
        own_positions(model.pos_embeddings, group)
    for block in model.layers.values():
        block.attention.inner_attention.register_forward_pre_hook(_exchange_in(group))
        block.attention.inner_attention.register_forward_hook(_exchange_out(group))
