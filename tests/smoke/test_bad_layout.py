"""Layouts that cannot run, through the command line: one line, before any process group is built.

Every constraint is in tests/unit/test_layout.py; here, that a run asks.
"""

import pytest
import torch.distributed as dist
from runs import SMALL, Run, assert_one_line

from microtron import startup, train

P = "--parallelism."
# Ranks, arguments, what the line says.
LAYOUTS = {
    "tensor": (
        8,
        f"{P}tensor_parallel_degree=8",
        ["tensor_parallel_degree = 8", "n_heads = 4", f"{P}tensor_parallel_degree=2 (dp_shard 4 x"],
    ),
    "context": (
        3,
        f"{P}context_parallel_degree=3",
        ["context_parallel_degree = 3", "n_heads = 4", "on 3 ranks", "=1 (dp_shard 3)"],
    ),
    "pipeline": (
        2,
        f"{P}pipeline_parallel_degree=2 {P}pipeline_parallel_schedule=gpipe",
        ["'gpipe'", "choose one of 1F1B, GPipe", f"{P}pipeline_parallel_degree=1 (dp_shard 2)"],
    ),
    "experts": (
        8,
        f"{P}expert_parallel_degree=8",
        ["expert_parallel_degree = 8", "num_experts = 4", "=4 (dp_shard 8, ep 4)"],
    ),
    "ranks": (
        1,
        f"{P}tensor_parallel_degree=2",
        ["tensor_parallel_degree = 2", "has 1: start so many (NGPU)", "=1 (1 rank)"],
    ),
    "shards": (
        4,
        f"{P}data_parallel_shard_degree=3",
        ["data_parallel_shard_degree = 3 makes 3", f"{P}data_parallel_shard_degree=4 (dp_shard 4)"],
    ),
    "batch": (4, "--training.global_batch_size=42", ["= 42", "ranks = 4: use 40"]),
}
# Options of TorchTitan that mean nothing here, why.
LEFT_OUT = {
    "disable_loss_parallel": "computed on shards",
    "pipeline_parallel_first_stage_less_layers=0": "balanced by their cost",
    "pipeline_parallel_last_stage_less_layers=2": "balanced by their cost",
    "module_fqns_per_model_part=a,b": "balanced by their cost",
    "pipeline_parallel_schedule_csv=a.csv": "pipeline_parallel_schedule",
    "context_parallel_load_balancer=ptrr": "Ulysses",
    "context_parallel_rotate_method=alltoall": "Ulysses",
    "expert_parallel_comm_backend=deepep": "leave it out",
    "no_pipeline_parallel_expert_parallel_overlap": "no such option",
}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs `microtron.train` here as rank 0 of many and checks its refusal; no process group is
    built, no folder opened.
    """

    def built(*args, **kwargs):
        pytest.fail("a process group or a folder was built")

    monkeypatch.setattr(dist, "init_process_group", built)
    monkeypatch.setattr(startup, "open_folder", built)

    def check(ranks, argv, told):
        environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": ranks}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
        assert train.main(["--data.mock", *argv]) == 1
        assert_one_line(capsys.readouterr().err, *told)
        assert not dist.is_initialized()

    return check


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(refused, case):
    ranks, arguments, told = LAYOUTS[case]
    refused(ranks, arguments.split(), told)


@pytest.mark.parametrize("option", LEFT_OUT)
def test_options_without_a_meaning(refused, option):
    name = option.split("=")[0].removeprefix("no_")
    refused(2, [P + option], [f"parallelism.{name} = ", LEFT_OUT[option], "leave it out"])


def test_memory_budget_needs_the_compiler(refused):
    argv = ["--activation_checkpoint.mode=memory_budget"]
    refused(1, argv, ["'memory_budget'", "set compile.enable = true, or choose full"])


def test_every_rank_ends(tmp_path):
    """As a person sees it: rank 0 tells, the others follow, nothing is left behind."""
    argv = [*SMALL, "--data.mock", f"{P}tensor_parallel_degree=2"]
    run = Run(argv, tmp_path, world_size=2, prepare=_no_groups).wait()
    assert [rank.exitcode for rank in run.ranks] == [1, 1], run.told
    told = ["tensor_parallel_degree = 2", "model.args.n_kv_heads = 1", "=1 (dp_shard 2)"]
    assert_one_line(run.err, *told)
    assert not run.out and not run.dump.exists()


def _no_groups():
    def built(*args, **kwargs):
        raise AssertionError("a process group was built")

    dist.init_process_group = built
