"""The peers of throughput.py at our shape: TorchTitan's own gpt_oss, transformers' GptOss.

Both get our batches, tokens a step, learning rate and clipping. What is configured for them:

* TorchTitan 0.2.2 runs under its own Trainer, with its own loss and balancing: no activation
  checkpointing (its default recomputes), the loss compiled (its blocks have no compile option; its
  FlexAttention is compiled always), YaRN off where our shape has none. Its router's bias, which it
  never fills, is set to zero. Its blocks hold bf16 weights, so its optimizer moves half our bytes.
* transformers: a plain loop with a fused AdamW, what its own Trainer does without the rest of it.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest import mock

from common import one_rank_wrapped, only_rank
from throughput_step import Running, Work

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.models.gpt_oss import GptOssModelArgs
    from transformers import GptOssForCausalLM

    from microtron.model.args import ModelArgs

# attention, experts, weights (bf16; or fp32 under autocast), whole model compiled
TRANSFORMERS = (
    ("eager", "grouped_mm", "bf16", False),
    ("sdpa", "grouped_mm", "bf16", False),
    ("flex_attention", "grouped_mm", "bf16", False),
    ("kernels-community/vllm-flash-attn3", "grouped_mm", "bf16", False),
    ("flex_attention", "eager", "bf16", False),
    ("flex_attention", "batched_mm", "bf16", False),
    ("eager", "grouped_mm", "bf16", True),
    ("flex_attention", "grouped_mm", "bf16", True),
    ("eager", "eager", "fp32", False),
    ("flex_attention", "eager", "fp32", False),
    ("flex_attention", "grouped_mm", "fp32", False),
)


def titan_args(args: "ModelArgs", seq_len: int) -> "GptOssModelArgs":
    """Our shape in TorchTitan's words, the rest as its own flavors have it."""
    import microtron.accelerator  # noqa: F401  (before torchtitan)

    from torchtitan.models.gpt_oss import GptOssModelArgs
    from torchtitan.models.moe import MoEArgs

    return GptOssModelArgs(
        max_seq_len=seq_len,
        vocab_size=args.vocab_size,
        dim=args.dim,
        moe_inter_dim=args.expert_dim,
        n_layers=args.n_layers,
        norm_eps=args.norm_eps,
        moe_args=MoEArgs(
            num_experts=args.num_experts,
            num_shared_experts=0,
            score_func="softmax",
            route_norm=True,
            gate_bias=True,
            score_before_experts=False,
            top_k=args.top_k,
        ),
        swiglu_limit=args.swiglu_limit,
        head_dim=args.head_dim,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        sliding_window_size=args.window,
        original_seq_len=args.rope_original_len,
        rope_theta=args.rope_theta,
        rope_factor=args.rope_factor,
        ntk_alpha=args.rope_beta_slow,
        ntk_beta=args.rope_beta_fast,
    )


def titan_job(work: Work, folder: str) -> "JobConfig":
    """TorchTitan's own JobConfig with our optimizer, clipping and batch."""
    from torchtitan.config import JobConfig

    like, job = work.parsed(), JobConfig()
    job.job.dump_folder = folder
    job.model.name, job.model.flavor = "gpt_oss", "peer"
    job.training.seq_len = work.seq_len
    job.training.local_batch_size = work.rows
    job.training.global_batch_size = work.rows * work.accumulate
    job.training.steps = like.training.steps
    job.training.max_norm = like.training.max_norm
    for field in dataclasses.fields(job.optimizer):
        setattr(job.optimizer, field.name, getattr(like.optimizer, field.name))
    job.lr_scheduler.warmup_steps = like.lr_scheduler.warmup_steps
    job.activation_checkpoint.mode = "none"
    job.compile.enable, job.compile.components = True, ["loss"]
    job.compile.backend = work.backend
    job.metrics.log_freq = 10**9  # nothing but the first step is read back
    return job


@contextlib.contextmanager
def run_torchtitan(work: Work, wrapped: bool) -> Iterator[Running]:
    """TorchTitan's Trainer on its gpt_oss; ``wrapped``: by FSDP2, though over one rank.

    Raises:
        UserError: there is no CUDA device, or it cannot have our shape.
    """
    from microtron.accelerator import DEVICE_TYPE

    from microtron.errors import UserError

    if DEVICE_TYPE != "cuda":
        raise UserError("its attention is FlexAttention alone, which has no backward on a CPU")
    with titan_running(work, wrapped) as running:
        yield running


@contextlib.contextmanager
def titan_running(work: Work, wrapped: bool) -> Iterator[Running]:
    """The same on any device that can."""
    import microtron.accelerator  # noqa: F401  (before torchtitan)

    import torch
    import torch.distributed as dist
    import torchtitan.train as titan
    from torchtitan.models.gpt_oss import get_train_spec

    from microtron.config import resolved_args
    from microtron.errors import UserError
    from microtron.model.accounting import count_parameters

    args = resolved_args(work.parsed())
    spec = dataclasses.replace(
        get_train_spec(),
        model_args={"peer": titan_args(args, work.seq_len)},
        build_tokenizer_fn=lambda job: object(),  # asked for, never used: the mask is causal
        build_dataloader_fn=lambda **unused: work.batches(),
    )
    only_rank()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        find = mock.patch.object(titan.train_spec_module, "get_train_spec", lambda name: spec)
        stack.enter_context(find)
        stack.enter_context(one_rank_wrapped() if wrapped else contextlib.nullcontext())
        stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        trainer = titan.Trainer(titan_job(work, folder))
        model = trainer.model_parts[0]
        count = sum(p.numel() for p in model.parameters())
        if count != (wanted := count_parameters(args).total):
            raise UserError(f"it has {count:,} parameters at our shape, ours {wanted:,}")
        with torch.no_grad():
            for block in model.layers.values():
                block.moe.router.gate.bias.zero_()
        losses = []
        micro_step = trainer.forward_backward_step

        def heard(**given: object) -> torch.Tensor:
            losses.append(micro_step(**given).detach())
            return losses[-1]

        trainer.forward_backward_step = heard
        batches = trainer.batch_generator(trainer.dataloader)

        def step() -> None:
            losses.clear()
            trainer.step += 1
            trainer.train_step(batches)

        yield Running(args, step, lambda: torch.stack(losses).sum().item())
        trainer.close()


def transformers_model(
    args: "ModelArgs", seq_len: int, attention: str, experts: str
) -> "GptOssForCausalLM":
    """transformers' model at our shape, on the default device, its own initial weights."""
    from transformers import GptOssConfig, GptOssForCausalLM

    from microtron.hf.config import to_config

    told = to_config(args, max_positions=seq_len)
    told |= {"attn_implementation": attention, "use_cache": False}
    model = GptOssForCausalLM(GptOssConfig(**told))
    model.set_experts_implementation(experts)
    return model


@contextlib.contextmanager
def run_transformers(
    work: Work, attention: str, experts: str, weights: str, compiled: bool
) -> Iterator[Running]:
    """transformers' model, trained as its Trainer does: forward with labels, clip, fused AdamW."""
    from microtron.accelerator import DEVICE_TYPE

    import torch

    from microtron.config import resolved_args

    job = work.parsed()
    args, options = resolved_args(job), job.optimizer
    torch.manual_seed(0)
    with torch.device(DEVICE_TYPE):
        model = transformers_model(args, work.seq_len, attention, experts)
    if weights == "bf16":
        for parameter in model.parameters():  # RoPE's frequencies stay fp32, as when it loads
            parameter.data = parameter.data.bfloat16()
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )
    if compiled:
        model.compile(backend=work.backend)
    batches, total = work.batches(), torch.zeros((), device=DEVICE_TYPE)

    def step() -> None:
        total.zero_()
        for _ in range(work.accumulate):
            tokens = next(batches)[0]["input"].to(DEVICE_TYPE, non_blocking=True)
            with torch.autocast(DEVICE_TYPE, torch.bfloat16, enabled=weights == "fp32"):
                loss = model(input_ids=tokens, labels=tokens).loss / work.accumulate
            loss.backward()
            total.add_(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.training.max_norm)
        optimizer.step()
        optimizer.zero_grad()

    yield Running(args, step, total.item)
