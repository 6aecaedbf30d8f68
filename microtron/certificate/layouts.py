"""What is certified: one small run, and the layouts it is spread over.

The model has every term switched on (sinks, windows, GQA, biases, router and vocabulary z-loss,
Switch loss), and its widths divide by 8. A layout is the options it adds to that run; where these
change the run itself (another model, batch or mask), the single process they are compared with gets
those too.
"""

from dataclasses import dataclass

# One run of 3 steps, in which clipping is at work (gradient norms are 0.4 to 0.9).
#
# Adam divides by sqrt(v) + eps, so with the usual 1e-8 an element whose gradient is nothing but
# rounding moves as far as any other, its sign depending on the layout. Few elements are like that,
# in experts that saw few tokens, but the next steps carry them everywhere. Measured on layouts of
# 2 ranks, the largest errors of weights, and of gradients at steps 2 and 3:
#
#     eps 1e-8    5.7e-5 (layers.1.moe.experts.gate_up_bias)    3.2e-4 (layers.0.attention.sinks)
#     eps 1e-5    3.4e-6 (tok_embeddings.weight)                1.3e-5 (layers.0.attention.wk)
#
# both with the tied head; without it 2.8e-5 and 9.3e-5 against 7e-7 and 3e-6. So 1e-5 leaves a
# factor of 8 below the tolerance that 1e-8 crosses, and is small beside the gradients (6e-4 in the
# mean square). Losses differ by one or two units in the last place, a fifth of their tolerance.
RUN = (
    "--model.args.dim=32",
    "--model.args.n_layers=4",
    "--model.args.n_heads=8",
    "--model.args.n_kv_heads=4",
    "--model.args.head_dim=8",
    "--model.args.vocab_size=128",
    "--model.args.expert_dim=48",
    "--model.args.hidden_dim=96",
    "--model.args.num_experts=8",
    "--model.args.window=8",
    "--model.args.aux_loss_coef=0.02",
    "--model.args.router_z_loss_coef=0.001",
    "--model.args.z_loss=0.0001",
    "--model.args.loss_chunk_tokens=48",
    "--training.steps=3",
    "--training.seq_len=32",
    "--training.global_batch_size=8",
    "--training.max_norm=0.25",
    "--training.mixed_precision_param=float32",
    "--lr_scheduler.warmup_steps=0",
    "--optimizer.lr=0.01",
    "--optimizer.eps=1e-5",
    "--data.mock",
)
DENSE = ("--model.args.num_experts=0",)
# GPT-2's shape with a head of its own, as a pipeline needs; Llama's with its extended RoPE.
GPT2 = (
    *DENSE,
    "--model.args.norm=layer",
    "--model.args.positions=learned",
    "--model.args.max_positions=40",
    "--model.args.activation=gelu",
    "--model.args.sinks=false",
    "--model.args.window_pattern=L",
    "--model.args.n_kv_heads=8",
)
TIED = ("--model.args.tie_embeddings=true",)
LLAMA = (
    *DENSE,
    "--model.args.activation=swiglu",
    "--model.args.sinks=false",
    "--model.args.window_pattern=L",
    "--model.args.attention_bias=false",
    "--model.args.mlp_bias=false",
    "--model.args.rope_scaling=llama3",
    "--model.args.rope_factor=4",
    "--model.args.rope_original_len=512",
    "--model.args.rope_beta_fast=4",
)
DOCUMENTS = ("--data.document_mask", "--data.eot_id=3")
EIGHT_LAYERS = ("--model.args.n_layers=8",)
SHORT = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "cp": "context_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
    "schedule": "pipeline_parallel_schedule",
    "reshard": "fsdp_reshard_after_forward",
}


@dataclass(frozen=True)
class Case:
    """One layout of one run."""

    name: str
    ranks: int
    local_batch: int
    layout: tuple[str, ...] = ()
    """Options of the layout alone."""
    run: tuple[str, ...] = ()
    """Options that change the run, and so the single process as well."""
    needs_torch: tuple[int, int] = (2, 11)

    @property
    def options(self) -> list[str]:
        """What is added to `RUN`."""
        return [*self.run, f"--training.local_batch_size={self.local_batch}", *self.layout]


def case(
    name: str,
    run: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    accumulate: int = 1,
    **degrees: int | str,
) -> Case:
    """A case from degrees by their short names; what is not given is 1."""
    # torch 2.11 cannot delay the weights' part of a backward that passes custom functions, nor send
    # to itself on gloo, as V-shaped schedules do.
    split_backward = str(degrees.get("schedule", "")).endswith("ZeroBubble")
    numbers = {k: v for k, v in degrees.items() if isinstance(v, int)}
    batch = numbers.get("shard", 1) * numbers.get("replicate", 1)
    ranks = batch * numbers.get("tp", 1) * numbers.get("pp", 1) * numbers.get("cp", 1)
    layout = [f"--parallelism.{SHORT[k]}={v}" for k, v in {"shard": 1, **degrees}.items()]
    needs = {"needs_torch": (2, 13)} if split_backward else {}
    return Case(name, ranks, 8 // batch // accumulate, (*layout, *extra), run, **needs)


def all_cases() -> list[Case]:
    """Every layout."""
    full, selective = (f"--activation_checkpoint.mode={m}" for m in ("full", "selective"))
    both = [  # for MoE and for dense
        {"name": "accumulate4", "accumulate": 4},
        {"name": "ac full", "extra": (full,)},
        {"name": "ac selective", "extra": (selective,)},
        {"name": "ddp2", "replicate": 2},
        {"name": "fsdp2", "shard": 2},
        {"name": "fsdp4", "shard": 4},
        {"name": "hsdp 2x2", "replicate": 2, "shard": 2},
        {"name": "tp2", "tp": 2},
        {"name": "tp4", "tp": 4},
        {"name": "tp8", "tp": 8, "run": ("--model.args.n_kv_heads=8",)},
        {"name": "pp2 1F1B", "pp": 2},
        {"name": "pp2 GPipe", "pp": 2, "schedule": "GPipe"},
        {"name": "pp2 LoopedBFS", "pp": 2, "schedule": "LoopedBFS"},
        {"name": "pp2 Interleaved1F1B", "pp": 2, "schedule": "Interleaved1F1B"},
        {"name": "pp2 InterleavedZeroBubble", "pp": 2, "schedule": "InterleavedZeroBubble"},
        {"name": "pp2 ZBVZeroBubble", "pp": 2, "schedule": "ZBVZeroBubble"},
        {"name": "pp4 1F1B", "pp": 4},
        {
            "name": "pp4 Interleaved1F1B",
            "pp": 4,
            "schedule": "Interleaved1F1B",
            "run": EIGHT_LAYERS,
        },
        {"name": "cp2", "cp": 2},
        {"name": "cp4", "cp": 4},
        {"name": "pp2 x dp2", "pp": 2, "shard": 2},
        {"name": "pp2 x tp2", "pp": 2, "tp": 2},
        {"name": "cp2 x tp2", "cp": 2, "tp": 2},
        {"name": "pp2 x dp2 x tp2", "pp": 2, "shard": 2, "tp": 2},
    ]
    moe = [  # for MoE alone
        {"name": "fsdp2 never reshard", "shard": 2, "reshard": "never"},
        {"name": "fsdp2 always reshard", "shard": 2, "reshard": "always"},
        {"name": "fsdp2 accumulate2", "shard": 2, "accumulate": 2},
        {"name": "ddp2 accumulate2", "replicate": 2, "accumulate": 2},
        {
            "name": "hsdp 2x2 x ep2, accumulate2",
            "replicate": 2,
            "shard": 2,
            "ep": 2,
            "accumulate": 2,
        },
        {"name": "ep2", "shard": 2, "ep": 2},
        {"name": "ep4", "shard": 4, "ep": 4},
        {"name": "ep2 x fsdp2", "shard": 4, "ep": 2},
        {"name": "hsdp 2x2 x ep2", "replicate": 2, "shard": 2, "ep": 2},
        {"name": "ep2 on tp2", "tp": 2, "ep": 2},
        {"name": "tp2 x ep2", "tp": 2, "shard": 2, "ep": 2},
        {"name": "tp2 x ep4", "tp": 2, "shard": 2, "ep": 4},
        {"name": "ep2 x etp2", "tp": 2, "shard": 2, "ep": 2, "etp": 2},
        {"name": "cp4, 2 kv heads", "cp": 4, "run": ("--model.args.n_kv_heads=2",)},
        {"name": "sep4", "cp": 4, "ep": 4},
        {"name": "pp2 x ep2", "pp": 2, "shard": 2, "ep": 2},
        {"name": "fsdp2 x cp2 x ep2", "shard": 2, "cp": 2, "ep": 2},
        {"name": "ddp2 x tp2", "replicate": 2, "tp": 2},
        {"name": "pp2 x ddp2", "pp": 2, "replicate": 2},
        {"name": "pp2 x cp2", "pp": 2, "cp": 2},
        {"name": "tp2 documents", "tp": 2, "run": DOCUMENTS},
        {"name": "cp2 documents", "cp": 2, "run": DOCUMENTS},
        {"name": "pp2 documents", "pp": 2, "run": DOCUMENTS},
        {"name": "accumulate2 x tp2", "tp": 2, "accumulate": 2},
        {"name": "ac full x pp2 x ep2", "pp": 2, "shard": 2, "ep": 2, "extra": (full,)},
        {"name": "ac selective x tp2", "tp": 2, "extra": (selective,)},
        {"name": "ac full x cp2 x tp2", "cp": 2, "tp": 2, "extra": (full,)},
        {"name": "bias balancing x fsdp2", "shard": 2, "run": ("--model.args.load_balance=bias",)},
        {"name": "tied head x tp2", "tp": 2, "run": TIED},
        {"name": "tied head x fsdp2", "shard": 2, "run": TIED},
        {"name": "qk-norm x tp2", "tp": 2, "run": ("--model.args.qk_norm=true",)},
        {"name": "pp2 x fsdp2 x cp2", "pp": 2, "shard": 2, "cp": 2},
        {"name": "hsdp 2x2 x tp2", "replicate": 2, "shard": 2, "tp": 2},
        {"name": "pp2 x tp2 x ep2", "pp": 2, "tp": 2, "ep": 2},
        {"name": "cp2 x tp2 x ep4", "cp": 2, "tp": 2, "ep": 4},
        {"name": "cp2 x ep2 x etp2", "cp": 2, "tp": 2, "ep": 2, "etp": 2},
        {
            "name": "pp2 ZBVZeroBubble x fsdp2 x ep2",
            "pp": 2,
            "shard": 2,
            "ep": 2,
            "schedule": "ZBVZeroBubble",
        },
        {"name": "ac selective x ep2", "shard": 2, "ep": 2, "extra": (selective,)},
        {"name": "softcap x tp2", "tp": 2, "run": ("--model.args.logit_softcap=5",)},
        {
            "name": "bias balancing x ep2 on tp2",
            "tp": 2,
            "ep": 2,
            "run": ("--model.args.load_balance=bias",),
        },
    ]
    shapes = [
        {"name": "gpt2 x fsdp2", "shard": 2, "run": GPT2},
        {"name": "gpt2 x ddp2", "replicate": 2, "run": GPT2},
        {"name": "gpt2 x tp2", "tp": 2, "run": GPT2},
        {"name": "gpt2 x cp2", "cp": 2, "run": GPT2},
        {"name": "gpt2 x cp2 x tp2", "cp": 2, "tp": 2, "run": GPT2},
        {"name": "gpt2 x pp2", "pp": 2, "run": GPT2},
        {"name": "gpt2 documents x cp2", "cp": 2, "run": (*GPT2, *DOCUMENTS)},
        {"name": "gpt2 tied x fsdp2", "shard": 2, "run": (*GPT2, *TIED)},
        {"name": "gpt2 tied x tp2", "tp": 2, "run": (*GPT2, *TIED)},
        {"name": "llama x fsdp2", "shard": 2, "run": LLAMA},
        {"name": "llama x tp2", "tp": 2, "run": LLAMA},
    ]
    cases = [case(**options) for options in both + moe + shapes]
    for options in both:
        name, run = options["name"], options.get("run", ())
        cases.append(case(**{**options, "name": f"{name}, dense", "run": (*run, *DENSE)}))
    return cases
