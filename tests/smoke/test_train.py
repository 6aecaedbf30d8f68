"""A run does what its TOML says; each option is told from its effect."""

import json
import math

import pytest
import tomli
import torch
from runs import SMALL, assert_same_contents, contents, run

STEPS = ["--training.steps=6", "--checkpoint.interval=3"]
EVAL = ["--validation.enable", "--validation.freq=3", "--validation.local_batch_size=4"]


@pytest.fixture(scope="module")
def data(tiny_corpus):
    return [f"--data.dirs={tiny_corpus}"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    argv = [
        *SMALL,
        *STEPS,
        *EVAL,
        *data,
        "--sample.freq=3",
        "--sample.prompt=line",
        "--sample.tokens=12",
    ]
    return run(argv, tmp_path_factory.mktemp("plain"))


def test_outputs_of_a_run(plain, data):
    lines = plain.lines()
    assert [e["step"] for e in lines] == list(range(1, 7))
    wanted = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tps",
        "mfu",
        "tflops",
        "memory_gib",
        "time_s",
        "expert_load_max_mean",
        "expert_entropy",
        "dead_experts",
    }
    assert all(wanted <= e.keys() for e in lines)
    assert abs(lines[0]["loss"] - math.log(264)) < 0.1
    assert lines[-1]["tokens"] == 6 * 4 * 16 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[1]["lr"] == pytest.approx(1e-2)
    validated = plain.lines("val_loss")
    assert [e["step"] for e in validated] == [3, 6]
    for entry in validated:
        # Byte tokens: a token is a byte, but for the separators.
        assert entry["val_bpb"] == pytest.approx(entry["val_loss"] / math.log(2), rel=0.01)
    assert plain.out.count("--- sample at step") == 2 and "\nline" in plain.out
    assert {p.name for p in (plain.dump / "checkpoint").iterdir()} == {"step-3", "step-6"}
    assert "step 6/6" in plain.out and "done: step 6" in plain.out


def test_the_written_config_runs_again_to_the_same_numbers(plain, tmp_path):
    config = tomli.loads((plain.dump / "config.toml").read_text())
    assert config["model"]["args"]["dim"] == 16 and config["training"]["steps"] == 6
    again = run([f"--job.config_file={plain.dump / 'config.toml'}"], tmp_path)
    assert again.losses() == plain.losses()
    assert_same_contents(again.step(6), plain.step(6))


def test_validation_and_samples_leave_training_alone(plain, tmp_path, data):
    without = run([*SMALL, *STEPS, *data], tmp_path)
    assert without.losses() == plain.losses()
    loads = [[e["expert_load_max_mean"] for e in r.lines()] for r in (without, plain)]
    assert loads[0] == loads[1]
    assert_same_contents(without.step(6), plain.step(6))


@pytest.mark.parametrize("mode", ["full", "selective", "op"])
def test_activation_checkpointing_changes_nothing(plain, tmp_path, data, mode):
    options = (
        ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op"]
        if mode == "op"
        else [f"--activation_checkpoint.mode={mode}"]
    )
    done = run([*SMALL, *STEPS, *data, *options], tmp_path)
    assert done.losses() == plain.losses()
    for mine, theirs in zip(done.lines(), plain.lines(), strict=True):
        assert mine["expert_load_max_mean"] == theirs["expert_load_max_mean"]
        assert mine["grad_norm"] == theirs["grad_norm"]
    assert_same_contents(done.step(6), plain.step(6))


def test_gradient_accumulation_is_the_same_step(plain, tmp_path, data):
    micro = run(
        [*SMALL, *STEPS, *data, "--training.local_batch_size=1", "--training.global_batch_size=4"],
        tmp_path,
    )
    for step, loss in plain.losses().items():
        assert micro.losses()[step] == pytest.approx(loss, rel=1e-5)
    whole, parts = contents(plain.step(3)), contents(micro.step(3))
    for name, tensor in whole.items():
        if name.startswith("/layers") and tensor.dim() > 1:
            assert (parts[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert [e["expert_load_max_mean"] for e in micro.lines()] == [
        e["expert_load_max_mean"] for e in plain.lines()
    ]


def test_val_target_stops_the_run(tmp_path, data):
    argv = [*SMALL, *EVAL, *data, "--training.steps=40", "--validation.val_target=5.3"]
    done = run(argv, tmp_path)
    assert done.lines("val_loss")[-1]["val_loss"] <= 5.3
    last = done.lines("val_loss")[-1]["step"]
    assert last < 40 and f"reached the target 5.3: step {last}" in done.out
    assert (done.step(last) / ".metadata").exists()
    assert "tokens" in done.out.splitlines()[-1] and " s)" in done.out.splitlines()[-1]


@pytest.mark.parametrize("balance", ["aux_loss", "bias", "none"])
def test_balancing_modes(tmp_path, data, balance):
    done = run(
        [
            *SMALL,
            *data,
            "--training.steps=12",
            f"--model.args.load_balance={balance}",
            "--model.args.router_z_loss_coef=1e-3",
        ],
        tmp_path,
    )
    state = contents(done.step(12))
    biased = [v for k, v in state.items() if k.endswith("expert_bias")]
    assert bool(biased) == (balance == "bias")
    assert all(b.abs().sum() > 0 for b in biased)
    shares = [v for k, v in state.items() if k.startswith("/layers") and k.endswith("fractions")]
    assert len(shares) == 2 and all(s.sum() == pytest.approx(1.0) for s in shares)


def test_mock_data_dense_model_and_document_masks(tmp_path, data):
    run([*SMALL, *STEPS, "--data.mock"], tmp_path / "mock")
    dense = run(
        [*SMALL, *STEPS, *EVAL, *data, "--model.args.num_experts=0", "--model.args.hidden_dim=32"],
        tmp_path / "dense",
    )
    assert "expert_load_max_mean" not in dense.lines()[0]
    masked = run([*SMALL, *STEPS, *EVAL, *data, "--data.document_mask"], tmp_path / "masked")
    assert masked.losses().keys() == dense.losses().keys()


def test_tensorboard_and_traces_by_option(tmp_path, data):
    done = run(
        [
            *SMALL,
            *STEPS,
            *data,
            "--metrics.enable_tensorboard",
            "--profiling.enable_profiling",
            "--profiling.profile_freq=5",
            "--checkpoint.no-enable",
        ],
        tmp_path,
    )
    assert list((done.dump / "tb").rglob("events.out.tfevents*"))
    traces = list((done.dump / "profile_traces").rglob("*trace.json"))
    assert traces and "traceEvents" in json.loads(traces[0].read_text())
    assert not (done.dump / "checkpoint").exists()


def test_initial_load_path_takes_the_weights_alone(plain, tmp_path, data):
    done = run([*SMALL, *STEPS, *data, f"--checkpoint.initial_load_path={plain.step(6)}"], tmp_path)
    assert done.losses()[1] < plain.losses()[1] - 0.1
    assert list(done.losses()) == list(range(1, 7))
    assert "started from the weights" in done.out


def test_two_ranks_train_as_one(plain, tmp_path, data):
    both = run(
        [*SMALL, *STEPS, *EVAL, *data, "--training.local_batch_size=2"], tmp_path, world_size=2
    )
    for step, loss in plain.losses().items():
        assert both.losses()[step] == pytest.approx(loss, rel=1e-5)
    for mine, theirs in zip(both.lines(), plain.lines(), strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["tokens"] == theirs["tokens"]
        assert mine["expert_load_max_mean"] == theirs["expert_load_max_mean"]
    assert both.lines("val_loss")[0]["val_tokens"] == plain.lines("val_loss")[0]["val_tokens"]
    assert both.lines("val_loss")[0]["val_loss"] == pytest.approx(
        plain.lines("val_loss")[0]["val_loss"], rel=1e-5
    )


def test_resume_on_another_number_of_ranks(plain, tmp_path, data):
    half = ["--training.local_batch_size=2"]
    run(
        [*SMALL, *data, *half, "--training.steps=3", "--lr_scheduler.total_steps=6"],
        tmp_path,
        world_size=2,
    )
    rest = run([*SMALL, *STEPS, *data, "--lr_scheduler.total_steps=6"], tmp_path)
    for step, loss in plain.losses().items():
        assert rest.losses()[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_compiled_blocks_train_the_same(plain, tmp_path, data, mode):
    argv = [
        *SMALL,
        *STEPS,
        *EVAL,
        *data,
        "--compile.enable",
        f"--activation_checkpoint.mode={mode}",
    ]
    done = run(argv, tmp_path)
    for step, loss in plain.losses().items():
        assert done.losses()[step] == pytest.approx(loss, rel=1e-4)
    assert torch.isfinite(torch.tensor(list(done.losses().values()))).all()
    assert [e["expert_load_max_mean"] for e in done.lines()] == [
        e["expert_load_max_mean"] for e in plain.lines()
    ]


def test_a_missing_dataset_is_prepared_on_first_use(plain, tmp_path, tiny_corpus):
    options = [
        *SMALL,
        *STEPS,
        f"--data.dirs={tmp_path / 'new'}",
        f"--data.source=text:{tiny_corpus.parent}/*.txt",
    ]
    first = run(options, tmp_path / "a")
    assert "preparing" in first.out and first.losses() == plain.losses()
    second = run(options, tmp_path / "b")
    assert "preparing" not in second.out and second.losses() == plain.losses()
