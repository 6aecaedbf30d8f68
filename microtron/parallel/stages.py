"""How the layers of a model are dealt to the stages of a pipeline.

A pipeline is as fast as its slowest stage. What a stage costs is the training FLOPs of its layers,
where window layers are cheaper than full ones, and of the head for the last stage; `split` finds
the cuts whose dearest stage is cheapest. The embedding is a look-up without FLOPs, so between equal
cuts the parameters decide, embedding and head counted. Pure arithmetic: nothing here knows a
process.
"""

import math
import operator
from collections.abc import Callable

from microtron.errors import UserError
from microtron.model import accounting
from microtron.model.args import ModelArgs

# Schedule, as torch spells it -> stages that a rank holds unless told otherwise.
STAGES_A_RANK = {
    "1F1B": 1,
    "GPipe": 1,
    "LoopedBFS": 2,
    "Interleaved1F1B": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
}
# Those that hold exactly so many.
_FIXED = ("1F1B", "GPipe", "ZBVZeroBubble")


def stage_count(schedule: str, pp: int, layers_per_stage: int | None, n_layers: int) -> int:
    """Stages of the whole pipeline.

    Args:
        schedule: one of `STAGES_A_RANK`.
        pp: ranks of the pipeline.
        layers_per_stage: parallelism.pipeline_parallel_layers_per_stage; None: as many stages as
            the schedule likes best.
        n_layers: layers of the model.

    Raises:
        UserError: there is no such schedule, or these stages do not fit its ranks or the layers.
    """
    if schedule not in STAGES_A_RANK:
        raise UserError(
            f"parallelism.pipeline_parallel_schedule = {schedule!r} is unknown: choose one of "
            f"{', '.join(STAGES_A_RANK)}"
        )
    ours = STAGES_A_RANK[schedule]
    if layers_per_stage is None:
        stages, told = pp * ours, f"parallelism.pipeline_parallel_degree = {pp} with {schedule}"
    else:
        told = f"parallelism.pipeline_parallel_layers_per_stage = {layers_per_stage}"
        if layers_per_stage < 1:
            raise UserError(f"{told} cannot work: give a positive number, or leave it out")
        stages = math.ceil(n_layers / layers_per_stage)
        wrong = stages != pp * ours if schedule in _FIXED else stages % pp
        if wrong:
            wanted = f"{pp} x {ours}" if schedule in _FIXED else f"a multiple of {pp}"
            raise UserError(
                f"{told} makes {stages} stages of model.args.n_layers = {n_layers}, but {schedule} "
                f"on parallelism.pipeline_parallel_degree = {pp} wants {wanted}: leave it out"
            )
    if stages > n_layers:
        raise UserError(
            f"{told} makes {stages} stages, more than model.args.n_layers = {n_layers}: each needs "
            "a layer"
        )
    return stages


def split(args: ModelArgs, seq_len: int, stages: int) -> list[range]:
    """Contiguous layers for each stage, first to last, one or more in each.

    The dearest stage is as cheap as it can be; among such cuts the largest stage holds as few
    parameters as it can, and among those the costs are as even as they can be (least squares).

    Raises:
        UserError: there are more stages than layers.
    """
    count = args.n_layers
    if not 1 <= stages <= count:
        raise UserError(f"{stages} stages cannot share {count} layers: each needs one")
    parts = [accounting.layer_flops(args, layer, seq_len) for layer in range(count)]
    head = accounting.flops_per_token(args, seq_len)["head"]
    counted = accounting.count_parameters(args)
    layer_parameters = (counted.non_embedding - accounting.norm_parameters(args)) // count
    first, last = counted.embedding, args.vocab_size * args.dim

    def flops(start: int, end: int) -> float:
        own = sum(sum(parts[layer].values()) for layer in range(start, end))
        return own + head * (end == count)

    def parameters(start: int, end: int) -> float:
        return (end - start) * layer_parameters + first * (start == 0) + last * (end == count)

    pieces = [(i, j) for i in range(count) for j in range(i + 1, count + 1)]
    cost = {piece: flops(*piece) for piece in pieces}
    most, _ = _cut(count, stages, cost, max)
    held = {piece: parameters(*piece) for piece in pieces if cost[piece] <= most}
    largest, _ = _cut(count, stages, held, max)
    squares = {piece: cost[piece] ** 2 for piece in held if held[piece] <= largest}
    _, ends = _cut(count, stages, squares, operator.add)
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def module_names(args: ModelArgs, layers: range, first: bool, last: bool) -> list[str]:
    """Names of the modules that a stage keeps, as TorchTitan's splitter wants them."""
    assert set(layers) <= set(range(args.n_layers))
    learned = args.positions == "learned"
    names = ["tok_embeddings"] if first else []
    names += ["pos_embeddings"] * (first and learned) + ["rope"] * (not learned)
    names += [f"layers.{layer}" for layer in layers]
    return names + (["norm", "output"] if last else [])


def _cut(
    count: int,
    pieces: int,
    cost: dict[tuple[int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The cheapest way to cut 0 .. count into pieces: its cost, and where each piece ends.

    Dynamic programming: the best cut of the first ``end`` layers into k pieces is the best cut of
    the first ``start`` into k - 1 and one piece more. ``cost`` is of (start, end) and holds the
    pieces that are allowed; ``join`` adds.
    """
    best = {end: (c, [end]) for (start, end), c in cost.items() if start == 0}
    for _ in range(1, pieces):
        longer: dict[int, tuple[float, list[int]]] = {}
        for (start, end), c in cost.items():
            if start in best:
                found = (join(best[start][0], c), [*best[start][1], end])
                longer[end] = min(longer.get(end, found), found)
        best = longer
    return best[count]
