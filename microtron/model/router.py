"""The router: which experts a token goes to, with what weight, and the losses that keep it honest.

Top-k on the raw logits, then softmax over the k (gpt-oss). All of it in fp32 (where FSDP2 brings
bf16, from weights and inputs rounded to it). The losses never show
up in the model's output: they ride on the routing weights through an autograd function that hands
them a gradient of one, so they hold under activation checkpointing (whose recomputation repeats
them exactly), under gradient accumulation and on pipeline stages that never see the loss.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from microtron.model.args import ModelArgs


class Routing(NamedTuple):
    """What the router decided for N tokens."""

    weights: torch.Tensor  # [N, k] fp32, sums to 1 over k
    experts: torch.Tensor  # [N, k] int64
    counts: torch.Tensor  # [E] int64, tokens sent to each expert


class AttachLoss(torch.autograd.Function):
    """Identity on ``x`` whose backward also starts ``loss`` with a gradient of one."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.like = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)


def switch_loss(probs: torch.Tensor, fractions: torch.Tensor, tokens: int) -> torch.Tensor:
    """``E * sum_i f_i P_i`` (Switch Transformer, arXiv:2101.03961 eq. 4), 1 at perfect balance.

    Args:
        probs: [N, E] softmax over all experts; the gradient flows through these.
        fractions: [E] share of the routed tokens each expert got, summing to 1.
        tokens: what the sum of probabilities is divided by: the tokens of the whole global batch.
    """
    return probs.shape[-1] * (probs.sum(0) * fractions).sum() / tokens


def count(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Tokens sent to each expert: experts [N, k] -> int64 [E], without the wait of a bincount."""
    flat = experts.reshape(-1)
    return flat.new_zeros(num_experts).scatter_add(0, flat, torch.ones_like(flat))


class Router(nn.Module):
    """x [N, dim] -> Routing."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.top_k, self.num_experts = args.top_k, args.num_experts
        self.aux_loss_coef = args.aux_loss_coef if args.load_balance == "aux_loss" else 0.0
        self.z_loss_coef = args.router_z_loss_coef
        self.stats_of_step = args.balance_stats == "step"
        self.gate = nn.Linear(args.dim, args.num_experts, bias=True)

    def forward(
        self,
        x: torch.Tensor,
        expert_bias: torch.Tensor | None,
        load_fractions: torch.Tensor,
        step_tokens: int | None,
    ) -> Routing:
        """Routes N tokens.

        Args:
            x: [N, dim].
            expert_bias: [E] added to the logits for the choice alone, or None.
            load_fractions: [E] each expert's share of the tokens in the step before.
            step_tokens: tokens of the global batch, over which router losses are averaged; None: N.
        """
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.gate.bias is None else self.gate.bias.float()
            logits = F.linear(x.float(), self.gate.weight.float(), bias)  # [N, E]
        choice = logits if expert_bias is None else logits + expert_bias
        experts = choice.topk(self.top_k, dim=-1).indices
        weights = logits.gather(-1, experts).softmax(dim=-1)
        counts = count(experts, self.num_experts)
        if self.training and torch.is_grad_enabled():
            loss = self._losses(logits, counts, load_fractions, step_tokens or x.shape[0])
            if loss is not None:
                weights = AttachLoss.apply(weights, loss)
        return Routing(weights, experts, counts)

    def _losses(
        self, logits: torch.Tensor, counts: torch.Tensor, load_fractions: torch.Tensor, tokens: int
    ) -> torch.Tensor | None:
        loss = None
        if self.aux_loss_coef:
            here = counts.float() / counts.sum()
            fractions = load_fractions if self.stats_of_step else here
            loss = self.aux_loss_coef * switch_loss(logits.softmax(-1), fractions, tokens)
        if self.z_loss_coef:
            z = self.z_loss_coef * logits.logsumexp(-1).square().sum() / tokens
            loss = z if loss is None else loss + z
        return loss
