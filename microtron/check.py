"""What a run's values must be, alone and together; asked before anything is built or written.

Names and types are right by then (`parse.py`). One table says it field by field; `check` adds what
takes more than one field. Datasets are checked by the loader (`data/checks.py`), layouts by
`parallel/layout.py`.
"""

import dataclasses
import importlib.util
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from microtron.accelerator import DEVICE_TYPE, TORCH

from torchtitan.config import JobConfig

from microtron.config import resolved_args
from microtron.errors import UserError
from microtron.model.args import ModelArgs

Rule = tuple[Callable[[Any], bool], str]  # what is right; the remedy where it is not

_POSITIVE: Rule = (lambda v: v >= 1, "give a positive number")
_ON_CUDA: Rule = (lambda v: not v or DEVICE_TYPE == "cuda", "it needs CUDA; leave it out")
_BALANCED: Rule = (
    lambda v: v == 1,
    "stages are balanced by their cost, embedding and head weighed in; leave it out",
)
RULES: dict[str, Rule] = {
    "job.dump_folder": (lambda v: v != "", "name the folder of this run"),
    "model.name": (lambda v: v == "microtron", "write microtron"),
    "training.steps": _POSITIVE,
    "training.seq_len": _POSITIVE,
    "training.local_batch_size": _POSITIVE,
    "training.global_batch_size": (
        lambda v: v == -1 or v >= 1,
        "give a number of sequences, or -1 for one micro-batch a rank",
    ),
    "training.gc_freq": _POSITIVE,
    "training.max_norm": (lambda v: v > 0, "give a number above 0 (1e9: off)"),
    "training.enable_cpu_offload": _ON_CUDA,
    "parallelism.pipeline_parallel_schedule": (
        lambda v: not v.endswith("ZeroBubble") or TORCH >= (2, 13),
        "torch below 2.13 loses its way in a split backward; choose 1F1B or Interleaved1F1B",
    ),
    "optimizer.name": (lambda v: v in ("Adam", "AdamW"), "choose Adam or AdamW"),
    "optimizer.lr": (lambda v: v > 0, "give a learning rate above 0"),
    "optimizer.weight_decay": (lambda v: v >= 0, "give 0 (off) or a positive number"),
    "optimizer.beta1": (lambda v: 0 <= v < 1, "give a number from 0 to below 1"),
    "optimizer.beta2": (lambda v: 0 <= v < 1, "give a number from 0 to below 1"),
    "optimizer.eps": (lambda v: v > 0, "give a number above 0, such as 1e-8"),
    "optimizer.early_step_in_backward": (
        lambda v: not v,
        "the gradient is clipped before the step; leave it out",
    ),
    "lr_scheduler.warmup_steps": (lambda v: v >= 0, "give 0 or more steps"),
    "lr_scheduler.total_steps": (
        lambda v: v is None or v >= 1,
        "give a positive number, or leave it out",
    ),
    "lr_scheduler.decay_ratio": (
        lambda v: v is None or 0 <= v <= 1,
        "give the share of the steps that decays, from 0 to 1",
    ),
    "lr_scheduler.min_lr_factor": (
        lambda v: 0 <= v <= 1,
        "give the share of the learning rate that is left, from 0 to 1",
    ),
    "activation_checkpoint.selective_ac_option": (
        lambda v: v == "op" or v.isdecimal() and int(v) > 0,
        "give op, or n for every n-th layer",
    ),
    "checkpoint.interval": _POSITIVE,
    "checkpoint.load_step": (lambda v: v >= -1, "give a step, or -1 for the newest"),
    "checkpoint.keep_latest_k": (
        lambda v: v == 0 or v >= 2,
        "keep 2 or more (one may be half-written), or 0 for all",
    ),
    "checkpoint.async_mode": (
        lambda v: v != "async_with_pinned_mem" or DEVICE_TYPE == "cuda",
        "it needs CUDA; use async",
    ),
    "checkpoint.initial_load_in_hf_quantized": (
        lambda v: not v,
        "leave it out: checkpoint.initial_load_in_hf reads MXFP4 as it is; or convert the folder "
        "once by `microtron convert from-hf`",
    ),
    "checkpoint.last_save_in_hf": (
        lambda v: not v or importlib.util.find_spec("transformers") is not None,
        "the export is compared in transformers, which is not installed: pip install transformers",
    ),
    "metrics.log_freq": _POSITIVE,
    "metrics.enable_wandb": (
        lambda v: not v or importlib.util.find_spec("wandb") is not None,
        "wandb is not installed: pip install wandb",
    ),
    "profiling.enable_memory_snapshot": (
        lambda v: not v or DEVICE_TYPE == "cuda",
        "it records the CUDA allocator; leave it out on CPU",
    ),
    "validation.freq": _POSITIVE,
    "validation.seq_len": (lambda v: v >= 1, "give a positive number, or -1 for training.seq_len"),
    "validation.local_batch_size": _POSITIVE,
    "validation.val_tokens": (
        lambda v: v == -1 or v > 0,
        "give a number of tokens, or -1 for the whole split",
    ),
    "debug.seed": (lambda v: 0 <= v < 2**63, "give a number from 0 to 2^63 - 1"),
    "data.val_fraction": (lambda v: 0 < v < 1, "give a share between 0 and 1"),
    "data.prefetch": (lambda v: v >= 0, "give 0 or more batches"),
    "data.eot_id": (lambda v: v >= -1, "give a token id, or -1 for the dataset's own"),
    "data.weights": (
        lambda v: all(w >= 0 for w in v) and (not v or sum(v) > 0),
        "give each folder a share of 0 or more, one of them above 0",
    ),
    "sample.freq": (lambda v: v >= 0, "give a number of steps, or 0 for never"),
    "sample.tokens": _POSITIVE,
    "sample.temperature": (lambda v: v >= 0, "give 0 (greedy) or more"),
    "sample.top_k": (lambda v: v >= 0, "give 0 (all tokens) or more"),
    "eval.hellaswag_freq": _POSITIVE,
    "eval.hellaswag_examples": (
        lambda v: v == -1 or v > 0,
        "give a number of examples, or -1 for all",
    ),
    "parallelism.disable_loss_parallel": (
        lambda v: not v,
        "under tensor parallelism the loss is always computed on shards; leave it out",
    ),
    "parallelism.module_fqns_per_model_part": (
        lambda v: v is None,
        "stages are balanced by their cost; leave it out",
    ),
    "parallelism.pipeline_parallel_first_stage_less_layers": _BALANCED,
    "parallelism.pipeline_parallel_last_stage_less_layers": _BALANCED,
    "parallelism.pipeline_parallel_schedule_csv": (
        lambda v: not v,
        "name a schedule in pipeline_parallel_schedule; leave it out",
    ),
    "parallelism.context_parallel_load_balancer": (
        lambda v: v == "headtail",
        "Ulysses deals heads, which are equal already; leave it out",
    ),
    "parallelism.context_parallel_rotate_method": (
        lambda v: v == "allgather",
        "Ulysses rotates nothing; leave it out",
    ),
    "parallelism.expert_parallel_comm_backend": (lambda v: v == "standard", "leave it out"),
    "comm.init_timeout_seconds": _POSITIVE,
    "comm.train_timeout_seconds": _POSITIVE,
    "model.args.attn_backend": (
        lambda v: v != "flex" or DEVICE_TYPE == "cuda",
        "FlexAttention trains on CUDA only; use sdpa",
    ),
}
# TorchTitan's options that mean nothing here: set, they would be passed over or fail late.
NOT_HERE = (
    "job.custom_config_module",
    "model.converters",
    "model.tokenizer_path",
    "quantize",
    "training.dataset",
    "training.dataset_path",
    "training.dataloader",
    "checkpoint.create_seed_checkpoint",
    "checkpoint.enable_ft_dataloader_checkpoints",
    "comm.mode",
    "memory_estimation",
    "fault_tolerance",
    "experimental",
    "validation.dataset",
    "validation.dataset_path",
    "validation.steps",
    "validation.dataloader",
    "debug.moe_force_load_balance",
    "parallelism.pipeline_parallel_expert_parallel_overlap",
)


def check(job: JobConfig) -> None:
    """Refuses values that cannot work.

    Raises:
        UserError: with the field, the value and the remedy.
    """

    def require(ok: bool, name: str, remedy: str) -> None:
        if not ok:
            value = operator.attrgetter(name)(job)
            raise UserError(f"{name} = {value!r} cannot work: {remedy}")

    defaults = dict(_leaves(type(job)()))
    for name, value in _leaves(job):
        if f"{name}.".startswith(tuple(f"{n}." for n in NOT_HERE)):
            require(value == defaults[name], name, "microtron has no such option; leave it out")
        numbers = value if isinstance(value, list) else [value]
        require(
            all(math.isfinite(n) for n in numbers if isinstance(n, float)),
            name,
            "give a finite number",
        )
    for name, (right, remedy) in RULES.items():
        require(right(operator.attrgetter(name)(job)), name, remedy)
    _check_lengths(job, require)
    _check_kernels(job, require)
    data, validation, profiling = job.data, job.validation, job.profiling
    require(
        bool(data.dirs) or data.mock,
        "data.dirs",
        "name a dataset folder made by `microtron prepare`, or set data.mock = true",
    )
    require(
        not data.weights or len(data.weights) == len(data.dirs),
        "data.weights",
        f"give one weight for each of the {len(data.dirs)} folders in data.dirs",
    )
    require(
        not (validation.enable and data.mock),
        "validation.enable",
        "random tokens (data.mock) have no validation split; leave out one of the two",
    )
    require(
        validation.val_target is None or validation.enable,
        "validation.val_target",
        "set validation.enable = true, or there is no loss to compare with",
    )
    checkpoint = job.checkpoint
    require(
        not checkpoint.initial_load_in_hf or bool(checkpoint.initial_load_path),
        "checkpoint.initial_load_in_hf",
        "name the Hugging Face folder in checkpoint.initial_load_path",
    )
    require(
        not checkpoint.initial_load_in_hf or checkpoint.initial_load_model_only,
        "checkpoint.initial_load_model_only",
        "a Hugging Face folder has no optimizer state; leave it out",
    )
    require(
        not checkpoint.last_save_in_hf or (checkpoint.enable and not checkpoint.load_only),
        "checkpoint.last_save_in_hf",
        "it exports the last checkpoint, and none is saved: leave out checkpoint.enable and "
        "checkpoint.load_only",
    )
    args = resolved_args(job)
    require(
        not checkpoint.last_save_in_hf or not args.moe or args.load_balance != "bias",
        "checkpoint.last_save_in_hf",
        "transformers has no selection bias: set model.args.load_balance = aux_loss",
    )
    total, steps = job.lr_scheduler.total_steps, job.training.steps
    require(
        total is None or total >= steps,
        "lr_scheduler.total_steps",
        f"give at least training.steps = {steps}, or leave it out",
    )
    require(
        job.activation_checkpoint.mode != "memory_budget" or job.compile.enable,
        "activation_checkpoint.mode",
        "it is the compiler's work: set compile.enable = true, or choose full",
    )
    shortest = profiling.profiler_active + profiling.profiler_warmup
    require(
        not profiling.enable_profiling or profiling.profile_freq >= shortest,
        "profiling.profile_freq",
        f"give at least profiler_active + profiler_warmup = {shortest} steps",
    )
    if job.compile.enable:
        import torch

        require(
            job.compile.backend in torch.compiler.list_backends(None),
            "compile.backend",
            f"choose one of {', '.join(torch.compiler.list_backends())}",
        )


def _check_lengths(job: JobConfig, require: Callable[[bool, str, str], None]) -> None:
    """Learned positions end with their table."""
    args = resolved_args(job)
    if args.positions == "rope":
        return
    lengths = {"training.seq_len": job.training.seq_len}
    if job.validation.enable:
        lengths["validation.seq_len"] = job.validation.seq_len
    for name, length in lengths.items():
        require(
            length <= args.max_positions,
            name,
            f"positions are learned up to model.args.max_positions = {args.max_positions}: give "
            "that or less",
        )


def _check_kernels(job: JobConfig, require: Callable[[bool, str, str], None]) -> None:
    """Bodies that this model, layout or machine does not have (`kernels.py`)."""
    args = resolved_args(job)
    for kernel, choice in dataclasses.asdict(job.kernels).items():
        if choice in ("auto", "torch"):
            continue
        mine = {"cpu": _no_cpu, "compile": _no_compiled, "liger": _no_liger}[choice]
        for wrong, remedy in (*_no_body(kernel, args, job), *mine(kernel, args, job)):
            require(not wrong, f"kernels.{kernel}", remedy)


def _no_body(kernel: str, args: ModelArgs, job: JobConfig) -> list[tuple[bool, str]]:
    """(whether it holds, why there is nothing but torch and what to do)."""
    own = {
        "rope": (
            args.positions == "learned",
            "model.args.positions = learned rotates nothing; leave it out",
        ),
        "swiglu": (args.activation == "gelu", "model.args.activation = gelu; leave it out"),
        "loss": (
            job.parallelism.tensor_parallel_degree > 1,
            "under tensor parallelism the loss is computed on shards, by torch; leave it out",
        ),
    }
    return [
        own.get(kernel, (False, "")),
        (
            kernel == "swiglu" and args.moe and DEVICE_TYPE == "cpu" and args.grouped_experts,
            "on a CPU experts are one operator, SwiGLU within; leave it out",
        ),
    ]


def _no_cpu(kernel: str, args: ModelArgs, job: JobConfig) -> list[tuple[bool, str]]:
    """Likewise, for the bodies by hand."""
    own = {
        "norm": (args.norm == "layer", "by hand there is RMSNorm, not LayerNorm; leave it out"),
        "swiglu": (args.activation == "swiglu", "by hand there is the clamped one; leave it out"),
    }
    return [
        (DEVICE_TYPE != "cpu", "its bodies are for a CPU; use auto or torch"),
        own.get(kernel, (False, "")),
        _in_compiled_blocks(kernel, job),
    ]


def _no_compiled(kernel: str, args: ModelArgs, job: JobConfig) -> list[tuple[bool, str]]:
    """Likewise, for compiled ones."""
    schedule = job.parallelism.pipeline_parallel_schedule
    pipelined = job.parallelism.pipeline_parallel_degree > 1
    return [
        (
            pipelined and schedule.endswith("ZeroBubble"),
            f"{schedule} splits the backward; use torch, or another schedule",
        )
    ]


def _in_compiled_blocks(kernel: str, job: JobConfig) -> tuple[bool, str]:
    return (
        kernel != "loss" and job.compile.enable and "model" in job.compile.components,
        "compile.enable = true fuses it with what is around it; leave one of the two out",
    )


def _no_liger(kernel: str, args: ModelArgs, job: JobConfig) -> list[tuple[bool, str]]:
    """Likewise, for Liger's."""
    own = {
        "norm": (args.norm == "layer", "Liger's is RMSNorm, not LayerNorm; use compile"),
        "swiglu": (args.activation != "swiglu", "Liger's has no clamps; use compile"),
    }
    return [
        (DEVICE_TYPE != "cuda", "Liger's kernels need CUDA; use torch or compile"),
        own.get(kernel, (False, "")),
        _in_compiled_blocks(kernel, job),
        *_no_compiled(kernel, args, job),
        (
            importlib.util.find_spec("liger_kernel") is None,
            "liger-kernel is not installed: pip install 'microtron[liger]'",
        ),
    ]


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every option."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
