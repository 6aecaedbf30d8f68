"""Bytes on a rank: what stays for the whole run (parameters, optimizer, gradients) and what comes
and goes within a step (gathered weights, activations, the loss's chunk).

Parameters are told one by one, so the sum is exact (`dryrun.py` holds it against the real model,
spread over a pretended cluster). Activations are in `activations.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from microtron.model.args import ModelArgs
from microtron.scaling.activations import boundary_bytes, end_bytes, kept_bytes, recomputed_bytes
from microtron.scaling.plan import Place, Plan, Stage

FP32 = 4


@dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    Attributes:
        split: dimension spread over tp (over etp for experts), or None: whole on each.
        expert: its first dimension is the experts, spread over ep.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    expert: bool = False


def block_weights(args: ModelArgs, layer: int) -> Iterator[Weight]:
    """The parameters of a layer (`model/attention.py`, `moe.py`, `mlp.py`; splits: `parallel/tp.py`
    and `ep.py`).
    """
    q, kv, dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.dim
    at = f"layers.{layer}."
    for norm in ("attention_norm", "ffn_norm"):
        yield from _norm(args, at + norm)
    for name, width in (("wq", q), ("wk", kv), ("wv", kv)):
        yield from _linear(f"{at}attention.{name}", width, dim, args.attention_bias, 0)
    yield from _linear(f"{at}attention.wo", dim, q, args.attention_bias, 1)
    if args.sinks:
        yield Weight(f"{at}attention.sinks", (args.n_heads,), 0)
    if args.qk_norm:
        for norm in ("q_norm", "k_norm"):
            yield Weight(f"{at}attention.{norm}.weight", (args.head_dim,))
    if not args.moe:
        width = args.hidden_dim
        gated = args.activation != "gelu"
        name, out = ("gate_up", 2 * width) if gated else ("up", width)
        yield from _linear(f"{at}feed_forward.{name}", out, dim, args.mlp_bias, 0)
        yield from _linear(f"{at}feed_forward.down", dim, width, args.mlp_bias, 1)
        return
    experts, width, at = args.num_experts, args.expert_dim, at + "moe."
    yield from _linear(f"{at}router.gate", experts, dim, True, None)
    yield Weight(f"{at}experts.gate_up", (experts, dim, 2 * width), 2, True)
    yield Weight(f"{at}experts.down", (experts, width, dim), 1, True)
    if args.mlp_bias:
        yield Weight(f"{at}experts.gate_up_bias", (experts, 2 * width), 1, True)
        yield Weight(f"{at}experts.down_bias", (experts, dim), None, True)


def _linear(name: str, out: int, inward: int, bias: bool, split: int | None) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (out, inward), split)
    if bias:
        yield Weight(f"{name}.bias", (out,), 0 if split == 0 else None)


def _norm(args: ModelArgs, name: str) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (args.dim,))
    if args.norm == "layer":
        yield Weight(f"{name}.bias", (args.dim,))


def head_weights(args: ModelArgs) -> list[Weight]:
    """The last norm and the head, which FSDP2 wraps together."""
    norm = list(_norm(args, "norm"))
    return norm + ([] if args.tie_embeddings else [Weight("output.weight", _table(args), 0)])


def _table(args: ModelArgs) -> tuple[int, int]:
    return args.vocab_size, args.dim


def wrapped_groups(args: ModelArgs, stage: Stage) -> list[list[Weight]]:
    """The stage's parameters as FSDP2 gathers them: embeddings, blocks, last norm with head."""
    tables = [Weight("tok_embeddings.weight", _table(args), 0)]
    if args.max_positions:
        tables.append(Weight("pos_embeddings.weight", (args.max_positions, args.dim)))
    groups = [tables] if stage.first else []
    groups += [list(block_weights(args, layer)) for layer in stage.layers]
    return groups + ([head_weights(args)] if stage.last else [])


def part(size: int, ranks: int, rank: int) -> int:
    """Rows of the rank's part: torch's chunks are ceil(size / ranks), the last may be short."""
    chunk = -(-size // ranks)
    return max(0, min(chunk, size - rank * chunk))


def gathered_shape(plan: Plan, weight: Weight, place: Place) -> list[int]:
    """Its shape on a rank while it computes: split by tp, ep and etp, whole over FSDP."""
    shape = list(weight.shape)
    if weight.expert:
        shape[0] = part(shape[0], plan.layout.ep, place.ep)
        if weight.split is not None:
            shape[weight.split] = part(shape[weight.split], plan.expert_split, place.etp)
    elif weight.split is not None:
        shape[weight.split] = part(shape[weight.split], plan.layout.tp, place.tp)
    return shape


def fsdp_dim(plan: Plan, weight: Weight) -> int:
    """The dimension that FSDP2 cuts: rows; of experts the width, where the ranks outnumber them."""
    outnumbered = plan.layout.ep * plan.efsdp > plan.args.num_experts
    return 1 if weight.expert and plan.layout.ep > 1 and outnumbered else 0


def local_shape(plan: Plan, weight: Weight, place: Place) -> list[int]:
    """Its shape on a rank between steps."""
    shape = gathered_shape(plan, weight, place)
    ranks, rank = plan.fsdp, place.fsdp
    if weight.expert and plan.layout.ep > 1 and plan.fsdp > 1:
        ranks, rank = plan.efsdp, place.efsdp
    dim = fsdp_dim(plan, weight)
    shape[dim] = part(shape[dim], ranks, rank)
    return shape


def numel(shape: list[int]) -> int:
    """Numbers in a tensor of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def local_parameters(plan: Plan, rank: int) -> dict[str, int]:
    """Numbers of each parameter that a rank keeps."""
    place = plan.place(rank)
    return {
        weight.name: numel(local_shape(plan, weight, place))
        for stage in plan.stages_of(place.pp)
        for group in wrapped_groups(plan.args, stage)
        for weight in group
    }


def gathered_numel(plan: Plan, rank: int) -> int:
    """Numbers of a rank's parameters while they compute: whole over FSDP."""
    return sum(_group_sizes(plan, plan.place(rank)))


def _group_sizes(plan: Plan, place: Place) -> list[int]:
    return [
        sum(numel(gathered_shape(plan, weight, place)) for weight in group)
        for stage in plan.stages_of(place.pp)
        for group in wrapped_groups(plan.args, stage)
    ]


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank, by use. ``peak`` is the larger of two moments: the loss at the end of the
    forward, and the backward of the largest block.
    """

    rank: int
    parameters: int
    optimizer: int
    gradients: int
    summed_gradients: int
    gathered_weights: int
    gathered_gradients: int
    activations: int
    recomputed: int
    loss: int

    @property
    def static(self) -> int:
        """What stays between steps, gradients counted with it."""
        return self.parameters + self.optimizer + self.gradients

    @property
    def peak(self) -> int:
        """The most at once."""
        backward = self.recomputed + self.gathered_gradients
        held = self.summed_gradients + self.gathered_weights + self.activations
        return self.static + held + max(self.loss, backward)


def memory_of(plan: Plan, rank: int) -> Memory:
    """What a rank needs."""
    place = plan.place(rank)
    stages = plan.stages_of(place.pp)
    count = sum(local_parameters(plan, rank).values())
    groups = _group_sizes(plan, place)
    in_flight = dict(zip((s.index for s in stages), in_flight_of(plan, place.pp), strict=True))
    activations = sum(
        in_flight[s.index] * (kept_bytes(plan, s) + (end_bytes(plan) if s.last else 0))
        + boundary_bytes(plan, s, in_flight[s.index], set(in_flight))
        for s in stages
    )
    again = (recomputed_bytes(plan, *block) for s in stages for block in enumerate(s.layers))
    return Memory(
        rank=rank,
        parameters=FP32 * count,
        optimizer=2 * FP32 * count,
        gradients=FP32 * count,
        summed_gradients=FP32 * sum(groups) if plan.wrapped and plan.layout.pp > 1 else 0,
        gathered_weights=_gathered_weights(plan, groups, stages[0].first, stages[-1].last),
        gathered_gradients=_gathered_gradients(plan, groups),
        activations=activations,
        recomputed=max(again),
        loss=loss_bytes(plan) if any(s.last for s in stages) else 0,
    )


def _gathered_weights(plan: Plan, groups: list[int], first: bool, last: bool) -> int:
    """Compute-dtype copies held at once. FSDP2 gathers a block while the one before computes, and
    by default keeps the last group until backward (parallel/dp.py). ``replicate`` keeps all. Where
    nothing is wrapped, autocast copies the blocks' matrices and keeps them until backward.
    """
    if plan.autocast:
        return plan.width * sum(groups[first : len(groups) - last])
    if plan.fsdp == 1:
        return plan.width * sum(groups) if plan.width < FP32 else 0
    if plan.reshard == "never" or (plan.layout.pp > 1 and plan.reshard == "default"):
        return plan.width * sum(groups)
    kept = groups[-1] if last and plan.reshard == "default" else 0
    return plan.width * (kept + sum(sorted(groups)[-2:]))


def _gathered_gradients(plan: Plan, groups: list[int]) -> int:
    """A block's gradients in compute dtype and, where they are reduced, as one fp32 buffer."""
    return (plan.width + FP32) * max(groups) if plan.wrapped else 0


def loss_bytes(plan: Plan) -> int:
    """While the loss takes a chunk (`model/head.py`): logits, their fp32 copy, log-probabilities
    that become the gradient, its copy in compute dtype; and the head's gradient in fp32.
    """
    args, tp = plan.args, plan.layout.tp
    rows, columns = min(args.loss_chunk_tokens, plan.tokens), -(-args.vocab_size // tp)
    copies = (8 if plan.width == FP32 else 12) + 4 * bool(args.logit_softcap)
    head = FP32 if plan.width == 2 else 0  # the fp32 sum, beside the one that is kept
    return copies * rows * columns + head * columns * args.dim


def in_flight_of(plan: Plan, pp_rank: int) -> list[int]:
    """Microbatches whose activations a pipeline rank holds at most, for each of its stages.

    GPipe and LoopedBFS run all forwards first. 1F1B (arXiv:2006.09503) starts a backward after as
    many forwards as there are stages behind it, itself included. Interleaved schedules
    (arXiv:2104.04473) warm up with (v - 1) rounds and two more for each rank behind; ZB-V
    (arXiv:2401.10241) holds 2 p halves. Orders: torch's pipelining/schedules.py, where a microbatch
    is held until its weight gradients are made.
    """
    pp, m, stages = plan.layout.pp, plan.pipelined, len(plan.stages_of(pp_rank))
    if pp == 1:
        return [1]
    if plan.schedule in ("GPipe", "LoopedBFS"):
        return [m] * stages
    if plan.schedule == "1F1B":
        return [min(m, pp - pp_rank)]
    if plan.schedule == "ZBVZeroBubble":
        down = min(m, 2 * pp - pp_rank - 1)
        return [down, min(m, pp_rank + 1)]
    rounds = max(1, m // pp)
    each = m // rounds
    # Zero bubble warms up with fewer, but puts off as many weight gradients as it saved.
    more = 2 * (pp - 1 - pp_rank) if plan.schedule == "Interleaved1F1B" else pp - 1
    forwards = min((stages - 1) * each + more + 1, stages * m)
    counts = [0] * stages
    for i in range(forwards):
        counts[i // each % stages] += 1
    return counts
