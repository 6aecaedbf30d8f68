"""A run that starts from a Hugging Face folder is the run that starts from its conversion."""

import os

import pytest
import torch
from exports import family, write_folder
from runs import Run, assert_one_line, run

from microtron import dcp
from microtron.hf.folder import Folder
from microtron.hf.from_hf import from_hf

FEW = [
    "--training.steps=2",
    "--training.seq_len=16",
    "--training.local_batch_size=4",
    "--training.global_batch_size=8",
    "--optimizer.lr=1e-2",
    "--lr_scheduler.warmup_steps=0",
]
TP2_DP2 = ["--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=2"]
PP2 = ["--parallelism.pipeline_parallel_degree=2"]
VOCAB = {"vocab_size": 64}  # a vocabulary that two ranks can share


def started(folder):
    return ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={folder}"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> (options, HF folder, losses of a run from the converted step)."""
    home, found = tmp_path_factory.mktemp("folders"), {}
    for name in ("gpt_oss", "gpt2", "llama"):
        write_folder(home / name, family(name, **VOCAB))
        from_hf(home / name, step := home / f"{name}_step")
        argv = [f"--job.config_file={step / 'train.toml'}", *FEW]
        found[name] = (argv, home / name, run(argv, home / f"{name}_run").losses())
    return found


@pytest.mark.parametrize(
    "name, layout, ranks",
    [
        ("gpt_oss", [], 1),
        ("gpt_oss", TP2_DP2, 4),
        ("gpt_oss", PP2, 2),
        ("gpt2", TP2_DP2, 4),
        ("llama", PP2, 2),
    ],
)
def test_a_folder_starts_the_same_run(tmp_path, folders, name, layout, ranks):
    argv, folder, expected = folders[name]
    done = run([*argv, *layout, *started(folder)], tmp_path, world_size=ranks)
    assert done.losses() == pytest.approx(expected, rel=1e-5)
    assert f"started from the weights in {folder}" in done.out


def test_a_folder_of_another_architecture_is_refused(tmp_path, folders):
    argv, folder, _ = folders["llama"]
    wrong = ["--model.args.n_heads=2", "--model.args.rope_theta=20000", "--model.args.window=7"]
    refused = Run([*argv, *started(folder), *wrong], tmp_path).wait()
    assert refused.code == 1
    assert_one_line(refused.err, str(folder), "n_heads 4 there, 2 here", "rope_theta 150000.0")
    assert "window" not in refused.err  # no layer has one
    refused = Run([*argv, f"--checkpoint.initial_load_path={folder}"], tmp_path).wait()
    assert_one_line(refused.err, str(folder), "add --checkpoint.initial_load_in_hf")
    (broken := tmp_path / "broken").mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    refused = Run([*argv, *started(broken)], tmp_path).wait()
    assert refused.code == 1
    assert_one_line(refused.err, f"{broken} has no model.safetensors")


def ungated():
    """Leaves transformers out of it: the gate has tests of its own."""
    from microtron.hf import to_hf

    plain = to_hf.export
    to_hf.export = lambda *a, **named: plain(*a, **named, check=False)


def test_the_last_step_is_exported_and_can_be_resumed(tmp_path, folders):
    argv, folder, expected = folders["gpt_oss"]
    argv = [*argv, *started(folder), "--checkpoint.last_save_in_hf"]
    done = run(argv, tmp_path, world_size=2, prepare=ungated)
    exported = Folder(done.dump / "hf")
    weights = dcp.read(done.step(2), ["norm.weight", "layers.1.moe.experts.down"])
    assert torch.equal(exported.tensor("model.norm.weight"), weights["norm.weight"])
    down = exported.tensor("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(down, weights["layers.1.moe.experts.down"])

    before = (done.dump / "hf" / "config.json").stat().st_mtime_ns
    again = run(argv, tmp_path, world_size=2, prepare=ungated)
    assert "nothing to do" in again.out
    assert (again.dump / "hf" / "config.json").stat().st_mtime_ns == before
    os.utime(done.dump / "hf" / "config.json", ns=(0, 0))  # an older step's, the newest failed
    again = run(argv, tmp_path, world_size=2, prepare=ungated)
    assert "nothing to do" in again.out
    assert (again.dump / "hf" / "config.json").stat().st_mtime_ns > before
    longer = run([*argv, "--training.steps=3"], tmp_path, prepare=ungated)
    assert "resumed from" in longer.out and list(longer.losses()) == [1, 2, 3]
    last = dcp.read(longer.step(3), ["norm.weight"])["norm.weight"]
    assert torch.equal(Folder(longer.dump / "hf").tensor("model.norm.weight"), last)
    assert longer.losses()[1] == pytest.approx(expected[1], rel=1e-5)


def test_what_cannot_be_exported_is_told_at_the_start(tmp_path, folders):
    argv = [*folders["gpt_oss"][0], "--checkpoint.initial_load_path=", "--model.args.qk_norm=true"]
    refused = Run([*argv, "--checkpoint.last_save_in_hf"], tmp_path).wait()
    assert refused.code == 1 and "step 1" not in refused.out
    assert_one_line(refused.err, "qk_norm = True (False there)")
