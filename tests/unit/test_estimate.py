"""The estimate: formulas against real models, real ranks and torch's own schedules."""

import json
from dataclasses import replace
from pathlib import Path

from microtron.accelerator import DEVICE_TYPE

import pytest
import torch
from tiny_run import DENSE, GPT2, TINY
from torch.distributed.pipelining import schedules

from microtron.cli import main
from microtron.errors import UserError
from microtron.flavors import FLAVORS
from microtron.model import accounting
from microtron.model.model import Transformer
from microtron.parse import parse
from microtron.scaling import dryrun
from microtron.scaling.communication import bubble, traffic_of
from microtron.scaling.devices import DEVICES
from microtron.scaling.estimate import degrees, load
from microtron.scaling.floor import floor_of, stage_flops
from microtron.scaling.memory import in_flight_of, local_parameters, memory_of, wrapped_groups
from microtron.scaling.plan import Stage, plan_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("train_configs/*.toml"))
SHORT = {
    "ddp": "data_parallel_replicate_degree",
    "fsdp": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "cp": "context_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
    "schedule": "pipeline_parallel_schedule",
}


@pytest.fixture(autouse=True)
def any_torch(monkeypatch):
    """What a schedule costs is counted whichever torch is here to run it."""
    monkeypatch.setattr("microtron.check.TORCH", (2, 13))


def job_of(*options, **degrees):
    """A small run and its ranks."""
    layout = [f"--parallelism.{SHORT[k]}={v}" for k, v in {"fsdp": 1, **degrees}.items()]
    ranks = 1
    for name in ("ddp", "fsdp", "tp", "pp", "cp"):
        ranks *= degrees.get(name, 1)
    return parse([*TINY, *options, *layout]), ranks


def plan_for(*options, kind=DEVICE_TYPE, **degrees):
    return plan_of(*job_of(*options, **degrees), kind)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_weights_are_those_of_the_model(flavor):
    args = FLAVORS[flavor]()
    whole = Stage(0, range(args.n_layers), True, True)
    told = {w.name: w.shape for group in wrapped_groups(args, whole) for w in group}
    with torch.device("meta"):
        real = {name: tuple(p.shape) for name, p in Transformer(args).named_parameters()}
    assert told == real


@pytest.mark.parametrize(
    "degrees, options",
    [
        ({"ddp": 2}, ()),
        ({"fsdp": 3}, ("--model.args.dim=40", "--model.args.vocab_size=61")),
        ({"ddp": 2, "fsdp": 2}, (DENSE,)),
        ({"tp": 2, "fsdp": 2}, ("--model.args.qk_norm=true",)),
        ({"tp": 4}, (DENSE, "--model.args.attention_bias=false")),
        ({"cp": 2, "tp": 2}, ()),
        ({"fsdp": 4, "ep": 2}, ()),
        ({"fsdp": 2, "tp": 2, "ep": 2, "etp": 2}, ()),
        ({"fsdp": 2, "tp": 2, "ep": 4}, ()),
        ({"fsdp": 16, "ep": 4}, ()),
        ({"fsdp": 6, "ep": 2}, ()),
        ({"pp": 2, "schedule": "Interleaved1F1B"}, ()),
        ({"pp": 2, "schedule": "ZBVZeroBubble", "fsdp": 2, "ep": 2}, ()),
        ({"pp": 2, "tp": 2, "ddp": 2}, (DENSE, "--compile.enable")),
        ({"fsdp": 2}, ("--model.args.tie_embeddings=true",)),
        ({"fsdp": 2, "tp": 2}, GPT2),
        ({"pp": 2, "cp": 2}, GPT2),
        ({"fsdp": 2, "tp": 2}, (*GPT2, "--model.args.tie_embeddings=true")),
    ],
    ids=str,
)  # fmt: skip
def test_parameters_of_every_rank_are_those_that_the_run_would_spread(degrees, options):
    job, ranks = job_of(*options, **degrees)
    plan = plan_of(job, ranks)
    for rank in range(ranks):
        assert dryrun.rehearse(job, plan, rank) == local_parameters(plan, rank)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_can_be_built(path):
    job = load(path, [], cpu=False)
    plan = plan_of(job, degrees(job), "cuda")
    ranks = dryrun.compare(job, plan)
    assert ranks[0] == 0 and ranks[-1] == plan.layout.world - 1
    fits = max(memory_of(plan, r).peak for r in plan.telling_ranks())
    assert fits < DEVICES["h100"].memory_bytes


def test_a_thousand_ranks_are_rehearsed(monkeypatch):
    job, ranks = job_of(pp=4, fsdp=64, tp=2, ddp=2, ep=8)
    plan = plan_of(job, ranks)
    assert dryrun.compare(job, plan) == [0, 256, 512, 768, 1023]
    monkeypatch.setattr(dryrun, "local_parameters", lambda plan, rank: {"norm.weight": 63})
    with pytest.raises(AssertionError, match="the formula says"):
        dryrun.compare(job, plan)
    assert not torch.distributed.is_initialized()


REAL = ["fsdp2", "tp2, full", "tp2, selective", "cp2", "tp2 x ep2, etp2", "pp2 Interleaved1F1B"]
REAL += ["tp2, gpt2", "cp2, gpt2"]


@pytest.mark.skipif(DEVICE_TYPE != "cpu", reason="these ranks are of a CPU")
@pytest.mark.parametrize("name", REAL)
def test_real_ranks(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import estimate as benchmark

    (case,) = [c for c in benchmark.CASES if c[0] == name]
    for row in benchmark.run(case):
        assert row["parameters_optimizer"]["ratio"] == pytest.approx(1, abs=0.01)
        assert row["activations"]["ratio"] == pytest.approx(1, abs=0.03)
        assert row["gradients"]["ratio"] == 1
        assert row["sent"]
        for kind, pair in row["sent"].items():
            even = 0.05 if "all-to-all" in kind else 0  # experts are not loaded evenly
            few = pytest.approx(pair["measured"], rel=even, abs=32)  # norms, counts of targets
            assert pair["predicted"] == few, kind


@pytest.mark.parametrize("microbatches", [4, 8, 16])
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
@pytest.mark.parametrize("pp", [2, 4])
def test_in_flight_is_what_torchs_order_makes(schedule, pp, microbatches):
    plan = plan_for("--model.args.n_layers=8", pp=pp, schedule=schedule)
    plan = replace(plan, pipelined=microbatches)
    order = object.__new__(schedules.get_schedule_class(schedule))
    order.pp_group_size, order.n_local_stages, order.num_stages = pp, 2, 2 * pp
    order._n_microbatches = microbatches
    order.number_of_rounds = max(1, microbatches // pp)
    order.microbatches_per_round = microbatches // order.number_of_rounds
    for rank in range(pp):
        alive, most = 0, 0
        for action in order._calculate_single_rank_operations(rank):
            kind = action.computation_type.name if action else ""
            alive += (kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"))
            most = max(most, alive)
        assert sum(in_flight_of(plan, rank)) == most


def test_bubbles():
    def of(schedule, m, pp=4):
        plan = plan_for("--model.args.n_layers=8", pp=pp, schedule=schedule)
        return bubble(replace(plan, pipelined=m))

    assert bubble(plan_for()) == 0
    assert of("1F1B", 4) == of("GPipe", 4) == 3 / 7
    assert of("Interleaved1F1B", 8) == of("LoopedBFS", 8) == 3 / 19
    assert of("InterleavedZeroBubble", 8) == 3 / 51
    assert of("ZBVZeroBubble", 8) == 0 and of("ZBVZeroBubble", 4) == pytest.approx(3 / 7)


def test_floor_by_hand():
    device = DEVICES["h100"]
    plan = plan_for("--training.mixed_precision_param=bfloat16", ddp=16, kind="cuda")
    floor = floor_of(plan, 0, device)
    flops = sum(accounting.flops_per_token(plan.args, plan.seq_len).values())
    assert floor.compute == pytest.approx(flops * 8 * 128 / device.flops)
    parameters = accounting.count_parameters(plan.args).total
    assert floor.memory == pytest.approx(parameters * (28 + 3 * 2) / device.memory_bytes_s)
    # 16 ranks, 8 in a node: a ring sends 2 x 15/16 of the gradients, an eighth of it by each port.
    counts = plan.args.num_experts * plan.args.n_layers * 8
    sent = 2 * 15 / 16 * (4 * parameters + counts)
    assert floor.inter_node == pytest.approx(sent / 8 / device.inter_bytes_s)
    assert floor.intra_node == pytest.approx(sent / device.intra_bytes_s)
    assert floor.step == max(floor.compute, floor.memory, floor.intra_node, floor.inter_node)


def test_floor_waits_for_the_pipeline():
    device = DEVICES["h100"]
    one, two = plan_for(kind="cuda"), plan_for(kind="cuda", pp=2)
    whole = floor_of(one, 0, device).compute
    stages = [floor_of(two, rank, device).compute * (1 - bubble(two)) for rank in (0, 1)]
    assert bubble(two) == 1 / 9
    assert sum(stages) == pytest.approx(whole)


def test_full_checkpointing_costs_a_forward_of_the_blocks():
    plan = plan_for()
    (stage,) = plan.stages
    head = accounting.flops_per_token(plan.args, plan.seq_len)["head"]
    once, again = (
        stage_flops(replace(plan, checkpointing=mode), stage) - head for mode in ("none", "full")
    )
    assert again == pytest.approx(4 / 3 * once)


def test_experts_travel_between_nodes_alone():
    """Rows for other nodes take the port, those for this node NVLink."""
    recipe = ROOT / "train_configs/gpt_oss_20b_64gpu.toml"
    job = load(recipe, ["parallelism.expert_parallel_degree=32"], cpu=False)
    plan = plan_of(job, 64, "cuda")
    (traffic,) = (t for t in traffic_of(plan, 0) if t.kind == "ep all-to-all")
    slow, fast = (replace(DEVICES["h100"], intra_bytes_s=x) for x in (1.0, 1e30))
    assert floor_of(plan, 0, slow).intra_node >= traffic.sent_bytes * 7 / 31
    inter = [floor_of(plan, 0, d).inter_node for d in (slow, fast)]
    assert inter[0] == inter[1] >= traffic.sent_bytes * 24 / 31 / fast.inter_bytes_s


def test_command(tmp_path, capsys):
    recipe = str(ROOT / "train_configs/gpt_oss_656m_pp2_dp2_tp2.toml")
    out = tmp_path / "estimate.json"
    assert main(["estimate", recipe, "--device", "h100", "--json", str(out), "--stages"]) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert "8 x H100 SXM: dp_shard 2 x tp 2 x pp 2" in text
    assert "built on the fake backend as rank 0, 4, 7" in text
    assert text.count("at most ") == 4 and "idle for" in text
    assert found["ranks"] == 8 and found["built_as_ranks"] == [0, 4, 7]
    memory = found["by_rank"][0]["memory_bytes"]
    assert memory["static"] == memory["parameters"] + memory["optimizer"] + memory["gradients"]
    assert found["by_rank"][1]["floor_s"]["step"] > 0


def test_command_tells_what_does_not_fit(capsys):
    recipe = str(ROOT / "train_configs/gpt_oss_656m.toml")
    argv = ["estimate", recipe, "--device", "l40s", "--no-dry-run"]
    options = ["--set", "compile.enable=false", "--set", "training.local_batch_size=32"]
    assert main([*argv, *options]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, told",
    [
        (["debug.toml", "--device", "h200x"], "--device h200x is unknown: choose one of a100"),
        (["none.toml"], "cannot read the run's TOML"),
        (["debug.toml", "--set", "training.seq_len"], "not of the form section.key=value"),
        (["debug.toml", "--set", "training.seqlen=3"], "did you mean training.seq_len?"),
        (["debug.toml", "--ngpu", "3", "--set", "parallelism.tensor_parallel_degree=2"], "nearest"),
        (["debug.toml", "--json", "/nowhere/x.json"], "cannot write --json /nowhere/x.json"),
    ],
)
def test_command_refuses_in_one_line(argv, told, capsys):
    path = str(ROOT / "train_configs" / argv[0])
    assert main(["estimate", path, "--no-dry-run", *argv[1:]]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_layout_that_cannot_be_built_is_told_in_one_line(monkeypatch):
    job, ranks = job_of(fsdp=2)
    plan = plan_of(job, ranks)

    def fail(*args):
        raise RuntimeError("no such mesh\nand much more")

    monkeypatch.setattr(dryrun, "parallelize", fail)
    with pytest.raises(
        UserError, match=r"layout dp_shard 2 cannot be built \(rank 1\): no such mesh; "
    ):
        dryrun.rehearse(job, plan, 1)
    assert not torch.distributed.is_initialized()
