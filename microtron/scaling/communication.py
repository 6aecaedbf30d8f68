"""Bytes that a rank sends in one optimizer step, by kind.

What counts is what must leave a rank on a ring: of a gathered tensor of G bytes over n ranks,
(n - 1)/n G for an all-gather or a reduce-scatter, twice that for an all-reduce; of L local bytes,
(n - 1)/n L for an all-to-all; all of it for a send. Below, N tokens, N' own tokens and M rows mean
what they mean in `activations.py`.

Under full checkpointing a block's forward runs again with all it exchanges; selective checkpointing
keeps the results of reduce-scatters and all-to-alls (`SAVED_OPS`) and repeats gathers alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from microtron.scaling.activations import expert_rows, mode_of
from microtron.scaling.memory import FP32, gathered_shape, local_shape, numel, wrapped_groups
from microtron.scaling.plan import Plan, Stage

INT64 = 8
# kind -> what it is, in the order of the table
KINDS = {
    "fsdp all-gather": "weights before forward and backward",
    "fsdp reduce-scatter": "gradients",
    "dp all-reduce": "gradients over replicas",
    "tp all-gather": "sequence parts before products",
    "tp reduce-scatter": "sums after products",
    "tp all-reduce": "loss, gradients of what is whole on each rank",
    "ep all-to-all": "tokens to experts and back",
    "cp all-to-all": "sequence for heads and back",
    "pp send": "hidden states and their gradients",
    "counts": "expert loads",
}


@dataclass(frozen=True)
class Traffic:
    """One kind over one group of ranks: ``ranks`` of them, ``stride`` apart."""

    kind: str
    sent_bytes: float
    ranks: int
    stride: int


def traffic_of(plan: Plan, rank: int) -> list[Traffic]:
    """What a rank sends in a step, kinds of no bytes left out."""
    layout = plan.layout
    efsdp = (plan.efsdp, layout.ep * layout.etp)
    groups = {"fsdp": (plan.fsdp, layout.tp), "efsdp": efsdp}
    groups |= {"dp": (layout.dp_replicate, plan.fsdp * layout.tp), "tp": (layout.tp, 1)}
    groups |= {"ep": (layout.ep, layout.etp), "cp": (layout.cp, layout.tp)}
    groups |= {"etp": (plan.expert_split, 1), "pp": (layout.pp, layout.world // layout.pp)}
    groups["loss"] = (layout.batch * layout.cp, layout.tp)
    total: dict[tuple[str, int, int], float] = {}
    parts = (_data(plan, rank), _tensor(plan, rank), _blocks(plan, rank), _pipeline(plan, rank))
    for kind, group, size in (item for part in parts for item in part):
        ranks, stride = groups[group]
        share = 1.0 if kind == "pp send" else (ranks - 1) / ranks
        share *= 2 if kind in ("dp all-reduce", "tp all-reduce", "counts") else 1
        key = (kind, ranks, stride)
        total[key] = total.get(key, 0.0) + share * size
    found = [Traffic(kind, size, ranks, n) for (kind, ranks, n), size in total.items() if size]
    return sorted(found, key=lambda t: list(KINDS).index(t.kind))


Items = Iterator[tuple[str, str, float]]  # kind, group, bytes of the whole tensor


def _data(plan: Plan, rank: int) -> Items:
    """FSDP2: each group of parameters is gathered for forward, again for backward where it was
    given up, and its fp32 gradient reduced. A pipeline gathers once and reduces once a step, or,
    told to give up always, once for each microbatch.
    """
    if not plan.wrapped:
        return
    place, piped = plan.place(rank), plan.layout.pp > 1
    for stage in plan.stages_of(place.pp):
        groups = wrapped_groups(plan.args, stage)
        for group in groups:
            last = stage.last and group is groups[-1] and not plan.args.tie_embeddings
            keep = plan.reshard == "never" or plan.reshard == "default" and (piped or last)
            gathers = 1 if keep else plan.pipelined + 1 if piped else 2
            for experts in (False, True):
                own = [w for w in group if (w.expert and plan.layout.ep > 1) == experts]
                whole = sum(numel(gathered_shape(plan, w, place)) for w in own)
                mesh = "efsdp" if experts else "fsdp"
                if plan.fsdp > 1:
                    yield "fsdp all-gather", mesh, plan.passes * gathers * plan.width * whole
                    yield "fsdp reduce-scatter", mesh, plan.passes * FP32 * whole
                local = sum(numel(local_shape(plan, w, place)) for w in own)
                yield "dp all-reduce", "dp", plan.passes * FP32 * local


def _forwards(plan: Plan) -> int:
    """Microbatches that pass a rank in a step."""
    return plan.passes * plan.pipelined


def _blocks(plan: Plan, rank: int) -> Items:
    """What the blocks exchange between norms and products."""
    args, layout = plan.args, plan.layout
    n, e = plan.tokens, plan.width
    hidden, sums = plan.residual * n * args.dim, e * n * args.dim
    heads, kv = args.n_heads // layout.tp, max(args.n_kv_heads // layout.tp, layout.cp)
    across, back = e * n * (heads + 2 * kv) * args.head_dim, e * n * heads * args.head_dim
    tokens, _ = expert_rows(plan)
    sent, returned = (w * tokens * args.top_k * args.dim for w in (plan.residual, e))
    for stage in plan.stages_of(plan.place(rank).pp):
        for position, _ in enumerate(stage.layers):
            mode = mode_of(plan, position)
            gathers = _forwards(plan) * (1 + (mode != "none"))
            others = _forwards(plan) * (1 + (mode == "full"))
            backs = _forwards(plan)
            ends = backs if plan.early_stop else others  # nothing needs a block's very last sum
            # attention: a gather and a sum, each the other's gradient
            yield "tp all-gather", "tp", gathers * hidden + backs * sums
            yield "tp reduce-scatter", "tp", others * sums + backs * hidden
            yield "cp all-to-all", "cp", (others + backs) * (across + back)
            if not args.moe:
                yield "tp all-gather", "tp", gathers * hidden + backs * sums
                yield "tp reduce-scatter", "tp", ends * sums + backs * hidden
                continue
            if plan.expert_split > 1:
                weights, chosen = FP32 * n * args.top_k, INT64 * n * args.top_k
                with_routing = hidden + weights + chosen
                yield "tp all-gather", "etp", gathers * with_routing + backs * sums
                yield "tp reduce-scatter", "etp", ends * sums + backs * (hidden + weights)
            if layout.ep > 1:
                both = (others + backs) * (sent + returned)
                yield "ep all-to-all", "ep", both + others * INT64 * args.num_experts


def _tensor(plan: Plan, rank: int) -> Items:
    """Embedding and head over the vocabulary; what is whole on every tp rank; expert loads."""
    args, place = plan.args, plan.place(rank)
    stages = plan.stages_of(place.pp)
    hidden, times = plan.residual * plan.tokens * args.dim, _forwards(plan)
    for stage in stages:
        if stage.first or stage.last:  # sum out of the embedding; gather into the head
            ends = stage.first + stage.last
            yield "tp reduce-scatter", "tp", times * ends * hidden
            yield "tp all-gather", "tp", times * ends * hidden
        if stage.last:
            yield "tp all-reduce", "tp", times * 3 * FP32 * plan.tokens
        for whole, group in _whole(plan, stage, rank):
            yield "tp all-reduce", group, FP32 * whole
    if args.moe:
        layers = sum(len(s.layers) for s in stages)
        for group in ("loss", "tp"):
            yield "counts", group, INT64 * args.num_experts * layers


def _whole(plan: Plan, stage: Stage, rank: int) -> Iterator[tuple[int, str]]:
    """Numbers of this rank's parameters that tp (of experts: etp) leaves whole, and the group."""
    place = plan.place(rank)
    for weight in (w for group in wrapped_groups(plan.args, stage) for w in group):
        if weight.split is None:
            group = "etp" if weight.expert else "tp"
            yield numel(local_shape(plan, weight, place)), group


def _pipeline(plan: Plan, rank: int) -> Items:
    """Hidden states to the next stage, gradients to the one before, unless it is on this rank."""
    if plan.layout.pp == 1:
        return
    mine = {s.index for s in plan.stages_of(plan.place(rank).pp)}
    hidden = plan.residual * plan.own_tokens * plan.args.dim
    for index in mine:
        sends = (index + 1 < len(plan.stages) and index + 1 not in mine) + (
            index > 0 and index - 1 not in mine
        )
        yield "pp send", "pp", _forwards(plan) * sends * hidden


def bubble(plan: Plan) -> float:
    """Share of a step in which a pipeline rank waits, if all stages take equally long.

    With p ranks, v stages on each, m microbatches, and backward twice a forward:
        GPipe (arXiv:1811.06965), 1F1B (arXiv:2006.09503): (p - 1) / (m + p - 1)
        interleaved (arXiv:2104.04473), looped (arXiv:2211.05953): (p - 1) / (v m + p - 1)
        interleaved zero bubble (arXiv:2401.10241, ZB-H1): weight gradients fill two thirds of it
        ZB-V (the same, section 6): none from 2 p - 1 microbatches on
    """
    p, m = plan.layout.pp, plan.pipelined
    v = len(plan.stages) // p
    if p == 1:
        return 0.0
    if plan.schedule == "ZBVZeroBubble":
        return max(0.0, 1 - m / (2 * p - 1))
    work = v * m * (3 if plan.schedule == "InterleavedZeroBubble" else 1)
    return (p - 1) / (work + p - 1)
