"""Which layouts can run, asked before any process group is built.

A layout is seven degrees. Five span the ranks, in this order of the mesh: pipeline, replicas, data
shards, context, tensor; experts are spread anew over the ranks that data shards, context and tensor
share (TorchTitan's sparse mesh: shards of experts = dp_shard x cp x tp / (ep x etp)).
`problem` says why one cannot run; `check_layout` adds the nearest that can, found by trying all
layouts of the same number of ranks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields, replace

from microtron.accelerator import DEVICE_TYPE

from torchtitan.config import JobConfig

from microtron.config import resolved_args
from microtron.errors import UserError
from microtron.model.args import ModelArgs
from microtron.parallel.stages import stage_count

# Degree -> its option in [parallelism].
OPTIONS = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}
# Schedules whose microbatches come in rounds of one a rank, all rounds equal.
ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")
_SUGGESTED = 3


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. ep and etp use the ranks of dp_shard, cp and tp once more."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def world(self) -> int:
        """Ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def batch(self) -> int:
        """Ranks that read data of their own."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        spans = [f.name for f in fields(self) if f.name not in ("ep", "etp")]
        told = " x ".join(f"{n} {getattr(self, n)}" for n in spans if getattr(self, n) > 1)
        again = [f"{n} {getattr(self, n)}" for n in ("ep", "etp") if getattr(self, n) > 1]
        return ", ".join([told or "1 rank", *again])


def layout_of(job: JobConfig, world_size: int) -> Layout:
    """The layout that [parallelism] names, data_parallel_shard_degree = -1 worked out.

    Raises:
        UserError: a degree is out of range, or they do not make ``world_size`` ranks.
    """
    layout = _named(job, world_size)
    told = _mismatch(layout, job, world_size)
    if told:
        raise UserError(told)
    return layout


def check_layout(job: JobConfig, world_size: int) -> Layout:
    """The layout of a run that can work; sets training.local_batch_size to `local_batch`.

    Raises:
        UserError: it cannot; with the numbers, and the nearest layouts that do work.
    """
    args, layout = resolved_args(job), _named(job, world_size)
    told = _mismatch(layout, job, world_size) or problem(layout, args, job)
    if told is None:
        job.training.local_batch_size = local_batch(layout, job)
        return layout
    near = [f"{_flags(found, job)} ({found})" for found in nearest(layout, args, job, world_size)]
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    raise UserError(told + (f"; nearest that work on {ranks}: {'; '.join(near)}" if near else ""))


def local_batch(layout: Layout, job: JobConfig) -> int:
    """Sequences a rank takes at once: training.local_batch_size, or the most below it that cut the
    global batch into whole micro-batches. So one TOML is the same run on any mesh.
    """
    most, whole = job.training.local_batch_size, job.training.global_batch_size
    if whole < 1 or whole % layout.batch:
        return most
    size = job.parallelism.pipeline_parallel_microbatch_size if layout.pp > 1 else 1
    share = whole // layout.batch
    fitting = [n for n in range(1, most + 1) if share % n == 0 and n % max(1, size) == 0]
    return max(fitting, default=most)


def problem(layout: Layout, args: ModelArgs, job: JobConfig) -> str | None:
    """The first reason why a layout cannot run, with its numbers; None: it can."""
    return next((told for check in CHECKS if (told := check(layout, args, job))), None)


def nearest(layout: Layout, args: ModelArgs, job: JobConfig, world_size: int) -> list[Layout]:
    """Up to three layouts of ``world_size`` ranks that work: first those that need no kind of
    parallelism that was not asked for, then by degrees changed, then by the factors of the change.
    Data shards that were left open (-1) change freely.
    """
    names = [f.name for f in fields(Layout)]
    if job.parallelism.data_parallel_shard_degree == -1:
        names.remove("dp_shard")
    asked = {n: max(1, getattr(layout, n)) for n in names}

    def distance(other: Layout) -> tuple:
        factors = [abs(math.log2(getattr(other, n) / asked[n])) for n in names]
        new = sum(asked[n] == 1 < getattr(other, n) for n in names)
        return new, sum(f > 0 for f in factors), sum(factors), -other.batch, astuple(other)

    found: list[Layout] = []
    for other in sorted(_layouts(world_size), key=distance):
        if found and distance(other)[0] > distance(found[0])[0]:
            break
        if other != layout and problem(other, args, job) is None:
            found.append(other)
            if len(found) == _SUGGESTED:
                break
    return found


def _named(job: JobConfig, world_size: int) -> Layout:
    """The degrees as given; open data shards take the ranks that are left."""
    layout = Layout(**{name: getattr(job.parallelism, o) for name, o in OPTIONS.items()})
    if layout.dp_shard == -1:
        rest = replace(layout, dp_shard=1).world
        layout = replace(layout, dp_shard=max(1, world_size // rest) if rest > 0 else 1)
    return layout


def _mismatch(layout: Layout, job: JobConfig, world_size: int) -> str | None:
    """Why the degrees do not make the ranks."""
    for name in OPTIONS:
        if getattr(layout, name) < 1:
            also = ", or -1 for the ranks that are left" if name == "dp_shard" else ""
            return f"{_told(layout, name)} cannot work: give 1 or more{also}"
    if layout.world == world_size:
        return None
    left_open = job.parallelism.data_parallel_shard_degree == -1
    named = [n for n in list(OPTIONS)[:5] if getattr(layout, n) > 1]
    named = [n for n in named if not (left_open and n == "dp_shard")]
    product = math.prod(getattr(layout, n) for n in named)
    degrees = " x ".join(_told(layout, n) for n in named) or _told(layout, "dp_shard")
    if left_open:
        return (
            f"{degrees} needs a multiple of {product} ranks, this run has {world_size}: start so "
            "many (NGPU), or change the degrees"
        )
    return (
        f"{degrees} makes {product} rank{'s' * (product > 1)}, this run has {world_size}: start so "
        "many (NGPU), or change the degrees"
    )


def _layouts(world_size: int) -> Iterator[Layout]:
    """Every layout of so many ranks that the mesh can express."""
    for degrees in _factorings(world_size, 5):
        dense = Layout(*degrees)
        yield dense
        ranks = dense.dp_shard * dense.cp * dense.tp
        for etp in {1, dense.tp}:
            for ep in _divisors(ranks // etp):
                if ep > 1:
                    yield replace(dense, ep=ep, etp=etp)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write ``number`` as a product of so many factors."""
    if parts == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in _factorings(number // first, parts - 1):
            yield first, *rest


def _told(layout: Layout, name: str) -> str:
    return f"parallelism.{OPTIONS[name]} = {getattr(layout, name)}"


def _flags(layout: Layout, job: JobConfig) -> str:
    """What to add to the command line to get this layout."""
    changed = []
    for name, option in OPTIONS.items():
        value, given = getattr(layout, name), getattr(job.parallelism, option)
        if value != given and not (name == "dp_shard" and given == -1):
            changed.append(f"--parallelism.{option}={value}")
    return " ".join(changed)


def _indivisible(layout: Layout, name: str, sizes: dict[str, int]) -> str | None:
    """The first of ``sizes`` (option -> value) that a degree does not divide."""
    degree = getattr(layout, name)
    for option, size in sizes.items():
        if size % degree:
            return f"{_told(layout, name)} does not divide {option} = {size}"
    return None


def _compiled(job: JobConfig) -> bool:
    return job.compile.enable and "model" in job.compile.components


def _lengths(job: JobConfig) -> dict[str, int]:
    """Sequence lengths that the run will see, by option."""
    lengths = {"training.seq_len": job.training.seq_len}
    if job.validation.enable and job.validation.seq_len != -1:
        lengths["validation.seq_len"] = job.validation.seq_len
    return lengths


def _sequence(layout: Layout, args: ModelArgs, job: JobConfig) -> str | None:
    """tp and cp both cut the sequence."""
    names = [n for n in ("tp", "cp") if getattr(layout, n) > 1]
    parts = layout.tp * layout.cp
    for option, length in _lengths(job).items():
        if length % parts:
            cut = " x ".join(_told(layout, n) for n in names)
            remedy = f"give a multiple of {parts}, such as {math.ceil(length / parts) * parts}"
            return f"{cut} does not divide {option} = {length}: {remedy}"
    return None


def _tensor(layout: Layout, args: ModelArgs, job: JobConfig) -> str | None:
    """Heads, vocabulary and feed-forward widths are dealt to the tensor ranks."""
    p, tp = job.parallelism, layout.tp
    if p.enable_async_tensor_parallel:
        told = "parallelism.enable_async_tensor_parallel = true"
        if tp == 1:
            return f"{told} needs parallelism.tensor_parallel_degree above 1: leave it out"
        if not _compiled(job):
            return f"{told} is the compiler's work: set compile.enable = true, or leave it out"
        if DEVICE_TYPE != "cuda":
            return f"{told} needs CUDA: leave it out"
    if tp == 1:
        return None
    sizes = {f"model.args.{n}": getattr(args, n) for n in ("n_heads", "n_kv_heads", "vocab_size")}
    if not args.moe:
        sizes["model.args.hidden_dim"] = args.hidden_dim
    told = _indivisible(layout, "tp", sizes)
    if told or not args.moe:
        return told
    name = "tp" if layout.ep == 1 else "etp"
    told = _indivisible(layout, name, {"model.args.expert_dim": args.expert_dim})
    if told or getattr(layout, name) == 1:
        return told
    part = args.expert_dim // tp
    if args.grouped_experts and part % 8 and DEVICE_TYPE == "cuda":
        return (
            f"{_told(layout, name)} leaves model.args.expert_dim / {tp} = {part} columns of an "
            "expert, and grouped_mm wants a multiple of 8: use model.args.experts_backend = 'loop'"
        )
    return None


def _context(layout: Layout, args: ModelArgs, job: JobConfig) -> str | None:
    """Ulysses (arXiv:2309.14509): while attending, a rank holds all tokens of some heads. Each
    key/value head is whole, or repeated, on a rank.
    """
    if layout.cp == 1:
        return None
    of = f" / tensor_parallel_degree {layout.tp}" if layout.tp > 1 else ""
    heads, kv = args.n_heads // layout.tp, args.n_kv_heads // layout.tp
    told = _indivisible(layout, "cp", {f"model.args.n_heads{of}": heads})
    if told is None and kv % layout.cp and layout.cp % kv:
        told = (
            f"{_told(layout, 'cp')} and model.args.n_kv_heads{of} = {kv}: neither divides the other"
        )
    return told


def _experts(layout: Layout, args: ModelArgs, job: JobConfig) -> str | None:
    """Experts are dealt whole (ep), or in columns too (etp), to the ranks of dp_shard, cp, tp."""
    ep, etp = layout.ep, layout.etp
    if ep == 1:
        if etp > 1:
            return (
                f"{_told(layout, 'etp')} needs parallelism.expert_parallel_degree above 1: leave "
                "it at 1, experts follow tensor_parallel_degree by themselves"
            )
        return None
    if not args.moe:
        return f"{_told(layout, 'ep')} needs experts, but model.args.num_experts = 0: leave it at 1"
    if etp not in (1, layout.tp):
        return f"{_told(layout, 'etp')} is neither 1 nor {_told(layout, 'tp')}"
    told = _indivisible(layout, "ep", {"model.args.num_experts": args.num_experts})
    if told:
        return told
    ranks = layout.dp_shard * layout.cp * layout.tp
    if ranks % (ep * etp):
        with_etp = f" x {_told(layout, 'etp')}" if etp > 1 else ""
        return (
            f"{_told(layout, 'ep')}{with_etp} does not divide the ranks that share experts, "
            f"dp_shard x cp x tp = {layout.dp_shard} x {layout.cp} x {layout.tp} = {ranks}"
        )
    shards = ranks // (ep * etp)
    if shards > 1 and layout.dp_shard * layout.cp == 1:
        return (
            f"{_told(layout, 'ep')} leaves every expert on {shards} ranks of tensor_parallel_degree"
            f" = {layout.tp}, and FSDP alone keeps such copies together: use {ranks // etp}, or "
            "data_parallel_shard_degree above 1"
        )
    if shards * ep > args.num_experts:  # more ranks than experts: FSDP2 cuts their inputs, evenly
        for name, width in (("dim", args.dim), ("expert_dim", args.expert_dim // etp)):
            if width % shards:
                return (
                    f"{_told(layout, 'ep')} leaves {shards} shards for each of model.args."
                    f"num_experts = {args.num_experts}, which do not divide {name} = {width}"
                )
    return None


def _pipeline(layout: Layout, args: ModelArgs, job: JobConfig) -> str | None:
    """Stages, and the microbatches that a schedule accepts (torch's pipelining/schedules.py)."""
    p, pp = job.parallelism, layout.pp
    if pp == 1:
        return None
    told, schedule = _told(layout, "pp"), p.pipeline_parallel_schedule
    try:
        stages = stage_count(schedule, pp, p.pipeline_parallel_layers_per_stage, args.n_layers)
    except UserError as error:
        return str(error)
    if args.tie_embeddings:
        return (
            f"{told} puts the embedding and the head on different ranks, but "
            "model.args.tie_embeddings = true shares their weights: set it to false"
        )
    if schedule.endswith("ZeroBubble") and _compiled(job):
        return (
            f"{told} with {schedule} splits the backward, which compile.enable = true forbids: "
            "choose another pipeline_parallel_schedule, or compile.enable = false"
        )
    batch, size = local_batch(layout, job), p.pipeline_parallel_microbatch_size
    sizes = f"parallelism.pipeline_parallel_microbatch_size = {size}"
    if size < 1:
        return f"{sizes} cannot work: give a number of sequences, 1 or more"
    if batch % size:
        return f"{sizes} does not divide training.local_batch_size = {batch}"
    count = batch // size
    counted = (
        f"{told} with {schedule} wants {{}} microbatches, but training.local_batch_size / "
        f"pipeline_parallel_microbatch_size = {batch} / {size} = {count}: "
        "use local_batch_size = {}"
    )
    if schedule == "1F1B" and count < stages:
        return counted.format(f"{stages} or more", stages * size)
    rounds = max(1, count // pp)
    if schedule in ROUNDS and count % rounds:
        return counted.format(f"a multiple of {rounds}", rounds * pp * size)
    return None


def _data(layout: Layout, args: ModelArgs, job: JobConfig) -> str | None:
    """The global batch is whole micro-batches on each rank that reads data."""
    if job.training.enable_cpu_offload and layout.dp_shard * layout.cp == 1:
        return (
            "training.enable_cpu_offload = true is FSDP's work, but data_parallel_shard_degree x "
            "context_parallel_degree = 1 x 1: leave it out, or shard over 2 ranks or more"
        )
    whole, ranks = job.training.global_batch_size, layout.batch
    if whole > 0 and whole % (local_batch(layout, job) * ranks):
        told = f"training.global_batch_size = {whole} is not a multiple of the data ranks = {ranks}"
        return f"{told}: use {max(1, whole // ranks) * ranks}"
    return None


CHECKS: tuple[Callable[[Layout, ModelArgs, JobConfig], str | None], ...] = (
    _experts,
    _tensor,
    _context,
    _sequence,
    _pipeline,
    _data,
)
