"""A run reduced to the numbers that its cost follows from: shapes, degrees, microbatches, stages.

`memory.py`, `activations.py`, `communication.py` and `floor.py` are arithmetic on a `Plan`; nothing
here needs a device or another process.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from microtron.accelerator import DEVICE_TYPE

from torchtitan.config import JobConfig

from microtron.config import resolved_args
from microtron.kernels import settle
from microtron.model.args import ModelArgs
from microtron.parallel.layout import Layout, check_layout
from microtron.parallel.pp import stages_of
from microtron.parallel.stages import split, stage_count


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds; a run without a pipeline is one stage."""

    index: int
    layers: range
    first: bool
    last: bool


@dataclass(frozen=True)
class Place:
    """Where a rank stands on each mesh."""

    pp: int
    dp_replicate: int
    fsdp: int
    tp: int
    efsdp: int
    ep: int
    etp: int


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        kind: "cuda" or "cpu": which attention and expert bodies run, and what they save.
        width: bytes of a compute-dtype number.
        microbatch: sequences of one forward on one rank.
        pipelined: microbatches that go through the pipeline together.
        passes: how often that is repeated before the optimizer steps (gradient accumulation).
        checkpointing: none, selective or full; ``option`` and ``early_stop`` as
            TorchTitan's options for it.
        by_hand: the functions of [kernels] that run as written for a CPU.
        reshard: default, always or never, as fsdp_reshard_after_forward.
    """

    args: ModelArgs
    layout: Layout
    kind: str
    width: int
    seq_len: int
    microbatch: int
    pipelined: int
    passes: int
    schedule: str
    stages: tuple[Stage, ...]
    checkpointing: str
    option: str
    early_stop: bool
    reshard: str
    compiled: bool
    documents: bool
    by_hand: frozenset[str]

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch between norms and residuals, summed over tp: S/cp of each row."""
        return self.microbatch * self.seq_len // self.layout.cp

    @property
    def own_tokens(self) -> int:
        """Tokens of a microbatch that are this rank's alone (sequence parallel over tp)."""
        return self.tokens // self.layout.tp

    @property
    def step_tokens(self) -> int:
        """Tokens of the global batch."""
        rows = self.microbatch * self.pipelined * self.passes * self.layout.batch
        return rows * self.seq_len

    @property
    def fsdp(self) -> int:
        """Ranks that share a dense parameter."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def efsdp(self) -> int:
        """Ranks that share an expert's parameter."""
        if self.layout.ep == 1:
            return self.fsdp
        return self.fsdp * self.layout.tp // (self.layout.ep * self.layout.etp)

    @property
    def expert_split(self) -> int:
        """Ranks over which an expert's width is split: etp, or tp where there is no ep."""
        return self.layout.tp if self.layout.ep == 1 else self.layout.etp

    @property
    def wrapped(self) -> bool:
        """Whether FSDP2 (or its replicating twin) wraps the blocks, with its mixed precision."""
        return self.fsdp > 1 or self.layout.dp_replicate > 1

    @property
    def autocast(self) -> bool:
        """Whether autocast brings bf16: where nothing is wrapped."""
        return self.width == 2 and not self.wrapped

    @property
    def residual(self) -> int:
        """Bytes of a number of the hidden states between blocks."""
        return 4 if self.autocast else self.width

    def stages_of(self, pp_rank: int) -> list[Stage]:
        """The stages of a pipeline rank, in the order of the model."""
        count = len(self.stages)
        return [self.stages[i] for i in stages_of(pp_rank, self.layout.pp, count, self.schedule)]

    def place(self, rank: int) -> Place:
        """TorchTitan's meshes: (pp, dp_replicate, fsdp, tp) and (pp, dp_replicate, efsdp, ep, etp),
        the last dimension fastest.
        """
        layout = self.layout
        shared = self.fsdp * layout.tp
        inner = rank % shared
        etp = layout.etp if layout.ep > 1 else layout.tp
        return Place(
            pp=rank // (shared * layout.dp_replicate),
            dp_replicate=rank // shared % layout.dp_replicate,
            fsdp=inner // layout.tp,
            tp=inner % layout.tp,
            efsdp=inner // (layout.ep * etp),
            ep=inner // etp % layout.ep,
            etp=inner % etp,
        )

    def telling_ranks(self) -> Iterator[int]:
        """Ranks whose costs differ: the first of each pipeline rank."""
        yield from range(0, self.layout.world, self.layout.world // self.layout.pp)


def plan_of(job: JobConfig, world_size: int, kind: str = DEVICE_TYPE) -> Plan:
    """The plan of a checked job on so many ranks; ``kind`` as in `Plan`.

    Raises:
        UserError: the layout cannot run (see `check_layout`).
    """
    layout, args, p = check_layout(job, world_size), resolved_args(job), job.parallelism
    local = job.training.local_batch_size
    whole = job.training.global_batch_size
    microbatch, stages = local, 1
    if layout.pp > 1:
        microbatch = p.pipeline_parallel_microbatch_size
        stages = stage_count(
            p.pipeline_parallel_schedule,
            layout.pp,
            p.pipeline_parallel_layers_per_stage,
            args.n_layers,
        )
    cuts = split(args, job.training.seq_len, stages)
    return Plan(
        args=args,
        layout=layout,
        kind=kind,
        width=2 if job.training.mixed_precision_param == "bfloat16" else 4,
        seq_len=job.training.seq_len,
        microbatch=microbatch,
        pipelined=local // microbatch,
        passes=max(1, whole // (local * layout.batch)),
        schedule=p.pipeline_parallel_schedule,
        stages=tuple(Stage(i, cut, i == 0, i == stages - 1) for i, cut in enumerate(cuts)),
        checkpointing=job.activation_checkpoint.mode,
        option=job.activation_checkpoint.selective_ac_option,
        early_stop=job.activation_checkpoint.early_stop,
        reshard=p.fsdp_reshard_after_forward,
        compiled=job.compile.enable,
        documents=job.data.document_mask,
        by_hand=frozenset(
            kernel for kernel, body in settle(asdict(job.kernels), kind).items() if body == "cpu"
        ),
    )
