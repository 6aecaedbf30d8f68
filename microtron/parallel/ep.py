"""Expert parallel: each rank keeps some of the experts, tokens travel to them and back.

The ranks are borrowed from data, context and tensor parallel (TorchTitan's ParallelDims). Every one
of them routes its own tokens, so a layer is: sort by expert, all-to-all, experts, all-to-all,
combine. Where experts are split over tensor parallel ranks as well (``etp``), these first gather
their tokens, compute a part of each expert's width, and sum the parts when they give the tokens
back. The host waits once a layer (and where checkpointing computes it again), for the split sizes
of the all-to-all; never without expert parallel.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from microtron.model.experts import Experts
from microtron.model.moe import MoE, dispatch
from microtron.model.permute import by_expert, combine, take
from microtron.model.precision import compute_dtype
from microtron.model.router import Routing, count
from microtron.parallel.collectives import all_gather, all_to_all, reduce_scatter
from microtron.parallel.local import distribute, with_local_parameters

# Expert weights [E, in, out] over (ep, etp): whole experts over ep; over etp the width between the
# two products. down_bias belongs to the sum, so each part of an expert adds its share of it.
EXPERT_PLAN: dict[str, tuple[Placement, Placement]] = {
    "gate_up": (Shard(0), Shard(2)),  # gate and up are interleaved: a part holds whole pairs
    "gate_up_bias": (Shard(0), Shard(1)),
    "down": (Shard(0), Shard(1)),
    "down_bias": (Shard(0), Replicate()),
}


class Exchange:
    """What MoE calls as ``dispatch``: tokens [N, dim], their routing, the experts -> [N, dim]."""

    def __init__(self, ep: dist.ProcessGroup | None, etp: dist.ProcessGroup | None) -> None:
        self.ep, self.etp = ep, etp

    def __call__(self, tokens: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
        """Through the experts and back."""
        tokens = tokens.to(compute_dtype(tokens))  # they travel in it
        if self.etp is not None:
            tokens, routing = self._gathered(tokens, routing)
        if self.ep is None:
            mixed = dispatch(tokens, routing, experts)
        else:
            mixed = self._across(tokens, routing, experts)
        return mixed if self.etp is None else reduce_scatter(mixed, 0, self.etp)

    def _gathered(self, tokens: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing]:
        """Tokens and routing of all etp ranks. The routing weights' gradient is summed on its way
        back: each rank's outputs are only a part (pytorch/torchtitan#2387).
        """
        tokens = all_gather(tokens, 0, self.etp)
        weights = all_gather(routing.weights, 0, self.etp)
        chosen = all_gather(routing.experts, 0, self.etp)
        counts = count(chosen, routing.counts.numel())
        return tokens, Routing(weights, chosen, counts)

    def _across(self, tokens: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
        ranks = self.ep.size()
        order, slots = by_expert(routing.experts)
        rows = take(tokens, order, slots)
        counts = all_to_all(routing.counts, self.ep).view(ranks, -1)  # [ranks, own experts]
        sizes = torch.stack((routing.counts.view(ranks, -1).sum(1), counts.sum(1)))
        sent, received = sizes.tolist()  # the one wait for the device
        rows = all_to_all(rows, self.ep, received, sent)
        # Rows lie by rank, then by expert; experts want them by expert.
        expert = torch.arange(counts.shape[1], device=rows.device).repeat(ranks)
        expert = expert.repeat_interleave(counts.reshape(-1), output_size=rows.shape[0])
        sorting, places = by_expert(expert.unsqueeze(1))
        outputs = experts(take(rows, sorting, places), counts.sum(0))
        outputs = take(outputs, places.squeeze(1), sorting.unsqueeze(1))
        outputs = all_to_all(outputs, self.ep, sent, received)
        return combine(outputs, order, slots, routing.weights)


def apply_experts(moe: MoE, mesh: DeviceMesh, ep: bool, etp: bool) -> None:
    """Spreads one layer's experts over ``mesh``: (ep, etp), or one of the two."""
    keep = [i for i, on in enumerate((ep, etp)) if on]
    for name, placements in EXPERT_PLAN.items():
        distribute(moe.experts, name, mesh, [placements[i] for i in keep])
    groups = dict(zip(keep, (mesh.get_group(i) for i in range(mesh.ndim)), strict=True))
    moe.dispatch = Exchange(groups.get(0), groups.get(1))
    parts = groups[1].size() if etp else 1
    with_local_parameters(moe.experts, {"down_bias": 1 / parts})
