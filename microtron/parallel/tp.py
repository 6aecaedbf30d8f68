"""Tensor parallel with sequence parallel (Megatron-LM, arXiv:1909.08053 and 2205.05198).

Between the blocks' products each rank holds a part of every sequence; norms, routers and residuals
work on it. Before the products the parts are gathered; each rank computes a part of the heads, of
the feed-forward width, of the vocabulary; the sum over ranks gives the sequence parts back.

Parameters that are whole on every rank see only its own tokens (or heads): their gradients are
parts of a sum, taken once a step by `sum_replicated_gradients`.
"""

import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from microtron.model.model import Transformer
from microtron.model.precision import compute_dtype
from microtron.parallel.collectives import all_gather, reduce_scatter
from microtron.parallel.ep import apply_experts
from microtron.parallel.local import distribute, own_positions, with_local_parameters
from microtron.parallel.loss import split_vocabulary

# Parameter -> how it lies on the tp mesh; the first pattern that matches. Experts: see ep.py.
PLAN: tuple[tuple[str, Placement], ...] = (
    (r"tok_embeddings\.weight", Shard(0)),  # vocabulary
    (r"output\.weight", Shard(0)),  # vocabulary
    (r"pos_embeddings\.weight", Replicate()),  # each rank looks up its part of the sequence
    (r".*\.attention\.w[qkv]\.(weight|bias)", Shard(0)),  # heads
    (r".*\.attention\.sinks", Shard(0)),  # heads
    (r".*\.attention\.wo\.weight", Shard(1)),  # heads, summed
    (r".*\.feed_forward\.gate_up\.(weight|bias)", Shard(0)),  # width, in pairs of gate and up
    (r".*\.feed_forward\.up\.(weight|bias)", Shard(0)),  # width
    (r".*\.feed_forward\.down\.weight", Shard(1)),  # width, summed
    (r".*norm\.(weight|bias)", Replicate()),
    (r".*\.router\.gate\.(weight|bias)", Replicate()),
    (r".*\.(wo|down)\.bias", Replicate()),  # added after the sum
)
SEQUENCE = 1  # the dimension that is spread between products: [B, S, dim]


def apply_tp(model: Transformer, mesh: DeviceMesh, with_experts: bool) -> None:
    """Spreads a model, or a pipeline stage, over the tp mesh.

    Args:
        with_experts: split the experts' width too; False where expert parallel has them.
    """
    group = mesh.get_group()
    for module_name, module in model.named_modules():
        if module_name.endswith(".experts"):
            continue
        for name, _ in list(module.named_parameters(module_name, recurse=False)):
            distribute(module, name.rpartition(".")[2], mesh, [_placement(name)])
    if model.model_args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    if model.tok_embeddings is not None:
        _embedding(model.tok_embeddings, group)
    if model.pos_embeddings is not None:
        own_positions(model.pos_embeddings, group)
        with_local_parameters(model.pos_embeddings)
    for block in model.layers.values():
        _gather_input(block.attention, group)
        _row_parallel(block.attention.wo, group)
        if not block.moe_enabled:
            _gather_input(block.feed_forward, group)
            _row_parallel(block.feed_forward.down, group)
        elif with_experts:
            apply_experts(block.moe, mesh, ep=False, etp=True)
        with_local_parameters(block, skip="moe.experts")
    if model.norm is not None:
        with_local_parameters(model.norm)
    if model.output is not None:
        _gather_input(model.output, group)
        split_vocabulary(model.output, group)
        with_local_parameters(model.output)


def _placement(name: str) -> Placement:
    for pattern, placement in PLAN:
        if re.fullmatch(pattern, name):
            return placement
    raise ValueError(f"the tensor parallel plan has no line for {name}")


def _gather_input(module: nn.Module, group: dist.ProcessGroup) -> None:
    def hook(module: nn.Module, args: tuple) -> tuple:
        x, *others = args
        return all_gather(x.to(compute_dtype(x)), SEQUENCE, group), *others  # it travels in it

    module.register_forward_pre_hook(hook)


def _row_parallel(linear: nn.Linear, group: dist.ProcessGroup) -> None:
    """x [B, S, part] @ part of the weight, summed over ranks, then the bias: [B, S/n, out]."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = reduce_scatter(F.linear(x, linear.weight), SEQUENCE, group)
        return out if linear.bias is None else out + linear.bias.to(out.dtype)

    linear.forward = forward


def _embedding(table: nn.Embedding, group: dist.ProcessGroup) -> None:
    """tokens [B, S] -> [B, S/n, dim]: each rank looks up what it has, zeros elsewhere."""

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        rows = tokens - group.rank() * table.weight.shape[0]
        mine = (rows >= 0) & (rows < table.weight.shape[0])
        found = F.embedding(rows.where(mine, 0), table.weight) * mine.unsqueeze(-1)
        return reduce_scatter(found, SEQUENCE, group)

    table.forward = forward
    with_local_parameters(table)


@torch.no_grad()
def sum_replicated_gradients(parameters: list[nn.Parameter]) -> None:
    """Sums over tp (and etp) ranks the gradients of parameters that are whole on each of them.

    Once a step, before the norm is taken: one collective for all of them.
    """
    by_group: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
    for parameter in parameters:
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            mesh = parameter.device_mesh
            for dim, name in enumerate(mesh.mesh_dim_names):
                if name in ("tp", "etp") and parameter.placements[dim].is_replicate():
                    grads = by_group.setdefault(mesh.get_group(dim), [])
                    grads.append(parameter.grad.to_local())
    for group, grads in by_group.items():
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
