"""A mixture of experts for a few tokens at a time, as generation has them.

On a CPU a step of generation is bound by reading weights, and general matrix products with a row or
two read them slowly, after sorting them apart or packing them. But ``x @ w`` is the sum of w's rows
weighted by x: an embedding_bag, whose kernel streams rows through registers. All chosen experts are
one table [E dim, out] and one bag each; sorted by expert, so that tokens which share one find it in
the cache. From `FEW` rows an expert on, and on a GPU, it is the model's own mixture.
"""

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.moe import MoE
from microtron.model.router import Routing, count

FEW = 6  # rows an expert has on average, above which a product pays for packing its weights


class FewTokens(nn.Module):
    """x [B, n, dim] -> ([B, n, dim], None): `MoE` without losses and counts."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        weights = moe.experts.gate_up
        bags = weights.device.type == "cpu" and weights.dtype == torch.float32
        self.few = FEW * len(weights) if bags and moe.experts.backend != "loop" else 0
        if self.few:
            self.up, self.down = Bags(weights), Bags(moe.experts.down)

    def forward(self, x: torch.Tensor, step_tokens: int | None = None) -> tuple[torch.Tensor, None]:
        """x [B, n, dim]."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self._route(tokens)
        if routing.experts.numel() < self.few:
            return self._bags(tokens, routing).view_as(x), None
        counts = count(routing.experts, self.moe.router.num_experts)
        routing = routing._replace(counts=counts)
        return self.moe.dispatch(tokens, routing, self.moe.experts).view_as(x), None

    def _route(self, tokens: torch.Tensor) -> Routing:
        """`Router.forward` without what only training needs; counts are left out."""
        gate = self.moe.router.gate
        logits = F.linear(tokens.float(), gate.weight.float(), gate.bias.float())  # [N, E]
        if self.moe.expert_bias is None:
            chosen, experts = logits.topk(self.moe.top_k, dim=-1)
        else:
            experts = (logits + self.moe.expert_bias).topk(self.moe.top_k, dim=-1).indices
            chosen = logits.gather(-1, experts)
        return Routing(chosen.softmax(-1), experts, None)

    def _bags(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """tokens [N, dim] -> [N, dim]; M = N k pairs of token and expert."""
        own = self.moe.experts
        if tokens.shape[0] == 1:
            expert, x = routing.experts[0], tokens.expand(self.moe.top_k, -1).contiguous()
        else:
            expert, order = routing.experts.view(-1).sort(stable=True)  # [M]
            token = order // self.moe.top_k
            x = tokens.index_select(0, token)
        hidden = self.up(x, own.gate_up_bias, expert)
        gate, up = hidden.view(*hidden.shape[:-1], -1, 2).unbind(-1)
        gate = gate.clamp(max=own.limit)
        act = torch.sigmoid(gate * own.alpha).mul_(gate)
        act.mul_(up.clamp(-own.limit, own.limit).add_(1))
        out = self.down(act, own.down_bias, expert)
        if tokens.shape[0] == 1:
            return routing.weights @ out
        out.mul_(routing.weights.view(-1).index_select(0, order).unsqueeze(-1))
        return torch.zeros_like(tokens).index_add_(0, token, out)


class Bags:
    """Rows of x through one of several weights each: a bag of the weight's rows.

    Args:
        weights: [E, in, out], kept as they are.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        experts, width, _ = weights.shape
        self.table = weights.detach().flatten(0, 1)
        self.rows = torch.arange(experts * width).view(experts, width)
        self.starts = torch.arange(0, FEW * experts * width, width)

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None, expert: torch.Tensor
    ) -> torch.Tensor:
        """``x[m] @ weights[e] + bias[e]``, e = expert[m]: x [M, in], bias [E, out] -> [M, out]."""
        rows = self.rows.index_select(0, expert).view(-1)
        starts = self.starts[: x.shape[0]]
        out = torch.embedding_bag(self.table, rows, starts, False, 0, False, x.view(-1))[0]
        return out if bias is None else out.add_(bias.index_select(0, expert))
