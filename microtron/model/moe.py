"""A dropless mixture of experts: route, sort, run the experts, combine.

Every token reaches all of its top-k experts, whatever the load: there is no capacity. The scores
multiply the experts' outputs, down bias included (gpt-oss).
"""

from collections.abc import Callable

import torch
from torch import nn

from microtron.model.args import ModelArgs
from microtron.model.experts import Experts
from microtron.model.permute import by_expert, combine, take
from microtron.model.precision import compute_dtype
from microtron.model.router import Router, Routing


class MoE(nn.Module):
    """x [B, S, dim] -> the same, plus how many tokens each expert got.

    Buffers: ``expert_bias`` [E] (selection bias, load_balance = bias), ``load_fractions`` [E]
        (shares in the step before) and ``tokens_per_expert`` [E] (this step's counts so far). The
        first two steer training and are saved; forward only reads them, so it may be recomputed or
        skipped freely.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.top_k = args.top_k
        self.load_balance_coeff = args.bias_update_rate if args.load_balance == "bias" else None
        self.router = Router(args)
        self.experts = Experts(args)
        self.dispatch = dispatch  # parallel/ep.py puts one here that crosses ranks
        experts = args.num_experts
        biased = self.load_balance_coeff is not None
        self.register_buffer("expert_bias", torch.empty(experts) if biased else None)
        self.register_buffer("load_fractions", torch.empty(experts))
        self.register_buffer(
            "tokens_per_expert", torch.empty(experts, dtype=torch.int64), persistent=False
        )

    def init_buffers(self, device: torch.device | None = None) -> None:
        """No bias, even load, nothing counted; on ``device``, where parameters may not be."""
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(device or buffer.device))
        if self.expert_bias is not None:
            self.expert_bias.zero_()
        self.load_fractions.fill_(1.0 / self.load_fractions.numel())
        self.tokens_per_expert.zero_()

    def forward(
        self, x: torch.Tensor, step_tokens: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, S, dim] -> ([B, S, dim], counts [E]). step_tokens: see Router."""
        tokens = x.reshape(-1, x.shape[-1])  # [N, dim]
        routing = self.router(tokens, self.expert_bias, self.load_fractions, step_tokens)
        mixed = self.dispatch(tokens, routing, self.experts)
        return mixed.view_as(x), routing.counts


def dispatch(
    tokens: torch.Tensor, routing: Routing, experts: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Each token through its experts and back: tokens [N, dim] -> [N, dim]."""
    tokens = tokens.to(compute_dtype(tokens))  # before there are k of each
    order, slots = by_expert(routing.experts)
    if experts.permutes(tokens):
        weights = routing.weights.reshape(-1).index_select(0, order)
        return experts(tokens, routing.counts, order // slots.shape[1], weights)
    outputs = experts(take(tokens, order, slots), routing.counts)
    return combine(outputs, order, slots, routing.weights)
