"""Expert load, once an optimizer step: the counts of all layers and ranks, and what follows from
them.

The model adds up which experts its training forwards used (`tokens_per_expert`). Just before the
optimizer steps, the counts of the global batch are summed over ranks in one collective; they become
the shares that the next step's Switch loss steers by (`load_fractions`), move the selection bias
where that is in use (arXiv:2408.15664: up by a fixed step for an expert below the mean, down
above), and are kept for the metrics. Taking the shares from the step before makes them the same for
every rank and every micro-batch, so the gradient does not depend on the layout.
"""

from collections.abc import Callable

import torch
from torch import nn


class ExpertBalance:
    """Reads and resets the counters of all MoE layers of this rank's model parts."""

    def __init__(
        self,
        model_parts: list[nn.Module],
        sum_over_ranks: Callable[[torch.Tensor], None] | None = None,
        sum_over_stages: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Args:
        sum_over_ranks: in place, over all ranks that route tokens through these layers.
        sum_over_stages: in place, over the stages of the pipeline, which have other layers.
        """
        self.layers = {
            name: layer.moe
            for part in model_parts
            for name, layer in part.layers.items()
            if layer.moe_enabled
        }
        self.sum_over_ranks, self.sum_over_stages = sum_over_ranks, sum_over_stages
        self.n_layers = model_parts[0].model_args.n_layers
        self.counts: torch.Tensor | None = None  # [L, E] of the last step

    @torch.no_grad()
    def step(self) -> None:
        """Takes the step's counts in; no host sync."""
        if not self.layers:
            return
        counts = torch.stack([moe.tokens_per_expert for moe in self.layers.values()])  # [L, E]
        if self.sum_over_ranks is not None:
            self.sum_over_ranks(counts)
        self.counts = counts
        loads = counts.float()
        for moe, load in zip(self.layers.values(), loads, strict=True):
            moe.load_fractions.copy_(load / load.sum())
            if moe.expert_bias is not None:
                move = moe.load_balance_coeff * torch.sign(load.mean() - load)
                moe.expert_bias.add_(move - move.mean())
            moe.tokens_per_expert.zero_()

    def metrics(self) -> dict[str, object]:
        """Of the last step, by layer: max/mean load, entropy (1 is even), experts left idle.

        Every rank calls it: a pipeline's stages put their layers together.
        """
        if self.counts is None:
            return {}
        counts = self.counts.new_zeros(self.n_layers, self.counts.shape[1])
        counts[[int(name) for name in self.layers]] = self.counts
        if self.sum_over_stages is not None:
            self.sum_over_stages(counts)
        loads = counts.double().cpu()
        shares = loads / loads.sum(1, keepdim=True)
        entropy = torch.special.entr(shares).sum(1) / torch.log(torch.tensor(shares.shape[1]))
        return {
            "expert_load_max_mean": [
                round(x, 4) for x in (shares.amax(1) * shares.shape[1]).tolist()
            ],
            "expert_entropy": [round(x, 4) for x in entropy.tolist()],
            "dead_experts": (loads == 0).sum(1).tolist(),
        }
