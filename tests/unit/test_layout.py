"""Layouts: each impossible one is refused with its numbers, and each remedy works."""

import copy
import functools
import math
import operator
import re

import pytest
from test_stages import torch_accepts

from microtron.config import resolved_args
from microtron.errors import UserError
from microtron.parallel import layout as room
from microtron.parallel.layout import OPTIONS, Layout, check_layout, layout_of, nearest, problem
from microtron.parse import parse

SHORT = {"rep": "dp_replicate", "shard": "dp_shard"} | {n: n for n in OPTIONS}
ARGS = "--model.args."
PIPE = "--parallelism.pipeline_parallel_"


@functools.cache
def debug_run():
    """A parsed run of the debug flavor: 4 layers, 4 heads, 2 kv heads, 4 experts, vocabulary 264,
    seq_len 2048, local batch 8.
    """
    return parse(["--data.mock"])


def value_of(text):
    """What a word of the command line stands for."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def job_of(text=""):
    """The debug run with ``pp=2 --training.steps=3``; the degrees have short names."""
    job = copy.deepcopy(debug_run())
    for word in text.split():
        name, _, value = word.partition("=")
        name = f"parallelism.{OPTIONS[SHORT[name]]}" if name in SHORT else name[2:]
        section, _, key = name.rpartition(".")
        operator.attrgetter(name)(job)  # there is such an option
        setattr(operator.attrgetter(section)(job), key, value_of(value or "true"))
    return job


# Ranks, the run, what the line must say: the option, the number that it collides with, the remedy.
REFUSED = {
    # the product
    "open": (8, "tp=3", ["tensor_parallel_degree = 3 needs a multiple of 3 ranks", "has 8"]),
    "more than there are": (1, "tp=2 pp=2", ["multiple of 4 ranks", "this run has 1"]),
    "closed": (8, "shard=4 tp=4", ["shard_degree = 4 x", "= 4 makes 16 ranks", "has 8"]),
    "idle ranks": (4, "shard=1", ["shard_degree = 1 makes 1 rank, this run has 4"]),
    "zero": (2, "tp=0", ["tensor_parallel_degree = 0 cannot work: give 1 or more"]),
    "negative": (2, "pp=-1", ["pipeline_parallel_degree = -1 cannot work"]),
    "no shards": (2, "shard=0", ["shard_degree = 0 cannot work", "-1 for the ranks that are left"]),
    "shards -2": (2, "shard=-2", ["shard_degree = -2 cannot work", "-1 for the ranks"]),
    # tensor parallel
    "heads": (8, "tp=8", ["tensor_parallel_degree = 8 does not divide model.args.n_heads = 4"]),
    "kv heads": (4, "tp=4", ["degree = 4 does not divide model.args.n_kv_heads = 2"]),
    "vocabulary": (
        2,
        f"tp=2 {ARGS}vocab_size=265",
        ["does not divide model.args.vocab_size = 265"],
    ),
    "sequence": (2, "tp=2 --training.seq_len=15", ["training.seq_len = 15", "such as 16"]),
    "validation": (
        2,
        "tp=2 --validation.seq_len=15 --validation.enable",
        ["validation.seq_len = 15: give a multiple of 2, such as 16"],
    ),
    "dense": (
        2,
        f"tp=2 {ARGS}num_experts=0 {ARGS}hidden_dim=33",
        ["degree = 2 does not divide model.args.hidden_dim = 33"],
    ),
    "experts' width": (2, f"tp=2 {ARGS}expert_dim=33", ["model.args.expert_dim = 33"]),
    "experts' width, etp": (
        4,
        f"tp=2 ep=2 etp=2 {ARGS}expert_dim=33",
        ["expert_tensor_parallel_degree = 2 does not divide model.args.expert_dim = 33"],
    ),
    "async without tp": (
        2,
        "--parallelism.enable_async_tensor_parallel --compile.enable",
        ["enable_async_tensor_parallel = true needs", "degree above 1: leave it out"],
    ),
    "async without compile": (
        2,
        "tp=2 --parallelism.enable_async_tensor_parallel",
        ["enable_async_tensor_parallel = true", "set compile.enable = true"],
    ),
    # context parallel
    "cp heads": (8, "cp=8", ["context_parallel_degree = 8 does not divide model.args.n_heads = 4"]),
    "cp and tp heads": (8, "tp=2 cp=4", ["n_heads / tensor_parallel_degree 2 = 2"]),
    "cp kv heads": (
        4,
        f"cp=4 {ARGS}n_heads=12 {ARGS}n_kv_heads=6",
        ["context_parallel_degree = 4", "n_kv_heads = 6: neither divides the other"],
    ),
    "cp and tp kv heads": (
        4,
        f"cp=2 tp=2 {ARGS}n_heads=12 {ARGS}n_kv_heads=6",
        ["n_kv_heads / tensor_parallel_degree 2 = 3: neither divides"],
    ),
    "cp sequence": (4, "cp=4 --training.seq_len=18", ["training.seq_len = 18", "such as 20"]),
    "cp and tp sequence": (
        4,
        "cp=2 tp=2 --training.seq_len=18",
        ["= 2 x parallelism.context", "training.seq_len = 18: give a multiple of 4"],
    ),
    # expert parallel
    "experts": (8, "ep=8", ["expert_parallel_degree = 8 does not divide", "num_experts = 4"]),
    "dense experts": (
        2,
        f"ep=2 {ARGS}num_experts=0 {ARGS}hidden_dim=32",
        ["expert_parallel_degree = 2 needs experts", "num_experts = 0: leave it at 1"],
    ),
    "ep ranks": (4, "ep=4 rep=2", ["degree = 4 does not divide the ranks", "2 x 1 x 1 = 2"]),
    "ep and etp ranks": (
        2,
        "tp=2 ep=2 etp=2",
        ["= 2 x parallelism.expert_tensor", "1 x 1 x 2 = 2"],
    ),
    "etp alone": (2, "tp=2 etp=2", ["expert_tensor_parallel_degree = 2 needs", "leave it at 1"]),
    "etp not tp": (8, "ep=2 etp=4 tp=2", ["etp", "degree = 4 is neither 1 nor", "degree = 2"][1:]),
    "expert shards": (
        6,
        "ep=2",
        ["expert_parallel_degree = 2 leaves 3 shards", "num_experts = 4", "dim = 128"],
    ),
    "expert shards, width": (
        6,
        f"ep=2 {ARGS}dim=96 {ARGS}expert_dim=128",
        ["leaves 3 shards", "do not divide expert_dim = 128"],
    ),
    # pipeline
    "stages": (8, "pp=8", ["degree = 8 with 1F1B makes 8 stages", "n_layers = 4"]),
    "schedule": (2, f"pp=2 {PIPE}schedule=1f1b", ["'1f1b' is unknown: choose one of 1F1B, GPipe"]),
    "layers a stage": (
        2,
        f"pp=2 {PIPE}layers_per_stage=1",
        ["layers_per_stage = 1 makes 4 stages"],
    ),
    "tied": (
        2,
        f"pp=2 {ARGS}tie_embeddings=true",
        ["degree = 2", "tie_embeddings = true", "false"],
    ),
    "zero bubble compiled": (
        2,
        f"pp=2 {PIPE}schedule=ZBVZeroBubble --compile.enable",
        ["degree = 2 with ZBVZeroBubble splits the backward", "compile.enable = true"],
    ),
    "microbatch 0": (2, f"pp=2 {PIPE}microbatch_size=0", ["microbatch_size = 0 cannot work"]),
    "microbatch": (
        2,
        f"pp=2 {PIPE}microbatch_size=3",
        ["microbatch_size = 3 does not divide training.local_batch_size = 8"],
    ),
    "few microbatches": (
        4,
        f"pp=4 {PIPE}microbatch_size=4",
        ["pipeline_parallel_degree = 4 with 1F1B wants 4 or more", "8 / 4 = 2: use local", "= 16"],
    ),
    "rounds": (
        2,
        f"pp=2 {PIPE}schedule=Interleaved1F1B --training.local_batch_size=5",
        ["degree = 2 with Interleaved1F1B wants a multiple of 2", "5 / 1 = 5", "batch_size = 4"],
    ),
    "rounds, zero bubble": (
        2,
        f"pp=2 {PIPE}schedule=InterleavedZeroBubble --training.local_batch_size=7",
        ["InterleavedZeroBubble wants a multiple of 3", "7 / 1 = 7", "batch_size = 6"],
    ),
    "copies of experts": (
        4,
        "tp=4 ep=2 --model.args.n_heads=4 --model.args.n_kv_heads=4",
        ["expert_parallel_degree = 2", "on 2 ranks of", "tensor_parallel_degree = 4, ", "use 4"],
    ),
    # data parallel
    "global batch": (
        8,
        "--training.global_batch_size=100",
        ["global_batch_size = 100 is not a multiple", "ranks = 8: use 96"],
    ),
    "global batch, replicas": (
        4,
        "rep=2 tp=2 --training.global_batch_size=41",
        ["global_batch_size = 41", "ranks = 2: use 40"],
    ),
}


def refusal(job, world_size):
    """The one line, and the suggestions in it: (flags, layout) each."""
    with pytest.raises(UserError) as refused:
        check_layout(job, world_size)
    told = str(refused.value)
    assert "\n" not in told
    head, _, near = told.partition("; nearest that work on ")
    assert not near or near.startswith(f"{world_size} rank")
    return head, re.findall(r"(--parallelism\S+(?: --parallelism\S+)*) \(([^)]*)\)", near)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_numbers(case):
    world, run, told = REFUSED[case]
    job = job_of(run)
    head, near = refusal(job, world)
    for part in told:
        assert part in head, (part, head)
    for given, promised in near:
        again = job_of(f"{run} {given}")
        assert str(check_layout(again, world)) == promised


def test_at_most_three_suggestions_nearest_first():
    _, near = refusal(job_of("tp=8"), 8)
    assert [shape for _, shape in near] == ["dp_shard 4 x tp 2", "dp_shard 8"]
    assert near[0][0] == "--parallelism.tensor_parallel_degree=2"
    _, near = refusal(job_of("cp=8 ep=8"), 8)  # one degree changed is not enough
    assert near[0] == (
        "--parallelism.context_parallel_degree=4 --parallelism.expert_parallel_degree=4",
        "dp_shard 2 x cp 4, ep 4",
    )
    assert len(near) == 3
    _, near = refusal(job_of("shard=3"), 8)
    assert near[0] == ("--parallelism.data_parallel_shard_degree=8", "dp_shard 8")


def test_no_suggestion_where_nothing_works():
    with pytest.raises(UserError) as refused:
        check_layout(job_of("--training.enable_cpu_offload"), 1)
    assert str(refused.value).endswith("or shard over 2 ranks or more")


@pytest.mark.parametrize("tp, ep, etp", [(8, 1, 1), (8, 2, 8), (8, 2, 1)])
def test_grouped_products_want_columns_by_eight_on_cuda(monkeypatch, tp, ep, etp):
    """gpt_oss_656m over 8: 180 columns of an expert; unless experts are not cut."""
    text = f"tp={tp} ep={ep} etp={etp} --model.flavor=gpt_oss_656m"
    run = job_of(text)
    assert check_layout(run, 16).tp == 8
    monkeypatch.setattr(room, "DEVICE_TYPE", "cuda")
    if etp == 1 and ep > 1:
        assert check_layout(run, 16).tp == 8
        return
    head, near = refusal(run, 16)
    assert "expert_dim / 8 = 180 columns" in head and "experts_backend = 'loop'" in head
    assert near[0][1] == ("dp_shard 2 x tp 8, ep 2" if etp > 1 else "dp_shard 4 x tp 4")
    assert check_layout(job_of(f"{text} --model.args.experts_backend=loop"), 16).tp == 8
    assert check_layout(job_of(f"{text} --model.args.dim=1444"), 16).tp == 8  # auto is loop there


def test_async_tensor_parallel_needs_cuda(monkeypatch):
    run = job_of("tp=2 --parallelism.enable_async_tensor_parallel --compile.enable")
    assert "needs CUDA" in refusal(run, 2)[0]
    monkeypatch.setattr(room, "DEVICE_TYPE", "cuda")
    assert check_layout(run, 2) == Layout(tp=2)


def test_offload_needs_shards():
    run = job_of("rep=2")
    run.training.enable_cpu_offload = True
    head, near = refusal(run, 2)
    assert "enable_cpu_offload = true is FSDP's work" in head and "= 1 x 1" in head
    assert near[0][1] == "dp_shard 2"
    run = job_of("cp=2")
    run.training.enable_cpu_offload = True
    assert check_layout(run, 2) == Layout(cp=2)


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "LoopedBFS", *room.ROUNDS, "ZBVZeroBubble"])
def test_microbatches_agree_with_torch(schedule):
    """What torch's schedule takes we take, and nothing else."""
    job = job_of(f"{PIPE}schedule={schedule} --model.args.n_layers=8")
    args = resolved_args(job)
    seen = set()
    for pp in (2, 3, 4):
        stages = pp if schedule in ("1F1B", "GPipe") else 2 * pp
        for count in range(1, 14):
            job.training.local_batch_size = 2 * count
            job.parallelism.pipeline_parallel_microbatch_size = 2
            ours = problem(Layout(pp=pp), args, job) is None
            assert ours == torch_accepts(schedule, pp, stages, count), (pp, count)
            seen.add(ours)
    assert seen == ({True, False} if schedule in ("1F1B", *room.ROUNDS) else {True})


# -- what a layout is -----------------------------------------------------------------------------


def test_layout_of():
    assert layout_of(job_of(), 6) == Layout(dp_shard=6)
    assert layout_of(job_of("rep=2 tp=2 cp=1"), 16) == Layout(dp_replicate=2, dp_shard=4, tp=2)
    full = layout_of(job_of("rep=2 shard=3 cp=2 tp=2 pp=2 ep=4 etp=2"), 48)
    assert full == Layout(2, 3, 2, 2, 2, 4, 2) and (full.world, full.batch) == (48, 6)
    with pytest.raises(UserError, match="needs a multiple of 3 ranks, this run has 8"):
        layout_of(job_of("tp=3"), 8)


@pytest.mark.parametrize(
    "layout, told",
    [
        (Layout(), "1 rank"),
        (Layout(2, 2, tp=2), "dp_replicate 2 x dp_shard 2 x tp 2"),
        (Layout(cp=8, ep=8), "cp 8, ep 8"),
        (Layout(tp=2, pp=4, ep=2, etp=2), "tp 2 x pp 4, ep 2, etp 2"),
    ],
)
def test_layouts_are_told_by_their_degrees(layout, told):
    assert str(layout) == told


# -- every layout ---------------------------------------------------------------------------------

MODELS = {
    "debug": "",
    "dense": "--model.args.num_experts=0 --model.args.hidden_dim=96",
    "many heads": "--model.args.n_heads=12 --model.args.n_kv_heads=6 --model.args.num_experts=6",
    "656m": "--model.flavor=gpt_oss_656m --training.global_batch_size=256",
    "tied": "--model.args.tie_embeddings=true --training.seq_len=24",
}


def with_layout(job, layout):
    """A copy of the run with these degrees."""
    job = copy.deepcopy(job)
    for name, option in OPTIONS.items():
        setattr(job.parallelism, option, getattr(layout, name))
    return job


def can_run(layout, args, job):
    """The constraints once more, as plain arithmetic."""
    n = layout
    heads, kv, rest = args.n_heads / n.tp, args.n_kv_heads / n.tp, n.dp_shard * n.cp * n.tp
    whole = [heads, kv, args.vocab_size / n.tp, job.training.seq_len / (n.tp * n.cp), heads / n.cp]
    whole += [max(kv, n.cp) / min(kv, n.cp)]
    if args.moe:
        etp = n.tp if n.ep == 1 else n.etp
        shards = rest / (n.ep * n.etp)
        whole += [args.num_experts / n.ep, args.expert_dim / etp, shards]
        if n.ep > 1 and n.dp_shard * n.cp == 1:
            whole += [1 / shards]
        if n.ep > 1 and shards * n.ep > args.num_experts:
            whole += [args.dim / shards, args.expert_dim / etp / shards]
    else:
        whole += [args.hidden_dim / n.tp, 1 / n.ep]
    if job.training.global_batch_size > 0:
        whole += [job.training.global_batch_size / (n.dp_replicate * n.dp_shard)]
    pipe = n.pp == 1 or n.pp <= args.n_layers and n.pp <= 8 and not args.tie_embeddings
    return pipe and n.etp in ((1,) if n.ep == 1 else (1, n.tp)) and all(x % 1 == 0 for x in whole)


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_is_taken_or_refused_in_a_line(model):
    job = job_of(MODELS[model])
    args = resolved_args(job)
    taken = refused = 0
    for world in range(1, 17):
        layouts = list(room._layouts(world))
        assert len(set(layouts)) == len(layouts) and all(n.world == world for n in layouts)
        for layout in layouts:
            told = problem(layout, args, job)
            assert (told is None) == can_run(layout, args, job), (layout, told)
            if told is not None:
                assert "\n" not in told and re.search(r"(= |above )\d", told), told
                refused += 1
            else:
                assert check_layout(with_layout(job, layout), world) == layout
                taken += 1
    assert taken > 40 and refused > 100


@pytest.mark.parametrize("model", ["debug", "dense"])
def test_every_suggestion_works(model):
    job = job_of(MODELS[model])
    args = resolved_args(job)
    for layout in room._layouts(12):
        if problem(layout, args, job) is not None:
            found = nearest(layout, args, with_layout(job, layout), 12)
            assert 1 <= len(found) <= 3 and layout not in found
            assert all(n.world == 12 and problem(n, args, job) is None for n in found)


def test_the_search_sees_every_layout():
    """Counted by hand for 4 ranks: 15 ways to make 4 of five factors, and experts on top."""
    layouts = list(room._layouts(4))
    assert len({(n.dp_replicate, n.dp_shard, n.cp, n.tp, n.pp) for n in layouts}) == 15
    again = {(n.ep, n.etp) for n in layouts if (n.dp_shard, n.tp) == (2, 2)}
    assert again == {(1, 1), (2, 1), (4, 1), (2, 2)}
    assert math.prod(room._divisors(12)) == 1728
