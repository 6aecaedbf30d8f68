"""Data parallel: FSDP2, HSDP, DDP, by block, on one engine (torch's `fully_shard` and `replicate`).

* FSDP2 (ZeRO-3, arXiv:1910.02054): weights, gradients and optimizer state are cut over dp_shard x
  cp ranks; a block's weights are gathered before it runs and given up after
  (`fsdp_reshard_after_forward` = always; the default keeps the last ones). `never` keeps gathered
  weights until backward is through: the memory of ZeRO-2, and its traffic where a step is one
  micro-batch (ZeRO-2 gathers once a step, this once a micro-batch).
* HSDP: the same within dp_shard, whole copies over dp_replicate; gradients are reduce-scattered,
  then all-reduced.
* DDP: whole copies everywhere, gradients all-reduced block by block behind backward.

ZeRO-1 (only the optimizer state is cut) is not there. With one micro-batch a step it would move the
bytes of `never`, 2 x parameters, and keep whole weights and gradients besides; with many it would
move them once where `never` moves them every time.

Gradients are plain sums: the loss is divided by the tokens of the global batch already.
"""

import itertools

from microtron.accelerator import DEVICE_TYPE

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims

from microtron.model.model import Transformer


def apply_dp(model: Transformer, dims: ParallelDims, job: JobConfig) -> None:
    """Wraps a model, or a pipeline stage, for the data parallel part of the mesh."""
    wrap = _Wrap(dims, job)
    tied = model.model_args.tie_embeddings
    if model.tok_embeddings is not None and not tied:
        tables = [model.tok_embeddings, model.pos_embeddings]
        wrap([table for table in tables if table is not None])
    for block in model.layers.values():
        if dims.ep_enabled and block.moe_enabled:
            wrap(block.moe.experts, experts=True)
        wrap(block)
    if model.output is not None and not tied:
        # Backward needs these first, so they stay whole after forward.
        wrap([model.norm, model.output], last=True)
    wrap(model, root=True)
    if dims.fsdp_enabled and dims.ep_enabled:
        _prefetch(list(model.layers.values()))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Plain sums: gloo has no PREMUL_SUM, and NCCL's returns zeros in bf16
            # (pytorch#190745).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _prefetch(blocks: list[nn.Module]) -> None:
    """With experts elsewhere the host waits inside every block, and so comes too late to gather the
    next one's weights behind this one's work; told in advance, FSDP2 starts them before.
    """
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following, following.moe.experts])
        following.set_modules_to_backward_prefetch([block, block.moe.experts])


def sum_at(last: bool, parts: list[nn.Module], dims: ParallelDims) -> None:
    """Before a micro-batch: whole copies (DDP, HSDP's replicas) sum their gradients at the last one
    of a step alone. (A pipeline sees to that itself.)
    """
    for part in parts if dims.dp_replicate_enabled else ():
        if dims.fsdp_enabled:
            part.set_requires_all_reduce(last)
        else:
            part.set_requires_gradient_sync(last)
            part.set_is_last_backward(last)


def reshard(parts: list[nn.Module]) -> None:
    """After a forward without a backward: gives up the weights that FSDP2 still holds whole."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class _Wrap:
    """`fully_shard` or `replicate` with this run's mesh and precision."""

    def __init__(self, dims: ParallelDims, job: JobConfig) -> None:
        self.dims, self.policy = dims, job.parallelism.fsdp_reshard_after_forward
        self.pp = dims.pp_enabled
        precision = MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[job.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job.training.mixed_precision_reduce],
            cast_forward_inputs=False,  # cos and sin stay fp32
        )
        self.options: dict[str, object] = {"mp_policy": precision}
        if job.training.enable_cpu_offload and DEVICE_TYPE == "cuda":
            self.options["offload_policy"] = CPUOffloadPolicy()

    def __call__(
        self,
        module: nn.Module | list[nn.Module],
        experts: bool = False,
        last: bool = False,
        root: bool = False,
    ) -> None:
        if not self.dims.fsdp_enabled:
            mesh = self.dims.get_mesh("dp_replicate")
            for one in module if isinstance(module, list) else [module]:
                replicate(one, mesh=mesh, **self.options)
            return
        options = dict(self.options)
        if experts:
            options["shard_placement_fn"] = self._expert_placement(module)
        # A pipeline runs many micro-batches a step: gathering again for each would cost more than
        # the memory is worth, unless it is asked for.
        keep = self.policy == "never" or self.policy == "default" and (self.pp or last)
        if not root:  # which torch keeps whole between forward and backward
            options["reshard_after_forward"] = not keep
        fully_shard(module, mesh=self._mesh("efsdp" if experts else "fsdp"), **options)

    def _mesh(self, shard: str) -> DeviceMesh:
        if self.dims.dp_replicate_enabled:
            return self.dims.get_mesh(["dp_replicate", shard])
        return self.dims.get_mesh(shard)

    def _expert_placement(self, module: nn.Module):  # noqa: ANN202
        """Experts are cut by expert; by their input where there are more ranks than experts."""
        ranks = self.dims.get_mesh("efsdp").size() * self.dims.ep
        by_expert = ranks <= module.gate_up.shape[0]
        return lambda parameter: Shard(0 if by_expert else 1)


def wrapped(dims: ParallelDims) -> bool:
    """Whether `apply_dp` wraps the model, and brings the compute dtype."""
    return dims.fsdp_enabled or dims.dp_replicate_enabled


def autocast_for(dims: ParallelDims, job: JobConfig) -> torch.dtype | None:
    """The dtype that autocast must bring where data parallel wrappers do not; None: none."""
    if wrapped(dims):
        return None
    dtype = TORCH_DTYPE_MAP[job.training.mixed_precision_param]
    return None if dtype == torch.float32 else dtype
