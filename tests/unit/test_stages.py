"""Stages of a pipeline: cuts against every possible cut, counts against torch's own schedules."""

import itertools
from types import SimpleNamespace

import pytest
from helpers import build, tiny_args
from torch import nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from microtron.errors import UserError
from microtron.flavors import FLAVORS, flavor
from microtron.model import accounting
from microtron.parallel.stages import STAGES_A_RANK, module_names, split, stage_count
from microtron.parse import parse


def flops(args, seq_len, layers):
    """Training FLOPs a token of a stage."""
    own = sum(sum(accounting.layer_flops(args, i, seq_len).values()) for i in layers)
    head = 6 * args.dim * args.vocab_size
    return own + head * (args.n_layers - 1 in layers)


def held(args, layers):
    """Parameters of a stage, counted on modules (the last norm left out)."""
    model = build(args)
    parts = [model.layers[str(i)] for i in layers]
    if 0 in layers:
        parts += [p for p in (model.tok_embeddings, model.pos_embeddings) if p is not None]
    parts += [model.output] if args.n_layers - 1 in layers else []
    return sum(p.numel() for part in parts for p in part.parameters())


def every_cut(layers, stages):
    """All ways to cut so many layers into non-empty runs."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]


LEARNED = {"positions": "learned", "max_positions": 900, "norm": "layer"}
SHAPES = {
    "head and embedding small": {},
    "head of some layers": {"vocab_size": 1500},
    "head dearer than all layers": {"vocab_size": 20000},
    "learned positions": LEARNED,
    "windows": {"window": 1, "window_pattern": "SSSL"},
    "full layers dear": {"window": 1, "window_pattern": "SSLL", "num_experts": 0, "hidden_dim": 8},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers, stages", [(1, 1), (4, 2), (5, 5), (7, 3), (8, 4), (9, 2)])
def test_no_cut_is_better(shape, layers, stages):
    args, seq_len = tiny_args(**SHAPES[shape], n_layers=layers), 512
    each = {}

    def badness(cut):
        for stage in cut:
            if stage not in each:
                each[stage] = (flops(args, seq_len, stage), held(args, stage))
        costs, parameters = zip(*(each[stage] for stage in cut), strict=True)
        return max(costs), max(parameters), sum(c**2 for c in costs)

    found = split(args, seq_len, stages)
    best = min(badness(cut) for cut in every_cut(layers, stages))
    assert badness(found) == pytest.approx(best, rel=1e-12)
    assert all(found) and [i for stage in found for i in stage] == list(range(layers))


def lengths(args, stages, seq_len=4096):
    """Layers of each stage."""
    return [len(stage) for stage in split(args, seq_len, stages)]


def test_window_layers_weigh_less_than_full_ones():
    """Four of each in a row: dealt by number it would be 4 and 4."""
    args = tiny_args(n_layers=8, window=1, window_pattern="SSSSLLLL")
    assert lengths(args, 2, seq_len=8192) == [6, 2]
    assert lengths(args, 2, seq_len=2) == [4, 4]


def test_the_head_weighs():
    """In gpt-oss-20b it is worth four layers."""
    assert lengths(flavor("gpt_oss_20b"), 2) == [14, 10]
    assert lengths(flavor("gpt_oss_20b"), 24) == [1] * 24


def test_the_embedding_decides_between_equals():
    """Nine equal layers and a head worth 1.9: 4, 3, 2 is as fast."""
    args = tiny_args(n_layers=9, window_pattern="L", num_experts=0, hidden_dim=8)
    layer = sum(accounting.layer_flops(args, 0, 64).values())
    args = args.override({"vocab_size": round(1.9 * layer / 6 / args.dim)})
    assert lengths(args, 3, seq_len=64) == [3, 4, 2]


def test_the_head_decides_between_equals():
    """One dear layer sets the pace; the head's table is as large as two of the cheap layers."""
    args = tiny_args(n_layers=9, window=1, window_pattern="LSSSSSSSS", vocab_size=1000)
    assert lengths(args, 3, seq_len=8192) == [1, 5, 3]


def test_the_position_table_decides_between_equals():
    """A dear last layer sets the pace; the table is as large as two of the cheap layers."""
    shape = {"n_layers": 9, "window": 1, "window_pattern": "SSSSSSSSL"}
    args = tiny_args(**shape)
    assert lengths(args, 3, seq_len=8192) == [4, 4, 1]
    rows = 2 * accounting.count_parameters(args).non_embedding // 9 // args.dim
    args = tiny_args(**shape, positions="learned", max_positions=rows)
    assert lengths(args, 3, seq_len=8192) == [3, 5, 1]


@pytest.mark.parametrize("name", FLAVORS)
def test_flavors_are_cut_as_evenly_as_layers_allow(name):
    args = flavor(name)
    dearest_layer = max(flops(args, 4096, [i]) for i in range(args.n_layers - 1))
    whole = flops(args, 4096, range(args.n_layers))
    for stages in (2, 4):
        most = max(flops(args, 4096, stage) for stage in split(args, 4096, stages))
        assert most < whole / stages + dearest_layer


@pytest.mark.parametrize("stages", [0, 3])
def test_stages_without_layers(stages):
    with pytest.raises(UserError, match=f"{stages} stages cannot share 2 layers"):
        split(tiny_args(), 16, stages)


@pytest.mark.parametrize("learned", [False, True], ids=["rope", "learned"])
def test_module_names_hold_the_whole_model_once(learned):
    args = tiny_args(n_layers=5, **(LEARNED if learned else {}))
    stages = split(args, 16, 3)
    names = [module_names(args, s, s is stages[0], s is stages[-1]) for s in stages]
    assert all(("rope" in own) != learned for own in names)
    assert ("pos_embeddings" in names[0]) == learned
    told = sorted(n for own in names for n in own if n != "rope")
    model = build(args)
    children = [n for n, _ in model.named_children() if n not in ("layers", "rope")]
    assert told == sorted(children + [f"layers.{n}" for n in model.layers])
    assert names[0][0] == "tok_embeddings" and names[-1][-2:] == ["norm", "output"]
    table = "pos_embeddings" if learned else "rope"
    assert module_names(args, range(5), True, True)[:2] == ["tok_embeddings", table]


# -- how many -------------------------------------------------------------------------------------


def torch_accepts(schedule, pp, stages, microbatches=16):
    """Whether torch builds this schedule."""
    cls = schedules.get_schedule_class(schedule)
    style = "v" if schedule == "ZBVZeroBubble" else "loop"
    ranks = generate_stage_to_rank_mapping(pp, stages, style=style)
    own = [
        SimpleNamespace(
            group_size=pp,
            group_rank=0,
            num_stages=stages,
            stage_index=index,
            is_first=index == 0,
            is_last=index == stages - 1,
            has_backward=True,
            submod=nn.Identity(),
        )
        for index, rank in ranks.items()
        if rank == 0
    ]
    several = issubclass(cls, schedules.PipelineScheduleMulti)
    try:
        cls(own if several else own[0], n_microbatches=microbatches, scale_grads=False)
    except ValueError:
        return False
    return several or len(own) == 1


@pytest.mark.parametrize("schedule", STAGES_A_RANK)
@pytest.mark.parametrize("pp", [2, 4])
def test_counts_agree_with_torch(schedule, pp):
    """Of 16 layers, each number a stage: what torch takes we take, and nothing else."""
    default = stage_count(schedule, pp, None, 16)
    assert default == pp * STAGES_A_RANK[schedule] and torch_accepts(schedule, pp, default)
    taken = 0
    for layers in range(1, 17):
        stages = -(-16 // layers)
        fits = stages % pp == 0 and torch_accepts(schedule, pp, stages)
        if fits:
            assert stage_count(schedule, pp, layers, 16) == stages
            taken += 1
        else:
            with pytest.raises(UserError, match=f"layers_per_stage = {layers} makes {stages} "):
                stage_count(schedule, pp, layers, 16)
    assert taken


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("1f1b", 2, None, 4), "'1f1b' is unknown: choose one of 1F1B, GPipe, LoopedBFS, Inter"),
        (("DualPipeV", 2, None, 4), "'DualPipeV' is unknown"),
        (("1F1B", 8, None, 4), "degree = 8 with 1F1B makes 8 stages, more than .*n_layers = 4"),
        (("ZBVZeroBubble", 4, None, 7), "makes 8 stages, more than model.args.n_layers = 7"),
        (("1F1B", 2, 0, 4), "layers_per_stage = 0 cannot work: give a positive number"),
        (("1F1B", 2, 1, 4), "makes 4 stages .*_degree = 2 wants 2 x 1: leave it out"),
        (("ZBVZeroBubble", 2, 2, 4), "makes 2 stages .* wants 2 x 2: leave it out"),
        (("LoopedBFS", 3, 1, 4), "makes 4 stages .* wants a multiple of 3: leave it out"),
    ],
)
def test_refused(arguments, told):
    with pytest.raises(UserError, match=told):
        stage_count(*arguments)


def test_zero_bubble_needs_a_newer_torch(monkeypatch):
    option = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
    monkeypatch.setattr("microtron.check.TORCH", (2, 13))
    parse([option, "--data.mock"])
    monkeypatch.setattr("microtron.check.TORCH", (2, 12))
    with pytest.raises(UserError, match="'ZBVZeroBubble' cannot work: torch below 2.13"):
        parse([option, "--data.mock"])
