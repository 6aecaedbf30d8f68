"""A run that changes its mesh at every checkpoint is the run that never did.

Weights, optimizer state, schedule and data position move through DCP from each layout to the next;
the global batch stays. Each step's loss is compared with one process that was never interrupted.
"""

import json

import pytest
from helpers import rel
from runs import SMALL, contents, run

STEPS = 8
MODEL = ["--model.args.n_kv_heads=2", "--model.args.n_layers=4", "--model.args.num_experts=4"]
BATCH = 8
LAYOUTS = {  # name -> ranks, sequences a data rank, options
    "one": (1, 8, {}),
    "accumulating": (1, 2, {}),
    "fsdp2": (2, 4, {"data_parallel_shard_degree": 2}),
    "ddp2": (2, 4, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}),
    "tp2": (2, 8, {"tensor_parallel_degree": 2}),
    "cp2": (2, 8, {"context_parallel_degree": 2}),
    "ep2": (2, 4, {"expert_parallel_degree": 2}),
    "pp2 interleaved": (
        2,
        8,
        {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"},
    ),
    "pp2 x dp2": (4, 4, {"pipeline_parallel_degree": 2}),
    "ep2 x etp2": (
        4,
        4,
        {
            "tensor_parallel_degree": 2,
            "expert_parallel_degree": 2,
            "expert_tensor_parallel_degree": 2,
        },
    ),
}
CHAINS = [
    ["fsdp2", "tp2", "one", "pp2 x dp2"],
    ["pp2 interleaved", "ep2", "cp2", "accumulating"],
    ["ep2 x etp2", "ddp2", "ep2", "tp2"],
]


def options(corpus, steps):
    return [
        *SMALL,
        *MODEL,
        f"--data.dirs={corpus}",
        f"--training.steps={steps}",
        f"--lr_scheduler.total_steps={STEPS}",
        f"--training.global_batch_size={BATCH}",
        "--optimizer.eps=1e-5",
        "--validation.enable",
        "--validation.freq=2",
        "--validation.val_tokens=500",
        "--validation.local_batch_size=4",
        "--sample.freq=4",
        "--sample.tokens=5",
    ]


@pytest.fixture(scope="module")
def unbroken(tiny_corpus, tmp_path_factory):
    """One process, never interrupted."""
    argv = [*options(tiny_corpus, STEPS), "--training.local_batch_size=8"]
    return run(argv, tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: " - ".join(chain))
def test_every_leg_goes_on_exactly(chain, unbroken, tiny_corpus, tmp_path):
    for leg, name in enumerate(chain, 1):
        ranks, local_batch, degrees = LAYOUTS[name]
        argv = [
            *options(tiny_corpus, STEPS * leg // len(chain)),
            f"--training.local_batch_size={local_batch}",
            *(f"--parallelism.{k}={v}" for k, v in degrees.items()),
        ]
        done = run(argv, tmp_path, world_size=ranks)
        if leg > 1:
            assert "resumed from" in done.out, done.told
    ours, truth = done.losses(), unbroken.losses()
    assert ours.keys() == truth.keys() == set(range(1, STEPS + 1))
    for step, loss in truth.items():
        assert ours[step] == pytest.approx(loss, rel=1e-5), step
    tokens = [line["tokens"] for line in done.lines()]
    assert tokens == [line["tokens"] for line in unbroken.lines()]
    loads = [line["expert_load_max_mean"] for line in done.lines()]
    assert loads == [line["expert_load_max_mean"] for line in unbroken.lines()]
    for ours, truth in zip(done.lines("val_loss"), unbroken.lines("val_loss"), strict=True):
        assert ours["val_tokens"] == truth["val_tokens"]
        assert ours["val_loss"] == pytest.approx(truth["val_loss"], rel=1e-5)
        assert ours["val_bpb"] == pytest.approx(truth["val_bpb"], rel=1e-5)
    assert_close_contents(done.step(STEPS), unbroken.step(STEPS))


def assert_close_contents(ours, truth):
    """Weights, both Adam states and every number of two checkpoints."""
    ours, truth = contents(ours), contents(truth)
    assert ours.keys() == truth.keys()
    tensors = 0
    for name, expected in truth.items():
        if name.endswith("time_s"):
            continue
        if hasattr(expected, "shape") and expected.dim():
            assert rel(ours[name], expected) < 1e-4, name
            tensors += 1
        else:
            assert ours[name] == expected, name
    assert tensors > 60


def test_a_sample_is_the_same_on_any_mesh(unbroken, tiny_corpus, tmp_path):
    """Text drawn at step 4, over stages, parts of the vocabulary and parts of the sequence."""
    argv = [*options(tiny_corpus, 4), "--training.local_batch_size=8"]
    degrees = ("pipeline_parallel_degree", "tensor_parallel_degree", "context_parallel_degree")
    for degree in degrees:
        done = run([*argv, f"--parallelism.{degree}=2"], tmp_path / degree, world_size=2)
        samples = [
            out.split("--- sample at step 4 ---")[1].split("---")[0]
            for out in (done.out, unbroken.out)
        ]
        assert samples[0] == samples[1], degree
        assert json.loads((done.step(4) / "microtron.json").read_text())["step"] == 4
