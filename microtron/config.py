"""What microtron adds to TorchTitan's JobConfig, and how a TOML and a command line become one.

TorchTitan merges the ``JobConfig`` below into its own (``[job] custom_config_module``). ``[data]``,
``[kernels]``, ``[sample]`` and ``[eval]`` are new; a few of TorchTitan's own sections get more
fields or better defaults here. ``[model.args]`` holds every field of ModelArgs, generated from it.
Values are checked before anything is built, each mistake told in one line (`check.py`). See all
options: ``./run_train.sh --help``.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from microtron.flavors import flavor
from microtron.model.args import ModelArgs


def _optional_fields(cls: type) -> type:
    """A dataclass with the fields of ``cls``, all optional: None keeps the flavor's value."""
    import docstring_parser
    import tyro

    told = {p.arg_name: p.description for p in docstring_parser.parse_from_object(cls).params}
    fields = []
    for f in dataclasses.fields(cls):
        kind = Annotated[f.type | None, tyro.conf.arg(help=told.get(f.name) or "")]
        fields.append((f.name, kind, field(default=None)))
    return dataclasses.make_dataclass("ModelArgsOverrides", fields)


ModelArgsOverrides = _optional_fields(ModelArgs)


@dataclass
class Job:
    dump_folder: str = "outputs/run"
    """Folder of this run: metrics.jsonl, config.toml, checkpoint/step-N, log/."""
    custom_config_module: str = "microtron.config"
    """Always microtron.config."""


@dataclass
class Model:
    name: str = "microtron"
    """Always microtron."""
    flavor: str = "debug"
    """Named size: debug, gpt_oss_656m, gpt_oss_656m_dense, gpt_oss_20b, gpt_oss_120b."""
    hf_assets_path: str = "."
    """Not used yet: tokenizers come with the data."""
    args: ModelArgsOverrides = field(default_factory=ModelArgsOverrides)
    """Any field of the flavor, replaced."""


@dataclass
class Training:
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype; master weights stay fp32. auto: bfloat16 on CUDA, float32 on CPU."""


@dataclass
class Optimizer:
    decay_embeddings: bool = False
    """Also apply weight decay to the embedding."""


@dataclass
class Checkpoint:
    enable: bool = True
    """Save checkpoints and resume from the newest."""
    initial_load_in_hf: bool = False
    """initial_load_path is a Hugging Face folder: gpt-oss, GPT-2 or Llama."""
    last_save_in_hf: bool = False
    """After the last step, export it to hf/ in the run's folder, compared in transformers."""
    last_save_model_only: bool = False
    """Drop the optimizer from the last step: smaller, but it cannot be resumed."""
    keep_latest_k: int = 3
    """Keep the newest k steps, delete older ones; 0 keeps all, 1 is refused."""
    async_mode: Literal["auto", "disabled", "async", "async_with_pinned_mem"] = "auto"
    """Write checkpoints beside training. auto: async on CUDA, disabled on CPU."""


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full", "memory_budget"] = "none"
    """Recompute activations in backward to save memory."""


@dataclass
class Validation:
    seq_len: int = -1
    """Sequence length for validation; -1: training.seq_len."""
    freq: int = 100
    """Validate every so many steps, and after the last one."""
    val_tokens: int = -1
    """Size of the fixed set: the first so many tokens of the validation split; -1: all."""
    val_target: float | None = None
    """Stop the run when the validation loss reaches this."""


@dataclass
class Debug:
    seed: int = 1337
    """Seed of the weights and of the data order."""


@dataclass
class Data:
    dirs: list[str] = field(default_factory=list)
    """Dataset folders made by `microtron prepare` (or with llm.c shards)."""
    weights: list[float] = field(default_factory=list)
    """Share of each folder in the mixture; empty: by equal shares."""
    source: str = ""
    """Where a missing dirs[0] is prepared from: stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB,
    hf:NAME.
    """
    tokenizer: str = "byte"
    """byte, char, gpt2, o200k_harmony, or the path of a tokenizer.json."""
    text_field: str = "text"
    """Field of jsonl, parquet and hf sources that holds the text."""
    val_fraction: float = 0.02
    """Share of the documents that prepare keeps for validation."""
    document_mask: bool = False
    """Keep packed documents apart: no attention across them, positions restart."""
    eot_id: int = -1
    """Token that starts a document; -1: as dataset.json says."""
    mock: bool = False
    """Random tokens in place of data: for speed tests."""
    verify: bool = True
    """Check shards before step 1 (sha256 and token ids once, then remembered)."""
    prefetch: int = 2
    """Batches loaded ahead."""


@dataclass
class Sample:
    freq: int = 0
    """Print a sample every so many steps and at the end; 0: never."""
    prompt: str = "\n"
    """Text to continue."""
    tokens: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int = 50
    """Sample among the k likeliest tokens; 0: all."""


@dataclass
class Kernels:
    """Bodies of a few functions (`kernels.py`). No part of the architecture: a run may change them
    when it resumes.
    """

    norm: Literal["auto", "torch", "cpu", "compile", "liger"] = "auto"
    """RMSNorm and LayerNorm: plain torch, or compiled by itself; RMSNorm also by hand for a CPU, or
    by Liger's kernel (CUDA). auto: the fastest measured."""
    rope: Literal["auto", "torch", "cpu", "compile", "liger"] = "auto"
    """Rotation of queries and keys."""
    swiglu: Literal["auto", "torch", "cpu", "compile", "liger"] = "auto"
    """Between the products of a feed-forward. cpu: only for model.args.activation = clamped_swiglu;
    liger: only for swiglu."""
    loss: Literal["auto", "torch", "cpu", "compile", "liger"] = "auto"
    """Head and cross-entropy: in chunks, these by hand for a CPU or compiled, or Liger's fused
    kernel (CUDA)."""


@dataclass
class Eval:
    hellaswag: str = ""
    """HellaSwag's validation jsonl: asked while training; empty: never."""
    hellaswag_freq: int = 1000
    """Ask every so many steps, and after the last one."""
    hellaswag_examples: int = -1
    """The first so many examples of the file; -1: all."""


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    validation: Validation = field(default_factory=Validation)
    debug: Debug = field(default_factory=Debug)
    data: Data = field(default_factory=Data)
    sample: Sample = field(default_factory=Sample)
    eval: Eval = field(default_factory=Eval)
    kernels: Kernels = field(default_factory=Kernels)


def overrides(job: Any) -> dict[str, Any]:
    """The fields of [model.args] that were given."""
    return {k: v for k, v in dataclasses.asdict(job.model.args).items() if v is not None}


def resolved_args(job: Any) -> ModelArgs:
    """The run's architecture: the flavor with [model.args] taken in.

    Raises:
        UserError: there is no such flavor, or a value cannot work.
    """
    return flavor(job.model.flavor).override(overrides(job))
