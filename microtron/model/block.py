"""One pre-norm residual block: window or full attention, then experts or a dense MLP."""

import torch
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.attention import Attention
from microtron.model.mlp import build_feed_forward
from microtron.model.moe import MoE
from microtron.model.norms import build_norm


class Block(nn.Module):
    """h [B, S, dim] -> (h, tokens sent to each expert or None).

    The counts are an output, not a side effect: a block that is recomputed, compiled or evaluated
    cannot count twice; the model adds up what its training forward returned.
    """

    def __init__(self, layer: int, args: ModelArgs) -> None:
        super().__init__()
        self.mask_kind = args.mask_kind(layer)
        self.moe_enabled = args.moe
        self.attention_norm = build_norm(args)
        self.attention = Attention(args)
        self.ffn_norm = build_norm(args)
        if self.moe_enabled:
            self.moe = MoE(args)
        else:
            self.feed_forward = build_feed_forward(args)

    def forward(
        self,
        h: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        mask: object,
        step_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h [B, S, dim]; rope, mask: of this batch; step_tokens: see Router."""
        h = h + self.attention(self.attention_norm(h), rope, mask)
        x = self.ffn_norm(h)
        if not self.moe_enabled:
            return h + self.feed_forward(x), None
        out, counts = self.moe(x, step_tokens)
        return h + out, counts
