"""The order in which a model is wrapped, on one page: activation checkpointing, compile, data
parallel.

Each wraps the blocks from the inside out: what is recomputed is decided first, the result is
compiled, and sharding hooks go around compiled blocks. TorchTitan calls `parallelize` with a model
on the meta device.
"""

from microtron.accelerator import DEVICE_TYPE

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac

from microtron.errors import UserError
from microtron.model.model import Transformer

# Results that selective (op) checkpointing keeps rather than computes again.
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.microtron.attention.default,
    torch.ops.microtron.experts.default,
    torch._higher_order_ops.flex_attention,
    torch._higher_order_ops.inductor_compiled_code,
}


def parallelize(model: Transformer, parallel_dims: ParallelDims, job: JobConfig) -> Transformer:
    """TorchTitan's parallelize_fn."""
    model.init_seed = job.debug.seed
    model.place_parameter = place
    if job.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job.activation_checkpoint,
            model_compile_enabled=job.compile.enable,
            op_sac_save_list=SAVED_OPS,
            base_folder=job.job.dump_folder,
        )
    if job.compile.enable and "model" in job.compile.components:
        for block in model.layers.values():
            block.compile(backend=job.compile.backend, fullgraph=True)
    if parallel_dims.dp_enabled:
        _shard(model, parallel_dims, job)
    return model


def check_layout(job: JobConfig, world_size: int) -> None:
    """Refuses layouts that this version does not have, before any process group is built.

    Raises:
        UserError: with the degree and what works instead.
    """
    p = job.parallelism
    for name in (
        "data_parallel_replicate_degree",
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
        "context_parallel_degree",
        "expert_parallel_degree",
    ):
        if getattr(p, name) != 1:
            raise UserError(
                f"parallelism.{name} = {getattr(p, name)} is not supported yet: "
                "leave it at 1 (all ranks share the data and the weights, FSDP2)"
            )
    if p.data_parallel_shard_degree not in (-1, world_size):
        raise UserError(
            f"parallelism.data_parallel_shard_degree = {p.data_parallel_shard_degree} does not "
            f"make the {world_size} ranks of this run: use {world_size}, or -1 for all of them"
        )
    ranks_batch = job.training.local_batch_size * world_size
    if job.training.global_batch_size > 0 and job.training.global_batch_size % ranks_batch:
        raise UserError(
            f"training.global_batch_size = {job.training.global_batch_size} is not a multiple of "
            f"local_batch_size x data ranks = {job.training.local_batch_size} x {world_size}: "
            f"use {max(1, job.training.global_batch_size // ranks_batch) * ranks_batch}"
        )
    if job.activation_checkpoint.mode == "memory_budget" and not job.compile.enable:
        raise UserError(
            "activation_checkpoint.mode = 'memory_budget' is the compiler's work: "
            "set compile.enable = true or choose full"
        )


def place(parameter: nn.Parameter, full: torch.Tensor) -> None:
    """Writes a full CPU tensor into a parameter, whole or spread, without communication."""
    if isinstance(parameter, DTensor):
        device = parameter.to_local().device
        full = distribute_tensor(
            full.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.data.copy_(full)


def reshard(model: nn.Module) -> None:
    """After a forward without a backward: gives up the weights that FSDP2 still holds whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _shard(model: Transformer, parallel_dims: ParallelDims, job: JobConfig) -> None:
    """FSDP2 by block."""
    options: dict[str, object] = {
        "mesh": parallel_dims.get_mesh("fsdp"),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[job.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job.training.mixed_precision_reduce],
        ),
    }
    if job.training.enable_cpu_offload and DEVICE_TYPE == "cuda":
        options["offload_policy"] = CPUOffloadPolicy()
    reshard = job.parallelism.fsdp_reshard_after_forward != "never"
    tied = model.model_args.tie_embeddings
    if not tied:
        fully_shard(model.tok_embeddings, **options, reshard_after_forward=reshard)
    for block in model.layers.values():
        fully_shard(block, **options, reshard_after_forward=reshard)
    if not tied:
        # Backward needs these first, so they stay whole after forward.
        always = job.parallelism.fsdp_reshard_after_forward == "always"
        fully_shard([model.norm, model.output], **options, reshard_after_forward=always)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global token count already. Plain sums: gloo has no
            # PREMUL_SUM, and NCCL's returns zeros in bf16 (pytorch#190745).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
