"""The order in which a model is spread, on one page.

    pipeline        pp.py        a stage is a model with layers missing; the rest sees no difference
    tensor          tp.py        weights become DTensors on tp; the sequence is cut between products
    experts         ep.py        whole experts on ep (which borrows dp, cp and tp ranks)
    context         ulysses.py   sequence for heads around attention
    kernels         kernels.py   the bodies of [kernels] in place of plain functions
    checkpointing   TorchTitan   decides what backward computes again, communication included
    compile         torch        a block with all of the above is one graph (with ep: a few)
    data            dp.py        FSDP2 / HSDP / DDP hooks go around compiled blocks

TorchTitan calls `parallelize` with a model, or a stage, on the meta device.
"""

import dataclasses

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac

from microtron import accelerator
from microtron.kernels import apply_kernels
from microtron.model.cpu_product import onednn_operators
from microtron.model.model import Transformer
from microtron.parallel.dp import apply_dp, wrapped
from microtron.parallel.ep import apply_experts
from microtron.parallel.tp import apply_tp
from microtron.parallel.ulysses import apply_ulysses

# Results that selective (op) checkpointing keeps rather than computes, or sends, again.
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
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch._higher_order_ops.flex_attention,
    torch._higher_order_ops.inductor_compiled_code,
    *onednn_operators(),
}


def parallelize(model: Transformer, dims: ParallelDims, job: JobConfig) -> Transformer:
    """TorchTitan's parallelize_fn."""
    model.init_seed = job.debug.seed
    model.place_parameter = place
    if dims.tp_enabled:
        apply_tp(model, dims.get_mesh("tp"), with_experts=not dims.ep_enabled)
    if dims.ep_enabled:
        mesh = dims.get_mesh(["ep", "etp"] if dims.etp_enabled else "ep")
        for block in model.layers.values():
            apply_experts(block.moe, mesh, ep=True, etp=dims.etp_enabled)
    if dims.cp_enabled:
        apply_ulysses(model, dims.get_mesh("cp").get_group())
    blocks_compiled = job.compile.enable and "model" in job.compile.components
    if accelerator.DEVICE_TYPE == "cpu" or not splits_backward(dims, job):
        apply_kernels(
            model,
            dataclasses.asdict(job.kernels),
            accelerator.DEVICE_TYPE,
            blocks_compiled,
            experts_apart=dims.ep_enabled,
        )
    if job.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job.activation_checkpoint,
            model_compile_enabled=job.compile.enable,
            op_sac_save_list=SAVED_OPS,
            base_folder=job.job.dump_folder,
        )
    if blocks_compiled:
        _compile(model, dims, job)
    if wrapped(dims):
        apply_dp(model, dims, job)
    return model


def splits_backward(dims: ParallelDims, job: JobConfig) -> bool:
    """Whether the schedule runs a backward twice, which compiled bodies and Liger's do not bear.

    A CPU's do, and `check.py` refuses others there.
    """
    return dims.pp_enabled and job.parallelism.pipeline_parallel_schedule.endswith("ZeroBubble")


def _compile(model: Transformer, dims: ParallelDims, job: JobConfig) -> None:
    if job.parallelism.enable_async_tensor_parallel and dims.tp_enabled:
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        torch._inductor.config._micro_pipeline_tp = True
        enable_symm_mem_for_group(dims.get_mesh("tp").get_group().group_name)
    for block in model.layers.values():
        if dims.ep_enabled:  # the host must see split sizes, and FSDP2 hooks the experts
            block.moe.dispatch = torch.compiler.disable(block.moe.dispatch)
        block.compile(backend=job.compile.backend, fullgraph=not dims.ep_enabled)


def place(parameter: nn.Parameter, full: torch.Tensor) -> None:
    """Writes a full CPU tensor into a parameter, whole or spread, without communication."""
    if isinstance(parameter, DTensor):
        device = parameter.to_local().device
        full = distribute_tensor(
            full.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.data.copy_(full)
